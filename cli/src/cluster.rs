//! Which cluster: a directory, a URL, or an embedded one.

use crate::exit::{NO_QUORUM, USAGE, coded};
use crate::local::TLS_DIR;
use crate::serve::offered;
use anyhow::{Context, Result};
use heddle_coordinator::{Coordinator, CoordinatorConfig};
use heddle_node::worker::{NodeConfig, Worker};
use heddle_proto::v1;
use heddle_proto::v1::coordinator_client::CoordinatorClient;
use heddle_storage::channel::{MESSAGE_BYTES_MAX, connect};
use heddle_storage::server::{Listener, serve};
use heddle_storage::tls::Credentials;
use heddle_storage::{Replica, ReplicaConfig, StoreClient};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::transport::Channel;

/// The file in a cluster's directory that clients read.
pub const FILE: &str = "cluster.json";
/// Leases in an embedded cluster: its parts live and die together.
const EMBEDDED_LEASE_MS: u64 = 10_000;
/// One replica has no leaders to spread.
const EMBEDDED_SHARDS: u32 = 1;

/// Where a cluster's parts are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterFile {
    /// The store's replicas.
    pub replicas: Vec<String>,
    /// The coordinator.
    pub coordinator: String,
}

/// A cluster to talk to.
pub struct Cluster {
    /// The store.
    pub store: StoreClient,
    /// The coordinator.
    pub coordinator: CoordinatorClient<Channel>,
    /// Where its parts are.
    pub file: ClusterFile,
    /// Where a recorder keeps its outbox.
    pub outbox_dir: PathBuf,
    /// The embedded cluster, if this process serves it.
    embedded: Option<Embedded>,
    /// Keeps the process that serves the embedded cluster from ending.
    _users: Option<File>,
}

struct Embedded {
    replica: Replica,
    users: PathBuf,
    _lock: File,
}

impl Cluster {
    /// The cluster that the user named, or the embedded one.
    pub async fn open(named: Option<&str>) -> Result<Cluster> {
        match named {
            Some(url) if is_url(url) => Cluster::at_url(url).await,
            Some(dir) => Cluster::in_dir(Path::new(dir)),
            None => Cluster::embedded(&data_dir()?).await,
        }
    }

    fn of(file: ClusterFile, outbox_dir: PathBuf, embedded: Option<Embedded>) -> Result<Cluster> {
        if file.replicas.is_empty() {
            return Err(coded(USAGE, "the cluster names no replicas"));
        }
        let channel = connect(&file.coordinator).context("the coordinator's address")?;
        Ok(Cluster {
            store: StoreClient::new(file.replicas.clone()),
            coordinator: CoordinatorClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
            file,
            outbox_dir,
            embedded,
            _users: None,
        })
    }

    /// The cluster that `heddle up` runs in `dir`.
    pub fn in_dir(dir: &Path) -> Result<Cluster> {
        // QEMU runs elsewhere, and is told where its ring is.
        let dir = &std::path::absolute(dir).with_context(|| format!("find {}", dir.display()))?;
        let path = dir.join(FILE);
        let bytes = std::fs::read(&path).map_err(|error| {
            coded(
                USAGE,
                format!("{}: {error}; is `heddle up --data {}` running?", path.display(), dir.display()),
            )
        })?;
        let file: ClusterFile =
            serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
        let tls = dir.join(TLS_DIR);
        if file.coordinator.starts_with("https://") && Credentials::ours().is_none() && tls.exists() {
            Credentials::load(&tls)?.adopt();
        }
        Cluster::of(file, dir.join("outbox"), None)
    }

    async fn at_url(url: &str) -> Result<Cluster> {
        let channel = connect(url).map_err(|e| coded(USAGE, e.to_string()))?;
        let info = CoordinatorClient::new(channel).info(v1::InfoRequest {}).await;
        // What answers a plain caller of a TLS port is noise to HTTP/2.
        let hint = if url.starts_with("http://") {
            "; is it one with mutual TLS? name it by https:// then"
        } else {
            ""
        };
        let info = info.map_err(|e| {
            coded(NO_QUORUM, format!("no coordinator answers at {url}: {}{hint}", e.message()))
        })?;
        let file = ClusterFile { replicas: info.into_inner().replicas, coordinator: url.into() };
        // What waits for one cluster is nothing to another.
        let name = format!("outbox-{}", heddle_proto::Hash::of(url.as_bytes()).short());
        Cluster::of(file, data_dir()?.join(name), None)
    }

