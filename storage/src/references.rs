//! Applying the commands of the block store: content-addressed blocks, each with the set of
//! recordings that refer to it.
//!
//! A set, never a count: a reference that is made or dropped twice is the same as once.

use crate::apply::{Entry, Outcome, Planted, Refusal, refused};
use crate::error::Error;
use crate::schema::{BlockRow, Key, is_hashes_full};
use heddle_proto::{Hash, RecordingId};

impl Entry<'_, '_> {
    /// Notes that `owner` refers to a block. Whether that is new.
    fn own(&mut self, hash: Hash, row: &BlockRow, owner: RecordingId) -> Result<bool, Error> {
        let further = Key::owner(self.group, hash, owner);
        if row.owner == owner || self.rows.has(&further)? {
            return Ok(false);
        }
        self.rows.put(&further, &());
        Ok(true)
    }

    /// Notes that a recording's blocks, or its place, are counted on being here from now on.
    pub(crate) fn count_on(&mut self, id: RecordingId) {
        self.rows.put(&Key::last(self.group, id), &self.index);
    }

    /// Whether an entry behind `until` counts on it.
    pub(crate) fn is_counted_on(&self, id: RecordingId, until: u64) -> Result<bool, Error> {
        let last = self.rows.get::<u64>(&Key::last(self.group, id))?;
        Ok(last.is_some_and(|last| last > until))
    }

    /// Notes in the owner's pages what it refers to, so that all can be dropped together.
    fn note(&mut self, owner: RecordingId, hashes: &[Hash]) -> Result<(), Error> {
        let from = Key::owned(self.group, owner, 0);
        let last = self.rows.last(&from, &Key::owned(self.group, owner, u32::MAX))?;
        let page_of = |key: &[u8]| key.last_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let mut page = last.as_ref().map_or(0, |(key, _)| page_of(key));
        let mut bytes = last.map(|(_, page)| page).unwrap_or_default();
        for hash in hashes {
            if is_hashes_full(&bytes) {
                self.rows.put_raw(Key::owned(self.group, owner, page).0, std::mem::take(&mut bytes));
                page += 1;
            }
            bytes.extend_from_slice(&hash.0);
        }
        if !hashes.is_empty() {
            self.rows.put_raw(Key::owned(self.group, owner, page).0, bytes);
        }
        Ok(())
    }

    pub(crate) fn pin(&mut self, owner: RecordingId, hashes: Vec<Hash>) -> Result<Outcome, Error> {
        let mut wanted = Vec::with_capacity(hashes.len());
        let mut owned = vec![];
        for hash in hashes {
            let row = self.rows.get::<BlockRow>(&Key::block(self.group, hash))?;
            if let Some(row) = &row
                && self.own(hash, row, owner)?
            {
                owned.push(hash);
            }
            wanted.push(row.is_none());
        }
        self.note(owner, &owned)?;
        if wanted.contains(&false) {
            self.count_on(owner);
        }
        Ok(Outcome::Wanted(wanted))
    }

    pub(crate) fn put_blocks(
        &mut self,
        owner: RecordingId,
        blocks: Vec<(Hash, u32, u32)>,
    ) -> Result<Outcome, Error> {
        let total: usize = blocks.iter().map(|(_, bytes, _)| *bytes as usize).sum();
        if total != self.bulk.len() {
            return refused(Refusal::Invalid("the blocks' lengths are not the bulk's".into()));
        }
        if !blocks.is_empty() {
            self.count_on(owner);
        }
        let mut from = 0;
        let mut owned = vec![];
        for (hash, bytes, raw_bytes) in blocks {
            let key = Key::block(self.group, hash);
            match self.rows.get::<BlockRow>(&key)? {
                // Each hash is stored once: a second copy is never pointed at.
                Some(row) => {
                    if self.own(hash, &row, owner)? {
                        owned.push(hash);
                    }
                }
                None => {
                    if let Some(at) = self.part(from, bytes as usize) {
                        self.rows.put(&key, &BlockRow { at, raw_bytes, owner });
                        self.rows.refer(at);
                        owned.push(hash);
                    }
                }
            }
            from += bytes as usize;
        }
        self.note(owner, &owned)?;
        Ok(Outcome::Done)
    }

    pub(crate) fn drop_owner(&mut self, owner: RecordingId, until: u64) -> Result<Outcome, Error> {
        if self.is_counted_on(owner, until)? {
            return refused(Refusal::BeingDeleted);
        }
        for (page, hashes) in self.rows.scan(Key::span_of(self.group, b'q', &owner.0))? {
            for hash in hashes.chunks_exact(32) {
                self.disown(Hash(hash.try_into().expect("chunks of 32")), owner)?;
            }
            self.rows.remove(page);
        }
        self.rows.remove(Key::last(self.group, owner).0);
        Ok(Outcome::Done)
    }

