//! A replica as a server: its directory, its thread, its services.

use crate::channel::MESSAGE_BYTES_MAX;
use crate::client::StoreClient;
use crate::core::{CoreConfig, Input};
use crate::error::{Error, IoContext};
use crate::replica::{self, Handle};
use crate::service::StoreService;
use crate::tls::Credentials;
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
    /// The replicas' addresses, its own included: all of a new cluster, and any later.
    pub peers: BTreeMap<u64, String>,
    /// Shards of a new cluster that hold recordings and blocks.
    pub shards: u32,
    /// It comes to a cluster that is there: it votes once that has taken it in.
    pub joins: bool,
}

const IDENTITY_VERSION: u32 = 2;
/// Most shards of a cluster.
pub const SHARDS_MAX: u32 = 1024;

/// What a directory says it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    version: u32,
    cluster: u64,
    replica: u64,
    /// Who votes in a new cluster; none in a replica that joined. Later members are in the groups.
    voters: Vec<u64>,
    /// Shards of the cluster, but for shard 0: fixed when it was created.
    shards: u32,
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
    threads: Vec<JoinHandle<()>>,
    groups: u32,
    /// Why it stopped, once it has.
    stopped: watch::Receiver<Option<String>>,
    known: Arc<KnownPeers>,
    _lock: File,
}

impl Replica {
    /// Opens the directory and starts the replica's thread. Needs a tokio runtime.
    pub fn start(config: ReplicaConfig) -> Result<Replica, Error> {
        let lock = lock(&config.dir)?;
        let Identity { voters, incarnation, shards, .. } = check_identity(&config)?;
        let known = Arc::new(KnownPeers::open(&config.dir)?);
        let groups = shards + 1;
        let opened = replica::open(&config.dir, CoreConfig::new(config.id, rand::random()), groups, &voters)?;
        let handle = opened.handle();
        let addresses: Vec<String> = config.peers.values().cloned().collect();
        let outbound = Outbound::new(config.cluster, (config.id, incarnation), config.peers, handle.clone());
        outbound.update(&opened.catalog().members()?);
        let known_addresses = outbound.addresses();
        let (stopping, stopped) = watch::channel(None);
        let started = opened.start(outbound, move |why| {
            // The first reason is the reason.
            stopping.send_if_modified(|known| {
                let is_first = known.is_none();
                known.get_or_insert(why.clone());
                is_first
            });
        });
        let (shared, threads) = started.at("start the threads for", &config.dir)?;
        let service = StoreService {
            me: config.id,
            cluster: config.cluster,
            shards,
            replica: shared.handle,
            catalog: shared.catalog,
            reader: shared.reader,
            addresses: known_addresses,
            peers: StoreClient::new(addresses),
            budget: StoreService::new_budget(),
        };
        tokio::spawn(service.clone().reconcile_all());
        Ok(Replica {
            service,
            cluster: config.cluster,
            id: config.id,
            handle,
            threads,
            groups,
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
            catalog: self.service.catalog.clone(),
            segments: self.service.reader.segments.clone(),
            groups: self.groups,
        };
        let transport = RaftTransportServer::new(transport)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
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

    /// Stops the threads and waits for them.
    pub fn stop(self) {
        self.handle.send(Input::Stop);
        for thread in self.threads {
            let _ = thread.join();
        }
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
    let path = config.dir.join("identity.json");
    let bad = |what: String| Error::Identity { path: path.clone(), what };
    if !path.exists() {
        if !(1..=SHARDS_MAX).contains(&config.shards) {
            return Err(bad(format!("a cluster has 1 to {SHARDS_MAX} shards, not {}", config.shards)));
        }
        let voters = if config.joins { vec![] } else { config.peers.keys().copied().collect() };
        let mine = Identity {
            version: IDENTITY_VERSION,
            cluster: config.cluster,
            replica: config.id,
            voters,
            shards: config.shards,
            incarnation: rand::random(),
        };
        write_synced(&config.dir, &path, &serde_json::to_vec(&mine).unwrap_or_default())?;
        return Ok(mine);
    }
    let bytes = fs::read(&path).at("read", &path)?;
    let found: Identity = serde_json::from_slice(&bytes).map_err(|error| {
        bad(format!("{error}; it is of another version, or damaged: replace this replica"))
    })?;
    if found.version != IDENTITY_VERSION {
        let what = format!("has version {}; this build reads {IDENTITY_VERSION}", found.version);
        return Err(bad(what));
    }
    if (found.cluster, found.replica) != (config.cluster, config.id) {
        let (cluster, id) = (found.cluster, found.replica);
        return Err(bad(format!(
            "the directory is of replica {id} of cluster {cluster:x}, not {} of {:x}",
            config.id, config.cluster
        )));
    }
    Ok(found)
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

/// HTTP/2's frames are read and written one at a time: with the usual 16 KiB that is a call
/// of the system for each, and up to a tenth of the throughput.
const FRAME_BYTES: u32 = 1 << 20;

/// Serves with health and reflection until `shutdown` ends. `add` adds the services. By TCP
/// it speaks TLS with those alone who show a certificate, once this process has its own.
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
    let mut builder = tonic::transport::Server::builder();
    if let (Listener::Tcp(_), Some(ours)) = (&listener, Credentials::ours()) {
        builder = builder.tls_config(ours.server())?;
    }
    let router = builder
        .initial_stream_window_size(8 << 20)
        .max_frame_size(Some(FRAME_BYTES))
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
