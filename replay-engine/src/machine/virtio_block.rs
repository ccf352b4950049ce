//! virtio-mmio (version 2) block device with one queue.
//!
//! A notification schedules a bottom half; the bottom half pops requests and
//! puts them in flight; a completion, which is an async event, moves the data
//! and tells the guest. Descriptors are the guest's: every index, length and
//! address is checked, and a bad one asks the driver for a reset.

use super::disk::{Disk, SECTOR};
use super::ram::Ram;
use serde::{Deserialize, Serialize};

/// Largest queue.
pub const QUEUE_MAX: u16 = 256;
/// Most bytes a request may move; a larger one fails with an I/O error.
const REQUEST_BYTES_MAX: u64 = 16 << 20;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 64;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// A part of guest memory named by a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    address: u64,
    len: u32,
}

/// A request that was popped and has not completed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Counts up from zero over all disks.
    pub id: u64,
    head: u16,
    kind: u32,
    sector: u64,
    data: Vec<Segment>,
    data_is_writable: bool,
    status_at: u64,
}

/// Registers, queue and requests in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioBlock {
    status: u32,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queue_size: u16,
    queue_ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    interrupt_status: u32,
    /// Requests popped and not completed, oldest first.
    pub in_flight: Vec<Request>,
}

/// What a register write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioWrite {
    /// Look at the queue, in a bottom half.
    Notify,
    /// The interrupt line may have changed.
    Line,
    /// Nothing.
    Nothing,
}

impl VirtioBlock {
    /// Whether the interrupt line is high.
    pub fn line(&self) -> bool {
        self.interrupt_status != 0
    }

    /// Reads register `offset`.
    pub fn load(&self, offset: u64, disk: &Disk) -> u32 {
        match offset {
            0x000 => 0x7472_6976,
            0x004 => 2,
            0x008 => 2,
            0x00c => 0x4c44_4448, // "HDDL"
            0x010 => ((FEATURE_VERSION_1 | FEATURE_FLUSH) >> (32 * (self.features_select & 1))) as u32,
            0x034 if self.queue_select == 0 => u32::from(QUEUE_MAX),
            0x044 if self.queue_select == 0 => u32::from(self.queue_ready),
            0x060 => self.interrupt_status,
            0x070 => self.status,
            0x100 => disk.sectors() as u32,
            0x104 => (disk.sectors() >> 32) as u32,
            _ => 0,
        }
    }

    /// Writes register `offset`.
    pub fn store(&mut self, offset: u64, value: u32) -> VirtioWrite {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let on_queue = self.queue_select == 0;
        match offset {
            0x014 => self.features_select = value,
            0x020 => {
                self.driver_features = match self.driver_features_select {
                    0 => low(self.driver_features),
                    1 => high(self.driver_features),
                    _ => self.driver_features,
                }
            }
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            0x038 if on_queue => self.queue_size = value.min(u32::from(QUEUE_MAX)) as u16,
            0x044 if on_queue => self.queue_ready = value & 1 != 0,
            0x050 if value == 0 => return VirtioWrite::Notify,
            0x064 => {
                self.interrupt_status &= !value;
                return VirtioWrite::Line;
            }
            0x070 if value == 0 => {
                *self = VirtioBlock::default();
                return VirtioWrite::Line;
            }
            0x070 => self.status = value,
            0x080 if on_queue => self.descriptors = low(self.descriptors),
            0x084 if on_queue => self.descriptors = high(self.descriptors),
            0x090 if on_queue => self.available = low(self.available),
            0x094 if on_queue => self.available = high(self.available),
            0x0a0 if on_queue => self.used = low(self.used),
            0x0a4 if on_queue => self.used = high(self.used),
            _ => {}
        }
        VirtioWrite::Nothing
    }

    /// Pops all available requests; each gets an id from `next_id`.
    pub fn pop_requests(&mut self, ram: &Ram, base: u64, next_id: &mut u64) -> Vec<u64> {
        let mut popped = vec![];
        if self.status & STATUS_DRIVER_OK == 0 || !self.queue_ready || self.queue_size == 0 {
            return popped;
        }
        let guest = Guest { ram, base };
        loop {
            let Some(index) = guest.u16(self.available.wrapping_add(2)) else {
                return self.fail(popped);
            };
            // More in flight than the queue has entries means the driver broke the rules.
            if index == self.next_available || self.in_flight.len() >= self.queue_size as usize {
                return popped;
            }
            let slot = u64::from(self.next_available % self.queue_size);
            let head = guest.u16(self.available.wrapping_add(4 + slot * 2));
            let Some(mut request) = head.and_then(|head| self.parse(&guest, head)) else {
                return self.fail(popped);
            };
            self.next_available = self.next_available.wrapping_add(1);
            request.id = *next_id;
            *next_id += 1;
            popped.push(request.id);
            self.in_flight.push(request);
        }
    }

