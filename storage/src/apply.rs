//! Applying a committed command: pure decisions over rows.
//!
//! Epoch, contiguity and duplicates are judged here and nowhere else, epoch first.
//! Every replica decides alike: nothing local enters but where bytes lie. A command that
//! is refused has changed nothing.

use crate::catalog::Txn;
use crate::command::{Command, Proposal};
use crate::error::Error;
use crate::journal::Location;
use crate::schema::{
    Chain, ChunkRow, Key, MemberRow, RecordingRow, RecordingState, SnapshotRow, Wish, chunks_of, is_page_full,
};
use bytes::Bytes;
use heddle_proto::chunk::HEADER_BYTES;
use heddle_proto::{ChunkHeader, Hash, RecordingId};

/// Longest token of a writer, and longest address of a replica: a row's value must hold them.
pub const TOKEN_BYTES_MAX: usize = 64;
/// See [`TOKEN_BYTES_MAX`].
pub const ADDRESS_BYTES_MAX: usize = 1024;

/// What an applied command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Opened: the epoch, and where to go on.
    Opened {
        /// The writer's epoch.
        epoch: u64,
        /// The committed watermark.
        events: u64,
        /// The last chunk.
        last_chunk: Hash,
    },
    /// Appended, sealed: the committed watermark.
    Committed {
        /// Events committed.
        events: u64,
    },
    /// A coordinator's epoch.
    Epoch(u64),
    /// Which of the blocks are not there.
    Wanted(Vec<bool>),
    /// The shard of a recording.
    Placed(u32),
    /// Done.
    Done,
    /// Refused.
    Refused(Refusal),
}

/// Why a command changed nothing. Each is another thing to do for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A newer writer or coordinator has taken over: stop.
    Fenced {
        /// The newest epoch.
        epoch: u64,
    },
    /// Other bytes are committed there: stop, something is wrong.
    Conflict(String),
    /// Chunks are missing before this one: send from the watermark on.
    Gap {
        /// The committed watermark.
        events: u64,
    },
    /// The recording has ended.
    Sealed,
    /// No such recording.
    NotFound,
    /// Its deletion is going on: try again.
    BeingDeleted,
    /// The request itself is bad.
    Invalid(String),
}

/// Faults that tests plant to see that they are found. None in a shipped store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Planted {
    #[default]
    None,
    AckBeforeFsync,
    VoteNotPersisted,
    CommitOfOldTerm,
    SnapshotOverNewerLog,
    ReferenceDroppedEarly,
    DamageTakenForTail,
}

/// A command with what is needed to apply it.
pub struct Entry<'a, 'b> {
    /// The group.
    pub group: u32,
    /// The entry's index.
    pub index: u64,
    /// The command's bulk.
    pub bulk: Bytes,
    /// Where the entry lies.
    pub entry_at: Location,
    /// Where in it the bulk begins.
    pub bulk_from: usize,
    /// The rows.
    pub rows: &'a mut Txn<'b>,
    /// For tests.
    pub planted: Planted,
}

pub(crate) fn refused(refusal: Refusal) -> Result<Outcome, Error> {
    Ok(Outcome::Refused(refusal))
}

impl Entry<'_, '_> {
    /// Applies it. An error is this replica's own trouble and stops it.
    pub fn apply(mut self, proposal: Proposal) -> Result<Outcome, Error> {
        match proposal.command {
            Command::Open { recording, token, fence } => self.open(recording, token, fence),
            Command::Append { recording, epoch } => self.append(recording, epoch),
            Command::AppendMany { recording, epoch, lengths } => self.append_many(recording, epoch, &lengths),
            Command::Seal { recording, epoch, events, last_chunk, cut } => {
                self.seal(recording, epoch, events, last_chunk, cut)
            }
            Command::AddSnapshot { recording, epoch, icount, event, root, digest } => {
                self.add_snapshot(recording, epoch, SnapshotRow { icount, event, root, digest })
            }
            Command::PutBlocks { owner, blocks } => self.put_blocks(owner, blocks),
            Command::Pin { owner, hashes } => self.pin(owner, hashes),
            Command::DropOwner { owner, until } => self.drop_owner(owner, until),
            Command::MetaAcquire { .. } => {
                let epoch = self.rows.get::<u64>(&Key::epoch())?.unwrap_or(0) + 1;
                self.rows.put(&Key::epoch(), &epoch);
                Ok(Outcome::Epoch(epoch))
            }
            Command::MetaWrite { epoch, puts, deletes } => self.meta_write(epoch, puts, deletes),
            Command::Delete { recording } => self.delete(recording),
            Command::Forget { recording } => self.forget(recording),
            Command::Abandon { recording } => self.abandon(recording),
            Command::Rewrite { recording, epoch } => self.rewrite(recording, epoch),
            Command::Adopt { recording, epoch, old, new } => self.adopt(recording, epoch, old, new),
            Command::Place { recording, shard } => {
                let key = Key::placed(recording);
                let placed = self.rows.get::<u32>(&key)?;
                if placed.is_none() {
                    self.rows.put(&key, &shard);
                }
                self.count_on(recording);
                Ok(Outcome::Placed(placed.unwrap_or(shard)))
            }
            Command::Unplace { recording, until } => {
                if self.is_counted_on(recording, until)? {
                    return refused(Refusal::BeingDeleted);
                }
                self.rows.remove(Key::placed(recording).0);
                self.rows.remove(Key::last(self.group, recording).0);
                Ok(Outcome::Done)
            }
            Command::Member { id, address, wish } => self.member(id, address, wish),
        }
    }

