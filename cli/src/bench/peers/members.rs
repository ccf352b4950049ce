//! A peer's processes: their programs, their addresses, their logs and their end.

use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// Members of a peer: as many as the log store has replicas.
pub(super) const MEMBERS: usize = 3;
/// A peer that isn't ready by then won't be. JetStream elects a leader of all, then one of the
/// stream, and needs 2 to 10 s.
const READY: Duration = Duration::from_secs(30);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// Of a member that has ended, the last lines it said.
const LOG_LINES: usize = 8;

/// Whether a peer's program is on this machine.
pub fn installed(name: &str) -> bool {
    find(name).is_some()
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian has nats-server there, which is on root's path only.
    let dirs = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    dirs.map(|dir| dir.join(name)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// Addresses on which nobody listens. All are bound at once, so that no two are the same, and
/// then let go: unlike our own parts, these programs can't bind beside us.
pub(super) fn free_addresses(count: usize) -> Result<Vec<SocketAddr>> {
    let bound = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>();
    let bound = bound.context("bind a free port")?;
    bound.iter().map(|socket| socket.local_addr().context("read its port")).collect()
}

/// Asks until the answer is `Ok`, for a while. Each time `ask` must end by itself.
pub(super) async fn until_ready<T>(ask: impl AsyncFn() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(ready) => return Ok(ready),
            Err(why) if began.elapsed() > READY => {
                return Err(why.context(format!("not ready after {} s", READY.as_secs())));
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The processes. All end when this is dropped, and with this process, however it ends.
pub(super) struct Members {
    dir: PathBuf,
    children: Vec<(String, Child)>,
}

impl Members {
    /// None yet; their data and logs will be in `dir`.
    pub(super) fn in_dir(dir: &Path) -> Result<Members> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("resolve {}", dir.display()))?;
        Ok(Members { dir, children: vec![] })
    }

    /// Where a member's data belongs.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Starts one.
    pub(super) fn start(&mut self, name: &str, program: &str, arguments: &[String]) -> Result<()> {
        let program = find(program).with_context(|| format!("{program} is not installed"))?;
        let log = File::create(self.log(name)).with_context(|| format!("create the log of {name}"))?;
        // Part of every Debian: it has the kernel kill the member when the thread that started it
        // ends, as `--with-parent` does for our own parts.
        let mut command = match find("setpriv") {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL"]).arg(program);
                command
            }
            None => Command::new(program),
        };
        // Without our environment: etcd takes settings from it, and Go its number of threads.
        command.args(arguments).env_clear();
        // A group of its own: a Ctrl-C at the terminal is ours to handle.
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::from(log.try_clone()?)).stderr(Stdio::from(log));
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        self.children.push((name.into(), child));
        Ok(())
    }

    /// Asks until the answer is `Ok`, as long as all members run.
    pub(super) async fn wait<T>(&mut self, ask: impl AsyncFn() -> Result<T>) -> Result<T> {
        tokio::select! {
            ready = until_ready(ask) => ready,
            why = self.first_end() => Err(anyhow!(why)),
        }
    }

    /// The process ids.
    pub(super) fn pids(&self) -> Vec<u32> {
        self.children.iter().filter_map(|(_, child)| child.id()).collect()
    }

    /// Ends all, and waits until they have: their data is of no use, so without asking them.
    pub(super) async fn stop(mut self) {
        for (_, child) in &mut self.children {
            // It fails for one that has ended by itself, which is as good.
            let _ = child.kill().await;
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// A member that has ended by itself, and the last lines it said.
    fn ended(&mut self) -> Option<String> {
        let mut children = self.children.iter_mut();
        let (name, status) =
            children.find_map(|(name, child)| Some((name.clone(), child.try_wait().ok()??)))?;
        let log = std::fs::read_to_string(self.log(&name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        Some(format!("{name} has ended ({status}): {last}"))
    }

    /// Ends when a member has ended by itself.
    async fn first_end(&mut self) -> String {
        loop {
            if let Some(why) = self.ended() {
                return why;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
