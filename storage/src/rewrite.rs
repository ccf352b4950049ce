//! Applying the commands that write a sealed recording's chunks anew, as larger ones.
//!
//! New chunks wait beside the old until all are there; then they take their place in
//! one step. The first names the last of the old, so the chain leads on from there.

use crate::apply::{Entry, Outcome, Refusal};
use crate::catalog::{ChunkRow, Key, RecordingState, Rewriting};
use crate::error::Error;
use heddle_proto::chunk::HEADER_BYTES;
use heddle_proto::{ChunkHeader, Hash, RecordingId};

fn refused(refusal: Refusal) -> Result<Outcome, Error> {
    Ok(Outcome::Refused(refusal))
}

impl Entry<'_> {
    /// Takes a new chunk. The first begins it all anew: another writer may have stopped midway.
    pub(crate) fn rewrite(&mut self, id: RecordingId, epoch: u64) -> Result<Outcome, Error> {
        let mut row = match self.writable(id, epoch)? {
            Ok(row) => row,
            Err(refusal) => return refused(refusal),
        };
        if row.state == RecordingState::Recording {
            return refused(Refusal::Conflict("it is being recorded; seal it first".into()));
        }
        if row.rewritten_from != Hash::ZERO {
            // Once: the chain leads on from what was acknowledged, not from a chain between.
            return refused(Refusal::Conflict("it was written anew already".into()));
        }
        let header = match ChunkHeader::decode(&self.bulk) {
            Ok(header) if header.recording == id => header,
            Ok(_) => return refused(Refusal::Invalid("the chunk is of another recording".into())),
            Err(error) => return refused(Refusal::Invalid(error.to_string())),
        };
        let chunk_id = Hash::of(&self.bulk[..HEADER_BYTES]);
        let fresh = || Rewriting {
            events: 0,
            icount: 0,
            chunks: 0,
            bytes_stored: 0,
            bytes_raw: 0,
            last_chunk: row.last_chunk,
            counts: vec![0; row.counts.len()],
        };
        let (mut new, is_begun_anew) = match row.rewriting.take() {
            Some(so_far) if header.first_event > 0 => (so_far, false),
            before => (fresh(), before.is_some()),
        };
        if header.first_event != new.events
            || header.previous != new.last_chunk
            || header.first_icount < new.icount
            || header.end_event() > row.events
        {
            return refused(Refusal::Conflict("the chunk does not follow the last one written anew".into()));
        }
        // Only now: a refused command changes nothing.
        if is_begun_anew {
            for key in self.catalog.chunk_rows_with(b'w', id, self.changes)?.into_keys() {
                self.changes.delete(key);
            }
        }
        let chunk = ChunkRow {
            at: self.bulk_at,
            id: chunk_id,
            events: header.events,
            first_icount: header.first_icount,
            last_icount: header.last_icount,
        };
        self.changes.put(Key::rewritten(id, header.first_event), &chunk);
        new.events = header.end_event();
        new.icount = header.last_icount;
        new.chunks += 1;
        new.bytes_stored += self.bulk.len() as u64;
        new.bytes_raw += u64::from(header.raw_bytes);
        new.last_chunk = chunk_id;
        for (sum, n) in new.counts.iter_mut().zip(header.counts) {
            *sum = sum.saturating_add(n);
        }
        let events = new.events;
        row.rewriting = Some(new);
        self.changes.put(Key::recording(id), &row);
        Ok(Outcome::Committed { events })
    }

    /// Puts the new chunks in the place of the old, if they hold as many events of each kind.
    pub(crate) fn adopt(
        &mut self,
        id: RecordingId,
        epoch: u64,
        old: Hash,
        last: Hash,
    ) -> Result<Outcome, Error> {
        let mut row = match self.writable(id, epoch)? {
            Ok(row) => row,
            Err(refusal) => return refused(refusal),
        };
        if row.last_chunk == last && row.rewritten_from == old {
            // A retry.
            return Ok(Outcome::Done);
        }
        let Some(new) = row.rewriting.take() else {
            return refused(Refusal::Conflict("no chunks were written anew".into()));
        };
        let is_whole = new.events == row.events && new.icount == row.icount && new.counts == row.counts;
        if !is_whole || row.last_chunk != old || new.last_chunk != last {
            return refused(Refusal::Conflict("the chunks written anew are not the recording's".into()));
        }
        let waiting = self.catalog.chunk_rows_with(b'w', id, self.changes)?;
        let held: u64 = waiting.values().map(|chunk| u64::from(chunk.events)).sum();
        if waiting.len() as u64 != new.chunks || held != row.events {
            return refused(Refusal::Conflict("some of the chunks written anew are not there".into()));
        }
        for key in self.catalog.chunk_rows_with(b'c', id, self.changes)?.into_keys() {
            self.changes.delete(key);
        }
        for (key, chunk) in waiting {
            self.changes.put(key.clone().adopted(), &chunk);
            self.changes.delete(key);
        }
        row.rewritten_from = old;
        row.last_chunk = last;
        row.chunks = new.chunks;
        row.bytes_stored = new.bytes_stored;
        row.bytes_raw = new.bytes_raw;
        self.changes.put(Key::recording(id), &row);
        Ok(Outcome::Done)
    }
}
