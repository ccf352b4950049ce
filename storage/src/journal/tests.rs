//! Torn tails are cut, corruption is refused.
#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

fn entry(index: u64, data: Vec<u8>) -> Frame {
    Frame { kind: FrameKind::Entry, group: 1, term: 1, index, data: Bytes::from(data) }
}

fn reopen(dir: &Path) -> Result<(Vec<Frame>, Journal), Error> {
    let mut frames = vec![];
    let journal = Journal::open(dir, |frame, _| frames.push(frame))?;
    Ok((frames, journal))
}

#[test]
fn what_was_appended_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut journal) = reopen(dir.path()).unwrap();
    let frames: Vec<Frame> = (1..50).map(|i| entry(i, vec![i as u8; i as usize * 7])).collect();
    let mut locations = vec![];
    for batch in frames.chunks(3) {
        locations.extend(journal.append(batch).unwrap());
    }
    drop(journal);
    let (found, journal) = reopen(dir.path()).unwrap();
    assert_eq!(found, frames);
    for (frame, location) in frames.iter().zip(locations) {
        assert_eq!(journal.reader().read(location).unwrap(), frame.data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_cut_anywhere_keeps_the_frames_before_it(cut in 16usize..3000, junk in proptest::collection::vec(any::<u8>(), 0..60)) {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut journal) = reopen(dir.path()).unwrap();
        let frames: Vec<Frame> = (1..20).map(|i| entry(i, vec![i as u8; 100])).collect();
        journal.append(&frames).unwrap();
        drop(journal);
        let path = segment_path(dir.path(), 1);
        let mut bytes = fs::read(&path).unwrap();
        let cut = cut.min(bytes.len());
        bytes.truncate(cut);
        bytes.extend(junk);
        fs::write(&path, bytes).unwrap();
        let whole = (cut - 16) / (FRAME_BYTES + 100);
        let (found, mut journal) = reopen(dir.path()).unwrap();
        prop_assert_eq!(&found[..], &frames[..whole]);
        journal.append(&[entry(99, vec![1])]).unwrap();
        drop(journal);
        let (found, _) = reopen(dir.path()).unwrap();
        prop_assert_eq!(found.len(), whole + 1);
    }

    #[test]
    fn a_flipped_bit_in_a_synced_frame_is_refused(at in 16usize..600, bit in 0u8..8) {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut journal) = reopen(dir.path()).unwrap();
        for i in 1..10 {
            journal.append(&[entry(i, vec![i as u8; 100])]).unwrap();
        }
        drop(journal);
        let path = segment_path(dir.path(), 1);
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        let error = reopen(dir.path()).err().map(|e| e.to_string()).unwrap_or_default();
        prop_assert!(error.contains("corrupt at byte"), "{}", error);
    }
}

#[test]
fn a_missing_segment_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(segment_path(dir.path(), 1), b"HDLJ").unwrap();
    fs::write(segment_path(dir.path(), 3), b"HDLJ").unwrap();
    let error = reopen(dir.path()).unwrap_err().to_string();
    assert!(error.contains("0000000000000002.seg") && error.contains("missing"), "{error}");
}
