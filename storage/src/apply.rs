//! Applying a committed command: pure decisions over rows.
//!
//! Epoch, contiguity and duplicates are judged here and nowhere else, epoch first.
//! Every replica decides alike: nothing local enters.

use crate::catalog::{
    BlockRow, Catalog, Chain, Changes, ChunkRow, Key, RecordingRow, RecordingState, SnapshotRow,
};
use crate::command::Command;
use crate::error::Error;
use crate::journal::Location;
use bytes::Bytes;
use heddle_proto::chunk::HEADER_BYTES;
use heddle_proto::{ChunkHeader, Hash, RecordingId};

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
    /// The request itself is bad.
    Invalid(String),
}

/// An entry's command with what is needed to apply it.
pub struct Entry<'a> {
    /// The command.
    pub command: Command,
    /// Its bulk.
    pub bulk: Bytes,
    /// Where the bulk lies.
    pub bulk_at: Location,
    /// Rows so far.
    pub catalog: &'a Catalog,
    /// Rows of this batch.
    pub changes: &'a mut Changes,
}

impl Entry<'_> {
    /// Applies it. An error is this replica's own trouble and stops it.
    pub fn apply(mut self) -> Result<Outcome, Error> {
        match self.command.clone() {
            Command::Open { recording, token, fence } => self.open(recording, token, fence),
            Command::Append { recording, epoch } => self.append(recording, epoch),
            Command::Seal { recording, epoch, events, last_chunk, cut } => {
                self.seal(recording, epoch, events, last_chunk, cut)
            }
            Command::AddSnapshot { recording, epoch, icount, event, root, digest } => {
                self.add_snapshot(recording, epoch, SnapshotRow { icount, event, root, digest })
            }
            Command::PutBlocks { blocks } => self.put_blocks(blocks),
            Command::MetaAcquire { .. } => {
                let epoch = self.get::<u64>(&Key::epoch())?.unwrap_or(0) + 1;
                self.changes.put(Key::epoch(), &epoch);
                Ok(Outcome::Epoch(epoch))
            }
            Command::MetaWrite { epoch, puts, deletes } => self.meta_write(epoch, puts, deletes),
            Command::Delete { recording } => self.delete(recording),
            Command::Rewrite { recording, epoch } => self.rewrite(recording, epoch),
            Command::Adopt { recording, epoch, old, new } => self.adopt(recording, epoch, old, new),
        }
    }

    pub(crate) fn get<T: serde::de::DeserializeOwned>(&self, key: &Key) -> Result<Option<T>, Error> {
        self.catalog.get_with(key, self.changes)
    }

    fn open(&mut self, id: RecordingId, token: Vec<u8>, fence: bool) -> Result<Outcome, Error> {
        let opened = |row: &RecordingRow| Outcome::Opened {
            epoch: row.epoch,
            events: row.chain.events,
            last_chunk: row.chain.last_chunk,
        };
        let key = Key::recording(id);
        let row = match self.get::<RecordingRow>(&key)? {
            // A retry gets the same answer, even after the end.
            Some(row) if row.token == token => return Ok(opened(&row)),
            Some(row) if row.state != RecordingState::Recording => {
                return Ok(Outcome::Refused(Refusal::Sealed));
            }
            Some(row) if !fence => {
                return Ok(Outcome::Refused(Refusal::Fenced { epoch: row.epoch }));
            }
            Some(row) => RecordingRow { epoch: row.epoch + 1, token, ..row },
            None if fence => return Ok(Outcome::Refused(Refusal::NotFound)),
            None => RecordingRow {
                state: RecordingState::Recording,
                epoch: 1,
                token,
                manifest: self.bulk_at,
                chain: Chain::new(Hash::ZERO),
                rewritten_from: Hash::ZERO,
                rewriting: None,
            },
        };
        self.changes.put(key, &row);
        Ok(opened(&row))
    }

    /// The row, if `epoch` may write to it.
    pub(crate) fn writable(
        &self,
        id: RecordingId,
        epoch: u64,
    ) -> Result<Result<RecordingRow, Refusal>, Error> {
        let Some(row) = self.get::<RecordingRow>(&Key::recording(id))? else {
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

    /// Puts a chunk's row.
    pub(crate) fn put_chunk(&mut self, key: Key, header: &ChunkHeader, id: Hash) {
        let row = ChunkRow {
            at: self.bulk_at,
            id,
            events: header.events,
            first_icount: header.first_icount,
            last_icount: header.last_icount,
        };
        self.changes.put(key, &row);
    }

    fn append(&mut self, id: RecordingId, epoch: u64) -> Result<Outcome, Error> {
        let mut row = match self.writable(id, epoch)? {
            Ok(row) => row,
            Err(refusal) => return Ok(Outcome::Refused(refusal)),
        };
        let refused = |refusal| Ok(Outcome::Refused(refusal));
        let (header, chunk_id) = match self.chunk_of(id) {
            Ok(found) => found,
            Err(refusal) => return refused(refusal),
        };
        if header.first_event < row.chain.events {
            let there = self.get::<ChunkRow>(&Key::chunk(id, header.first_event))?;
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
        self.put_chunk(Key::chunk(id, header.first_event), &header, chunk_id);
        row.chain.push(&header, chunk_id, self.bulk.len());
        self.changes.put(Key::recording(id), &row);
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
            Err(refusal) => return Ok(Outcome::Refused(refusal)),
        };
        if events > row.chain.events {
            return Ok(Outcome::Refused(Refusal::Gap { events: row.chain.events }));
        }
        if events != row.chain.events || (last != row.chain.last_chunk && last != row.rewritten_from) {
            let what = format!("{} events are committed, not {events}", row.chain.events);
            return Ok(Outcome::Refused(Refusal::Conflict(what)));
        }
        if row.state == RecordingState::Recording {
            row.state = if cut { RecordingState::Cut } else { RecordingState::Sealed };
            self.changes.put(Key::recording(id), &row);
        }
        Ok(Outcome::Committed { events })
    }

    fn add_snapshot(&mut self, id: RecordingId, epoch: u64, row: SnapshotRow) -> Result<Outcome, Error> {
        if let Err(refusal) = self.writable(id, epoch)? {
            return Ok(Outcome::Refused(refusal));
        }
        if !self.catalog.has_with(&Key::block(row.root), self.changes)? {
            let what = "the snapshot's root block is not stored".into();
            return Ok(Outcome::Refused(Refusal::Invalid(what)));
        }
        self.changes.put(Key::snapshot(id, row.icount), &row);
        Ok(Outcome::Done)
    }

    fn delete(&mut self, id: RecordingId) -> Result<Outcome, Error> {
        let Some(row) = self.get::<RecordingRow>(&Key::recording(id))? else {
            return Ok(Outcome::Refused(Refusal::NotFound));
        };
        if row.state == RecordingState::Recording {
            let what = "it is being recorded; end the recording first".into();
            return Ok(Outcome::Refused(Refusal::Conflict(what)));
        }
        // Rows of this batch first: they may not be in the catalog yet.
        self.changes.delete_of(id);
        for key in self.catalog.keys_of(id)? {
            self.changes.delete(key);
        }
        Ok(Outcome::Done)
    }

    fn put_blocks(&mut self, blocks: Vec<(Hash, u32, u32)>) -> Result<Outcome, Error> {
        let mut from = 0;
        for (hash, bytes, raw_bytes) in blocks {
            let key = Key::block(hash);
            // Each hash is stored once: a second copy is never pointed at.
            if !self.catalog.has_with(&key, self.changes)? {
                let at = self.bulk_at.part(from, bytes as usize);
                self.changes.put(key, &BlockRow { at, raw_bytes });
            }
            from += bytes as usize;
        }
        Ok(Outcome::Done)
    }

    fn meta_write(
        &mut self,
        epoch: u64,
        puts: Vec<(String, u32)>,
        deletes: Vec<String>,
    ) -> Result<Outcome, Error> {
        let newest = self.get::<u64>(&Key::epoch())?.unwrap_or(0);
        if epoch != newest {
            return Ok(Outcome::Refused(Refusal::Fenced { epoch: newest }));
        }
        let mut from = 0;
        for (key, bytes) in puts {
            self.changes.put(Key::meta(&key), &self.bulk_at.part(from, bytes as usize));
            from += bytes as usize;
        }
        for key in deletes {
            self.changes.delete(Key::meta(&key));
        }
        Ok(Outcome::Done)
    }
}