    /// Where a part of the bulk lies.
    pub(crate) fn part(&self, from: usize, bytes: usize) -> Option<Location> {
        let part = self.bulk.get(from..from.checked_add(bytes)?)?;
        Some(self.entry_at.part(self.bulk_from + from, part))
    }

    /// Where the whole bulk lies.
    pub(crate) fn whole(&self) -> Location {
        self.entry_at.part(self.bulk_from, &self.bulk)
    }

    fn open(&mut self, id: RecordingId, token: Vec<u8>, fence: bool) -> Result<Outcome, Error> {
        if token.len() > TOKEN_BYTES_MAX {
            return refused(Refusal::Invalid("the token is too long".into()));
        }
        let opened = |row: &RecordingRow| Outcome::Opened {
            epoch: row.epoch,
            events: row.chain.events,
            last_chunk: row.chain.last_chunk,
        };
        let key = Key::recording(self.group, id);
        let row = match self.rows.get::<RecordingRow>(&key)? {
            Some(row) if row.state == RecordingState::Deleted => {
                return refused(if fence { Refusal::NotFound } else { Refusal::BeingDeleted });
            }
            // A retry gets the same answer, even after the end.
            Some(row) if row.token == token => return Ok(opened(&row)),
            Some(row) if row.state != RecordingState::Recording => return refused(Refusal::Sealed),
            Some(row) if !fence => return refused(Refusal::Fenced { epoch: row.epoch }),
            Some(row) => RecordingRow { epoch: row.epoch + 1, token, ..row },
            None if fence => return refused(Refusal::NotFound),
            None => {
                let manifest = self.whole();
                self.rows.refer(manifest);
                RecordingRow {
                    state: RecordingState::Recording,
                    epoch: 1,
                    token,
                    manifest,
                    chain: Chain::new(Hash::ZERO),
                    rewritten_from: Hash::ZERO,
                    rewriting: None,
                }
            }
        };
        self.rows.put(&key, &row);
        Ok(opened(&row))
    }

    /// The row, if `epoch` may write to it.
    pub(crate) fn writable(
        &self,
        id: RecordingId,
        epoch: u64,
    ) -> Result<Result<RecordingRow, Refusal>, Error> {
        let row = self.rows.get::<RecordingRow>(&Key::recording(self.group, id))?;
        let Some(row) = row.filter(|row| row.state != RecordingState::Deleted) else {
            return Ok(Err(Refusal::NotFound));
        };
        Ok(if row.epoch == epoch { Ok(row) } else { Err(Refusal::Fenced { epoch: row.epoch }) })
    }

    /// The bulk as a chunk of this recording: its header and id.
    pub(crate) fn chunk_of(&self, id: RecordingId) -> Result<(ChunkHeader, Hash), Refusal> {
        let header = ChunkHeader::decode(&self.bulk).map_err(|error| Refusal::Invalid(error.to_string()))?;
        if header.recording != id {
            return Err(Refusal::Invalid("the chunk is of another recording".into()));
        }
        Ok((header, Hash::of(&self.bulk[..HEADER_BYTES])))
    }

