//! Torn tails are cut, corruption is refused.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::disk::Directory;
use proptest::prelude::*;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SEGMENT: u64 = 256 << 10;

fn entry(index: u64, data: Vec<u8>) -> Frame {
    Frame { kind: FrameKind::Entry, group: 1, term: 1, index, data: Bytes::from(data) }
}

fn reopen(dir: &Path) -> Result<(Vec<Frame>, Journal), Error> {
    let mut frames = vec![];
    let config = JournalConfig { segment_bytes: SEGMENT, reserve_bytes: 0, in_background: false };
    let journal = Journal::open(Arc::new(Directory::open(dir)?), config, |found| {
        if found.frame.kind == FrameKind::Entry {
            assert!(found.is_whole);
            frames.push(found.frame);
        }
    })?;
    Ok((frames, journal))
}

fn first_segment(dir: &Path) -> std::path::PathBuf {
    dir.join(segment_name(1))
}

/// Changes one byte of a file.
fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn what_was_appended_is_there_after_reopening_over_many_segments() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut journal) = reopen(dir.path()).unwrap();
    let frames: Vec<Frame> = (1..400).map(|i| entry(i, vec![i as u8; i as usize * 17])).collect();
    let mut locations = vec![];
    for batch in frames.chunks(3) {
        locations.extend(journal.append(batch).unwrap());
    }
    assert!(journal.segments().numbers().len() > 4);
    drop(journal);
    let (found, journal) = reopen(dir.path()).unwrap();
    assert_eq!(found, frames);
    for (frame, location) in frames.iter().zip(locations) {
        assert_eq!(journal.segments().read(location).unwrap(), frame.data);
    }
}

#[test]
fn recycled_segments_show_nothing_of_their_former_life() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut journal) = reopen(dir.path()).unwrap();
    let mut written = 0;
    for round in 0..12u64 {
        for i in 0..10 {
            journal.append(&[entry(written + 1, vec![(round * 10 + i) as u8; 20_000])]).unwrap();
            written += 1;
        }
        let current = journal.segments().current();
        let mark = Frame { kind: FrameKind::ScanFrom, group: 0, term: 0, index: current, data: Bytes::new() };
        journal.append(&[mark]).unwrap();
        journal.segments().set_scan_from(current);
        let dead: Vec<u64> = journal.segments().numbers().into_iter().filter(|n| *n < current).collect();
        journal.segments().recycle(&dead).unwrap();
    }
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert!(files <= POOL_MAX + 3, "{files} files");
    drop(journal);
    let (found, mut journal) = reopen(dir.path()).unwrap();
    assert!(found.windows(2).all(|pair| pair[1].index == pair[0].index + 1), "in order, none twice");
    assert_eq!(found.last().unwrap().index, written);
    journal.append(&[entry(written + 1, vec![1])]).unwrap();
    drop(journal);
    assert_eq!(reopen(dir.path()).unwrap().0.last().unwrap().index, written + 1);
}

#[test]
fn the_bytes_of_all_files_are_counted_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let config = JournalConfig { reserve_bytes: 0, in_background: false, ..JournalConfig::default() };
    let open = || Journal::open(Arc::new(Directory::open(dir.path()).unwrap()), config, |_| {}).unwrap();
    let on_disk = || -> u64 {
        std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum()
    };
    let mut journal = open();
    assert_eq!(journal.segments().total_bytes(), FIRST_SEGMENT_BYTES);
    for i in 1..4 {
        journal.append(&[entry(i, vec![i as u8; 6 << 20])]).unwrap();
    }
    assert_eq!(journal.segments().total_bytes(), on_disk());
    assert_eq!(on_disk(), 3 * FIRST_SEGMENT_BYTES, "the second is twice as long as the first");
    drop(journal);
    let journal = open();
    assert_eq!(journal.segments().total_bytes(), on_disk());
    journal.segments().recycle(&[1]).unwrap();
    assert_eq!(journal.segments().total_bytes(), 2 * FIRST_SEGMENT_BYTES);
    assert_eq!(on_disk(), 2 * FIRST_SEGMENT_BYTES);
}

#[test]
fn a_damaged_batch_that_was_synced_is_corruption() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut journal) = reopen(dir.path()).unwrap();
    let places: Vec<Location> =
        (1..10).flat_map(|i| journal.append(&[entry(i, vec![i as u8; 300])]).unwrap()).collect();
    drop(journal);
    // The head of a frame: it can't be said what was in it.
    flip(&first_segment(dir.path()), u64::from(places[3].offset) - 20);
    let error = reopen(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("was synced"), "{error}");
}

#[test]
fn a_damaged_first_frame_is_corruption_in_the_oldest_segment_too() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut journal) = reopen(dir.path()).unwrap();
    for i in 1..40 {
        journal.append(&[entry(i, vec![i as u8; 20_000])]).unwrap();
    }
    drop(journal);
    // Its data: hard states are in it.
    flip(&first_segment(dir.path()), (BLOCK + BATCH_BYTES + FRAME_BYTES + 1) as u64);
    let error = reopen(dir.path()).unwrap_err();
    assert!(error.to_string().contains("first frame is damaged"), "{error}");
}

