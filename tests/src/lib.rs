//! The cluster in a box: what the tests of real processes share.
//!
//! `HEDDLE_FULL=1` asks for the large counts; without it a seeded sample runs.
//! `HEDDLE_REQUIRE=1` makes a test fail that is otherwise skipped for want of
//! what `./test` installs.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

pub mod device;
pub mod formats;
pub mod gdb;
pub mod lan;
pub mod linear;
pub mod network;
pub mod recording_model;
pub mod sim;
pub mod witness;

use heddle_cli::cluster::Cluster;
use heddle_cli::local::{DEFAULT_SHARDS, LocalCluster, LocalConfig};
use heddle_proto::{Chunk, ChunkBuilder, Event, Hash, Manifest, RecordingId, v1};
use heddle_storage::StoreClient;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The `heddle` binary beside the test's own.
pub fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().parent().unwrap().join("heddle");
    assert!(program.exists(), "{} is not built: run ./test", program.display());
    program
}

/// `sample`, or `full` when the large counts are asked for.
pub fn count(sample: u64, full: u64) -> u64 {
    if std::env::var_os("HEDDLE_FULL").is_some() { full } else { sample }
}

/// Says that a test is skipped, as something is not there that `./test` installs; fails where
/// `HEDDLE_REQUIRE` is set. `./test` counts what is said.
pub fn skip(why: impl Display) {
    assert!(std::env::var_os("HEDDLE_REQUIRE").is_none(), "HEDDLE_REQUIRE is set, but {why}");
    leave_out(why);
}

/// Says that a test is skipped by somebody's wish, or as this machine forbids what it does.
pub fn leave_out(why: impl Display) {
    println!("skipped: {why}");
}

/// What a test's random choices come from: `HEDDLE_SEED`, or a new one. It is printed.
pub fn seed() -> u64 {
    let given = std::env::var("HEDDLE_SEED").ok();
    let seed = given.map_or_else(rand::random, |seed| seed.parse().unwrap());
    eprintln!("HEDDLE_SEED={seed}");
    seed
}

/// Runs `heddle` with an embedded cluster in a directory of its own.
pub struct Embedded {
    dir: TempDir,
}

impl Default for Embedded {
    fn default() -> Self {
        Embedded { dir: TempDir::new().unwrap() }
    }
}

/// What a finished `heddle` said.
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    fn of(output: Output) -> Said {
        Said {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Its output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {} {}", self.out, self.err))
    }

    /// Itself, if it ended with `code`.
    pub fn expect(self, code: i32) -> Said {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }
}

/// Runs a command with `input` typed.
pub fn run(command: &mut Command, input: &[u8]) -> Said {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A child that does not read its input closes the pipe.
    let _ = stdin.write_all(input);
    drop(stdin);
    Said::of(child.wait_with_output().unwrap())
}

impl Embedded {
    /// The command, without arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program());
        command.env("XDG_DATA_HOME", self.dir.path()).env_remove("HEDDLE_CLUSTER");
        command
    }

    /// Runs `heddle` with `args`.
    pub fn heddle(&self, args: &[&str]) -> Said {
        run(self.command().args(args), b"")
    }

    /// Where its data is.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("heddle")
    }
}

/// Three replicas and a coordinator in `dir`, no nodes; no recording is cut for silence.
pub fn three_replicas(dir: &Path) -> LocalConfig {
    LocalConfig {
        program: program(),
        dir: dir.to_path_buf(),
        replicas: 3,
        nodes: 0,
        slots: 1,
        lease_ms: 3_600_000,
        offers_planted: true,
        qemu: vec![],
        shards: DEFAULT_SHARDS,
        tls: None,
        environment: BTreeMap::new(),
    }
}

/// A cluster of real processes in a directory of its own.
pub struct Processes {
    /// The processes.
    pub cluster: LocalCluster,
    /// A client.
    pub client: Cluster,
    _dir: TempDir,
}

impl Processes {
    /// Three replicas, a coordinator, `nodes` nodes, short leases.
    pub async fn start(nodes: u64, lease_ms: u64) -> Processes {
        Processes::offering(nodes, lease_ms, vec![]).await
    }

    /// The same, with nodes that offer these QEMUs alone; none: those that are installed.
    pub async fn offering(nodes: u64, lease_ms: u64, qemu: Vec<PathBuf>) -> Processes {
        let dir = TempDir::new().unwrap();
        let config = LocalConfig { nodes, lease_ms, qemu, ..three_replicas(dir.path()) };
        let cluster = LocalCluster::start(config).await.unwrap();
        let client = Cluster::in_dir(dir.path()).unwrap();
        Processes { cluster, client, _dir: dir }
    }

