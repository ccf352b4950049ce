//! Partitions: three real replicas, each in a network of its own that is cut, both ways and
//! one way. Who can't reach a majority promises nothing, the others go on, and what was
//! acknowledged is on every replica once they reach each other again.
#![allow(clippy::unwrap_used)]

use heddle_cli::local::DEFAULT_SHARDS;
use heddle_proto::{Body, Chunk, ChunkBuilder, Event, Hash, RecordingId, Role, v1};
use heddle_storage::placement::placement;
use heddle_storage::{StoreClient, StoreError};
use heddle_tests::network::Network;
use heddle_tests::witness::Watched;
use heddle_tests::{append, count, new_id, program, seed, until};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::slice::from_ref;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PORT: u16 = 7000;
const MANIFEST: &[u8] = b"{}";
/// The shard whose leader loses its followers.
const SHARD: u32 = 1;

#[test]
fn under_partitions_every_history_is_right_and_nothing_acknowledged_is_lost() {
    let Some(mut cluster) = Cluster::start() else { return };
    let random = StdRng::seed_from_u64(seed());
    cluster.network.block_on(async || rounds(&cluster, random).await);
    cluster.check_all_run();
}

/// The client reaches it all the while; nobody else does.
#[test]
fn a_leader_without_its_followers_neither_acknowledges_nor_answers() {
    let Some(mut cluster) = Cluster::start() else { return };
    cluster.network.block_on(async || without_followers(&cluster).await);
    cluster.check_all_run();
}

/// It leads shard 0, which says where recordings are to be, and one more.
#[test]
fn a_leader_that_fell_silent_holds_up_nobody_for_long() {
    let Some(mut cluster) = Cluster::start() else { return };
    cluster.network.block_on(async || around_the_silent(&cluster).await);
    cluster.check_all_run();
}

async fn rounds(cluster: &Cluster, mut random: StdRng) {
    let addresses = cluster.addresses();
    let store = StoreClient::new(addresses.clone());
    let mut acked: BTreeMap<RecordingId, Vec<Chunk>> = BTreeMap::new();
    let mut cuts: Vec<usize> = vec![];
    for round in 0..count(8, 60) {
        if cuts.is_empty() {
            cuts = (0..CUTS).collect();
            cuts.shuffle(&mut random);
        }
        // A recording on each shard: all of them must find a leader among those who are left.
        let start = |shard| Watched::start(new_id_on(shard), &addresses, &mut random);
        let watched: Vec<Watched> = (1..=DEFAULT_SHARDS).map(start).collect();
        more_acked(&watched, 3).await;
        let leader = *leaders(&store).await.get(&random.gen_range(0..=DEFAULT_SHARDS)).unwrap();
        let follower = *others(leader).choose(&mut random).unwrap();
        let cut = Cut::all(leader, follower)[cuts.pop().unwrap()];
        eprintln!("round {round}: {cut:?}");
        cut.apply(&cluster.network);
        if cut.leaves_majority() {
            more_acked(&watched, random.gen_range(5..40)).await;
        } else {
            none_acked(&watched).await;
        }
        cluster.network.heal();
        more_acked(&watched, 3).await;
        let ids: Vec<RecordingId> = watched.iter().map(|watched| watched.id).collect();
        for watched in watched {
            acked.insert(watched.id, watched.end().await);
        }
        for address in &addresses {
            let alone = StoreClient::new(vec![address.clone()]);
            for id in &ids {
                let row = until("the replica to catch up", async || alone.get(*id).await.ok()).await;
                assert_eq!(row.state, "sealed", "{id} at {address}");
            }
        }
    }
    check_everywhere(&addresses, &acked).await;
}

/// Each replica alone has all that was acknowledged, and all have the same.
async fn check_everywhere(addresses: &[String], acked: &BTreeMap<RecordingId, Vec<Chunk>>) {
    for (id, acked) in acked {
        let mut first: Option<Vec<Chunk>> = None;
        for address in addresses {
            let alone = StoreClient::new(vec![address.clone()]);
            let found = until("the recording", async || alone.read(*id, 0, 0).await.ok()).await;
            let by_event: BTreeMap<u64, &Chunk> =
                found.iter().map(|chunk| (chunk.header.first_event, chunk)).collect();
            for chunk in acked {
                let event = chunk.header.first_event;
                let there = by_event.get(&event).is_some_and(|found| found.bytes == chunk.bytes);
                assert!(there, "{address} lost the acknowledged chunk at event {event} of {id}");
            }
            let first = first.get_or_insert_with(|| found.clone());
            assert!(*first == found, "{id} is another one at {address}");
        }
    }
}

/// Waits until so many more chunks of each recording are acknowledged: with more than its
/// witnesses have under way, some were sent since.
async fn more_acked(watched: &[Watched], more: u64) {
    let before: Vec<u64> = watched.iter().map(Watched::acked).collect();
    until("chunks to be acknowledged", async || {
        watched.iter().zip(&before).all(|(watched, before)| watched.acked() >= before + more).then_some(())
    })
    .await;
}

