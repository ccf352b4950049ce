//! A disk that is full, or that fails: nothing acknowledged is lost, whoever can goes on,
//! and with the cause the trouble goes.
#![allow(clippy::unwrap_used)]

use heddle_cli::local::LocalCluster;
use heddle_proto::{AsyncEvent, Body, Chunk, ChunkBuilder, Event, RecordingId, Role};
use heddle_storage::{StoreClient, StoreError};
use heddle_tests::device::{Device, may_mount};
use heddle_tests::{append, count, new_id, root, run, three_replicas, until};
use rand::RngCore;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tonic::{Code, Status};

/// A small device, and what is taken away of it at first: what is left holds the segments
/// that a replica keeps ready, and fills up within seconds.
const DEVICE_BYTES: u64 = 640 << 20;
const BALLAST_BYTES: u64 = 384 << 20;
const ROOM_BYTES: u64 = DEVICE_BYTES - BALLAST_BYTES;
const CHUNK_BYTES: usize = 512 << 10;
const TOKEN: &[u8] = b"disk";
const MANIFEST: &[u8] = b"{}";

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_disk_is_full_catches_up_once_it_is_not() {
    if !may_mount() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let home = home(&dir);
    let device = small_device(&dir, &home, 2);
    let mut cluster = LocalCluster::start(three_replicas(&home)).await.unwrap();
    let store = StoreClient::new(cluster.file().replicas);
    let mut recording = Recording::open(&store).await;
    // More than it has room for, unless it leads and refuses.
    let enough = ROOM_BYTES + (32 << 20);
    while recording.bytes() < enough && recording.append(&store).await.is_ok() {}
    eprintln!("{} MiB appended, {} MiB free", recording.bytes() >> 20, device.free_bytes() >> 20);
    if recording.bytes() < enough {
        // Nobody else may refuse for it.
        let leader = store.replicas().await.into_iter().find(|row| row.role == "leader");
        assert_eq!(leader.map(|row| row.id), Some(2));
    }
    recording.check(&store).await;
    all_go_on(&mut cluster);
    device.release();
    until("appends to be taken", async || recording.append(&store).await.ok()).await;
    recording.check_everywhere(&store).await;
    all_go_on(&mut cluster);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_refuses_and_goes_on_once_there_is_room() {
    if !may_mount() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let home = home(&dir);
    let devices = [1, 2, 3].map(|replica| small_device(&dir, &home, replica));
    let mut cluster = LocalCluster::start(three_replicas(&home)).await.unwrap();
    let store = StoreClient::new(cluster.file().replicas);
    let mut recording = Recording::open(&store).await;
    let refused = loop {
        assert!(recording.bytes() < ROOM_BYTES, "more was acknowledged than there is room for");
        if let Err(status) = recording.append(&store).await {
            break status;
        }
    };
    eprintln!("{} MiB appended, then: {}", recording.bytes() >> 20, refused.message());
    // It is asked again and again, and what is refused leaves nothing behind.
    for _ in 0..count(20, 500) {
        let _ = recording.append(&store).await;
    }
    recording.check(&store).await;
    assert_eq!(store.list().await.unwrap().len(), 1);
    all_go_on(&mut cluster);
    devices.iter().for_each(Device::release);
    until("appends to be taken", async || recording.append(&store).await.ok()).await;
    for _ in 0..20 {
        recording.append(&store).await.unwrap();
    }
    recording.check_everywhere(&store).await;
    all_go_on(&mut cluster);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_or_sync_stops_that_replica_alone() {
    let dir = TempDir::new().unwrap();
    let home = home(&dir);
    let library = faulty_disk(dir.path());
    let trigger = |name: &str| home.join(format!("{name}.fails"));
    let mut config = three_replicas(&home);
    for replica in 1..=3 {
        let name = format!("replica-{replica}");
        let variables = [
            ("LD_PRELOAD", library.clone()),
            ("FAULTY_DISK_DIR", home.join(&name)),
            ("FAULTY_DISK_TRIGGER", trigger(&name)),
        ];
        let variables = variables.map(|(key, path)| (key.to_string(), path.to_str().unwrap().to_string()));
        config.environment.insert(name, variables.to_vec());
    }
    let mut cluster = LocalCluster::start(config).await.unwrap();
    let store = StoreClient::new(cluster.file().replicas);
    let mut recording = Recording::open(&store).await;
    for (what, leads) in [("sync", false), ("sync", true), ("write", false), ("write", true)] {
        recording.append(&store).await.unwrap();
        let victim = until("a replica of that role", async || {
            let replicas = store.replicas().await;
            let role = if leads { "leader" } else { "follower" };
            replicas.iter().find(|row| row.role == role).map(|row| format!("replica-{}", row.id))
        })
        .await;
        std::fs::write(trigger(&victim), what).unwrap();
        let (ended, why) = until("the replica to stop", async || {
            recording.append(&store).await.unwrap();
            cluster.ended()
        })
        .await;
        assert_eq!(ended, victim, "{why}");
        let named = home.join(&victim).join("journal").display().to_string();
        for part in [named.as_str(), ".seg", "Input/output error"] {
            assert!(why.contains(part), "{what}, leader: {leads}: no {part:?} in {why}");
        }
        for _ in 0..10 {
            recording.append(&store).await.unwrap();
        }
        recording.check(&store).await;
        std::fs::remove_file(trigger(&victim)).unwrap();
        cluster.start_part(&victim).unwrap();
        recording.check_everywhere(&store).await;
        all_go_on(&mut cluster);
    }
    cluster.stop().await;
}

/// Where the cluster is, by its real name.
fn home(dir: &TempDir) -> PathBuf {
    let home = dir.path().join("cluster");
    std::fs::create_dir(&home).unwrap();
    home.canonicalize().unwrap()
}

/// A small device that will have this replica's directory.
fn small_device(dir: &TempDir, home: &Path, replica: u64) -> Device {
    let name = format!("replica-{replica}");
    let device = Device::new(dir.path(), &name, DEVICE_BYTES);
    let there = device.path().join("data");
    std::fs::create_dir(&there).unwrap();
    std::os::unix::fs::symlink(there, home.join(name)).unwrap();
    device.fill(BALLAST_BYTES);
    device
}

/// The library that makes a disk fail, compiled.
fn faulty_disk(dir: &Path) -> PathBuf {
    let library = dir.join("faulty_disk.so");
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&library);
    command.arg(root().join("tests/faulty_disk.c")).arg("-ldl");
    run(&mut command, b"").expect(0);
    library
}

fn all_go_on(cluster: &mut LocalCluster) {
    if let Some((_, why)) = cluster.ended() {
        panic!("{why}");
    }
}

/// A recording that grows by large chunks.
struct Recording {
    id: RecordingId,
    epoch: u64,
    builder: ChunkBuilder,
    acked: Vec<Chunk>,
    /// The one that was refused, to be tried next.
    refused: Option<Chunk>,
}

impl Recording {
    async fn open(store: &StoreClient) -> Recording {
        let id = new_id();
        let epoch = store.open(id, TOKEN, MANIFEST, false).await.unwrap().epoch;
        Recording { id, epoch, builder: ChunkBuilder::new(id), acked: vec![], refused: None }
    }

    /// Appends a chunk, whoever leads. An error: the store has no room for it.
    async fn append(&mut self, store: &StoreClient) -> Result<(), Status> {
        let chunk = match self.refused.take() {
            Some(chunk) => chunk,
            None => self.next_chunk(),
        };
        let (id, epoch) = (self.id, self.epoch);
        let said = until("an answer to an append", async || {
            let attempt = append(store, epoch, std::slice::from_ref(&chunk));
            match tokio::time::timeout(Duration::from_secs(5), attempt).await {
                Ok(Ok(_)) => return Some(Ok(())),
                Ok(Err(status)) if status.code() == Code::ResourceExhausted => return Some(Err(status)),
                Ok(Err(status)) => match StoreError::from(status) {
                    StoreError::Unavailable(_) => {}
                    other => panic!("the store refuses what it should take: {other}"),
                },
                Err(_) => {}
            }
            // This finds who leads now.
            let _ = store.open(id, TOKEN, MANIFEST, false).await;
            None
        })
        .await;
        match said {
            Ok(()) => self.acked.push(chunk),
            Err(_) => self.refused = Some(chunk),
        }
        said
    }

    fn next_chunk(&mut self) -> Chunk {
        let mut data = vec![0; CHUNK_BYTES];
        rand::thread_rng().fill_bytes(&mut data);
        let icount = 10 * self.acked.len() as u64;
        let body = Body::Async(AsyncEvent::Char { data });
        self.builder.push(&Event { icount, role: Role::Vcpu, body });
        self.builder.take().unwrap()
    }

    fn bytes(&self) -> u64 {
        self.acked.iter().map(|chunk| chunk.bytes.len() as u64).sum()
    }

    /// All that was acknowledged is read back.
    async fn check(&self, store: &StoreClient) {
        let found = until("the recording", async || match store.read(self.id, 0, 0).await {
            Err(StoreError::Unavailable(_)) => None,
            read => Some(read.unwrap()),
        })
        .await;
        let (acked, there) = (self.acked.len(), found.len());
        assert!(acked <= there, "{acked} chunks were acknowledged, {there} are there");
        let mut both = found.iter().zip(&self.acked);
        assert!(both.all(|(found, acked)| found.bytes == acked.bytes), "a chunk has other bytes");
    }

    /// The same, from each replica alone, once it has caught up.
    async fn check_everywhere(&self, store: &StoreClient) {
        for address in store.addresses() {
            self.check(&StoreClient::new(vec![address.clone()])).await;
        }
    }
}
