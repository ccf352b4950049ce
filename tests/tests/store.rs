//! The log store as three real processes: what was acknowledged is there.
#![allow(clippy::unwrap_used)]

use heddle_node::rewrite::rewrite;
use heddle_proto::{Body, Chunk, ChunkBuilder, Event, Hash, Role, v1};
use heddle_storage::placement::block_shard;
use heddle_storage::{Route, StoreError};
use heddle_tests::{Processes, append, chunks, count, new_id, until};
use std::path::Path;
use std::time::Duration;

fn events(from: u64, count: u64) -> Vec<Event> {
    let body = |i: u64| Body::Check { value: i.wrapping_mul(0x9e37_79b9_7f4a_7c15), output: i };
    (from..from + count).map(|i| Event { icount: i * 10, role: Role::Vcpu, body: body(i) }).collect()
}

/// A chunk of that many bytes is large here: a few hundred events.
const LARGE: usize = 10 << 10;

fn manifest() -> Vec<u8> {
    b"{}".to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_duplicates_gaps_and_conflicts() {
    let p = Processes::start(0, 5000).await;
    let store = &p.client.store;
    let id = new_id();
    let all = chunks(id, &events(0, 1000), 100);
    let opened = store.open(id, b"one", &manifest(), false).await.unwrap();
    assert_eq!(opened.epoch, store.open(id, b"one", &manifest(), false).await.unwrap().epoch, "a retry");
    let other = store.open(id, b"two", &manifest(), false).await.unwrap_err();
    assert!(matches!(other, StoreError::Fenced(_)), "{other}");

    p.leader().await;
    // Warm up the client's idea of the leader, which append relies on.
    assert_eq!(
        store.seal(id, 99, 0, Hash::ZERO, false).await.unwrap_err().to_string(),
        "FENCED: epoch 1 has taken over"
    );
    assert_eq!(append(store, opened.epoch, &all[..5]).await.unwrap(), 500);
    assert_eq!(append(store, opened.epoch, &all[2..4]).await.unwrap(), 500, "duplicates are acknowledged");
    let gap = append(store, opened.epoch, &all[7..8]).await.unwrap_err();
    assert_eq!(StoreError::from(gap), StoreError::Gap(500));
    let mut changed = events(500, 100);
    changed[3].icount += 1;
    let conflicting = chunks(id, &[events(0, 500), changed].concat(), 100);
    assert_eq!(append(store, opened.epoch, &all[5..6]).await.unwrap(), 600);
    let conflict = StoreError::from(append(store, opened.epoch, &conflicting[5..6]).await.unwrap_err());
    assert!(matches!(conflict, StoreError::Conflict(_)), "{conflict}");

    let fencing = store.open(id, b"two", &[], true).await.unwrap();
    assert_eq!((fencing.epoch, fencing.committed_events), (2, 600));
    let fenced = StoreError::from(append(store, opened.epoch, &all[6..7]).await.unwrap_err());
    assert!(matches!(fenced, StoreError::Fenced(_)), "{fenced}");
    store.seal(id, 2, 600, all[5].id(), true).await.unwrap();
    let sealed = StoreError::from(append(store, 2, &all[6..7]).await.unwrap_err());
    assert_eq!(sealed, StoreError::Sealed);
    assert_eq!(store.get(id).await.unwrap().state, "cut");

    // A damaged chunk is refused before it is proposed.
    let mut bytes = all[6].bytes.to_vec();
    bytes[300] ^= 1;
    let request = v1::AppendRequest {
        recording: id.to_vec().into(),
        epoch: 2,
        chunk: bytes.into(),
        rewrites: false,
        more: vec![],
    };
    let reply = store.leader(id).unwrap().append(tokio_stream::iter([request])).await;
    let status = match reply {
        Ok(reply) => reply.into_inner().message().await.unwrap_err(),
        Err(status) => status,
    };
    assert!(status.message().contains("payload does not have the hash"), "{status}");
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_recording_is_written_anew_and_stays_the_same() {
    let p = Processes::start(0, 5000).await;
    let store = &p.client.store;
    let (id, all) = (new_id(), events(0, 5000));
    let small = chunks(id, &all, 50);
    let epoch = store.open(id, b"one", &manifest(), false).await.unwrap().epoch;
    p.leader().await;
    // Nothing is there yet, so nothing is to do.
    rewrite(store, id, epoch, LARGE).await.unwrap();
    append(store, epoch, &small).await.unwrap();
    let open = rewrite(store, id, epoch, LARGE).await.unwrap_err();
    assert!(format!("{open:#}").contains("seal it first"), "{open:#}");
    let old = small.last().unwrap().id();
    store.seal(id, epoch, 5000, old, false).await.unwrap();
    let before = store.get(id).await.unwrap();
    // Another writer may not, and nothing is adopted that was not written.
    assert!(rewrite(store, id, epoch + 1, LARGE).await.is_err());
    let none = store.adopt(id, epoch, old, old).await.unwrap_err();
    assert!(matches!(none, StoreError::Conflict(_)), "{none}");
    // One that was begun and left is begun anew; a chunk that is refused takes nothing away.
    let mut builder = ChunkBuilder::resume(id, 0, old);
    all[..700].iter().for_each(|event| builder.push(event));
    let begun = builder.take().unwrap();
    let rewriting = |chunk: &Chunk| {
        let recording = id.to_vec().into();
        let request =
            v1::AppendRequest { recording, epoch, chunk: chunk.bytes.clone(), rewrites: true, more: vec![] };
        let client = store.leader(id);
        async move {
            let reply = client.unwrap().append(tokio_stream::iter([request])).await;
            match reply {
                Ok(reply) => reply.into_inner().message().await.map(drop),
                Err(status) => Err(status),
            }
        }
    };
    rewriting(&begun).await.unwrap();
    assert!(rewriting(&small[0]).await.is_err(), "it names no chunk before it");
    assert!(store.adopt(id, epoch, old, begun.id()).await.is_err(), "some are missing");

    // Somebody reads all the while.
    let reader = store.clone();
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let expected = all.clone();
    let reading = tokio::spawn(async move {
        let mut times = 0;
        while stopped.try_recv().is_err() || times == 0 {
            let chunks = reader.read(id, 0, 5000).await.unwrap();
            let read: Vec<Event> = chunks.iter().flat_map(|chunk| chunk.events().unwrap()).collect();
            assert!(read == expected, "{} events", read.len());
            times += 1;
        }
    });
    rewrite(store, id, epoch, LARGE).await.unwrap();
    stop.send(()).unwrap();
    reading.await.unwrap();
    let after = store.get(id).await.unwrap();
    assert!(before.chunks == 100 && (4..20).contains(&after.chunks), "{} chunks", after.chunks);
    assert!(after.bytes_stored < before.bytes_stored * 3 / 4, "{} bytes", after.bytes_stored);
    assert_eq!((&after.counts, after.committed_icount), (&before.counts, before.committed_icount));
    assert_eq!(after.rewritten_from, before.last_chunk);
    let read = store.read(id, 0, 0).await.unwrap();
    let mut last = None;
    for chunk in &read {
        chunk.check_follows(last, old).unwrap();
        last = Some(&chunk.header);
    }
    let middle = store.read(id, 2000, 2001).await.unwrap();
    assert_eq!((middle.len(), read.len() as u64), (1, after.chunks));
    let new = read.last().unwrap().id();
    assert_eq!(new.to_vec(), after.last_chunk.to_vec());
    // Once is enough.
    rewrite(store, id, epoch, 1).await.unwrap();
    assert_eq!(store.get(id).await.unwrap().last_chunk, after.last_chunk);
    // A seal that is tried again has its answer, and so has the adoption.
    store.seal(id, epoch, 5000, old, false).await.unwrap();
    store.adopt(id, epoch, old, new).await.unwrap();
    // All replicas agree, and it is gone as a whole.
    store.delete(id).await.unwrap();
    assert!(matches!(store.get(id).await.unwrap_err(), StoreError::NotFound(_)));
    p.cluster.stop().await;
}

/// A recording leaves one cluster in a file and replays in another that never saw it.
#[tokio::test(flavor = "multi_thread")]
async fn an_exported_recording_replays_elsewhere_and_a_changed_file_is_refused_whole() {
    let (from, to) = (Processes::start(0, 5000).await, Processes::start(2, 5000).await);
    from.heddle(&["record", "builtin", "--name", "loom"]).await.expect(0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("loom.heddle");
    let mut command = from.command();
    command.args(["export", "loom"]).stdout(std::fs::File::create(&path).unwrap());
    assert!(tokio::task::spawn_blocking(move || command.status()).await.unwrap().unwrap().success());
    let whole = std::fs::read(&path).unwrap();
    let name = path.to_str().unwrap();

    // One bit anywhere, or one byte less or more, and nothing of it is taken.
    let changed = dir.path().join("changed");
    let seed = u64::from_le_bytes(whole[whole.len() - 8..].try_into().unwrap());
    eprintln!("seed {seed}");
    for i in 0..count(12, 200) {
        let at = (seed.wrapping_mul(2 * i + 1) % whole.len() as u64) as usize;
        let mut bytes = whole.clone();
        match i % 4 {
            0 => bytes.truncate(at),
            1 if i == 1 => bytes.push(0),
            _ => bytes[at] ^= 1 << (i % 8),
        }
        std::fs::write(&changed, bytes).unwrap();
        let said = to.heddle(&["import", changed.to_str().unwrap()]).await.expect(5);
        assert!(said.err.contains("nothing was imported"), "change {i} at {at}: {}", said.err);
    }
    assert!(to.client.store.list().await.unwrap().is_empty(), "nothing was stored");

    to.heddle(&["import", name]).await.expect(0);
    let again = to.heddle(&["import", name]).await.expect(0);
    assert!(again.err.contains("there already"), "{}", again.err);
    for spans in ["1", "4"] {
        let value = to.heddle(&["replay", "loom", "--spans", spans, "-o", "json"]).await.expect(0).json();
        assert_eq!(value["verdict"], "match", "{value}");
    }
    let same = |p: &Processes| {
        let store = p.client.store.clone();
        async move { store.list().await.unwrap().remove(0) }
    };
    let (a, b) = (same(&from).await, same(&to).await);
    assert_eq!((a.manifest, a.counts, a.snapshots), (b.manifest, b.counts, b.snapshots));
    // What was imported can be exported again.
    let mut command = to.command();
    command.args(["export", "loom"]).stdout(std::fs::File::create(&changed).unwrap());
    assert!(tokio::task::spawn_blocking(move || command.status()).await.unwrap().unwrap().success());
    from.client.store.delete(heddle_proto::RecordingId::from_slice(&a.recording).unwrap()).await.unwrap();
    from.heddle(&["import", changed.to_str().unwrap()]).await.expect(0);
    from.cluster.stop().await;
    to.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_stored_once_and_checked() {
    let p = Processes::start(0, 5000).await;
    let store = &p.client.store;
    let blocks: Vec<(Hash, bytes::Bytes)> = (0..300u32)
        .map(|i| {
            let bytes = bytes::Bytes::from(i.to_le_bytes().repeat(1024));
            (Hash::of(&bytes), bytes)
        })
        .collect();
    let owner = new_id();
    assert_eq!(store.put_blocks(owner, blocks.clone()).await.unwrap().0, 300);
    assert_eq!(store.put_blocks(owner, blocks.clone()).await.unwrap(), (0, 0), "nothing is sent twice");
    let hashes: Vec<Hash> = blocks.iter().map(|(hash, _)| *hash).collect();
    let found = store.get_blocks(&hashes).await.unwrap();
    assert!(found.iter().zip(&blocks).all(|(found, (_, bytes))| found == bytes));
    let lied = v1::Block {
        hash: hashes[0].to_vec().into(),
        data: heddle_storage::service::compress_block(b"other"),
    };
    let shard = block_shard(hashes[0], store.shards().await.unwrap());
    let mut client = store.leader(Route::Shard(shard)).unwrap();
    let request = v1::PutBlocksRequest { blocks: vec![lied], owner: owner.to_vec().into(), shard };
    let status = client.put_blocks(request).await.unwrap_err();
    assert!(status.message().contains("has other bytes"), "{status}");
    assert!(matches!(store.get_blocks(&[Hash([9; 32])]).await, Err(StoreError::NotFound(_))));
    p.cluster.stop().await;
}

/// kill -9 of any replica, over and over, under load: every acknowledged chunk is
/// read back, from every replica, and its hash compared.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_to_kill_9() {
    // The coordinator would cut a recording that is silent for a lease, as this one may be.
    let mut p = Processes::start(0, 3_600_000).await;
    let store = p.client.store.clone();
    let id = new_id();
    let opened = store.open(id, b"load", &manifest(), false).await.unwrap();
    let all = chunks(id, &events(0, count(400_000, 6_000_000)), 200);
    let (acked_sender, acked) = tokio::sync::watch::channel(0u64);
    let writer = {
        let (store, all) = (store.clone(), all.clone());
        tokio::spawn(async move {
            let mut next = 0;
            while next < all.len() {
                let end = (next + 8).min(all.len());
                match append(&store, opened.epoch, &all[next..end]).await {
                    Ok(committed) => {
                        acked_sender.send_replace(committed);
                        next = end;
                    }
                    // Which of them were committed the store knows: it acknowledges those again.
                    Err(status) => {
                        assert!(heddle_storage::channel::is_transient(&status), "{status}");
                        store.redirect(id, store.tried(id), &status);
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                if acked_sender.is_closed() {
                    return next;
                }
            }
            next
        })
    };
    let kills = count(4, 200);
    for kill in 0..kills {
        let before = *acked.borrow();
        until("more chunks to be acknowledged", async || {
            (*acked.borrow() > before || writer.is_finished()).then_some(())
        })
        .await;
        let victim = match kill % 3 {
            0 => p.leader().await,
            n => format!("replica-{n}"),
        };
        p.cluster.kill(&victim).await.unwrap();
        let before = *acked.borrow();
        until("the other two to go on", async || {
            if let Some((_, why)) = p.cluster.ended() {
                panic!("kill {kill}: {why}");
            }
            (*acked.borrow() > before || writer.is_finished()).then_some(())
        })
        .await;
        p.cluster.start_part(&victim).unwrap();
    }
    let promised = *acked.borrow();
    drop(acked);
    writer.await.unwrap();
    assert!(promised > 0);
    // All three die at once, and come back: the disks alone have it.
    for replica in 1..=3 {
        p.cluster.kill(&format!("replica-{replica}")).await.unwrap();
    }
    for replica in 1..=3 {
        p.cluster.start_part(&format!("replica-{replica}")).unwrap();
    }
    let found = until("the recording", async || store.read(id, 0, 0).await.ok()).await;
    let there = found.last().unwrap().header.end_event();
    assert!(there >= promised, "{promised} events were acknowledged, {there} are there");
    assert!(found.iter().zip(&all).all(|(found, written)| found.bytes == written.bytes));
    // Each replica catches up and has the same.
    for address in store.addresses() {
        let alone = heddle_storage::StoreClient::new(vec![address.clone()]);
        let chunks = until("the replica to catch up", async || alone.read(id, 0, 0).await.ok()).await;
        assert_eq!(chunks.last().unwrap().header.end_event(), there, "{address}");
    }
    p.cluster.stop().await;
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The catalog is never the truth: deleted, made garbage or an old copy, it is rebuilt.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalog_is_rebuilt_from_the_journal() {
    let mut p = Processes::start(0, 3_600_000).await;
    let store = p.client.store.clone();
    let id = new_id();
    let all = chunks(id, &events(0, 5000), 100);
    let opened = store.open(id, b"one", &manifest(), false).await.unwrap();
    append(&store, opened.epoch, &all[..10]).await.unwrap();
    let catalog = |p: &Processes, replica: u64| p.cluster.dir().join(format!("replica-{replica}/catalog"));
    let old = tempfile::tempdir().unwrap();
    p.cluster.kill("replica-3").await.unwrap();
    copy_dir(&catalog(&p, 3), old.path());
    p.cluster.start_part("replica-3").unwrap();
    // It may have led the shard.
    until("the rest to be taken", async || {
        let done = append(&store, opened.epoch, &all[10..]).await;
        done.map_err(|status| store.redirect(id, store.tried(id), &status)).ok()
    })
    .await;
    store.seal(id, opened.epoch, 5000, all.last().unwrap().id(), false).await.unwrap();
    for replica in 1..=3 {
        p.cluster.kill(&format!("replica-{replica}")).await.unwrap();
    }
    std::fs::remove_dir_all(catalog(&p, 1)).unwrap();
    for entry in std::fs::read_dir(catalog(&p, 2)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::write(path, b"garbage".repeat(100)).unwrap();
        }
    }
    std::fs::remove_dir_all(catalog(&p, 3)).unwrap();
    copy_dir(old.path(), &catalog(&p, 3));
    for replica in 1..=3 {
        p.cluster.start_part(&format!("replica-{replica}")).unwrap();
    }
    for address in store.addresses() {
        let alone = heddle_storage::StoreClient::new(vec![address.clone()]);
        let row = until("the recording", async || alone.get(id).await.ok()).await;
        assert_eq!((row.state.as_str(), row.committed_events), ("sealed", 5000), "{address}");
        assert_eq!(alone.read(id, 0, 0).await.unwrap(), all, "{address}");
    }
    p.cluster.stop().await;
}

/// A range by icount, and a live recording that is followed, both at any replica.
#[tokio::test(flavor = "multi_thread")]
async fn ranges_by_icount_and_a_live_recording_that_is_followed() {
    let p = Processes::start(0, 3_600_000).await;
    let store = p.client.store.clone();
    let id = new_id();
    let all = chunks(id, &events(0, 5000), 100);
    let epoch = store.open(id, b"one", &manifest(), false).await.unwrap().epoch;
    let followers: Vec<_> = store
        .addresses()
        .into_iter()
        .map(|address| {
            let alone = heddle_storage::StoreClient::new(vec![address]);
            tokio::spawn(async move {
                let mut seen = vec![];
                alone
                    .follow(id, 0, |chunk| {
                        seen.push(chunk);
                        true
                    })
                    .await
                    .unwrap();
                seen
            })
        })
        .collect();
    for part in all.chunks(7) {
        append(&store, epoch, part).await.unwrap();
    }
    store.seal(id, epoch, 5000, all.last().unwrap().id(), false).await.unwrap();
    for follower in followers {
        assert!(follower.await.unwrap() == all);
    }
    // Event i is at icount 10 i.
    for (from, to, first, last) in
        [(12_345, 20_000, 1200, 2000), (0, 5, 0, 0), (49_990, 0, 4900, 4900), (990, 1000, 0, 100)]
    {
        let request = v1::ReadRequest {
            recording: id.to_vec().into(),
            by_icount: true,
            from_icount: from,
            to_icount: to,
            ..Default::default()
        };
        let address = store.addresses().pop().unwrap();
        let mut replies = store.at(&address).unwrap().read(request).await.unwrap().into_inner();
        let mut found = vec![];
        while let Some(reply) = replies.message().await.unwrap() {
            found.push(Chunk::parse(reply.chunk).unwrap().header.first_event);
        }
        assert_eq!((found.first(), found.last()), (Some(&first), Some(&last)), "{from}..{to}: {found:?}");
    }
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_nothing_is_acknowledged() {
    let mut p = Processes::start(0, 5000).await;
    let store = p.client.store.with_patience(Duration::from_millis(600));
    p.cluster.kill("replica-1").await.unwrap();
    p.cluster.kill("replica-2").await.unwrap();
    let refused = store.open(new_id(), b"x", &manifest(), false).await.unwrap_err();
    assert!(matches!(refused, StoreError::Unavailable(_)), "{refused}");
    let said = p.heddle(&["get", "replicas", "-o", "json"]).await.expect(0);
    let unreachable = said.json().as_array().unwrap().iter().filter(|r| r["role"] == "unreachable").count();
    assert_eq!(unreachable, 2);
    p.cluster.stop().await;
}

/// A replica whose directory was wiped would vote on what it forgot: its peers refuse it.
#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_replica_never_counts_under_its_old_id() {
    let mut p = Processes::start(0, 5000).await;
    let leader = p.leader().await;
    let others: Vec<String> =
        (1..=3).map(|i| format!("replica-{i}")).filter(|name| *name != leader).collect();
    p.client.store.open(new_id(), b"before", &manifest(), false).await.unwrap();
    p.cluster.kill(&others[0]).await.unwrap();
    std::fs::remove_dir_all(p.cluster.dir().join(&others[0])).unwrap();
    p.cluster.start_part(&others[0]).unwrap();
    p.client.store.open(new_id(), b"two of three", &manifest(), false).await.unwrap();
    p.cluster.kill(&others[1]).await.unwrap();
    let store = p.client.store.with_patience(Duration::from_secs(2));
    let refused = store.open(new_id(), b"one and a wiped one", &manifest(), false).await.unwrap_err();
    assert!(matches!(refused, StoreError::Unavailable(_)), "{refused}");
    p.cluster.start_part(&others[1]).unwrap();
    until("a majority", async || store.open(new_id(), b"after", &manifest(), false).await.ok()).await;
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_a_directory_is_refused() {
    let p = Processes::start(0, 5000).await;
    let said = p
        .heddle(&[
            "serve",
            "storage",
            "--id",
            "1",
            "--listen",
            "127.0.0.1:0",
            "--peer",
            "1=http://127.0.0.1:1",
            "--dir",
            p.cluster.dir().join("replica-1").to_str().unwrap(),
        ])
        .await
        .expect(1);
    assert!(said.err.contains("another process serves this directory"), "{}", said.err);
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_part_answers_health_and_reflection() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let p = Processes::start(1, 5000).await;
    let nodes = p.client.coordinator.clone().nodes(v1::NodesRequest {}).await.unwrap().into_inner().nodes;
    let file = &p.client.file;
    let parts = [
        (file.replicas[0].clone(), "heddle.v1.LogStore"),
        (file.coordinator.clone(), "heddle.v1.Coordinator"),
        (nodes[0].address.clone(), "heddle.v1.Node"),
    ];
    for (address, service) in parts {
        let channel = heddle_storage::channel::connect(&address).unwrap();
        let health = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.unwrap();
        assert_eq!(health.into_inner().status, 1, "{service} serves");
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::iter([request]))
            .await
            .unwrap()
            .into_inner();
        let answer = answers.message().await.unwrap().unwrap().message_response;
        let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
        assert!(list.service.iter().any(|s| s.name == service), "{service} is described");
    }
    p.cluster.stop().await;
}