/// Without a majority: what was under way is lost, and what comes after, and none of it is
/// acknowledged.
async fn none_acked(watched: &[Watched]) {
    let more_lost = async || {
        let before: Vec<u64> = watched.iter().map(Watched::lost).collect();
        until("questions to be left without an answer", async || {
            watched.iter().zip(&before).all(|(watched, before)| watched.lost() >= before + 5).then_some(())
        })
        .await;
    };
    more_lost().await;
    let acked = || watched.iter().map(Watched::acked).collect::<Vec<u64>>();
    let before = acked();
    more_lost().await;
    assert_eq!(acked(), before, "no two replicas hear each other");
}

/// A way to cut the network.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// It reaches nobody, clients neither.
    Alone(u64),
    /// These two don't reach each other.
    Between(u64, u64),
    /// What the first sends to the second is lost.
    OneWay(u64, u64),
    /// What it sends to other replicas is lost.
    Mute(u64),
    /// What other replicas send to it is lost.
    Deaf(u64),
    /// No replica reaches another.
    Apart,
    /// Each is heard by one other, and hears the third.
    Ring,
}

const CUTS: usize = 9;

impl Cut {
    fn all(leader: u64, follower: u64) -> [Cut; CUTS] {
        [
            Cut::Alone(leader),
            Cut::Alone(follower),
            Cut::Between(leader, follower),
            Cut::OneWay(leader, follower),
            Cut::OneWay(follower, leader),
            Cut::Mute(leader),
            Cut::Deaf(leader),
            Cut::Apart,
            Cut::Ring,
        ]
    }

    fn apply(self, network: &Network) {
        match self {
            Cut::Alone(replica) => network.cut(replica),
            Cut::Between(a, b) => network.cut_between(a, b),
            Cut::OneWay(from, to) => network.cut_one_way(from, to),
            Cut::Mute(from) => others(from).into_iter().for_each(|to| network.cut_one_way(from, to)),
            Cut::Deaf(to) => others(to).into_iter().for_each(|from| network.cut_one_way(from, to)),
            Cut::Apart => [(1, 2), (1, 3), (2, 3)].into_iter().for_each(|(a, b)| network.cut_between(a, b)),
            Cut::Ring => [(1, 2), (2, 3), (3, 1)].into_iter().for_each(|(a, b)| network.cut_one_way(a, b)),
        }
    }

    fn leaves_majority(self) -> bool {
        !matches!(self, Cut::Apart | Cut::Ring)
    }
}

fn others(replica: u64) -> Vec<u64> {
    (1..=3).filter(|other| *other != replica).collect()
}

fn new_id_on(shard: u32) -> RecordingId {
    std::iter::repeat_with(new_id).find(|id| placement(*id, DEFAULT_SHARDS) == shard).unwrap()
}

/// Who leads each shard, once all have a leader.
async fn leaders(store: &StoreClient) -> BTreeMap<u32, u64> {
    until("leaders of all shards", async || {
        let mut found: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for replica in store.replicas().await {
            for row in replica.shards.iter().filter(|row| row.role == "leader") {
                // The newest term's.
                let newest = found.entry(row.shard).or_default();
                *newest = (*newest).max((row.term, replica.id));
            }
        }
        let leaders: BTreeMap<u32, u64> = found.into_iter().map(|(shard, (_, id))| (shard, id)).collect();
        (0..=DEFAULT_SHARDS).all(|shard| leaders.contains_key(&shard)).then_some(leaders)
    })
    .await
}

async fn without_followers(cluster: &Cluster) {
    let addresses = cluster.addresses();
    let at = |replica: u64| addresses[replica as usize - 1].clone();
    let store = StoreClient::new(addresses.clone());
    let id = new_id_on(SHARD);
    let opened = until("a leader", async || store.open(id, b"one", MANIFEST, false).await.ok()).await;
    let first = chunk(id, None, 1);
    until("an append", async || {
        let appended = append(&store, opened.epoch, from_ref(&first)).await;
        // This finds who leads now.
        let _ = store.open(id, b"one", MANIFEST, false).await;
        appended.ok()
    })
    .await;
    // Shards have replicas that their leaders go to: from there it does not move by itself.
    let leader = 1 + u64::from(SHARD) % 3;
    until("the leader to be where it stays", async || {
        (leaders(&store).await[&SHARD] == leader).then_some(())
    })
    .await;
    others(leader).into_iter().for_each(|follower| cluster.network.cut_between(leader, follower));

    let alone = StoreClient::new(vec![at(leader)]).with_patience(Duration::from_secs(1));
    let (lost, kept) = (chunk(id, Some(&first), 2), chunk(id, Some(&first), 3));
    // Meanwhile the other two let another writer take over.
    let taking_over = async {
        let store = StoreClient::new(others(leader).into_iter().map(at).collect());
        let opened = until("a new leader", async || store.open(id, b"two", &[], true).await.ok()).await;
        until("an append at it", async || append(&store, opened.epoch, from_ref(&kept)).await.ok()).await;
    };
    let asking = async {
        tokio::join!(
            append(&alone, opened.epoch, from_ref(&lost)),
            alone.get(id),
            alone.read(id, 0, 0),
            taking_over
        )
    };
    let asked = tokio::time::timeout(Duration::from_secs(60), asking).await;
    let (appended, got, read, ()) = asked.expect("all is answered, in one way or another");
    let appended = appended.map_err(StoreError::from);
    assert!(matches!(appended, Err(StoreError::Unavailable(_))), "an append: {appended:?}");
    assert!(matches!(got, Err(StoreError::Unavailable(_))), "a look: {got:?}");
    assert!(matches!(read, Err(StoreError::Unavailable(_))), "a read: {read:?}");
    let reached = store.at(&at(leader)).unwrap().replicas(v1::ReplicasRequest {}).await.unwrap().into_inner();
    assert_eq!(reached.me.map(|row| row.id), Some(leader), "the client reaches it");

    cluster.network.heal();
    let whole = vec![first, kept];
    let found = until("it to hear of the others", async || alone.read(id, 0, 0).await.ok()).await;
    assert!(found == whole, "{} chunks", found.len());
    check_everywhere(&addresses, &BTreeMap::from([(id, whole)])).await;
}

