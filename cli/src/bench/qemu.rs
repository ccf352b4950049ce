//! `heddle bench qemu`: recording, storing and replaying Debian's Linux on QEMU.

use super::cost::{Cost, cpu_of_parts, median, timed};
use super::{Rows, start_cluster};
use crate::args::{BenchQemu, Format};
use crate::cluster::Cluster;
use crate::commands::recordings;
use crate::exit::{OK, USAGE, coded};
use crate::local::LocalCluster;
use anyhow::{Context, Result, ensure};
use heddle_node::qemu::builds::QemuBuild;
use heddle_node::rewrite::LARGE_BYTES;
use heddle_proto::{ChunkBuilder, RecordingId};
use heddle_replay_engine::qemu::log::encode;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Recordings that are replayed one at a time and all at once.
const MANY: u32 = 4;
/// What the store's index has for a chunk: key and row, rounded up.
const CHUNK_ROW_BYTES: u64 = 128;
/// Events between two looks at how full a chunk is.
const LOOK_EVENTS: usize = 1 << 12;

/// The beginning of the parameters of the guest with a long log: 128 ns an instruction,
/// so that its timer ticks often.
const LONG_LOG: &str = "long-log";

struct Bench<'a> {
    command: &'a BenchQemu,
    cluster: LocalCluster,
    client: Cluster,
    dir: PathBuf,
    rows: Rows,
}

impl Bench<'_> {
    fn qemu_line(&self, append: &str) -> Vec<String> {
        let command = self.command;
        let mut line: Vec<String> =
            ["-M", "pc", "-m", "256", "-nographic", "-nic", "none"].map(String::from).into();
        line.extend(["-kernel".into(), command.kernel.display().to_string()]);
        line.extend(["-initrd".into(), command.initrd.display().to_string()]);
        line.extend(["-append".into(), format!("console=ttyS0 quiet noline {append}")]);
        line
    }

    /// Plain QEMU, recording to a local file or replaying from it.
    fn plain(&self, mode: &str, append: &str, is_pinned: bool) -> Result<Cost> {
        let log = self.dir.join(format!("{}.log", append.replace(['=', ' '], "-")));
        let mut command = Command::new(if is_pinned { "taskset" } else { "qemu-system-x86_64" });
        if is_pinned {
            command.args(["-c", "0", "qemu-system-x86_64"]);
        }
        command.args(self.qemu_line(append)).args(["-global", "apic-common.vapic=off", "-icount"]);
        command.arg(format!("shift=auto,sleep=on,rr={mode},rrfile={}", log.display()));
        Ok(timed(&mut command)?.0)
    }

    fn heddle(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap_or_else(|_| "heddle".into()));
        command.arg("--cluster").arg(self.cluster.dir()).args(["-o", "json"]).args(arguments);
        command
    }

    /// CPU seconds of a recording and of the cluster's parts meanwhile.
    fn record_cpu(&self, name: &str, append: &str, more: &[&str]) -> Result<f64> {
        let (cost, _, parts) = self.record(name, append, more)?;
        Ok(cost.cpu + parts)
    }

    /// Records through the cluster: the recorder's cost, QEMU's own CPU seconds, and the parts'.
    fn record(&self, name: &str, append: &str, more: &[&str]) -> Result<(Cost, f64, f64)> {
        let before = cpu_of_parts();
        let mut arguments: Vec<String> = ["record", "qemu", "--name", name].map(String::from).into();
        arguments.extend(more.iter().map(ToString::to_string));
        arguments.extend(["--".into(), "qemu-system-x86_64".into()]);
        arguments.extend(self.qemu_line(append));
        if append.starts_with(LONG_LOG) {
            arguments.extend(["-icount".into(), "shift=7".into()]);
        }
        let (cost, out) = timed(&mut self.heddle(&arguments))?;
        let said: Value = serde_json::from_slice(&out).context("the recording's summary")?;
        Ok((cost, said["qemu_cpu_seconds"].as_f64().unwrap_or(0.0), cpu_of_parts() - before))
    }

    fn replay(&self, name: &str, spans: u32) -> Result<Cost> {
        let arguments = ["replay".into(), name.into(), "--spans".into(), spans.to_string()];
        let before = cpu_of_parts();
        let (cost, _) = timed(&mut self.heddle(&arguments))?;
        Ok(Cost { cpu: cost.cpu + cpu_of_parts() - before, ..cost })
    }

    /// How many snapshots a recording has.
    fn snapshots(&self, name: &str) -> Result<f64> {
        let arguments = ["get", "recording", name].map(String::from);
        let (_, out) = timed(&mut self.heddle(&arguments))?;
        let said: Value = serde_json::from_slice(&out).context("the recording's row")?;
        said["snapshots"].as_f64().context("a number of snapshots")
    }

    fn index(&self, name: &str, snapshots: u32) -> Result<Cost> {
        let arguments = ["index".into(), name.into(), "--snapshots".into(), snapshots.to_string()];
        Ok(timed(&mut self.heddle(&arguments))?.0)
    }
}

