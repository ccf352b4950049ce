//! A split virtqueue: rings and descriptors in guest memory, walked as if they meant harm.
//!
//! ```text
//! descriptors  address u64 | len u32 | flags u16 | next u16, by index
//! available    flags u16 | index u16 | ring of heads u16    what the driver offers
//! used         flags u16 | index u16 | ring of (head u32, written u32)
//! ```
//! All of it is the guest's. Every index, length and address is checked where it is used;
//! [`Broken`] says that the driver broke the rules, and the device then asks for a reset.

use super::RAM_BASE;
use super::ram::Ram;
use serde::{Deserialize, Serialize};

/// Largest queue, as QEMU's block device has it.
pub const QUEUE_MAX: u16 = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// No device here offers indirect descriptors, so a driver may not use them.
const INDIRECT: u16 = 4;

/// The driver broke the rules of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// A part of guest memory named by a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Guest-physical.
    #[serde(serialize_with = "super::shown::hex")]
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

impl Segment {
    /// Its bytes, if all of them are RAM.
    pub fn bytes(self, ram: &Ram) -> Result<&[u8], Broken> {
        ram.slice(self.address.wrapping_sub(RAM_BASE), self.len as usize).ok_or(Broken)
    }
}

/// Descriptors that belong together: what the device may read, then what it may write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Index of the first descriptor: the chain's name in the used ring.
    pub head: u16,
    /// For the device to read.
    pub readable: Vec<Segment>,
    /// For the device to write.
    pub writable: Vec<Segment>,
}

impl Chain {
    /// Bytes that the device may write.
    pub fn capacity(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// What the driver put in. `None` if it is more than `bytes_max`.
    pub fn read(&self, ram: &Ram, bytes_max: usize) -> Result<Option<Vec<u8>>, Broken> {
        let total: u64 = self.readable.iter().map(|segment| u64::from(segment.len)).sum();
        if total > bytes_max as u64 {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(total as usize);
        for segment in &self.readable {
            bytes.extend_from_slice(segment.bytes(ram)?);
        }
        Ok(Some(bytes))
    }

    /// Puts bytes in, as many as there is room for; how many.
    pub fn write(&self, ram: &mut Ram, bytes: &[u8]) -> Result<u32, Broken> {
        let mut rest = bytes;
        for segment in &self.writable {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            ram.write(segment.address.wrapping_sub(RAM_BASE), now).ok_or(Broken)?;
            rest = later;
        }
        Ok((bytes.len() - rest.len()) as u32)
    }
}

/// Where a queue lies, and how far both sides have come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Virtqueue {
    /// Entries, at most [`QUEUE_MAX`].
    pub size: u16,
    /// The driver has set it up.
    pub is_ready: bool,
    /// Address of the descriptors.
    #[serde(serialize_with = "super::shown::hex")]
    pub descriptors: u64,
    /// Address of the available ring.
    #[serde(serialize_with = "super::shown::hex")]
    pub available: u64,
    /// Address of the used ring.
    #[serde(serialize_with = "super::shown::hex")]
    pub used: u64,
    next_available: u16,
    next_used: u16,
}

impl Virtqueue {
    /// Chains that the driver offers and the device has not popped; zero while there is no queue.
    pub fn waiting(&self, ram: &Ram) -> Result<u16, Broken> {
        if !self.is_ready || self.size == 0 {
            return Ok(0);
        }
        let index = load::<2>(ram, self.available.wrapping_add(2))? as u16;
        let waiting = index.wrapping_sub(self.next_available);
        // A driver has no more descriptors to offer than the queue has entries.
        if waiting > self.size { Err(Broken) } else { Ok(waiting) }
    }

    /// The next chain that the driver offers.
    pub fn pop(&mut self, ram: &Ram) -> Result<Option<Chain>, Broken> {
        if self.waiting(ram)? == 0 {
            return Ok(None);
        }
        let slot = u64::from(self.next_available % self.size);
        let head = load::<2>(ram, self.available.wrapping_add(4 + slot * 2))? as u16;
        let chain = self.walk(ram, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Takes the last pop back: the chain is offered still.
    pub fn unpop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    fn walk(&self, ram: &Ram, head: u16) -> Result<Chain, Broken> {
        let mut chain = Chain { head, readable: vec![], writable: vec![] };
        let mut next = Some(head);
        while let Some(index) = next {
            // A chain longer than the queue goes in a circle.
            let walked = chain.readable.len() + chain.writable.len();
            if index >= self.size || walked >= usize::from(self.size) {
                return Err(Broken);
            }
            let at = self.descriptors.wrapping_add(u64::from(index) * 16);
            let (address, word) = (load::<8>(ram, at)?, load::<8>(ram, at.wrapping_add(8))?);
            let (len, flags) = (word as u32, (word >> 32) as u16);
            let is_writable = flags & WRITE != 0;
            if flags & INDIRECT != 0 || (!is_writable && !chain.writable.is_empty()) {
                return Err(Broken);
            }
            let side = if is_writable { &mut chain.writable } else { &mut chain.readable };
            side.push(Segment { address, len });
            next = (flags & NEXT != 0).then_some((word >> 48) as u16);
        }
        Ok(chain)
    }

    /// Gives a chain back, with the number of bytes that were written into it.
    pub fn give_back(&mut self, ram: &mut Ram, head: u16, written: u32) -> Result<(), Broken> {
        let slot = u64::from(self.next_used % self.size.max(1));
        let entry = u64::from(head) | u64::from(written) << 32;
        self.next_used = self.next_used.wrapping_add(1);
        store(ram, self.used.wrapping_add(4 + slot * 8), &entry.to_le_bytes())?;
        store(ram, self.used.wrapping_add(2), &self.next_used.to_le_bytes())
    }
}

fn load<const N: usize>(ram: &Ram, at: u64) -> Result<u64, Broken> {
    ram.load::<N>(at.wrapping_sub(RAM_BASE)).ok_or(Broken)
}

/// Stores bytes at a guest-physical address, all of which must be RAM.
pub fn store(ram: &mut Ram, at: u64, bytes: &[u8]) -> Result<(), Broken> {
    ram.write(at.wrapping_sub(RAM_BASE), bytes).ok_or(Broken)
}
