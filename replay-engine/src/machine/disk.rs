//! A disk: an image that is never written, and an overlay of the blocks that were.

use super::ram::PAGE;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Image and overlay.
#[derive(Clone, Debug)]
pub struct Disk {
    base: Arc<[u8]>,
    overlay: BTreeMap<u32, Box<[u8; PAGE]>>,
    dirty: BTreeSet<u32>,
}

impl Disk {
    /// A disk that shows `base`.
    pub fn new(base: Arc<[u8]>) -> Disk {
        Disk { base, overlay: BTreeMap::new(), dirty: BTreeSet::new() }
    }

    /// Sectors; a partial one at the end is not offered.
    pub fn sectors(&self) -> u64 {
        self.base.len() as u64 / SECTOR
    }

    /// Overlay blocks that the disk can have.
    pub fn blocks(&self) -> usize {
        self.base.len().div_ceil(PAGE)
    }

    /// Reads at byte `at`; what lies beyond the end reads as zeros.
    pub fn read(&self, at: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let from = at as usize + done;
            let (block, offset) = (from / PAGE, from % PAGE);
            let len = (PAGE - offset).min(out.len() - done);
            let to = &mut out[done..done + len];
            match self.overlay.get(&(block as u32)) {
                Some(bytes) => to.copy_from_slice(&bytes[offset..offset + len]),
                None => {
                    to.fill(0);
                    if let Some(rest) = self.base.get(from..) {
                        let have = rest.len().min(len);
                        to[..have].copy_from_slice(&rest[..have]);
                    }
                }
            }
            done += len;
        }
    }

    /// Writes at byte `at`, to the overlay.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let to = at as usize + done;
            let (block, offset) = ((to / PAGE) as u32, to % PAGE);
            let len = (PAGE - offset).min(bytes.len() - done);
            if !self.overlay.contains_key(&block) {
                let mut fresh = Box::new([0; PAGE]);
                self.read(u64::from(block) * PAGE as u64, &mut fresh[..]);
                self.overlay.insert(block, fresh);
            }
            let page = self.overlay.get_mut(&block).expect("inserted above");
            page[offset..offset + len].copy_from_slice(&bytes[done..done + len]);
            self.dirty.insert(block);
            done += len;
        }
    }

    /// Puts back an overlay block of a snapshot.
    pub fn restore_block(&mut self, block: u32, bytes: &[u8; PAGE]) {
        self.overlay.insert(block, Box::new(*bytes));
    }

    /// An overlay block.
    pub fn overlay_block(&self, block: u32) -> Option<&[u8]> {
        self.overlay.get(&block).map(|bytes| &bytes[..])
    }

    /// Overlay blocks written since the last call.
    pub fn take_dirty(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.dirty).into_iter().collect()
    }
}
