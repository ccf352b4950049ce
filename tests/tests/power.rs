//! A power cut: what was acknowledged has reached the device, all of it.
//!
//! A cluster lives on an ext4 in a file. At random moments its replicas are stopped and the
//! file is copied: what only the kernel's memory had is not in the copy. A fresh cluster on
//! the copy must have all that was acknowledged, stand by its votes, and go on.
//! Not shown: writes torn in the middle, and a device that loses its own cache.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use heddle_cli::local::LocalCluster;
use heddle_proto::{Body, Chunk, ChunkBuilder, Event, Hash, RecordingId, Role, v1};
use heddle_storage::{StoreClient, StoreError};
use heddle_tests::device::{Device, may_mount};
use heddle_tests::{append, chunks, count, new_id, seed, three_replicas, until};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngCore, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// Holds three times what all rounds write, some 250 MiB, and segments kept ready.
const DEVICE_BYTES: u64 = 3 << 30;
/// Bytes that a writer begins to send between two cuts: then it has done its share.
const SHARE_BYTES: usize = 1 << 20;
const WRITERS: u64 = 4;
/// Events of a chunk: some ten bytes each.
const SIZES: [u64; 6] = [1, 5, 40, 300, 2000, 10_000];
const TOKEN: &[u8] = b"power";
const MANIFEST: &[u8] = b"{}";

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_to_a_power_cut() {
    if !may_mount() {
        return;
    }
    let mut random = StdRng::seed_from_u64(seed());
    let dir = TempDir::new().unwrap();
    let device = Device::new(dir.path(), "device", DEVICE_BYTES);
    let config = three_replicas(&device.path().join("cluster"));
    let mut cluster = LocalCluster::start(config).await.unwrap();
    let store = StoreClient::new(cluster.file().replicas);
    let ledger = Ledger::default();
    for round in 0..count(4, 50) {
        if round % 3 == 1 {
            // Another term, with other votes.
            let (leader, _) = led(&how_all_stand(&store).await).unwrap();
            let name = format!("replica-{leader}");
            cluster.kill(&name).await.unwrap();
            cluster.start_part(&name).unwrap();
        }
        let before = how_all_stand(&store).await;
        let load = Load::start(&store, &ledger, round, &mut random);
        let is_of_round = |promise: &Promise| promise.round == round && promise.acked > 0;
        until("chunks to be acknowledged", async || {
            ledger.lock().unwrap().values().any(is_of_round).then_some(())
        })
        .await;
        // Not to wait for anything: this is the random moment.
        tokio::time::sleep(Duration::from_micros(random.gen_range(20_000..200_000))).await;
        signal_replicas(&cluster, Signal::STOP);
        let copy = device.copy(dir.path(), "copy");
        // An answer that has come by now was sent before its replica stopped.
        let mut promises = ledger.lock().unwrap().clone();
        promises.retain(|_, promise| promise.round == round || random.gen_bool(0.1));
        examine(&copy, &before, &promises, &mut random).await;
        drop(copy);
        signal_replicas(&cluster, Signal::CONT);
        load.stop().await;
    }
    cluster.stop().await;
}

fn signal_replicas(cluster: &LocalCluster, signal: Signal) {
    for replica in 1..=3 {
        let pid = cluster.pid(&format!("replica-{replica}")).unwrap();
        kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    }
}

/// Starts a cluster on the copy, and checks what it has.
async fn examine(
    copy: &Device,
    before: &[v1::ReplicaRow],
    promises: &BTreeMap<RecordingId, Promise>,
    random: &mut StdRng,
) {
    let config = three_replicas(&copy.path().join("cluster"));
    let cluster = LocalCluster::start(config).await.unwrap();
    let store = StoreClient::new(cluster.file().replicas);
    check_terms(before, &how_all_stand(&store).await);
    // Whichever is asked knows all of it.
    let alone = StoreClient::new(vec![store.addresses().choose(random).unwrap().clone()]);
    for (id, promise) in promises {
        promise.check(*id, &store, &alone).await;
    }
    let (id, all) = (new_id(), (0..500).map(|i| event(i, random.next_u64())).collect::<Vec<_>>());
    let more = chunks(id, &all, 100);
    let epoch = store.open(id, TOKEN, MANIFEST, false).await.unwrap().epoch;
    assert_eq!(append(&store, epoch, &more).await.unwrap(), 500);
    assert_eq!(store.read(id, 0, 0).await.unwrap(), more);
}

