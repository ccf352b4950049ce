//! A cluster of real processes on this machine, for `up`, `demo` and tests.

use crate::certificates;
use crate::cluster::{ClusterFile, FILE, wait_ready};
use anyhow::{Context, Result, bail};
use heddle_storage::tls::Credentials;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::TcpSocket;
use tokio::process::{Child, Command};

/// Shards of a new store, unless said otherwise.
pub const DEFAULT_SHARDS: u32 = 4;

/// Where in a cluster's directory its credentials are.
pub const TLS_DIR: &str = "tls";
/// A cluster on this machine is often started again, and makes new ones then.
const CERTIFICATE_DAYS: i64 = 365;

/// How a cluster on this machine is made up.
#[derive(Clone, Debug)]
pub struct LocalConfig {
    /// The `heddle` binary.
    pub program: PathBuf,
    /// Where its data lives.
    pub dir: PathBuf,
    /// Replicas of the store.
    pub replicas: u64,
    /// Nodes.
    pub nodes: u64,
    /// Slots of each.
    pub slots: u32,
    /// Leases.
    pub lease_ms: u64,
    /// Nodes offer builds with a planted fault.
    pub offers_planted: bool,
    /// QEMUs that nodes offer; none: the usual ones on the path.
    pub qemu: Vec<PathBuf>,
    /// Shards of a new store.
    pub shards: u32,
    /// Where certificates for mutual TLS are made; none: the parts talk in clear.
    pub tls: Option<PathBuf>,
    /// Variables of the environment of a part, by its name.
    pub environment: BTreeMap<String, Vec<(String, String)>>,
}

/// A port that stays ours: bound, never listened on, so that a dead part refuses
/// connections and nobody else gets its port.
struct Reserved {
    address: SocketAddr,
    _socket: TcpSocket,
}

impl Reserved {
    fn new() -> Result<Reserved> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind("127.0.0.1:0".parse()?)?;
        Ok(Reserved { address: socket.local_addr()?, _socket: socket })
    }
}

/// The processes. All end when this is dropped, and with this process, however it ends.
pub struct LocalCluster {
    config: LocalConfig,
    replicas: Vec<Reserved>,
    coordinator: Reserved,
    nodes: Vec<Reserved>,
    children: BTreeMap<String, Child>,
    joined_through: usize,
}

impl LocalCluster {
    /// Starts all parts and waits until they are ready.
    pub async fn start(config: LocalConfig) -> Result<LocalCluster> {
        std::fs::create_dir_all(&config.dir).with_context(|| format!("create {}", config.dir.display()))?;
        if let Some(dir) = &config.tls {
            let hosts = ["127.0.0.1".into(), "localhost".into()];
            certificates::issue(&dir.join("authority"), dir, &hosts, CERTIFICATE_DAYS)?;
            Credentials::load(dir)?.adopt();
        }
        let reserve = |count: u64| (0..count).map(|_| Reserved::new()).collect::<Result<Vec<_>>>();
        let mut cluster = LocalCluster {
            replicas: reserve(config.replicas)?,
            coordinator: Reserved::new()?,
            nodes: reserve(config.nodes)?,
            children: BTreeMap::new(),
            joined_through: 0,
            config,
        };
        for id in 1..=cluster.config.replicas {
            cluster.start_part(&format!("replica-{id}"))?;
        }
        cluster.start_part("coordinator")?;
        for id in 1..=cluster.config.nodes {
            cluster.start_part(&format!("node-{id}"))?;
        }
        let (file, nodes) = (cluster.file(), cluster.config.nodes as usize);
        tokio::select! {
            ready = wait_ready(&file, nodes, Duration::from_secs(60)) => ready?,
            why = cluster.first_end() => bail!(why),
        }
        let path = cluster.config.dir.join(FILE);
        let json = serde_json::to_vec_pretty(&cluster.file())?;
        std::fs::write(&path, json).with_context(|| format!("write {}", path.display()))?;
        Ok(cluster)
    }

    /// What clients need.
    pub fn file(&self) -> ClusterFile {
        ClusterFile {
            replicas: self.replicas.iter().map(|replica| self.url(replica)).collect(),
            coordinator: self.url(&self.coordinator),
        }
    }