    /// Adds a chunk behind the last of a chain, to pages of this kind.
    pub(crate) fn push_chunk(
        &mut self,
        kind: u8,
        id: RecordingId,
        chain: &mut Chain,
        header: &ChunkHeader,
        chunk_id: Hash,
    ) -> Result<(), Error> {
        let at = self.whole();
        let row = ChunkRow {
            at,
            id: chunk_id,
            first_event: header.first_event,
            events: header.events,
            first_icount: header.first_icount,
            last_icount: header.last_icount,
        };
        let mut key = Key::page(self.group, kind, id, chain.page);
        if self.rows.look(&key, is_page_full)? == Some(true) {
            chain.page = header.first_event;
            key = Key::page(self.group, kind, id, chain.page);
        }
        self.rows.extend(&key, |page| row.encode(page))?;
        self.rows.refer(at);
        chain.push(header, chunk_id, self.bulk.len());
        Ok(())
    }

    fn append(&mut self, id: RecordingId, epoch: u64) -> Result<Outcome, Error> {
        let mut row = match self.writable(id, epoch)? {
            Ok(row) => row,
            Err(refusal) => return refused(refusal),
        };
        let outcome = self.append_to(id, &mut row)?;
        if !matches!(outcome, Outcome::Refused(_)) {
            self.rows.put(&Key::recording(self.group, id), &row);
        }
        Ok(outcome)
    }

    /// The row is read and written once for all.
    fn append_many(&mut self, id: RecordingId, epoch: u64, lengths: &[u32]) -> Result<Outcome, Error> {
        let mut row = match self.writable(id, epoch)? {
            Ok(row) => row,
            Err(refusal) => return refused(refusal),
        };
        let (all, all_from) = (self.bulk.clone(), self.bulk_from);
        if lengths.iter().map(|length| *length as usize).sum::<usize>() != all.len() {
            return refused(Refusal::Invalid("the chunks' lengths are not the bulk's".into()));
        }
        let mut outcome = Outcome::Committed { events: row.chain.events };
        let mut from = 0;
        for length in lengths {
            let to = from + *length as usize;
            (self.bulk, self.bulk_from) = (all.slice(from..to), all_from + from);
            from = to;
            outcome = self.append_to(id, &mut row)?;
            if matches!(outcome, Outcome::Refused(_)) {
                break;
            }
        }
        self.rows.put(&Key::recording(self.group, id), &row);
        Ok(outcome)
    }

    fn append_to(&mut self, id: RecordingId, row: &mut RecordingRow) -> Result<Outcome, Error> {
        let (header, chunk_id) = match self.chunk_of(id) {
            Ok(found) => found,
            Err(refusal) => return refused(refusal),
        };
        if header.first_event < row.chain.events {
            let from = Key::page(self.group, b'c', id, 0);
            let page = self.rows.last(&from, &Key::page(self.group, b'c', id, header.first_event))?;
            let page = page.map(|(_, page)| page).unwrap_or_default();
            let there = chunks_of(&page).find(|chunk| chunk.first_event == header.first_event);
            return Ok(match there {
                Some(chunk) if chunk.id == chunk_id => Outcome::Committed { events: row.chain.events },
                _ => Outcome::Refused(Refusal::Conflict(format!(
                    "another chunk is committed at event {}",
                    header.first_event
                ))),
            });
        }
        if row.state != RecordingState::Recording {
            return refused(Refusal::Sealed);
        }
        if header.first_event > row.chain.events {
            return refused(Refusal::Gap { events: row.chain.events });
        }
        if !row.chain.is_followed_by(&header) {
            let what = "the chunk does not follow the last one committed".into();
            return refused(Refusal::Conflict(what));
        }
        self.push_chunk(b'c', id, &mut row.chain, &header, chunk_id)?;
        Ok(Outcome::Committed { events: row.chain.events })
    }

    fn seal(
        &mut self,
        id: RecordingId,
        epoch: u64,
        events: u64,
        last: Hash,
        cut: bool,
    ) -> Result<Outcome, Error> {
        let mut row = match self.writable(id, epoch)? {
            Ok(row) => row,
            Err(refusal) => return refused(refusal),
        };
        if events > row.chain.events {
            return refused(Refusal::Gap { events: row.chain.events });
        }
        if events != row.chain.events || (last != row.chain.last_chunk && last != row.rewritten_from) {
            let what = format!("{} events are committed, not {events}", row.chain.events);
            return refused(Refusal::Conflict(what));
        }
        if row.state == RecordingState::Recording {
            row.state = if cut { RecordingState::Cut } else { RecordingState::Sealed };
            self.rows.put(&Key::recording(self.group, id), &row);
        }
        Ok(Outcome::Committed { events })
    }