    fn fail(&mut self, popped: Vec<u64>) -> Vec<u64> {
        self.status |= STATUS_NEEDS_RESET;
        self.interrupt_status |= 2;
        popped
    }

    /// Header, data segments, status byte. `None` if the chain breaks the rules.
    fn parse(&self, guest: &Guest, head: u16) -> Option<Request> {
        let mut chain: Vec<(Segment, bool)> = vec![];
        let mut next = Some(head);
        while let Some(index) = next {
            if index >= self.queue_size || chain.len() >= self.queue_size as usize {
                return None;
            }
            let at = self.descriptors.checked_add(u64::from(index) * 16)?;
            let (address, word) = (guest.u64(at)?, guest.u64(at.checked_add(8)?)?);
            let (len, flags) = (word as u32, (word >> 32) as u16);
            chain.push((Segment { address, len }, flags & 2 != 0));
            next = (flags & 1 != 0).then_some((word >> 48) as u16);
        }
        let ((header, header_writable), (status, status_writable)) = (*chain.first()?, *chain.last()?);
        if chain.len() < 2 || header_writable || !status_writable || header.len < 16 || status.len == 0 {
            return None;
        }
        let middle = &chain[1..chain.len() - 1];
        let data_is_writable = middle.first().is_some_and(|(_, writable)| *writable);
        Some(Request {
            id: 0,
            head,
            kind: guest.u64(header.address)? as u32,
            sector: guest.u64(header.address.checked_add(8)?)?,
            data: middle.iter().map(|(segment, _)| *segment).collect(),
            data_is_writable,
            status_at: status.address,
        })
    }

    /// Completes request `id`: moves its data, writes its status, uses its descriptor.
    /// `false` if no such request is in flight.
    pub fn complete(&mut self, id: u64, ram: &mut Ram, base: u64, disk: &mut Disk) -> bool {
        let Some(at) = self.in_flight.iter().position(|request| request.id == id) else {
            return false;
        };
        let request = self.in_flight.remove(at);
        let outcome = request.transfer(ram, base, disk);
        let (status, written) = outcome.map_or((1u8, 1), |bytes| (0, bytes + 1));
        let mut guest_write = |at: u64, bytes: &[u8]| ram.write(at.wrapping_sub(base), bytes);
        let slot = u64::from(self.next_used % self.queue_size.max(1));
        let entry = u64::from(request.head) | u64::from(written) << 32;
        let index = self.next_used.wrapping_add(1);
        let done = guest_write(request.status_at, &[status])
            .and_then(|()| guest_write(self.used.wrapping_add(4 + slot * 8), &entry.to_le_bytes()))
            .and_then(|()| guest_write(self.used.wrapping_add(2), &index.to_le_bytes()));
        self.next_used = index;
        self.interrupt_status |= 1;
        if done.is_none() {
            self.fail(vec![]);
        }
        true
    }
}

impl Request {
    /// Moves the data; bytes written to the guest, or `None` for an I/O error.
    fn transfer(&self, ram: &mut Ram, base: u64, disk: &mut Disk) -> Option<u32> {
        let total: u64 = self.data.iter().map(|segment| u64::from(segment.len)).sum();
        let end = self.sector.checked_mul(SECTOR)?.checked_add(total)?;
        match self.kind {
            0 | 1 => {
                let in_bounds = end <= disk.sectors() * SECTOR && total <= REQUEST_BYTES_MAX;
                if !in_bounds || total % SECTOR != 0 || self.data_is_writable != (self.kind == 0) {
                    return None;
                }
                let mut at = self.sector * SECTOR;
                for segment in &self.data {
                    let guest_at = segment.address.wrapping_sub(base);
                    if self.kind == 0 {
                        let mut bytes = vec![0; segment.len as usize];
                        disk.read(at, &mut bytes);
                        ram.write(guest_at, &bytes)?;
                    } else {
                        disk.write(at, ram.slice(guest_at, segment.len as usize)?);
                    }
                    at += u64::from(segment.len);
                }
                Some(if self.kind == 0 { total as u32 } else { 0 })
            }
            4 => Some(0), // Flush: the overlay lives as long as the machine.
            8 => {
                let id = b"heddle-disk\0\0\0\0\0\0\0\0\0";
                let segment = self.data.first().filter(|_| self.data_is_writable)?;
                let len = (segment.len as usize).min(id.len());
                ram.write(segment.address.wrapping_sub(base), &id[..len])?;
                Some(len as u32)
            }
            _ => None,
        }
    }
}

/// Guest-physical reads.
struct Guest<'a> {
    ram: &'a Ram,
    base: u64,
}

impl Guest<'_> {
    fn u16(&self, at: u64) -> Option<u16> {
        self.ram.load::<2>(at.wrapping_sub(self.base)).map(|v| v as u16)
    }
    fn u64(&self, at: u64) -> Option<u64> {
        self.ram.load::<8>(at.wrapping_sub(self.base))
    }
}