    /// `heddle` with this cluster.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program());
        command.arg("--cluster").arg(self.cluster.dir());
        command
    }

    /// Runs `heddle` with `args` and `input` typed, off the runtime's threads.
    pub async fn heddle(&self, args: &[&str]) -> Said {
        let mut command = self.command();
        command.args(args);
        tokio::task::spawn_blocking(move || run(&mut command, b"")).await.unwrap()
    }

    /// The name of the leading replica.
    pub async fn leader(&self) -> String {
        until("a leader", async || {
            let replicas = self.client.store.replicas().await;
            replicas.iter().find(|r| r.role == "leader").map(|r| format!("replica-{}", r.id))
        })
        .await
    }

    /// The row of the recording of this name.
    pub async fn row(&self, name: &str) -> Option<v1::RecordingRow> {
        let rows = self.client.store.list().await.ok()?;
        rows.into_iter().find(|row| Manifest::decode(&row.manifest).is_ok_and(|m| m.name == name))
    }

    /// Waits until the recording has so many instructions committed.
    pub async fn committed(&self, name: &str, icount: u64) -> v1::RecordingRow {
        until("instructions to be committed", async || {
            self.row(name).await.filter(|row| row.committed_icount >= icount)
        })
        .await
    }
}

/// Waits for a condition, and says what it waited for if it never holds.
pub async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < limit, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The chunks of `events`, as a recorder would make them.
pub fn chunks(id: RecordingId, events: &[Event], each: usize) -> Vec<Chunk> {
    let mut builder = ChunkBuilder::new(id);
    let mut chunks = vec![];
    for (i, event) in events.iter().enumerate() {
        builder.push(event);
        let next_is_async = events.get(i + 1).is_some_and(|next| next.body.is_async());
        if (i + 1) % each == 0 && !next_is_async {
            chunks.extend(builder.take());
        }
    }
    chunks.extend(builder.take());
    chunks
}

/// Stores a copy of a recording with other events, all hashes made good again.
/// `shift` moves an old event index to where that event is in the copy.
pub async fn copy(
    store: &StoreClient,
    row: &v1::RecordingRow,
    name: &str,
    events: &[Event],
    shift: impl Fn(u64) -> u64,
) -> RecordingId {
    let mut manifest = Manifest::decode(&row.manifest).unwrap();
    manifest.id = RecordingId(rand::random());
    manifest.name = name.into();
    let id = manifest.id;
    let opened = store.open(id, b"copy", &manifest.encode(), false).await.unwrap();
    let chunks = chunks(id, events, 500);
    append(store, opened.epoch, &chunks).await.unwrap();
    for snapshot in &row.snapshots {
        // The other recording has the snapshot's other blocks.
        let root = Hash::from_slice(&snapshot.root).unwrap();
        let block = store.get_blocks(&[root]).await.unwrap().remove(0);
        store.put_blocks(id, vec![(root, block)]).await.unwrap();
        let moved = v1::SnapshotRow { event: shift(snapshot.event), ..snapshot.clone() };
        store.add_snapshot(id, opened.epoch, moved).await.unwrap();
    }
    let last = chunks.last().unwrap().id();
    store.seal(id, opened.epoch, events.len() as u64, last, false).await.unwrap();
    id
}

/// Appends chunks and waits for all acknowledgements; the committed watermark.
pub async fn append(store: &StoreClient, epoch: u64, chunks: &[Chunk]) -> Result<u64, tonic::Status> {
    let requests: Vec<v1::AppendRequest> = chunks
        .iter()
        .map(|chunk| v1::AppendRequest {
            recording: chunk.header.recording.to_vec().into(),
            epoch,
            chunk: chunk.bytes.clone(),
            rewrites: false,
            more: vec![],
        })
        .collect();
    let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return Ok(0) };
    let mut client = store.leader(first.header.recording).unwrap();
    let mut replies = client.append(tokio_stream::iter(requests)).await?.into_inner();
    let mut committed = 0;
    while let Some(reply) = replies.message().await? {
        committed = reply.committed_events;
    }
    if committed < last.header.end_event() {
        return Err(tonic::Status::unavailable("the stream ended early"));
    }
    Ok(committed)
}

/// A recording id that nobody else has.
pub fn new_id() -> RecordingId {
    RecordingId(rand::random())
}

/// The workspace's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}