    /// One replica, coordinator and node in this process, over a Unix socket in
    /// `dir`; if another process serves that already, that one.
    async fn embedded(dir: &Path) -> Result<Cluster> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let socket = dir.join("heddle.sock");
        let address = format!("unix:{}", socket.display());
        let file = ClusterFile { replicas: vec![address.clone()], coordinator: address.clone() };
        let outbox_dir = dir.join("outbox");
        let lock = File::create(dir.join("lock")).with_context(|| format!("lock {}", dir.display()))?;
        let users = File::create(dir.join("users")).with_context(|| format!("lock {}", dir.display()))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            // Who serves waits for its users before it ends; who is ending lets none in.
            let users = tokio::task::spawn_blocking(move || {
                flock(&users, FlockOperation::LockShared).map(|()| users)
            });
            let users = users.await?.context("join the cluster")?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                let cluster = Cluster::of(file, outbox_dir, None)?;
                return Ok(Cluster { _users: Some(users), ..cluster });
            }
        }
        let _ = std::fs::remove_file(&socket);
        let listener = tokio::net::UnixListener::bind(&socket)
            .with_context(|| format!("listen on {}; is the path too long for a socket?", socket.display()))?;
        let peers = BTreeMap::from([(1, address.clone())]);
        let dir_1 = dir.join("replica-1");
        let config =
            ReplicaConfig { id: 1, cluster: 1, dir: dir_1, peers, shards: EMBEDDED_SHARDS, joins: false };
        let replica = Replica::start(config)?;
        // The coordinator needs the store, and both answer on one socket: so the store's
        // services are reached in process until the coordinator has read its jobs.
        let early = dir.join("store.sock");
        let _ = std::fs::remove_file(&early);
        let early_listener = tokio::net::UnixListener::bind(&early).context("listen for the coordinator")?;
        let early_address = format!("unix:{}", early.display());
        let early_serve = serve(Listener::Unix(early_listener), replica.services(), std::future::pending());
        tokio::spawn(early_serve);
        let coordinator = Coordinator::start(CoordinatorConfig {
            name: "embedded".into(),
            replicas: vec![early_address],
            lease_ms: EMBEDDED_LEASE_MS,
        })
        .await?;
        let slots = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let worker = Worker::new(NodeConfig {
            name: "embedded".into(),
            slots,
            replicas: file.replicas.clone(),
            coordinator: address.clone(),
            address,
            offers_planted: true,
            qemu: offered(&[]).await,
        })?;
        let (coordinator_service, node_service) = (coordinator.service(), worker.service());
        let store_services = replica.services();
        let router_of =
            |router| store_services(router).add_service(coordinator_service).add_service(node_service);
        tokio::spawn(serve(Listener::Unix(listener), router_of, std::future::pending()));
        tokio::spawn(async move { worker.run().await });
        wait_ready(&file, 1, Duration::from_secs(20)).await?;
        let cluster =
            Cluster::of(file, outbox_dir, Some(Embedded { replica, users: dir.join("users"), _lock: lock }))?;
        for said in heddle_node::record::recover(&cluster.store, &cluster.outbox_dir).await {
            eprintln!("heddle: {said}");
        }
        Ok(cluster)
    }

    /// Leaves the cluster; an embedded one is stopped cleanly, once nobody uses it.
    pub async fn close(self) {
        let Some(Embedded { replica, users, _lock }) = self.embedded else { return };
        let waiting = tokio::task::spawn_blocking(move || {
            let file = File::create(users).ok()?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                eprintln!("heddle: waiting for others that use this embedded cluster");
                flock(&file, FlockOperation::LockExclusive).ok()?;
            }
            Some(file)
        });
        let _nobody_else = waiting.await;
        replica.stop();
    }
}

fn is_url(text: &str) -> bool {
    ["http://", "https://", "unix:"].iter().any(|scheme| text.starts_with(scheme))
}

/// The user's data directory, as the XDG base directories have it.
fn data_dir() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = set("XDG_DATA_HOME") {
        return Ok(dir.join("heddle"));
    }
    let home = set("HOME").context("neither XDG_DATA_HOME nor HOME is set: name a cluster")?;
    Ok(home.join(".local/share/heddle"))
}

/// Waits until the cluster has a leader and a coordinator answers.
pub async fn wait_ready(file: &ClusterFile, nodes: usize, patience: Duration) -> Result<()> {
    let until = tokio::time::Instant::now() + patience;
    let channel = connect(&file.coordinator)?;
    let mut client = CoordinatorClient::new(channel);
    loop {
        if let Ok(reply) = client.nodes(v1::NodesRequest {}).await
            && reply.into_inner().nodes.iter().filter(|node| node.state == "ready").count() >= nodes
        {
            return Ok(());
        }
        if tokio::time::Instant::now() > until {
            return Err(coded(crate::exit::TIMEOUT, "the cluster did not come up in time"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