    fn disown(&mut self, hash: Hash, owner: RecordingId) -> Result<(), Error> {
        let key = Key::block(self.group, hash);
        let Some(row) = self.rows.get::<BlockRow>(&key)? else { return Ok(()) };
        let is_first = row.owner == owner;
        if !is_first {
            self.rows.remove(Key::owner(self.group, hash, owner).0);
            if self.planted != Planted::ReferenceDroppedEarly {
                return Ok(());
            }
        }
        let further = self.rows.scan(Key::span_of(self.group, b'o', &hash.0))?.into_iter().next();
        match further {
            Some((next, _)) if self.planted != Planted::ReferenceDroppedEarly => {
                let id = next.last_chunk::<16>().copied().unwrap_or_default();
                self.rows.put(&key, &BlockRow { owner: RecordingId(id), ..row });
                self.rows.remove(next);
            }
            _ => {
                self.rows.release(row.at);
                self.rows.remove(key.0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::catalog::Catalog;
    use crate::command::{Command, Proposal};
    use crate::journal::Location;
    use crate::rows::MemRows;
    use bytes::Bytes;
    use std::sync::Arc;

    const ID: RecordingId = RecordingId([7; 16]);

    fn apply(catalog: &Catalog, group: u32, index: u64, command: Command, bulk: &'static [u8]) -> Outcome {
        let (bulk, planted) = (Bytes::from_static(bulk), Planted::None);
        let entry_at = Location { segment: 1, offset: 4096, bytes: 100, crc: 0 };
        let rows = &mut catalog.begin();
        let entry = Entry { group, index, bulk: bulk.clone(), entry_at, bulk_from: 20, rows, planted };
        entry.apply(Proposal { command, bulk }).unwrap()
    }

    fn late() -> Outcome {
        Outcome::Refused(Refusal::BeingDeleted)
    }

    /// Two replicas finish one deletion; the second is late, and the id is in use again.
    #[test]
    fn a_late_end_of_a_deletion_does_not_take_the_blocks_of_the_next_recording() {
        let catalog = Catalog::new(Arc::new(MemRows::default()));
        let hash = Hash::of(b"block");
        let put = || Command::PutBlocks { owner: ID, blocks: vec![(hash, 5, 5)] };
        let drop_owner = |until| Command::DropOwner { owner: ID, until };
        assert_eq!(apply(&catalog, 1, 10, put(), b"block"), Outcome::Done);
        assert_eq!(apply(&catalog, 1, 11, drop_owner(9), b""), late(), "it has not seen these blocks");
        assert_eq!(apply(&catalog, 1, 12, drop_owner(10), b""), Outcome::Done);
        assert!(!catalog.owns(1, hash, ID).unwrap());
        assert_eq!(catalog.raw(&Key::last(1, ID).0).unwrap(), None, "nothing is left of it");
        assert_eq!(apply(&catalog, 1, 13, put(), b"block"), Outcome::Done);
        assert_eq!(apply(&catalog, 1, 14, drop_owner(10), b""), late());
        assert!(catalog.owns(1, hash, ID).unwrap());
        // A reference to what it refers to already counts, too.
        let pin = Command::Pin { owner: ID, hashes: vec![hash] };
        assert_eq!(apply(&catalog, 1, 15, pin, b""), Outcome::Wanted(vec![false]));
        assert_eq!(apply(&catalog, 1, 16, drop_owner(14), b""), late());
    }

    #[test]
    fn a_late_end_of_a_deletion_does_not_take_the_place_of_the_next_recording() {
        let catalog = Catalog::new(Arc::new(MemRows::default()));
        let place = || Command::Place { recording: ID, shard: 3 };
        let unplace = |until| Command::Unplace { recording: ID, until };
        assert_eq!(apply(&catalog, 0, 10, place(), b""), Outcome::Placed(3));
        assert_eq!(apply(&catalog, 0, 12, place(), b""), Outcome::Placed(3));
        assert_eq!(apply(&catalog, 0, 13, unplace(11), b""), late());
        assert_eq!(catalog.get::<u32>(&Key::placed(ID)).unwrap(), Some(3));
        assert_eq!(apply(&catalog, 0, 14, unplace(13), b""), Outcome::Done);
        assert_eq!(catalog.get::<u32>(&Key::placed(ID)).unwrap(), None);
    }
}
