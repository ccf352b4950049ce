//! A replica as a server: its directory, its thread, its services.

use crate::catalog::Catalog;
use crate::channel::MESSAGE_BYTES_MAX;
use crate::error::{Error, IoContext};
use crate::raft_log::RaftLog;
use crate::replica::{Handle, Input, ReplicaLoop};
use crate::service::StoreService;
use crate::transport::{KnownPeers, Outbound, TransportService};
use heddle_proto::v1::log_store_server::LogStoreServer;
use heddle_proto::v1::raft_transport_server::RaftTransportServer;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::{Router, TcpIncoming};

/// What a replica is told at start.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// Its id, from 1.
    pub id: u64,
    /// The cluster's id: replicas of another one are refused.
    pub cluster: u64,
    /// Its directory.
    pub dir: PathBuf,
    /// All replicas' addresses, its own included.
    pub peers: BTreeMap<u64, String>,
}

/// What a directory says it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    version: u32,
    cluster: u64,
    replica: u64,
    /// Who voted when the cluster was created: it can't change by a flag.
    voters: Vec<u64>,
    /// Minted with the directory. Peers remember it, so that a directory that was
    /// wiped does not come back under its old id and vote on what it forgot.
    incarnation: u64,
}

/// A running replica.
pub struct Replica {
    service: StoreService,
    cluster: u64,
    id: u64,
    handle: Handle,
    thread: JoinHandle<()>,
    /// Why it stopped, once it has.
    stopped: watch::Receiver<Option<String>>,
    known: Arc<KnownPeers>,
    _lock: File,
}

impl Replica {
    /// Opens the directory and starts the replica's thread. Needs a tokio runtime.
    pub fn start(config: ReplicaConfig) -> Result<Replica, Error> {
        let lock = lock(&config.dir)?;
        let Identity { voters, incarnation, .. } = check_identity(&config)?;
        let known = KnownPeers::open(&config.dir)?;
        let (log, journal) = RaftLog::open(&config.dir.join("journal"), &voters)?;
        let catalog = Catalog::open(&config.dir.join("catalog"), log.last())?;
        let (sender, inputs) = std::sync::mpsc::channel();
        let handle = Handle::new(sender);
        let outbound = Outbound::start(config.cluster, (config.id, incarnation), &config.peers, &handle);
        let service = StoreService {
            replica: handle.clone(),
            catalog: catalog.clone(),
            journal: journal.reader(),
            peers: Arc::new(config.peers),
            budget: StoreService::new_budget(),
        };
        let replica = ReplicaLoop::new(config.id, log, journal, catalog, outbound)?;
        let (stopping, stopped) = watch::channel(None);
        let thread = std::thread::Builder::new().name("raft".into()).spawn(move || {
            let why = match replica.run(inputs) {
                Ok(()) => "asked to".to_string(),
                Err(error) => {
                    tracing::error!(%error, "the replica stops");
                    error.to_string()
                }
            };
            let _ = stopping.send(Some(why));
        });
        let thread = thread.at("start the thread for", &config.dir)?;
        let known = Arc::new(known);
        Ok(Replica {
            service,
            cluster: config.cluster,
            id: config.id,
            handle,
            thread,
            stopped,
            known,
            _lock: lock,
        })
    }

    /// Adds this replica's services to a server.
    pub fn services(&self) -> impl FnOnce(Router) -> Router + Send + 'static + use<> {
        let store = LogStoreServer::new(self.service.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let transport = TransportService {
            cluster: self.cluster,
            me: self.id,
            replica: self.handle.clone(),
            known: self.known.clone(),
        };
        let transport = RaftTransportServer::new(transport).max_decoding_message_size(MESSAGE_BYTES_MAX);
        move |router| router.add_service(store).add_service(transport)
    }

    /// Ends when the replica has stopped, with the reason.
    pub async fn stopped(&self) -> String {
        let mut stopped = self.stopped.clone();
        match stopped.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "its thread panicked".into(),
        }
    }

    /// Stops the thread and waits for it.
    pub fn stop(self) {
        self.handle.send(Input::Stop);
        let _ = self.thread.join();
    }
}

/// One process a directory: a second one would take the first's half-written frame
/// for a torn tail, and cut it.
fn lock(dir: &Path) -> Result<File, Error> {
    fs::create_dir_all(dir).at("create", dir)?;
    let path = dir.join("lock");
    let file = File::create(&path).at("create", &path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| Error::Identity {
        path: dir.to_path_buf(),
        what: "another process serves this directory".into(),
    })?;
    Ok(file)
}

fn check_identity(config: &ReplicaConfig) -> Result<Identity, Error> {
    let voters: Vec<u64> = config.peers.keys().copied().collect();
    let path = config.dir.join("identity.json");
    let bad = |what: String| Error::Identity { path: path.clone(), what };
    let mut mine = Identity {
        version: 1,
        cluster: config.cluster,
        replica: config.id,
        voters,
        incarnation: rand::random(),
    };
    if !path.exists() {
        write_synced(&config.dir, &path, &serde_json::to_vec(&mine).unwrap_or_default())?;
        return Ok(mine);
    }
    let bytes = fs::read(&path).at("read", &path)?;
    let found: Identity = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
    mine.incarnation = found.incarnation;
    if found != mine {
        return Err(bad(format!("the directory is of {found:?}, this is {mine:?}")));
    }
    Ok(mine)
}

/// Writes a small file whole or not at all.
pub(crate) fn write_synced(dir: &Path, path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let part = path.with_extension("part");
    let mut file = File::create(&part).at("create", &part)?;
    file.write_all(bytes).at("write to", &part)?;
    file.sync_all().at("sync", &part)?;
    fs::rename(&part, path).at("put in place", path)?;
    File::open(dir).and_then(|dir| dir.sync_all()).at("sync", dir)
}

/// Where a server listens.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

/// Serves with health and reflection until `shutdown` ends. `add` adds the services.
pub async fn serve(
    listener: Listener,
    add: impl FnOnce(Router) -> Router,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(heddle_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("our own descriptors are whole");
    let router = tonic::transport::Server::builder()
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(5)))
        .add_service(health_service)
        .add_service(reflection);
    let router = add(router);
    match listener {
        Listener::Tcp(listener) => {
            // Without it every answer waits 40 ms for a delayed acknowledgement.
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            router.serve_with_incoming_shutdown(incoming, shutdown).await
        }
        Listener::Unix(listener) => {
            router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown).await
        }
    }
}
