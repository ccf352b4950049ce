//! Snapshots that a session keeps in memory, to go back to.

use super::Origin;
use crate::page_tree::BlockSource;
use crate::state::{Snapshot, snapshot_blocks};
use heddle_proto::{Hash, Position};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Most snapshots; at the bound every second one is dropped, so what lies far back gets sparse.
const SNAPSHOTS_MAX: usize = 256;
/// Most bytes of their blocks; at the bound the same happens.
const BYTES_MAX: usize = 256 << 20;
/// The last snapshots are the most likely to be wanted: so many are kept whatever they take.
const SNAPSHOTS_MIN: usize = 4;

/// Snapshots and their blocks. A block that a snapshot shares with the recording's own is
/// not in here.
#[derive(Default)]
pub(super) struct Memory {
    snapshots: BTreeMap<u64, (Position, Hash)>,
    blocks: HashMap<Hash, Vec<u8>>,
    bytes: usize,
    /// The snapshot that the live state was last saved to or restored from: the next one has
    /// only what is new since, so this one's blocks must stay.
    base: Option<u64>,
}

impl Memory {
    /// Whether there is one at `icount`.
    pub(super) fn has(&self, icount: u64) -> bool {
        self.snapshots.contains_key(&icount)
    }

    /// The last one at or before `icount`.
    pub(super) fn nearest(&self, icount: u64) -> Option<(Position, Hash)> {
        self.snapshots.range(..=icount).next_back().map(|(_, snapshot)| *snapshot)
    }

    /// The live state was restored from the snapshot at `icount`, one of these or not.
    pub(super) fn restored(&mut self, icount: u64) {
        self.base = Some(icount);
    }

    /// Keeps a snapshot of the live state.
    pub(super) fn keep(&mut self, snapshot: Snapshot, origin: &mut dyn Origin) -> Result<(), String> {
        let icount = snapshot.position.icount;
        self.snapshots.insert(icount, (snapshot.position, snapshot.root));
        self.base = Some(icount);
        for (hash, bytes) in snapshot.blocks {
            let len = bytes.len();
            if self.blocks.insert(hash, bytes).is_none() {
                self.bytes += len;
            }
        }
        while self.snapshots.len() > SNAPSHOTS_MIN
            && (self.snapshots.len() > SNAPSHOTS_MAX || self.bytes > BYTES_MAX)
        {
            self.thin(origin)?;
        }
        Ok(())
    }

    /// Drops every second snapshot, and the blocks that only those have.
    fn thin(&mut self, origin: &mut dyn Origin) -> Result<(), String> {
        let base = self.base;
        let mut is_second = false;
        self.snapshots.retain(|icount, _| {
            is_second = !is_second;
            !is_second || base == Some(*icount)
        });
        let roots: Vec<Hash> = self.snapshots.values().map(|(_, root)| *root).collect();
        let mut used = HashSet::new();
        for root in roots {
            used.extend(snapshot_blocks(root, &mut self.source(origin))?);
        }
        self.blocks.retain(|hash, _| used.contains(hash));
        self.bytes = self.blocks.values().map(Vec::len).sum();
        Ok(())
    }

    /// All blocks: these and the recording's.
    pub(super) fn source<'a>(&'a self, origin: &'a mut dyn Origin) -> Source<'a> {
        Source { blocks: &self.blocks, origin }
    }
}

/// See [`Memory::source`].
pub(super) struct Source<'a> {
    blocks: &'a HashMap<Hash, Vec<u8>>,
    origin: &'a mut dyn Origin,
}

impl BlockSource for Source<'_> {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        let is_missing = |hash: &&Hash| !self.blocks.contains_key(*hash);
        let missing: Vec<Hash> = hashes.iter().filter(is_missing).copied().collect();
        let fetched = if missing.is_empty() { vec![] } else { self.origin.blocks(&missing)? };
        let mut fetched = fetched.into_iter();
        let found = hashes.iter().map(|hash| match self.blocks.get(hash) {
            Some(bytes) => Ok(bytes.clone()),
            None => fetched.next().ok_or_else(|| format!("no block {hash}")),
        });
        found.collect()
    }
}