#[test]
fn a_frame_with_damaged_data_is_handed_on_as_damaged_if_it_was_synced() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut journal) = reopen(dir.path()).unwrap();
    let places: Vec<Location> =
        (1..10).flat_map(|i| journal.append(&[entry(i, vec![i as u8; 300])]).unwrap()).collect();
    let error = {
        flip(&first_segment(dir.path()), u64::from(places[3].offset) + 7);
        journal.segments().read(places[3]).unwrap_err()
    };
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    drop(journal);
    let mut damaged = vec![];
    let config = JournalConfig { segment_bytes: SEGMENT, reserve_bytes: 0, in_background: false };
    Journal::open(Arc::new(Directory::open(dir.path()).unwrap()), config, |found| {
        if !found.is_whole {
            damaged.push(found.frame.index);
        }
    })
    .unwrap();
    assert_eq!(damaged, [4]);
}

#[test]
fn the_last_batch_of_an_idle_journal_is_marked_as_synced() {
    for is_marked in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut journal) = reopen(dir.path()).unwrap();
        let place = journal.append(&[entry(1, vec![7; 300])]).unwrap()[0];
        if is_marked {
            journal.mark().unwrap();
        }
        drop(journal);
        flip(&first_segment(dir.path()), u64::from(place.offset) - 20);
        let opened = reopen(dir.path());
        assert_eq!(opened.is_err(), is_marked, "only the mark can tell it from a torn tail");
    }
}

#[test]
fn another_version_is_refused_by_its_number() {
    let dir = tempfile::tempdir().unwrap();
    drop(reopen(dir.path()).unwrap());
    let file = OpenOptions::new().write(true).open(first_segment(dir.path())).unwrap();
    file.write_all_at(&9u32.to_le_bytes(), 4).unwrap();
    let error = reopen(dir.path()).unwrap_err().to_string();
    assert!(error.contains("version 9") && error.contains("reads 2"), "{error}");
}

#[test]
fn a_torn_tail_stays_cut_though_later_batches_would_join_up() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut journal) = reopen(dir.path()).unwrap();
    let places: Vec<Location> =
        (1..4).flat_map(|i| journal.append(&[entry(i, vec![i as u8; 9000])]).unwrap()).collect();
    drop(journal);
    flip(&first_segment(dir.path()), u64::from(places[2].offset) + 8000);
    let (found, mut journal) = reopen(dir.path()).unwrap();
    assert_eq!(found.len(), 2, "the last one was torn");
    // Another entry takes its place; what was cut must not come back behind it.
    journal.append(&[entry(3, vec![9; 10])]).unwrap();
    journal.append(&[entry(4, vec![9; 10])]).unwrap();
    drop(journal);
    flip(&first_segment(dir.path()), u64::from(places[2].offset) + 8000);
    let (found, _) = reopen(dir.path()).unwrap();
    let indexes: Vec<(u64, usize)> = found.iter().map(|frame| (frame.index, frame.data.len())).collect();
    assert_eq!(indexes, [(1, 9000), (2, 9000), (3, 10), (4, 10)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_cut_anywhere_keeps_the_frames_before_it(
        cut in 0usize..80_000,
        junk in proptest::collection::vec(any::<u8>(), 0..5000),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut journal) = reopen(dir.path()).unwrap();
        let frames: Vec<Frame> = (1..20).map(|i| entry(i, vec![i as u8; 100 * i as usize])).collect();
        let mut ends = vec![];
        for frame in &frames {
            journal.append(std::slice::from_ref(frame)).unwrap();
            ends.push(journal.end as usize);
        }
        drop(journal);
        // From some block on nothing reached the disk but junk.
        let cut = (2 * BLOCK + cut).next_multiple_of(BLOCK).min(SEGMENT as usize);
        let path = first_segment(dir.path());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[cut..].fill(0);
        let n = junk.len().min(bytes.len() - cut);
        bytes[cut..cut + n].copy_from_slice(&junk[..n]);
        std::fs::write(&path, &bytes).unwrap();
        let whole = ends.iter().filter(|end| **end <= cut).count();
        let (found, mut journal) = reopen(dir.path()).unwrap();
        prop_assert_eq!(&found, &frames[..whole]);
        // It goes on from there.
        let next = entry(whole as u64 + 1, vec![7; 10]);
        journal.append(std::slice::from_ref(&next)).unwrap();
        drop(journal);
        let (found, _) = reopen(dir.path()).unwrap();
        prop_assert_eq!(found.last(), Some(&next));
    }

    #[test]
    fn no_bytes_make_a_scan_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20_000)) {
        let dir = tempfile::tempdir().unwrap();
        drop(reopen(dir.path()).unwrap());
        let path = first_segment(dir.path());
        let mut file = std::fs::read(&path).unwrap();
        let n = bytes.len().min(file.len() - BLOCK);
        file[BLOCK..BLOCK + n].copy_from_slice(&bytes[..n]);
        std::fs::write(&path, &file).unwrap();
        let _ = reopen(dir.path());
    }
}
