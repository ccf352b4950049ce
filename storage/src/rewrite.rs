//! Applying the commands that write a sealed recording's chunks anew, as larger ones.
//!
//! New chunks wait beside the old until all are there; then they take their place in
//! one step. The first names the last of the old, so the chain leads on from there.

use crate::apply::{Entry, Outcome, Refusal, refused};
use crate::error::Error;
use crate::schema::{Chain, Key, RecordingState, chunks_of};
use heddle_proto::{Hash, RecordingId};

impl Entry<'_, '_> {
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
        let (header, chunk_id) = match self.chunk_of(id) {
            Ok(found) => found,
            Err(refusal) => return refused(refusal),
        };
        let (mut new, is_begun_anew) = match row.rewriting.take() {
            Some(so_far) if header.first_event > 0 => (so_far, false),
            before => (Chain::new(row.chain.last_chunk), before.is_some()),
        };
        if !new.is_followed_by(&header) || header.end_event() > row.chain.events {
            return refused(Refusal::Conflict("the chunk does not follow the last one written anew".into()));
        }
        // Only now: a refused command changes nothing.
        if is_begun_anew {
            for (key, page) in self.rows.scan(Key::span_of(self.group, b'w', &id.0))? {
                self.rows.drop_row(key, &page)?;
            }
        }
        self.push_chunk(b'w', id, &mut new, &header, chunk_id)?;
        let events = new.events;
        row.rewriting = Some(new);
        self.rows.put(&Key::recording(self.group, id), &row);
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
        if row.chain.last_chunk == last && row.rewritten_from == old {
            // A retry.
            return Ok(Outcome::Done);
        }
        let Some(new) = row.rewriting.take() else {
            return refused(Refusal::Conflict("no chunks were written anew".into()));
        };
        let is_whole = new.events == row.chain.events
            && new.icount == row.chain.icount
            && new.counts == row.chain.counts;
        if !is_whole || row.chain.last_chunk != old || new.last_chunk != last {
            return refused(Refusal::Conflict("the chunks written anew are not the recording's".into()));
        }
        let waiting = self.rows.scan(Key::span_of(self.group, b'w', &id.0))?;
        let held: u64 =
            waiting.iter().flat_map(|(_, page)| chunks_of(page)).map(|c| u64::from(c.events)).sum();
        let count = waiting.iter().flat_map(|(_, page)| chunks_of(page)).count();
        if count as u64 != new.chunks || held != row.chain.events {
            return refused(Refusal::Conflict("some of the chunks written anew are not there".into()));
        }
        for (key, page) in self.rows.scan(Key::span_of(self.group, b'c', &id.0))? {
            self.rows.drop_row(key, &page)?;
        }
        for (key, page) in waiting {
            let first = chunks_of(&page).next().map_or(0, |chunk| chunk.first_event);
            self.rows.remove(key);
            self.rows.put_raw(Key::page(self.group, b'c', id, first).0, page);
        }
        row.rewritten_from = old;
        row.chain = new;
        self.rows.put(&Key::recording(self.group, id), &row);
        Ok(Outcome::Done)
    }
}
