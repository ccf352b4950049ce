//! `heddle bench store`: replicated durable appends against etcd and JetStream.
//!
//! Ours are three replicas as processes, each acknowledged chunk fsynced on a majority and
//! indexed; the client makes chains of chunks with random payloads and checks nothing away.

use super::Rows;
use super::peers::{ETCD_SETTINGS, Etcd, Load, Measured, NATS_SETTINGS, Nats, Timing, installed};
use crate::args::{BenchStore, Format};
use crate::cluster::Cluster;
use crate::exit::OK;
use crate::local::{LocalCluster, LocalConfig};
use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use heddle_proto::chunk::HEADER_BYTES;
use heddle_proto::event::KINDS;
use heddle_proto::{ChunkHeader, Hash, RecordingId, v1};
use heddle_storage::channel::is_transient;
use heddle_storage::{StoreClient, StoreError};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

const OURS: &str = "ours: fdatasync on a majority, CRC32C and BLAKE3 checked, indexed";
/// Loads: payload bytes, operations in flight, least ratio to etcd's throughput, and that
/// with mutual TLS on our side alone.
const LOADS: [(usize, usize, &str, &str); 3] = [
    (64 << 10, 64, ">= 4", ">= 3"),
    (4 << 10, 1024, ">= 10", ">= 8"),
    (64 << 10, 1, "for information", "for information"),
];
/// Bytes of chunks in one request, about.
const TOGETHER_BYTES: usize = 128 << 10;
/// Bytes of a recording in the steady state, and how many are kept.
const STEADY_BYTES: u64 = 128 << 20;
const STEADY_KEPT: usize = 4;