    fn url(&self, part: &Reserved) -> String {
        let scheme = if self.config.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", part.address)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.config.dir
    }

    /// Starts `replica-N`, `coordinator` or `node-N`.
    pub fn start_part(&mut self, name: &str) -> Result<()> {
        let number = name.rsplit('-').next().and_then(|n| n.parse::<usize>().ok()).unwrap_or(1);
        let log = std::fs::File::create(self.config.dir.join(format!("{name}.log")))?;
        let mut command = Command::new(&self.config.program);
        command.arg("serve");
        let replicas = |command: &mut Command| {
            for replica in &self.replicas {
                command.arg("--replica").arg(self.url(replica));
            }
        };
        if name.starts_with("replica") {
            command.arg("storage").args(["--id", &number.to_string()]);
            command.arg("--dir").arg(self.config.dir.join(name));
            command.arg("--listen").arg(self.replicas[number - 1].address.to_string());
            command.args(["--shards", &self.config.shards.to_string()]);
            let is_first = number as u64 <= self.config.replicas;
            for (i, replica) in self.replicas.iter().enumerate() {
                let is_founder = (i as u64) < self.config.replicas;
                if if is_first { is_founder } else { i + 1 == number } {
                    command.arg("--peer").arg(format!("{}={}", i + 1, self.url(replica)));
                }
            }
            if !is_first {
                command.arg("--join").arg(self.url(&self.replicas[self.joined_through]));
            }
        } else if name == "coordinator" {
            command.arg("coordinator").arg("--listen").arg(self.coordinator.address.to_string());
            command.args(["--lease-ms", &self.config.lease_ms.to_string()]);
            replicas(&mut command);
        } else {
            command.arg("node").args(["--name", name, "--slots", &self.config.slots.to_string()]);
            command.arg("--listen").arg(self.nodes[number - 1].address.to_string());
            command.arg("--coordinator").arg(self.url(&self.coordinator));
            if self.config.offers_planted {
                command.arg("--offer-planted");
            }
            for program in &self.config.qemu {
                command.arg("--qemu").arg(program);
            }
            replicas(&mut command);
        }
        if let Some(dir) = &self.config.tls {
            command.arg("--tls").arg(dir);
        }
        for (name, value) in self.config.environment.get(name).into_iter().flatten() {
            command.env(name, value);
        }
        // A group of its own: a Ctrl-C at the terminal is ours to handle.
        command.arg("--with-parent").process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::from(log.try_clone()?)).stderr(Stdio::from(log));
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        self.children.insert(name.into(), child);
        Ok(())
    }

    /// Starts another replica, which asks replica `through` (from 1) about the cluster. The
    /// store takes it in with `heddle replica add`; its id and its address.
    pub fn add_replica(&mut self, through: usize) -> Result<(u64, String)> {
        self.replicas.push(Reserved::new()?);
        self.joined_through = through - 1;
        let id = self.replicas.len();
        self.start_part(&format!("replica-{id}"))?;
        Ok((id as u64, self.url(&self.replicas[id - 1])))
    }

    /// kill -9, and the end of it.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        let child = self.children.get_mut(name).with_context(|| format!("no {name}"))?;
        child.kill().await.with_context(|| format!("kill {name}"))?;
        self.children.remove(name);
        Ok(())
    }

    /// A part that has ended by itself, and the last lines it said.
    pub fn ended(&mut self) -> Option<(String, String)> {
        for (name, child) in &mut self.children {
            if let Ok(Some(status)) = child.try_wait() {
                let log =
                    std::fs::read_to_string(self.config.dir.join(format!("{name}.log"))).unwrap_or_default();
                return Some((name.clone(), format!("{name} has ended ({status}): {}", log.trim())));
            }
        }
        None
    }

    /// Ends when a part has ended by itself.
    async fn first_end(&mut self) -> String {
        loop {
            if let Some((_, why)) = self.ended() {
                return why;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The process id of a part.
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.children.get(name).and_then(Child::id)
    }

    /// Ends all parts.
    pub async fn stop(mut self) {
        for child in self.children.values_mut() {
            if let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
        }
        for child in self.children.values_mut() {
            let _ = tokio::time::timeout(Duration::from_secs(3), child.wait()).await;
            let _ = child.kill().await;
        }
    }
}