    /// The root is in another shard: the service has seen that it is stored and owned, and
    /// what a recording owns stays until the recording is deleted, which is judged here.
    fn add_snapshot(&mut self, id: RecordingId, epoch: u64, row: SnapshotRow) -> Result<Outcome, Error> {
        if let Err(refusal) = self.writable(id, epoch)? {
            return refused(refusal);
        }
        self.rows.put(&Key::snapshot(self.group, id, row.icount), &row);
        Ok(Outcome::Done)
    }

    fn delete(&mut self, id: RecordingId) -> Result<Outcome, Error> {
        let key = Key::recording(self.group, id);
        let Some(mut row) = self.rows.get::<RecordingRow>(&key)? else {
            return refused(Refusal::NotFound);
        };
        if row.state == RecordingState::Recording {
            let what = "it is being recorded; end the recording first".into();
            return refused(Refusal::Conflict(what));
        }
        if row.state == RecordingState::Deleted {
            return Ok(Outcome::Done);
        }
        for kind in [b'c', b'w', b's'] {
            for (key, value) in self.rows.scan(Key::span_of(self.group, kind, &id.0))? {
                self.rows.drop_row(key, &value)?;
            }
        }
        self.rows.release(row.manifest);
        row.state = RecordingState::Deleted;
        row.manifest = Location::NONE;
        row.rewriting = None;
        self.rows.put(&key, &row);
        Ok(Outcome::Done)
    }

    fn forget(&mut self, id: RecordingId) -> Result<Outcome, Error> {
        let key = Key::recording(self.group, id);
        match self.rows.get::<RecordingRow>(&key)? {
            Some(row) if row.state != RecordingState::Deleted => {
                return refused(Refusal::Conflict("it is not deleted".into()));
            }
            Some(_) => self.rows.remove(key.0),
            None => {}
        }
        Ok(Outcome::Done)
    }

    fn abandon(&mut self, id: RecordingId) -> Result<Outcome, Error> {
        let key = Key::recording(self.group, id);
        if self.rows.has(&key)? {
            return refused(Refusal::Conflict("it was opened".into()));
        }
        let row = RecordingRow {
            state: RecordingState::Deleted,
            epoch: 0,
            token: vec![],
            manifest: Location::NONE,
            chain: Chain::new(Hash::ZERO),
            rewritten_from: Hash::ZERO,
            rewriting: None,
        };
        self.rows.put(&key, &row);
        Ok(Outcome::Done)
    }

    fn meta_write(
        &mut self,
        epoch: u64,
        puts: Vec<(String, u32)>,
        deletes: Vec<String>,
    ) -> Result<Outcome, Error> {
        let newest = self.rows.get::<u64>(&Key::epoch())?.unwrap_or(0);
        if epoch != newest {
            return refused(Refusal::Fenced { epoch: newest });
        }
        let total: usize = puts.iter().map(|(_, bytes)| *bytes as usize).sum();
        if total != self.bulk.len() {
            return refused(Refusal::Invalid("the rows' lengths are not the bulk's".into()));
        }
        let mut from = 0;
        for (key, bytes) in puts {
            let key = Key::meta(&key);
            let Some(at) = self.part(from, bytes as usize) else { continue };
            self.drop_if_there(&key)?;
            self.rows.put(&key, &at);
            self.rows.refer(at);
            from += bytes as usize;
        }
        for key in deletes {
            self.drop_if_there(&Key::meta(&key))?;
        }
        Ok(Outcome::Done)
    }

    fn drop_if_there(&mut self, key: &Key) -> Result<(), Error> {
        match self.rows.get_raw(&key.0)? {
            Some(value) => self.rows.drop_row(key.0.clone(), &value),
            None => Ok(()),
        }
    }

    fn member(&mut self, id: u64, address: String, wish: Wish) -> Result<Outcome, Error> {
        if address.len() > ADDRESS_BYTES_MAX {
            return refused(Refusal::Invalid("the address is too long".into()));
        }
        let key = Key::member(id);
        let known = self.rows.get::<MemberRow>(&key)?;
        let is_gone = known.as_ref().is_some_and(|row| row.wish == Wish::Removed);
        if is_gone && wish != Wish::Removed {
            let what = format!("replica {id} was removed; a new one takes a new id");
            return refused(Refusal::Invalid(what));
        }
        let address = match known {
            Some(row) if address.is_empty() => row.address,
            None if address.is_empty() => {
                return refused(Refusal::Invalid(format!("there is no replica {id}")));
            }
            _ => address,
        };
        self.rows.put(&key, &MemberRow { address, wish });
        Ok(Outcome::Done)
    }
}
