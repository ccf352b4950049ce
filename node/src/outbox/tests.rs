//! The outbox keeps what it took, in order, within its bound.
#![allow(clippy::unwrap_used)]

use super::*;
use heddle_proto::{Body, ChunkBuilder, Event, Role};

fn chunks(count: u64) -> Vec<Chunk> {
    let mut builder = ChunkBuilder::new(RecordingId([3; 16]));
    (0..count)
        .map(|i| {
            for k in 0..20 {
                let value = i * 31 + k;
                builder.push(&Event {
                    icount: i * 100 + k,
                    role: Role::Vcpu,
                    body: Body::Check { value, output: value },
                });
            }
            builder.take().unwrap()
        })
        .collect()
}

#[test]
fn it_fills_up_pauses_and_goes_on_at_half() {
    let dir = tempfile::tempdir().unwrap();
    let all = chunks(20);
    let bound = all[0].bytes.len() as u64 * 4;
    let mut outbox = Outbox::create(dir.path(), RecordingId([3; 16]), [1; 16], bound).unwrap();
    assert!(!outbox.is_full());
    all.iter().for_each(|chunk| outbox.push(chunk.clone()));
    assert!(outbox.is_full());
    assert!(outbox.pending_bytes() <= bound, "the file stays within its bound");
    for chunk in &all {
        assert_eq!(outbox.pending(0).unwrap().as_ref(), Some(chunk), "in order, none lost");
        assert_eq!(outbox.acknowledge(chunk.header.end_event()), (1, chunk.bytes.len() as u64));
    }
    assert!(!outbox.is_full() && outbox.is_empty());
    outbox.remove().unwrap();
}

#[test]
fn what_was_left_behind_is_read_as_far_as_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let all = chunks(6);
    let mut outbox = Outbox::create(dir.path(), RecordingId([3; 16]), [1; 16], 1 << 20).unwrap();
    all.iter().for_each(|chunk| outbox.push(chunk.clone()));
    assert!(left_behind(dir.path()).is_empty(), "its process lives");
    let path = outbox.path().to_path_buf();
    drop(outbox);
    let found: Vec<PathBuf> = left_behind(dir.path()).into_iter().map(|(path, _)| path).collect();
    assert_eq!(found, vec![path.clone()]);
    let whole = std::fs::read(&path).unwrap();
    for cut in (40..whole.len()).step_by(37) {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let found = read_left_behind(&path, &File::open(&path).unwrap()).unwrap();
        assert_eq!(found.token, [1; 16]);
        assert_eq!(found.chunks[..], all[..found.chunks.len()]);
    }
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(read_left_behind(&path, &File::open(&path).unwrap()).unwrap().chunks, all);
}

#[test]
fn what_was_acknowledged_is_given_back_and_not_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let all = chunks(30_000);
    let mut outbox = Outbox::create(dir.path(), RecordingId([3; 16]), [1; 16], 1 << 30).unwrap();
    all.iter().for_each(|chunk| outbox.push(chunk.clone()));
    let kept = all.len() - 10;
    outbox.acknowledge(all[kept - 1].header.end_event());
    let path = outbox.path().to_path_buf();
    drop(outbox);
    let file = File::open(&path).unwrap();
    let on_disk = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
    assert!(on_disk < file.metadata().unwrap().len() / 2, "{on_disk} bytes are still on disk");
    assert!(read_past_hole(&path, &file).unwrap().len() < 2 * PUNCH_BYTES as usize);
    let found = read_left_behind(&path, &file).unwrap().chunks;
    assert!(found.ends_with(&all[kept..]), "{} chunks", found.len());
}