/// Runs the QEMU benchmark.
pub async fn qemu(command: BenchQemu, format: Format) -> Result<u8> {
    for file in [&command.kernel, &command.initrd] {
        if !file.is_file() {
            let what = format!("{} is not there; tests/linux-guest makes the guest", file.display());
            return Err(coded(USAGE, what));
        }
    }
    QemuBuild::probe(Path::new("qemu-system-x86_64"))?;
    let dir = tempfile::tempdir().context("make a directory")?;
    let cluster = start_cluster(&dir.path().join("cluster"), 2).await?;
    let client = Cluster::in_dir(cluster.dir())?;
    let mut bench =
        Bench { command: &command, cluster, client, dir: dir.path().into(), rows: Rows::default() };
    let computing = format!("rounds={}", command.rounds);
    let idle = format!("rounds=2 idle={}", command.idle);
    let is_wanted = |part: &str| command.part.is_empty() || command.part.iter().any(|wanted| wanted == part);
    if is_wanted("recording") {
        recording(&mut bench, &computing)?;
    }
    if is_wanted("spans") {
        parallel(&mut bench, &computing, &idle)?;
    }
    if is_wanted("many") {
        many(&mut bench)?;
    }
    if is_wanted("stored") {
        stored(&mut bench).await?;
    }
    let rows = std::mem::take(&mut bench.rows);
    bench.cluster.stop().await;
    rows.print("qemu", format)?;
    Ok(OK)
}

/// What recording and streaming costs over `rr=record` to a local file.
fn recording(bench: &mut Bench, computing: &str) -> Result<()> {
    let (mut plain, mut ours, mut qemu, mut parts) = (vec![], vec![], vec![], vec![]);
    for run in 0..bench.command.runs {
        plain.push(bench.plain("record", computing, false)?);
        let name = format!("record-{run}");
        let (cost, own, others) = bench.record(&name, computing, &["--no-last-snapshot"])?;
        ours.push(cost);
        qemu.push(Cost { cpu: own, wall: own });
        parts.push(Cost { cpu: others, wall: others });
    }
    let (plain, ours) = (median(plain), median(ours));
    let (qemu, parts) = (median(qemu), median(parts));
    let peer = "QEMU rr=record to a local file";
    bench.rows.row("record, QEMU's CPU", qemu.cpu, peer, plain.cpu, "CPU s", "<= 1.05");
    bench.rows.row("record, all CPU", ours.cpu + parts.cpu, peer, plain.cpu, "CPU s", "<= 1.10");
    bench.rows.row("record, wall", ours.wall, peer, plain.wall, "s", "for information");
    let without = ours.cpu + parts.cpu;
    let last = bench.record_cpu("computing", computing, &[])? - without;
    bench.rows.row("a snapshot at the end", last, peer, plain.cpu, "CPU s", "for information");
    let every = bench.record_cpu("snapshots", computing, &["--snapshot-every", "2000000000"])?;
    let count = bench.snapshots("snapshots")?;
    let each = (every - without - last) / (count - 1.0).max(1.0);
    bench.rows.row("each snapshot before", each, peer, plain.cpu, "CPU s", "for information");
    Ok(())
}