async fn start(dir: &Path, shards: u32, tls: Option<&Path>) -> Result<(LocalCluster, StoreClient)> {
    let cluster = LocalCluster::start(LocalConfig {
        program: std::env::current_exe().context("find this program")?,
        dir: dir.to_path_buf(),
        replicas: 3,
        nodes: 0,
        slots: 1,
        lease_ms: 3_600_000,
        offers_planted: false,
        qemu: vec![],
        shards,
        tls: tls.map(Path::to_path_buf),
        environment: BTreeMap::new(),
    })
    .await?;
    let store = Cluster::in_dir(cluster.dir())?.store;
    // Leaders go to their places first; a move in the middle of a load is another load.
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let rows = store.replicas().await;
        let led = rows.iter().flat_map(|row| row.shards.iter().map(move |shard| (row.id, shard)));
        let led = led.filter(|(_, shard)| shard.role == "leader");
        let in_place = led.filter(|(id, shard)| {
            let mut voters = shard.voters.clone();
            voters.sort_unstable();
            voters.get(shard.shard as usize % voters.len().max(1)) == Some(id)
        });
        if in_place.count() == shards as usize + 1 || Instant::now() > until {
            return Ok((cluster, store));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Makes a chain of chunks.
struct Chain {
    header: ChunkHeader,
    payloads: Vec<(Bytes, Hash)>,
    made: usize,
}

impl Chain {
    fn new(recording: RecordingId, load: &Load) -> Result<Chain> {
        let mut counts = [0; KINDS];
        counts[0] = 1;
        let payloads = load.payloads()?.into_iter().map(|p| (p.clone(), Hash::of(&p))).collect();
        let header = ChunkHeader {
            recording,
            first_event: 0,
            events: 1,
            first_icount: 0,
            last_icount: 0,
            payload_bytes: load.payload_bytes as u32,
            raw_bytes: load.payload_bytes as u32,
            payload_hash: Hash::ZERO,
            previous: Hash::ZERO,
            counts,
        };
        Ok(Chain { header, payloads, made: 0 })
    }

    fn next(&mut self) -> Bytes {
        let (payload, hash) = &self.payloads[self.made % self.payloads.len()];
        self.header.payload_hash = *hash;
        let head = self.header.encode();
        let mut bytes = BytesMut::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(payload);
        self.header.previous = Hash::of(&head);
        self.header.first_event += 1;
        self.header.first_icount += 1;
        self.header.last_icount += 1;
        self.made += 1;
        bytes.freeze()
    }
}

/// Appends to one recording until the time is over, or so many bytes are in; latencies that count.
async fn append(
    store: &StoreClient,
    load: &Load,
    timing: Timing,
    bytes_max: u64,
) -> Result<(Vec<f64>, RecordingId, Hash, u64)> {
    let id = RecordingId(rand::random());
    let epoch = store.open(id, b"bench", b"{}", false).await?.epoch;
    // The first chunk finds the leader. A stream that begins elsewhere, or whose leader
    // changes, is begun again with what was not acknowledged.
    let mut chain = Chain::new(id, load)?;
    let first = chain.next();
    let mut pending = VecDeque::from([(Instant::now(), first)]);
    let (mut latencies, mut acknowledged) = (vec![], 0u64);
    for attempt in 0.. {
        let (sender, requests) = mpsc::channel(load.window.max(1));
        let request = |chunk: Bytes| v1::AppendRequest {
            recording: id.to_vec().into(),
            epoch,
            chunk,
            rewrites: false,
            more: vec![],
        };
        for (_, chunk) in &pending {
            sender.send(request(chunk.clone())).await?;
        }
        let tried = store.tried(id);
        let whole = async {
            let mut replies = store.leader(id)?.append(ReceiverStream::new(requests)).await?.into_inner();
            while let Some(reply) = replies.message().await? {
                let now = Instant::now();
                while acknowledged < reply.committed_events {
                    acknowledged += 1;
                    let (sent, _) = pending.pop_front().context("an answer to nothing")?;
                    timing.take(sent, now, &mut latencies);
                }
                let is_full = chain.made as u64 * load.payload_bytes as u64 >= bytes_max;
                if timing.is_over(now) || is_full {
                    if pending.is_empty() {
                        break;
                    }
                    continue;
                }
                // What the window lets go at once shares messages.
                while pending.len() < load.window {
                    let free = load.window - pending.len();
                    let count = free.min(TOGETHER_BYTES / load.payload_bytes).max(1);
                    let chunks: Vec<Bytes> = (0..count).map(|_| chain.next()).collect();
                    let mut message = request(chunks[0].clone());
                    message.more = chunks[1..].to_vec();
                    let now = Instant::now();
                    pending.extend(chunks.into_iter().map(|chunk| (now, chunk)));
                    sender.send(message).await?;
                }
            }
            anyhow::Ok(())
        };
        let Err(error) = whole.await else { break };
        let status = match error.downcast_ref::<tonic::Status>() {
            Some(status) if is_transient(status) => status.clone(),
            _ => match error.downcast_ref::<StoreError>() {
                Some(StoreError::Unavailable(what)) => tonic::Status::unavailable(what.to_string()),
                _ => return Err(error),
            },
        };
        ensure!(attempt < 50, "the leader changes again and again: {status}");
        // Names of leaders come with refusals of single calls.
        store.get(id).await?;
        store.redirect(id, tried, &status);
    }
    ensure!(pending.is_empty(), "the stream ended with chunks in flight");
    Ok((latencies, id, chain.header.previous, epoch))
}

/// Bytes a process has written to files.
fn write_bytes(pid: Option<u32>) -> f64 {
    let text = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/io")).ok());
    let text = text.unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0.0)
}

/// The most bytes that any replica has written.
fn most_written(cluster: &LocalCluster, before: &[f64]) -> (Vec<f64>, f64) {
    let now: Vec<f64> = (1..=3).map(|id| write_bytes(cluster.pid(&format!("replica-{id}")))).collect();
    let most = now.iter().zip(before).map(|(now, before)| now - before).fold(0.0, f64::max);
    (now, most)
}

/// Resident bytes of a process.
fn resident(pid: Option<u32>) -> f64 {
    let text = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/statm")).ok());
    let pages = text.and_then(|text| text.split_whitespace().nth(1)?.parse::<f64>().ok());
    pages.unwrap_or(0.0) * 4096.0
}

/// Runs the store's benchmark.
pub async fn store(command: BenchStore, format: Format) -> Result<u8> {
    let dir = tempfile::tempdir().context("make a directory")?;
    let mut rows = Rows::default();
    eprintln!("  {OURS}\n  {ETCD_SETTINGS}\n  {NATS_SETTINGS}");
    let is_wanted = |part: &str| command.part.is_empty() || command.part.iter().any(|wanted| wanted == part);
    if is_wanted("peers") {
        for (number, (payload_bytes, window, target, tls_target)) in LOADS.into_iter().enumerate() {
            if command.load.is_some_and(|kib| kib << 10 != payload_bytes) {
                continue;
            }
            let load = Load { payload_bytes, window, seconds: command.seconds };
            let (parts, tls) = (dir.path().join(number.to_string()), dir.path().join("tls"));
            against_peers(&mut rows, &parts, &tls, &load, [target, tls_target]).await?;
        }
    }
    if is_wanted("steady") {
        steady(&mut rows, &dir.path().join("steady"), command.seconds * 3.0).await?;
    }
    if is_wanted("many") {
        many(&mut rows, &dir.path().join("many"), &command).await?;
    }
    if is_wanted("open") {
        open(&mut rows, &dir.path().join("open"), command.chunks).await?;
    }
    rows.print("store", format)?;
    Ok(OK)
}

fn name_of(load: &Load) -> String {
    format!("{} KiB x {}", load.payload_bytes >> 10, load.window)
}

/// Our own throughput, and the most bytes that a replica wrote.
async fn measure_ours(dir: &Path, load: &Load, tls: Option<&Path>) -> Result<(Measured, f64)> {
    let (cluster, store) = start(dir, 1, tls).await?;
    let (before, _) = most_written(&cluster, &[0.0; 3]);
    let timing = load.start()?;
    let (latencies, ..) = append(&store, load, timing, u64::MAX).await?;
    let ours = Measured::new(load, latencies)?;
    let (_, written) = most_written(&cluster, &before);
    cluster.stop().await;
    let _ = std::fs::remove_dir_all(dir);
    Ok((ours, written))
}

async fn against_peers(
    rows: &mut Rows,
    dir: &Path,
    tls: &Path,
    load: &Load,
    [target, tls_target]: [&str; 2],
) -> Result<()> {
    let name = name_of(load);
    let (ours, written) = measure_ours(&dir.join("heddle"), load, None).await?;
    let (ours_tls, _) = measure_ours(&dir.join("heddle-tls"), load, Some(tls)).await?;
    // The warm-up writes, too; its bytes are in both.
    let share = 1.0 + 1.0 / load.seconds;
    let payload = ours.bytes as f64 * share;
    rows.row(
        &format!("{name}, bytes written"),
        written / 1e6,
        "payload",
        payload / 1e6,
        "MB",
        "for information",
    );
    let compare = |rows: &mut Rows, peer: &str, theirs: &Measured, target: &str| {
        rows.row(&name, ours.mb_per_second(), peer, theirs.mb_per_second(), "MB/s", target);
        let p50 = if load.window == 1 && target.starts_with(['>', 'f']) && peer == "etcd" {
            "<= 1"
        } else {
            "for information"
        };
        let p99 = if load.window > 1 && peer == "etcd" { "<= 1" } else { "for information" };
        rows.row(&format!("{name}, p50"), ours.percentile(50.0), peer, theirs.percentile(50.0), "ms", p50);
        rows.row(&format!("{name}, p99"), ours.percentile(99.0), peer, theirs.percentile(99.0), "ms", p99);
    };
    if installed("etcd") {
        let etcd = Etcd::start(&dir.join("etcd")).await?;
        let theirs = etcd.run(load).await;
        let written = etcd.pids().into_iter().map(|pid| write_bytes(Some(pid))).fold(0.0, f64::max);
        etcd.stop().await;
        let payload = theirs.as_ref().map_or(0.0, |theirs| theirs.bytes as f64 * share);
        let row = format!("{name}, bytes that etcd wrote");
        rows.row(&row, written / 1e6, "payload", payload / 1e6, "MB", "for information");
        let theirs = theirs?;
        compare(rows, "etcd", &theirs, target);
        let name = format!("{name}, mutual TLS");
        rows.row(
            &name,
            ours_tls.mb_per_second(),
            "etcd in clear",
            theirs.mb_per_second(),
            "MB/s",
            tls_target,
        );
    } else {
        rows.without(&name, "etcd", target, "not installed: apt-get install etcd-server");
    }
    if installed("nats-server") {
        let nats = Nats::start(&dir.join("nats")).await?;
        let theirs = nats.run(load).await;
        nats.stop().await;
        compare(rows, "JetStream (not durable)", &theirs?, "for information");
    } else {
        rows.without(&name, "JetStream", "for information", "not installed: apt-get install nats-server");
    }
    let _ = std::fs::remove_dir_all(dir);
    Ok(())
}

/// Recordings come and go: segments are recycled, what lives is moved, checkpoints are written.
async fn steady(rows: &mut Rows, dir: &Path, seconds: f64) -> Result<()> {
    let (cluster, store) = start(dir, 1, None).await?;
    let load = Load { payload_bytes: 64 << 10, window: 64, seconds };
    let timing = load.start()?;
    let mut kept: VecDeque<RecordingId> = VecDeque::new();
    let mut before = vec![];
    let mut payload = 0.0;
    let mut recycled_from = None;
    while !timing.is_over(Instant::now()) {
        let whole = Timing::clone(&timing);
        let (_, id, last, epoch) = append(&store, &load, whole, STEADY_BYTES).await?;
        let row = store.get(id).await?;
        store.seal(id, epoch, row.committed_events, last, false).await?;
        kept.push_back(id);
        // Counted once the store has as many segments as it will have.
        if kept.len() > STEADY_KEPT {
            store.delete(kept.pop_front().context("one is kept")?).await?;
            match recycled_from {
                None => {
                    before = most_written(&cluster, &[0.0; 3]).0;
                    recycled_from = Some(Instant::now());
                }
                Some(_) => payload += (row.committed_events * load.payload_bytes as u64) as f64,
            }
        }
    }
    let (_, written) = most_written(&cluster, &before);
    let journal = store.replicas().await.iter().map(|row| row.journal_bytes).max().unwrap_or(0) as f64;
    let took = recycled_from.context("too short for a steady state: give it more --seconds")?.elapsed();
    rows.row("steady state, bytes written", written / 1e6, "payload", payload / 1e6, "MB", "<= 1.10");
    rows.row("steady state, payload", payload / 1e6, "the store's segments", journal / 1e6, "MB", ">= 2");
    let rate = payload / 1e6 / took.as_secs_f64();
    rows.row("steady state, throughput", rate, "one second", 1.0, "MB/s", "for information");
    cluster.stop().await;
    let _ = std::fs::remove_dir_all(dir);
    Ok(())
}

/// Many recordings at once on 64 shards against one.
async fn many(rows: &mut Rows, dir: &Path, command: &BenchStore) -> Result<()> {
    let (cluster, store) = start(dir, 64, None).await?;
    let one = Load { payload_bytes: 64 << 10, window: 64, seconds: command.seconds };
    let (latencies, ..) = append(&store, &one, one.start()?, u64::MAX).await?;
    let alone = Measured::new(&one, latencies)?;
    let memory = |cluster: &LocalCluster| {
        (1..=3).map(|id| resident(cluster.pid(&format!("replica-{id}")))).fold(0.0, f64::max)
    };
    let before = memory(&cluster);
    let each = Load { payload_bytes: 64 << 10, window: 1, seconds: command.seconds };
    let timing = each.start()?;
    let mut running = JoinSet::new();
    for _ in 0..command.recordings {
        let store = store.clone();
        running.spawn(async move { append(&store, &each, timing, u64::MAX).await });
    }
    let middle = timing.began() + Duration::from_secs_f64(1.0 + command.seconds / 2.0);
    tokio::time::sleep_until(middle.into()).await;
    let during = memory(&cluster);
    let mut latencies = vec![];
    while let Some(done) = running.join_next().await {
        latencies.extend(done??.0);
    }
    let together = Measured::new(&each, latencies)?;
    let name = format!("{} recordings on 64 shards", command.recordings);
    rows.row(&name, together.mb_per_second(), "one recording", alone.mb_per_second(), "MB/s", ">= 0.8");
    let each = (during - before).max(0.0) / command.recordings as f64 / 1024.0;
    rows.row("memory of an open recording", each, "256 KiB", 256.0, "KiB", "<= 1");
    cluster.stop().await;
    let _ = std::fs::remove_dir_all(dir);
    Ok(())
}

/// Opening a store that holds many chunks, and a seek in it.
async fn open(rows: &mut Rows, dir: &Path, chunks: u64) -> Result<()> {
    let (mut cluster, store) = start(dir, 1, None).await?;
    let load = Load { payload_bytes: 512, window: 4096, seconds: 600.0 };
    let timing = load.start()?;
    let (_, id, ..) = append(&store, &load, timing, chunks * 512).await?;
    let seek = async |event: u64| {
        let mut times = vec![];
        for step in 0..200u64 {
            let began = Instant::now();
            let found = store.read(id, event + step % 7, event + step % 7 + 1).await?;
            ensure!(found.len() == 1, "a seek found {} chunks", found.len());
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        anyhow::Ok(times[times.len() / 2])
    };
    let (near, far) = (seek(10).await?, seek(chunks - 20).await?);
    rows.row("seek near a long recording's end, p50", far, "near its beginning", near, "ms", "<= 1.5");
    // Long enough for the rows to be on disk, as they are in a store that was idle.
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.kill("replica-2").await?;
    let began = Instant::now();
    cluster.start_part("replica-2")?;
    let address = store.addresses()[1].clone();
    let alone = StoreClient::new(vec![address]).with_patience(Duration::from_secs(60));
    let row = loop {
        match alone.get(id).await {
            Ok(row) => break row,
            Err(StoreError::Unavailable(_)) if began.elapsed() < Duration::from_secs(120) => {}
            Err(error) => return Err(error.into()),
        }
    };
    ensure!(row.committed_events >= chunks, "{} of {chunks} chunks are there", row.committed_events);
    let took = began.elapsed().as_secs_f64();
    let name = format!("open after kill -9, {chunks} chunks");
    rows.row(&name, took, "3 s", 3.0, "s", "<= 1");
    cluster.stop().await;
    let _ = std::fs::remove_dir_all(dir);
    Ok(())
}
