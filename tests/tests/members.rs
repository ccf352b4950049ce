//! The store's members as real processes: replicas come and go, and what they hold is whole.
#![allow(clippy::unwrap_used)]

use heddle_proto::{Body, Chunk, Event, Hash, RecordingId, Role};
use heddle_storage::StoreClient;
use heddle_tests::{Processes, append, chunks, new_id, until};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use serde_json::Value;
use std::os::unix::fs::FileExt;

fn events(count: u64) -> Vec<Event> {
    let body = |i: u64| Body::Check { value: i.wrapping_mul(0x9e37_79b9_7f4a_7c15), output: i };
    (0..count).map(|i| Event { icount: i * 10, role: Role::Vcpu, body: body(i) }).collect()
}

/// Recordings with blocks of their own, sealed.
async fn fill(
    store: &StoreClient,
    count: usize,
) -> Vec<(RecordingId, Vec<Chunk>, Vec<(Hash, bytes::Bytes)>)> {
    let mut random = StdRng::seed_from_u64(count as u64);
    let mut all = vec![];
    for _ in 0..count {
        let id = new_id();
        let epoch = store.open(id, b"writer", b"{}", false).await.unwrap().epoch;
        let chunks = chunks(id, &events(3000), 150);
        append(store, epoch, &chunks).await.unwrap();
        let block = |_| {
            let mut bytes = vec![0; 4096];
            random.fill_bytes(&mut bytes);
            (Hash::of(&bytes), bytes::Bytes::from(bytes))
        };
        let blocks: Vec<_> = (0..40).map(block).collect();
        store.put_blocks(id, blocks.clone()).await.unwrap();
        store.seal(id, epoch, 3000, chunks.last().unwrap().id(), false).await.unwrap();
        all.push((id, chunks, blocks));
    }
    all
}

/// All of it is there, as the replica at `address` alone says.
async fn check(address: &str, all: &[(RecordingId, Vec<Chunk>, Vec<(Hash, bytes::Bytes)>)]) {
    let alone = StoreClient::new(vec![address.to_string()]);
    for (id, chunks, blocks) in all {
        let found = until("the replica to answer", async || alone.read(*id, 0, 0).await.ok()).await;
        assert!(found == *chunks, "{id} at {address}");
        let hashes: Vec<Hash> = blocks.iter().map(|(hash, _)| *hash).collect();
        let found = alone.get_blocks(&hashes).await.unwrap();
        assert!(found.iter().zip(blocks).all(|(found, (_, bytes))| found == bytes), "{id} at {address}");
    }
}

async fn shards(p: &Processes) -> Vec<Value> {
    p.heddle(&["get", "shards", "-o", "json"]).await.expect(0).json().as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_comes_another_goes_and_the_bytes_are_all_there() {
    let mut p = Processes::start(0, 3_600_000).await;
    let store = p.client.store.clone();
    let mut all = fill(&store, 6).await;
    // One is lost with its disk; another takes its place under an id of its own.
    p.cluster.kill("replica-2").await.unwrap();
    std::fs::remove_dir_all(p.cluster.dir().join("replica-2")).unwrap();
    let (id, url) = p.cluster.add_replica(1).unwrap();
    assert_eq!(id, 4);
    p.heddle(&["replica", "add", &format!("4={url}")]).await.expect(0);
    p.heddle(&["replica", "remove", "2"]).await.expect(0);
    for shard in shards(&p).await {
        let mut voters: Vec<u64> =
            shard["voters"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        voters.sort_unstable();
        assert_eq!(voters, [1, 3, 4], "{shard}");
    }
    check(&url, &all).await;
    // Now the new one counts: with one of the old it is a majority.
    p.cluster.kill("replica-1").await.unwrap();
    all.extend(fill(&store, 1).await);
    p.cluster.start_part("replica-1").unwrap();
    check(&url, &all).await;
    // An id that is gone stays gone.
    let back = p.heddle(&["replica", "add", "2=http://127.0.0.1:1"]).await.expect(1);
    assert!(back.err.contains("a new one takes a new id"), "{}", back.err);
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaders_are_spread_and_leave_a_drained_replica() {
    let p = Processes::start(0, 3_600_000).await;
    // Even in the cluster's first moments, when the store has no row of it yet.
    p.heddle(&["replica", "drain", "3"]).await.expect(0);
    p.heddle(&["replica", "undrain", "3"]).await.expect(0);
    let leaders = async || {
        let shards = shards(&p).await;
        shards.iter().map(|shard| shard["leader"].as_u64()).collect::<Option<Vec<u64>>>()
    };
    until("leaders on all replicas", async || {
        leaders().await.filter(|led| (1..=3).all(|id| led.contains(&id)))
    })
    .await;
    p.heddle(&["replica", "drain", "3"]).await.expect(0);
    assert!(leaders().await.is_none_or(|led| !led.contains(&3)));
    p.heddle(&["replica", "undrain", "3"]).await.expect(0);
    until("it leads again", async || leaders().await.filter(|led| led.contains(&3))).await;
    p.cluster.stop().await;
}

/// A bit rots on one replica's disk: reads still get what was written, and scrub mends it.
#[tokio::test(flavor = "multi_thread")]
async fn rotten_bytes_are_mended_from_another_replica() {
    let p = Processes::start(0, 3_600_000).await;
    let store = p.client.store.clone();
    let all = fill(&store, 3).await;
    let dir = p.cluster.dir().join("replica-1/journal");
    let segment = dir.join("0000000000000001.seg");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&segment).unwrap();
    let content = std::fs::read(&segment).unwrap();
    let mut rotten = 0;
    for (_, chunks, _) in &all {
        let chunk = &chunks[3].bytes[..];
        let at = content.windows(chunk.len()).position(|window| window == chunk).expect("it is stored");
        let at = at + chunk.len() - 5;
        file.write_all_at(&[content[at] ^ 0x20], at as u64).unwrap();
        rotten += 1;
    }
    // The first is asked for, and mended on the way.
    let address = store.addresses()[0].clone();
    check(&address, &all[..1]).await;
    let said = p.heddle(&["scrub", "--rate", "0", "-o", "json"]).await.expect(0).json();
    let row = &said[0];
    assert_eq!(row["damaged"], row["mended"], "{said}");
    assert!(row["damaged"].as_u64().unwrap() >= rotten - 1, "{said}");
    check(&address, &all).await;
    let again = p.heddle(&["scrub", "--rate", "0", "-o", "json"]).await.expect(0).json();
    assert!(again.as_array().unwrap().iter().all(|row| row["damaged"] == 0), "{again}");
    p.cluster.stop().await;
}