/// No replica is in an earlier term than the one it had reported.
fn check_terms(before: &[v1::ReplicaRow], after: &[v1::ReplicaRow]) {
    for (before, after) in before.iter().zip(after) {
        let (id, old, new) = (after.id, before.term, after.term);
        assert!(old <= new, "replica {id} was in term {old}, and is in term {new}");
    }
    // A majority had voted in the old leader's term: nobody is elected in it again.
    let ((_, old), (_, new)) = (led(before).unwrap(), led(after).unwrap());
    assert!(old < new, "term {old} had a leader, and one was elected in term {new}");
}

/// How the replicas stand, once all answer and one leads.
async fn how_all_stand(store: &StoreClient) -> Vec<v1::ReplicaRow> {
    until("a leader of three", async || {
        let rows = store.replicas().await;
        let all_answer = rows.iter().all(|row| row.role != "unreachable");
        (all_answer && led(&rows).is_some()).then_some(rows)
    })
    .await
}

/// The newest leader, and its term.
fn led(rows: &[v1::ReplicaRow]) -> Option<(u64, u64)> {
    let leaders = rows.iter().filter(|row| row.role == "leader");
    leaders.map(|row| (row.id, row.term)).max_by_key(|(_, term)| *term)
}

/// What a writer sent of a recording, and what of that was acknowledged.
#[derive(Clone, Default)]
struct Promise {
    round: u64,
    sent: Vec<Chunk>,
    acked: usize,
    blocks: Vec<(Hash, Bytes)>,
    snapshots: Vec<v1::SnapshotRow>,
    ended: Option<&'static str>,
}

type Ledger = Arc<Mutex<BTreeMap<RecordingId, Promise>>>;

impl Promise {
    async fn check(&self, id: RecordingId, store: &StoreClient, alone: &StoreClient) {
        let row = store.get(id).await.unwrap_or_else(|error| panic!("recording {id}: {error}"));
        let found = alone.read(id, 0, 0).await.unwrap_or_else(|error| panic!("chunks of {id}: {error}"));
        let (acked, there, sent) = (self.acked, found.len(), self.sent.len());
        assert!(acked <= there, "{id}: {acked} chunks were acknowledged, {there} are there");
        assert!(there <= sent, "{id}: {sent} chunks were sent, {there} are there");
        let same = found.iter().zip(&self.sent).all(|(found, sent)| found.bytes == sent.bytes);
        assert!(same, "{id}: a chunk has other bytes");
        if let Some(ended) = self.ended {
            assert_eq!((row.state.as_str(), there), (ended, sent), "{id}");
        }
        for snapshot in &self.snapshots {
            assert!(row.snapshots.contains(snapshot), "{id}: snapshot {snapshot:?} is not there");
        }
        let hashes: Vec<Hash> = self.blocks.iter().map(|(hash, _)| *hash).collect();
        let blocks = store.get_blocks(&hashes).await;
        let blocks = blocks.unwrap_or_else(|error| panic!("blocks of {id}: {error}"));
        assert!(blocks.iter().zip(&self.blocks).all(|(found, (_, sent))| found == sent), "blocks of {id}");
    }
}

/// Writers that write until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(store: &StoreClient, ledger: &Ledger, round: u64, random: &mut StdRng) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let writer = |_| Writer {
            store: store.with_patience(Duration::from_millis(500)),
            ledger: ledger.clone(),
            stop: stop.clone(),
            round,
            random: StdRng::seed_from_u64(random.next_u64()),
        };
        let writers: Vec<Writer> = (0..WRITERS).map(writer).collect();
        Load { stop, writers: writers.into_iter().map(|writer| tokio::spawn(writer.run())).collect() }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
    }
}

struct Writer {
    store: StoreClient,
    ledger: Ledger,
    stop: Arc<AtomicBool>,
    round: u64,
    random: StdRng,
}

/// A step of a writer.
enum Act {
    Open,
    Append(Vec<Chunk>),
    PutBlocks(Vec<(Hash, Bytes)>),
    AddSnapshot(v1::SnapshotRow),
    Seal { events: u64, last_chunk: Hash, cut: bool },
}

impl Act {
    fn bytes(&self) -> usize {
        match self {
            Act::Append(chunks) => chunks.iter().map(|chunk| chunk.bytes.len()).sum(),
            Act::PutBlocks(blocks) => blocks.iter().map(|(_, bytes)| bytes.len()).sum(),
            Act::Open | Act::AddSnapshot(_) | Act::Seal { .. } => 0,
        }
    }
}

