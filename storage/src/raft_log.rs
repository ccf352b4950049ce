//! A group's Raft log over the journal: where each entry lies, and the newest in memory.

use crate::error::Error;
use crate::journal::{Frame, FrameKind, Location, Segments};
use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError, util};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// One group's log, from the first entry that is not truncated on.
#[derive(Debug)]
pub struct RaftLog {
    segments: Segments,
    hard_state: HardState,
    conf_state: ConfState,
    /// Index and term of the entry before the first.
    before: (u64, u64),
    slots: VecDeque<Slot>,
    /// While the journal is read: it is not known yet behind what the log begins.
    is_floating: bool,
    /// Entries below it are not in memory.
    cached_from: u64,
    cached_bytes: usize,
    cache_bytes_max: usize,
    /// What a snapshot has of it.
    applied: u64,
    /// What a follower that lags too far can be sent: index, term and members.
    offer: Option<(u64, u64, ConfState)>,
    /// A follower needs a newer one.
    is_asked: Cell<bool>,
    /// An entry that could not be read.
    failed: RefCell<Option<Error>>,
}

/// Where an entry that was found belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// In the log.
    Taken,
    /// Before its beginning.
    Old,
    /// Not next to its end.
    Gap,
}

#[derive(Clone, Debug)]
struct Slot {
    term: u64,
    kind: FrameKind,
    /// None until it is durable.
    at: Option<Location>,
    data: Option<Bytes>,
}

impl RaftLog {
    /// An empty log behind `before`.
    pub fn new(segments: Segments, before: (u64, u64), cache_bytes_max: usize) -> RaftLog {
        RaftLog {
            segments,
            hard_state: HardState::default(),
            conf_state: ConfState::default(),
            before,
            slots: VecDeque::new(),
            is_floating: true,
            cached_from: before.0 + 1,
            cached_bytes: 0,
            cache_bytes_max,
            applied: 0,
            offer: None,
            is_asked: Cell::new(false),
            failed: RefCell::new(None),
        }
    }

    /// Takes an entry that was found in the journal; it replaces what was there, and all behind.
    pub fn found(&mut self, index: u64, term: u64, kind: FrameKind, at: Location) -> Fit {
        if self.is_floating && (self.slots.is_empty() || index <= self.before.0) {
            // The scan began in the middle of this log.
            self.slots.clear();
            self.before = (index - 1, 0);
        }
        if index <= self.before.0 {
            return Fit::Old;
        }
        let keep = (index - self.before.0 - 1) as usize;
        if keep > self.slots.len() {
            return Fit::Gap;
        }
        self.slots.truncate(keep);
        self.slots.push_back(Slot { term, kind, at: Some(at), data: None });
        self.cached_from = self.last() + 1;
        Fit::Taken
    }

    /// Whether the entry of this index and term is in the log, or just before it.
    pub fn leads_to(&self, index: u64, term: u64) -> bool {
        self.term_at(index) == Some(term) || (self.is_floating && index == self.before.0)
    }

    /// The log begins behind (index, term): what matches it stays, the rest goes.
    pub fn begin_behind(&mut self, index: u64, term: u64) {
        if index < self.before.0 && !self.slots.is_empty() {
            return;
        }
        if self.is_floating && index == self.before.0 {
            self.before.1 = term;
        }
        self.is_floating = false;
        if self.term_at(index) == Some(term) {
            self.truncate(index);
        } else {
            self.slots.clear();
            self.before = (index, term);
            (self.cached_from, self.cached_bytes) = (index + 1, 0);
        }
    }

    /// Forgets entries up to `index`.
    pub fn truncate(&mut self, index: u64) {
        let Some(term) = self.term_at(index) else { return };
        while self.before.0 < index {
            if let Some(data) = self.slots.pop_front().and_then(|slot| slot.data) {
                self.cached_bytes -= data.len();
            }
            self.before.0 += 1;
        }
        self.before.1 = term;
        self.cached_from = self.cached_from.max(index + 1);
    }

    fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots.get(index.checked_sub(self.before.0 + 1)? as usize)
    }

    fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.before.0 {
            return Some(self.before.1);
        }
        self.slot(index).map(|slot| slot.term)
    }

    /// The last index.
    pub fn last(&self) -> u64 {
        self.before.0 + self.slots.len() as u64
    }

    /// Index and term of the entry before the first.
    pub fn before(&self) -> (u64, u64) {
        self.before
    }

    /// Where entry `index`'s data lies, once it is durable.
    pub fn location(&self, index: u64) -> Option<Location> {
        self.slot(index)?.at
    }

    /// The segment of the first durable entry from `index` on.
    pub fn segment_from(&self, index: u64) -> Option<u64> {
        let skip = index.saturating_sub(self.before.0 + 1) as usize;
        self.slots.iter().skip(skip).find_map(|slot| slot.at).map(|at| at.segment)
    }

    /// Bytes of the entries behind `index`.
    pub fn bytes_behind(&self, index: u64) -> u64 {
        let skip = index.saturating_sub(self.before.0) as usize;
        self.slots.iter().skip(skip).filter_map(|slot| slot.at).map(|at| u64::from(at.bytes)).sum()
    }

    /// The hard state.
    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    /// Follows what Raft wants persisted.
    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    /// The members.
    pub fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }

    /// Follows a membership change.
    pub fn set_conf_state(&mut self, conf_state: ConfState) {
        self.conf_state = conf_state;
    }

    /// Rows follow the entries up to this one.
    pub fn set_applied(&mut self, index: u64) {
        self.applied = index;
    }

    /// What can be sent to a follower that lags too far.
    pub fn set_offer(&mut self, offer: Option<(u64, u64, ConfState)>) {
        self.offer = offer;
    }

    /// Whether a follower has asked for a snapshot since the last look.
    pub fn take_asked(&self) -> bool {
        self.is_asked.replace(false)
    }

    /// Why an entry could not be read, if one could not.
    pub fn take_failed(&self) -> Option<Error> {
        self.failed.take()
    }

    /// Takes entries that are about to be written.
    pub fn append(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            let Some(keep) = entry.index.checked_sub(self.before.0 + 1) else { continue };
            while self.slots.len() as u64 > keep {
                if let Some(data) = self.slots.pop_back().and_then(|slot| slot.data) {
                    self.cached_bytes -= data.len();
                }
            }
            self.cached_from = self.cached_from.min(entry.index);
            self.cached_bytes += entry.data.len();
            let kind = frame_kind(&entry);
            self.slots.push_back(Slot { term: entry.term, kind, at: None, data: Some(entry.data) });
        }
    }

    /// An entry is durable.
    pub fn persisted(&mut self, index: u64, term: u64, at: Location) {
        let before = self.before.0;
        let slot = index.checked_sub(before + 1).and_then(|i| self.slots.get_mut(i as usize));
        if let Some(slot) = slot.filter(|slot| slot.term == term) {
            slot.at = Some(at);
        }
        while self.cached_bytes > self.cache_bytes_max && self.cached_from < self.last() {
            let i = (self.cached_from - before - 1) as usize;
            let Some(slot) = self.slots.get_mut(i).filter(|slot| slot.at.is_some()) else { break };
            self.cached_bytes -= slot.data.take().map_or(0, |data| data.len());
            self.cached_from += 1;
        }
    }

    /// An entry, or why it can't be read.
    fn entry(&self, index: u64) -> raft::Result<Result<Entry, Error>> {
        let unavailable = || raft::Error::Store(StorageError::Unavailable);
        let slot = self.slot(index).ok_or_else(unavailable)?;
        let data = match (&slot.data, slot.at) {
            (Some(data), _) => data.clone(),
            (None, Some(at)) => match self.segments.read(at) {
                Ok(data) => data,
                Err(error) => return Ok(Err(error)),
            },
            (None, None) => return Err(unavailable()),
        };
        let mut entry = Entry { index, term: slot.term, data, ..Entry::default() };
        if slot.kind == FrameKind::ConfChange {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
        }
        Ok(Ok(entry))
    }
}

fn frame_kind(entry: &Entry) -> FrameKind {
    if entry.get_entry_type() == EntryType::EntryNormal { FrameKind::Entry } else { FrameKind::ConfChange }
}

/// The frame that makes an entry durable.
pub fn entry_frame(group: u32, entry: &Entry) -> Frame {
    Frame { kind: frame_kind(entry), group, term: entry.term, index: entry.index, data: entry.data.clone() }
}

/// The frame that makes a hard state durable.
pub fn hard_state_frame(group: u32, hard_state: &HardState) -> Frame {
    Frame::of_hard_state(group, (hard_state.term, hard_state.vote, hard_state.commit))
}

/// The hard state of a frame.
pub fn hard_state_of(frame: &Frame) -> HardState {
    let (term, vote, commit) = frame.hard_state();
    HardState { term, vote, commit, ..HardState::default() }
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
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.before.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let max_size = max_size.into();
        let mut size = 0;
        let mut entries = vec![];
        for index in low..high {
            let entry = match self.entry(index)? {
                Ok(entry) => entry,
                // A snapshot has what was applied: a follower gets that instead.
                Err(error @ Error::Corrupt { .. }) if context.can_async() && index <= self.applied => {
                    if !entries.is_empty() {
                        break;
                    }
                    tracing::error!(%error, index, "an entry is damaged: a follower is sent a snapshot");
                    return Err(raft::Error::Store(StorageError::Compacted));
                }
                // raft-rs panics at an error; whoever runs it looks for what failed.
                Err(error) => {
                    self.failed.borrow_mut().get_or_insert(error);
                    break;
                }
            };
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
        if index < self.before.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        self.term_at(index).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _: u64) -> raft::Result<Snapshot> {
        if let Some((index, term, conf)) = &self.offer
            && *index >= request_index
            && *index >= self.before.0
        {
            let mut snapshot = Snapshot::default();
            let metadata = snapshot.mut_metadata();
            (metadata.index, metadata.term) = (*index, *term);
            metadata.set_conf_state(conf.clone());
            return Ok(snapshot);
        }
        self.is_asked.set(true);
        Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}
