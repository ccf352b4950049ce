//! Raft's log over the journal: an index of positions, and the newest entries in memory.

use crate::error::Error;
use crate::journal::{Frame, FrameKind, Journal, JournalReader, Location};
use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError, util};
use std::collections::VecDeque;

/// Newest entries kept in memory, in bytes: what followers and apply read is there.
const CACHE_BYTES_MAX: usize = 32 << 20;

/// One Raft group's log. Nothing is truncated yet: the first index is 1.
#[derive(Debug)]
pub struct RaftLog {
    reader: JournalReader,
    hard_state: HardState,
    conf_state: ConfState,
    /// By index - 1.
    places: Vec<Place>,
    cache: VecDeque<Entry>,
    cache_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    term: u64,
    kind: FrameKind,
    at: Location,
}

impl RaftLog {
    /// The log of the frames in the journal, for a group of these `voters`.
    pub fn open(dir: &std::path::Path, voters: &[u64]) -> Result<(RaftLog, Journal), Error> {
        let mut places: Vec<Place> = vec![];
        let mut hard_state = HardState::default();
        let journal = Journal::open(dir, |frame, at| match frame.kind {
            FrameKind::HardState => {
                hard_state.term = frame.term;
                hard_state.vote = frame.index;
                let commit = frame.data.first_chunk::<8>();
                hard_state.commit = commit.map_or(0, |bytes| u64::from_le_bytes(*bytes));
            }
            kind => {
                // A later frame of the same index replaces it and all behind it.
                places.truncate(frame.index.saturating_sub(1) as usize);
                places.push(Place { term: frame.term, kind, at });
            }
        })?;
        let conf_state = ConfState::from((voters.to_vec(), vec![]));
        let reader = journal.reader();
        let log = RaftLog { reader, hard_state, conf_state, places, cache: VecDeque::new(), cache_bytes: 0 };
        Ok((log, journal))
    }

    /// The last index.
    pub fn last(&self) -> u64 {
        self.places.len() as u64
    }

    /// Where entry `index`'s data lies.
    pub fn location(&self, index: u64) -> Option<Location> {
        self.places.get((index as usize).checked_sub(1)?).map(|place| place.at)
    }

    /// Raises the commit index to what is known to have been applied.
    pub fn raise_commit(&mut self, applied: u64) {
        self.hard_state.commit = self.hard_state.commit.max(applied);
    }

    /// Follows what Raft wants persisted.
    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    /// Follows a membership change.
    pub fn set_conf_state(&mut self, conf_state: ConfState) {
        self.conf_state = conf_state;
    }

    /// Takes entries whose frames lie at `places`.
    pub fn append(&mut self, entries: Vec<Entry>, places: &[Location]) {
        for (entry, at) in entries.into_iter().zip(places) {
            let keep = entry.index as usize - 1;
            self.places.truncate(keep);
            while self.cache.back().is_some_and(|last| last.index >= entry.index) {
                self.cache_bytes -= self.cache.pop_back().map_or(0, |old| old.data.len());
            }
            let kind = frame_kind(&entry);
            self.places.push(Place { term: entry.term, kind, at: *at });
            self.cache_bytes += entry.data.len();
            self.cache.push_back(entry);
            while self.cache_bytes > CACHE_BYTES_MAX && self.cache.len() > 1 {
                self.cache_bytes -= self.cache.pop_front().map_or(0, |old| old.data.len());
            }
        }
    }

    fn entry(&self, index: u64) -> raft::Result<Entry> {
        if let Some(first) = self.cache.front().map(|entry| entry.index)
            && index >= first
            && let Some(entry) = self.cache.get((index - first) as usize)
        {
            return Ok(entry.clone());
        }
        let place = self.places.get(index as usize - 1);
        let place = place.ok_or(raft::Error::Store(StorageError::Unavailable))?;
        let data = self.reader.read(place.at).map_err(|error| {
            tracing::error!(%error, index, "can't read a Raft entry");
            raft::Error::Store(StorageError::Other(Box::new(error)))
        })?;
        let mut entry = Entry { index, term: place.term, data, ..Entry::default() };
        if place.kind == FrameKind::ConfChange {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
        }
        Ok(entry)
    }
}

fn frame_kind(entry: &Entry) -> FrameKind {
    if entry.get_entry_type() == EntryType::EntryNormal { FrameKind::Entry } else { FrameKind::ConfChange }
}

/// The frame that makes an entry durable.
pub fn entry_frame(group: u64, entry: &Entry) -> Frame {
    Frame { kind: frame_kind(entry), group, term: entry.term, index: entry.index, data: entry.data.clone() }
}

/// The frame that makes a hard state durable.
pub fn hard_state_frame(group: u64, hard_state: &HardState) -> Frame {
    let data = Bytes::copy_from_slice(&hard_state.commit.to_le_bytes());
    Frame { kind: FrameKind::HardState, group, term: hard_state.term, index: hard_state.vote, data }
}

impl Storage for RaftLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if high > self.last() + 1 || low == 0 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let max_size = max_size.into();
        let mut size = 0;
        let mut entries = vec![];
        for index in low..high {
            let entry = self.entry(index)?;
            size += entry.data.len() as u64;
            if !entries.is_empty() && max_size.is_some_and(|max| size > max) {
                break;
            }
            entries.push(entry);
        }
        util::limit_size(&mut entries, max_size);
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == 0 {
            return Ok(0);
        }
        let place = self.places.get(index as usize - 1);
        place.map(|place| place.term).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, _: u64, _: u64) -> raft::Result<Snapshot> {
        // Never needed: the whole log is there, so a follower catches up by it.
        Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}