/// Spans and many recordings on two cores.
fn parallel(bench: &mut Bench, computing: &str, idle: &str) -> Result<()> {
    bench.plain("record", computing, false)?;
    let serial = bench.plain("replay", computing, false)?;
    bench.record("in-spans", computing, &[])?;
    let index = bench.index("in-spans", 7)?;
    bench.rows.row("index, wall", index.wall, "QEMU rr=replay, serial", serial.wall, "s", "for information");
    let whole = bench.replay("in-spans", 1)?;
    bench.rows.row(
        "computing guest, whole",
        whole.wall,
        "QEMU rr=replay, serial",
        serial.wall,
        "s",
        "for information",
    );
    let spans = bench.replay("in-spans", 8)?;
    bench.rows.row(
        "computing guest, spans",
        spans.wall,
        "QEMU rr=replay, serial",
        serial.wall,
        "s",
        "<= 0.60",
    );
    bench.rows.row(
        "computing guest, spans' CPU",
        spans.cpu,
        "QEMU rr=replay, serial",
        serial.cpu,
        "CPU s",
        "for information",
    );
    bench.plain("record", idle, false)?;
    let pinned = bench.plain("replay", idle, true)?;
    let unpinned = bench.plain("replay", idle, false)?;
    bench.record("idle", idle, &[])?;
    bench.index("idle", 7)?;
    let spans = bench.replay("idle", 8)?;
    bench.rows.row(
        "idle guest, spans",
        spans.wall,
        "QEMU rr=replay on one core",
        pinned.wall,
        "s",
        "<= 0.58",
    );
    bench.rows.row(
        "idle guest, spans",
        spans.wall,
        "QEMU rr=replay unpinned",
        unpinned.wall,
        "s",
        "for information",
    );
    Ok(())
}

/// Many recordings, one after the other and all at once.
fn many(bench: &mut Bench) -> Result<()> {
    let guest = format!("rounds={}", bench.command.rounds / MANY);
    let names: Vec<String> = (0..MANY).map(|number| format!("many-{number}")).collect();
    for name in &names {
        bench.record(name, &guest, &[])?;
    }
    // Once before, so that nothing is fetched for the first time while it counts.
    bench.replay(&names[0], 1)?;
    let began = Instant::now();
    for name in &names {
        bench.replay(name, 1)?;
    }
    let one_by_one = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let mut running = vec![];
    for name in &names {
        let arguments = ["replay".into(), name.clone()];
        let mut command = bench.heddle(&arguments);
        running.push(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
    }
    for mut child in running {
        ensure!(child.wait()?.success(), "a replay beside others diverged");
    }
    let at_once = began.elapsed().as_secs_f64();
    bench.rows.row("many recordings, one at a time", one_by_one, "all at once", at_once, "s", ">= 1.8");
    Ok(())
}

/// Bytes of a sealed recording against zstd -19 of the whole log.
async fn stored(bench: &mut Bench<'_>) -> Result<()> {
    let guest = format!("{LONG_LOG} rounds={}", bench.command.log_rounds);
    bench.record("long", &guest, &["--no-last-snapshot"])?;
    let recording = recordings::find(&bench.client.store, "long").await?;
    let events = recordings::events(&bench.client.store, recording.id()).await?;
    let mut log = vec![];
    encode(&mut log, &mut 0, &events)?;
    let began = Instant::now();
    let best = zstd::bulk::compress(&log, 19).context("compress the log")?.len() as f64;
    let zstd_seconds = began.elapsed().as_secs_f64();
    let peer = format!("zstd -19 of the {:.1} MiB log", log.len() as f64 / f64::from(1 << 20));
    let row = &recording.row;
    let sealed = (row.bytes_stored + row.chunks * CHUNK_ROW_BYTES) as f64;
    bench.rows.row("stored, sealed", sealed, &peer, best, "bytes", "<= 1.00");
    let began = Instant::now();
    let mut builder = ChunkBuilder::new(RecordingId::default());
    let mut large = 0;
    for part in events.chunks(LOOK_EVENTS) {
        part.iter().for_each(|event| builder.push(event));
        if builder.raw_bytes() >= LARGE_BYTES {
            large += builder.take().map_or(0, |chunk| chunk.bytes.len());
        }
    }
    large += builder.take().map_or(0, |chunk| chunk.bytes.len());
    let own_seconds = began.elapsed().as_secs_f64();
    ensure!(large > 0, "nothing was encoded");
    let speed = |seconds: f64| log.len() as f64 / 1e6 / seconds.max(1e-9);
    bench.rows.row("encoding", speed(own_seconds), "zstd -19", speed(zstd_seconds), "MB/s", ">= 20");
    let began = Instant::now();
    let middle = events.len() as u64 / 2;
    let chunks = bench.client.store.read(recording.id(), middle, middle + 1).await?;
    let found = chunks.first().context("the event's chunk")?.events()?;
    ensure!(!found.is_empty(), "an empty chunk");
    let one = began.elapsed().as_secs_f64();
    let began = Instant::now();
    recordings::events(&bench.client.store, recording.id()).await?;
    let all = began.elapsed().as_secs_f64();
    bench.rows.row("reading one event in the middle", one, "reading all", all, "s", "for information");
    Ok(())
}
