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

    pub(crate) fn drop_owner(&mut self, owner: RecordingId) -> Result<Outcome, Error> {
        for (page, hashes) in self.rows.scan(Key::span_of(self.group, b'q', &owner.0))? {
            for hash in hashes.chunks_exact(32) {
                self.disown(Hash(hash.try_into().expect("chunks of 32")), owner)?;
            }
            self.rows.remove(page);
        }
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