async fn around_the_silent(cluster: &Cluster) {
    let addresses = cluster.addresses();
    let store = StoreClient::new(addresses.clone());
    let others = StoreClient::new(addresses[1..].to_vec());
    // Where the leaders of shards 0 and 3 stay: see `without_followers`.
    let silent = 1;
    until("the leaders to be where they stay", async || {
        let leaders = leaders(&store).await;
        (leaders[&0] == silent && leaders[&3] == silent).then_some(())
    })
    .await;
    let impatient = store.with_patience(Duration::from_secs(1));
    let known = new_id_on(3);
    until("a recording", async || impatient.open(known, b"known", MANIFEST, false).await.ok()).await;
    // Now the other two know as well whom to ask for a place.
    for shard in [1, 2] {
        others.open(new_id_on(shard), b"before", MANIFEST, false).await.unwrap();
    }
    cluster.network.cut(silent);
    let reached = until("new leaders", async || {
        let leaders = leaders(&others).await;
        leaders.values().all(|leader| *leader != silent).then_some(leaders)
    })
    .await;
    eprintln!("they lead now: {reached:?}");

    // Less than one attempt of a client that has time.
    let limit = Duration::from_secs(4);
    let began = Instant::now();
    others.open(new_id_on(1), b"new", MANIFEST, false).await.unwrap();
    assert!(began.elapsed() < limit, "a new recording waited {:?}", began.elapsed());
    let began = Instant::now();
    until("the impatient to find another", async || impatient.get(known).await.ok()).await;
    assert!(began.elapsed() < limit, "they waited {:?}", began.elapsed());
    cluster.network.heal();
}

/// A chunk of a few events behind another one.
fn chunk(id: RecordingId, before: Option<&Chunk>, value: u64) -> Chunk {
    let (events, last) = before.map_or((0, Hash::ZERO), |chunk| (chunk.header.end_event(), chunk.id()));
    let mut builder = ChunkBuilder::resume(id, events, last);
    for output in events..events + 10 {
        let body = Body::Check { value, output };
        builder.push(&Event { icount: output * 10, role: Role::Vcpu, body });
    }
    builder.take().unwrap()
}

/// Three replicas, each on a host of its own. All end when this is dropped.
struct Cluster {
    replicas: Vec<Child>,
    network: Network,
    dir: TempDir,
}

impl Cluster {
    /// `None` where there can't be such a network.
    fn start() -> Option<Cluster> {
        let network = Network::new(3)?;
        let mut cluster = Cluster { replicas: vec![], network, dir: TempDir::new().unwrap() };
        for replica in 1..=3 {
            let child = cluster.spawn(replica);
            cluster.replicas.push(child);
        }
        Some(cluster)
    }

    fn spawn(&self, replica: u64) -> Child {
        let mut command = self.network.command(replica, &program());
        command.args(["serve", "storage", "--with-parent", "--id", &replica.to_string()]);
        command.arg("--dir").arg(self.dir.path().join(format!("replica-{replica}")));
        command.args(["--listen", &format!("{}:{PORT}", self.network.address(replica))]);
        for (peer, address) in (1..).zip(self.addresses()) {
            command.args(["--peer", &format!("{peer}={address}")]);
        }
        let log = File::create(self.log(replica)).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap()
    }

    fn addresses(&self) -> Vec<String> {
        (1..=3).map(|replica| format!("http://{}:{PORT}", self.network.address(replica))).collect()
    }

    fn log(&self, replica: u64) -> PathBuf {
        self.dir.path().join(format!("replica-{replica}.log"))
    }

    fn check_all_run(&mut self) {
        for (child, replica) in self.replicas.iter_mut().zip(1..) {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "replica {replica} has ended: {ended:?}");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in &mut self.replicas {
            let _ = child.kill();
            let _ = child.wait();
        }
        for replica in (1..=3).filter(|_| std::thread::panicking()) {
            let log = std::fs::read_to_string(self.log(replica)).unwrap_or_default();
            eprintln!("replica {replica} said: {}", log.trim());
        }
    }
}
