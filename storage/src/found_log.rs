//! A group's log as a scan of the journal finds it, frame by frame.
//!
//! A scan begins where the newest checkpoint needs it to, in the middle of logs, and may meet
//! an older checkpoint first, whose next entries lie before the scan's beginning. What follows
//! such a gap is kept aside until a checkpoint within it, or just before it, says that it
//! counts; without one it does not.

use crate::journal::{FrameKind, Location, Segments};
use crate::raft_log::{Fit, RaftLog};

/// The log, and what was found ahead of it.
pub(crate) struct FoundLog {
    /// The log so far.
    pub kept: RaftLog,
    ahead: Option<RaftLog>,
    segments: Segments,
    cache_bytes: usize,
}

impl FoundLog {
    /// Nothing was found yet.
    pub fn new(segments: Segments, cache_bytes: usize) -> FoundLog {
        let kept = RaftLog::new(segments.clone(), (0, 0), cache_bytes);
        FoundLog { kept, ahead: None, segments, cache_bytes }
    }

    /// An entry: it replaces what was there, and all behind.
    pub fn found(&mut self, index: u64, term: u64, kind: FrameKind, at: Location) {
        match self.kept.found(index, term, kind, at) {
            Fit::Taken => self.ahead = None,
            Fit::Old => {}
            Fit::Gap => {
                let new = || RaftLog::new(self.segments.clone(), (0, 0), self.cache_bytes);
                let ahead = self.ahead.get_or_insert_with(new);
                if ahead.found(index, term, kind, at) == Fit::Gap {
                    *ahead = new();
                    ahead.found(index, term, kind, at);
                }
            }
        }
    }

    /// A checkpoint as of (index, term): what matches it stays, the rest goes.
    pub fn begin_behind(&mut self, index: u64, term: u64) {
        if !self.kept.leads_to(index, term) {
            match self.ahead.take() {
                Some(mut ahead) if ahead.leads_to(index, term) => {
                    ahead.set_hard_state(self.kept.hard_state().clone());
                    self.kept = ahead;
                }
                // A later one may still reach it.
                other => self.ahead = other.filter(|ahead| ahead.before().0 > index),
            }
        }
        self.kept.begin_behind(index, term);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::disk::Directory;
    use crate::journal::{Journal, JournalConfig};
    use raft::Storage as _;
    use std::sync::Arc;

    fn log() -> FoundLog {
        let dir = tempfile::tempdir().unwrap();
        let config = JournalConfig { segment_bytes: 256 << 10, reserve_bytes: 0, in_background: false };
        let disk = Arc::new(Directory::open(dir.path()).unwrap());
        FoundLog::new(Journal::open(disk, config, |_| {}).unwrap().segments(), 1 << 20)
    }

    fn entries(log: &mut FoundLog, term: u64, indexes: std::ops::RangeInclusive<u64>) {
        indexes.for_each(|index| log.found(index, term, FrameKind::Entry, Location::NONE));
    }

    fn bounds(log: &FoundLog) -> ((u64, u64), u64) {
        (log.kept.before(), log.kept.last())
    }

    #[test]
    fn entries_behind_a_gap_count_once_a_checkpoint_reaches_them() {
        for checkpoint in [177, 180, 190] {
            let mut log = log();
            log.begin_behind(130, 6);
            entries(&mut log, 7, 178..=185);
            entries(&mut log, 8, 186..=190);
            assert_eq!(bounds(&log), ((130, 6), 130));
            let term = if checkpoint < 186 { 7 } else { 8 };
            log.begin_behind(checkpoint, term);
            entries(&mut log, 9, 191..=200);
            assert_eq!(bounds(&log), ((checkpoint, term), 200));
            assert_eq!(log.kept.term(200).unwrap(), 9);
        }
    }

    #[test]
    fn entries_behind_a_gap_are_replaced_by_those_of_a_later_leader() {
        let mut log = log();
        log.begin_behind(130, 6);
        entries(&mut log, 7, 178..=190);
        entries(&mut log, 8, 185..=186);
        log.begin_behind(180, 7);
        assert_eq!(bounds(&log), ((180, 7), 186));
        // Those ahead were cut off by a leader that begins in the log.
        let mut log = self::log();
        log.begin_behind(130, 6);
        entries(&mut log, 7, 178..=190);
        entries(&mut log, 8, 131..=132);
        log.begin_behind(132, 8);
        assert_eq!(bounds(&log), ((132, 8), 132));
    }

    #[test]
    fn entries_behind_a_gap_that_nothing_reaches_do_not_count() {
        let mut log = log();
        log.begin_behind(130, 6);
        entries(&mut log, 6, 131..=135);
        entries(&mut log, 7, 178..=190);
        assert_eq!(bounds(&log), ((130, 6), 135));
        // A fetched snapshot in another term than theirs.
        log.begin_behind(180, 9);
        assert_eq!(bounds(&log), ((180, 9), 180));
        entries(&mut log, 9, 181..=181);
        assert_eq!(bounds(&log), ((180, 9), 181));
    }
}