impl Writer {
    /// Recording after recording, one act after the other, each until it is acknowledged.
    async fn run(mut self) {
        let mut bytes = 0;
        while bytes < SHARE_BYTES {
            let (id, mut epoch) = (new_id(), 0u64);
            for act in plan(id, &mut self.random) {
                bytes += act.bytes();
                if let Act::Append(chunks) = &act {
                    self.note(id, |promise| promise.sent.extend_from_slice(chunks));
                }
                while !self.perform(id, &mut epoch, &act).await {
                    if self.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    // This finds who leads now.
                    let _ = self.store.open(id, TOKEN, MANIFEST, false).await;
                }
                self.note(id, |promise| match act {
                    Act::Open => promise.round = self.round,
                    Act::Append(_) => promise.acked = promise.sent.len(),
                    Act::PutBlocks(blocks) => promise.blocks.extend(blocks),
                    Act::AddSnapshot(row) => promise.snapshots.push(row),
                    Act::Seal { cut, .. } => promise.ended = Some(if cut { "cut" } else { "sealed" }),
                });
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        }
    }

    fn note(&self, id: RecordingId, change: impl FnOnce(&mut Promise)) {
        change(self.ledger.lock().unwrap().entry(id).or_default());
    }

    /// Whether the act was acknowledged; whether it was done is unknown otherwise.
    async fn perform(&self, id: RecordingId, epoch: &mut u64, act: &Act) -> bool {
        let attempt = tokio::time::timeout(Duration::from_secs(5), self.attempt(id, epoch, act));
        match attempt.await {
            Ok(Ok(())) => true,
            Ok(Err(StoreError::Unavailable(_))) | Err(_) => false,
            Ok(Err(error)) => panic!("the store refuses what it should take: {error}"),
        }
    }

    async fn attempt(&self, id: RecordingId, epoch: &mut u64, act: &Act) -> Result<(), StoreError> {
        let store = &self.store;
        match act {
            Act::Open => *epoch = store.open(id, TOKEN, MANIFEST, false).await?.epoch,
            Act::Append(chunks) => {
                append(store, *epoch, chunks).await?;
            }
            Act::PutBlocks(blocks) => {
                store.put_blocks(id, blocks.clone()).await?;
            }
            Act::AddSnapshot(row) => store.add_snapshot(id, *epoch, row.clone()).await?,
            Act::Seal { events, last_chunk, cut } => {
                store.seal(id, *epoch, *events, *last_chunk, *cut).await?;
            }
        }
        Ok(())
    }
}

/// All that is done with a recording: batches of chunks of assorted sizes, now and then a
/// snapshot, often an end.
fn plan(id: RecordingId, random: &mut StdRng) -> Vec<Act> {
    let mut builder = ChunkBuilder::new(id);
    let (mut events, mut last_chunk) = (0u64, Hash::ZERO);
    let mut acts = vec![Act::Open];
    for _ in 0..random.gen_range(1..20) {
        let mut batch = vec![];
        for _ in 0..random.gen_range(1..5) {
            for _ in 0..*SIZES.choose(random).unwrap() {
                builder.push(&event(events, random.next_u64()));
                events += 1;
            }
            batch.push(builder.take().unwrap());
        }
        last_chunk = batch.last().unwrap().id();
        acts.push(Act::Append(batch));
        if random.gen_bool(0.15) {
            let blocks: Vec<_> = (0..random.gen_range(1..20)).map(|_| block(random)).collect();
            let root = blocks[0].0.to_vec().into();
            let (icount, digest) = (events * 10, vec![7u8; 32].into());
            let row = v1::SnapshotRow { icount, event: events, root, digest };
            acts.extend([Act::PutBlocks(blocks), Act::AddSnapshot(row)]);
        }
    }
    if random.gen_bool(0.6) {
        acts.push(Act::Seal { events, last_chunk, cut: random.gen_bool(0.3) });
    }
    acts
}

fn event(i: u64, value: u64) -> Event {
    Event { icount: i * 10, role: Role::Vcpu, body: Body::Check { value, output: i } }
}

fn block(random: &mut StdRng) -> (Hash, Bytes) {
    let mut bytes = vec![0; 4096];
    random.fill_bytes(&mut bytes);
    (Hash::of(&bytes), Bytes::from(bytes))
}
