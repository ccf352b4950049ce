//! virtio block device with one queue.
//!
//! A notification schedules a bottom half; the bottom half pops requests and
//! puts them in flight; a completion, which is an async event, moves the data
//! and tells the guest.

use super::RAM_BASE;
use super::disk::{Disk, SECTOR};
use super::ram::Ram;
use super::virtio::{FEATURE_VERSION_1, Identity, Transport};
use super::virtqueue::{Broken, Chain, Segment, store};
use serde::{Deserialize, Serialize};

const FEATURE_FLUSH: u64 = 1 << 9;
/// What it is.
pub const IDENTITY: Identity = Identity { id: 2, features: FEATURE_VERSION_1 | FEATURE_FLUSH, queues: 1 };
const QUEUE: u16 = 0;
/// Most bytes a request may move; a larger one fails with an I/O error.
const REQUEST_BYTES_MAX: u64 = 16 << 20;
const HEADER_BYTES: u32 = 16;

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
    #[serde(serialize_with = "super::shown::hex")]
    status_at: u64,
}

/// The transport, and requests in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioBlock {
    /// Registers and queue.
    pub transport: Transport,
    /// Requests popped and not completed, oldest first.
    pub in_flight: Vec<Request>,
}

impl VirtioBlock {
    /// After reset.
    pub fn new() -> VirtioBlock {
        VirtioBlock { transport: Transport::new(&IDENTITY), in_flight: vec![] }
    }

    /// Whether it has its queue: one from outside may not.
    pub fn is_whole(&self) -> bool {
        self.transport.is_whole(&IDENTITY)
    }

    /// The driver has reset the transport: what was in flight is dropped.
    pub fn reset(&mut self) {
        self.in_flight.clear();
    }

    /// Pops all available requests; each gets an id from `next_id`.
    pub fn pop_requests(&mut self, ram: &Ram, next_id: &mut u64) -> Vec<u64> {
        let mut popped = vec![];
        // More in flight than the queue has entries means the driver broke the rules.
        while self.in_flight.len() < usize::from(self.transport.queue_size(QUEUE)) {
            let Some(chain) = self.transport.pop(QUEUE, ram) else { break };
            let Ok(mut request) = Request::parse(&chain, ram) else {
                self.transport.fail();
                break;
            };
            request.id = *next_id;
            *next_id = next_id.wrapping_add(1);
            popped.push(request.id);
            self.in_flight.push(request);
        }
        popped
    }

    /// Completes request `id`: moves its data, writes its status, uses its descriptor.
    /// `false` if no such request is in flight.
    pub fn complete(&mut self, id: u64, ram: &mut Ram, disk: &mut Disk) -> bool {
        let Some(at) = self.in_flight.iter().position(|request| request.id == id) else {
            return false;
        };
        let request = self.in_flight.remove(at);
        let outcome = request.transfer(ram, disk);
        let (status, written) = outcome.map_or((1u8, 1), |bytes| (0, bytes + 1));
        let written = store(ram, request.status_at, &[status]).map(|()| written);
        self.transport.give_back(QUEUE, ram, request.head, written);
        true
    }
}

impl Default for VirtioBlock {
    fn default() -> Self {
        Self::new()
    }
}

impl Request {
    /// Header, data segments on one side, status byte.
    fn parse(chain: &Chain, ram: &Ram) -> Result<Request, Broken> {
        let (header, to_write) = chain.readable.split_first().ok_or(Broken)?;
        let (status, to_read) = chain.writable.split_last().ok_or(Broken)?;
        let is_two_sided = !to_write.is_empty() && !to_read.is_empty();
        if header.len < HEADER_BYTES || status.len == 0 || is_two_sided {
            return Err(Broken);
        }
        let word = |at: u64| {
            let at = header.address.wrapping_add(at).wrapping_sub(RAM_BASE);
            ram.load::<8>(at).ok_or(Broken)
        };
        Ok(Request {
            id: 0,
            head: chain.head,
            kind: word(0)? as u32,
            sector: word(8)?,
            data: if to_read.is_empty() { to_write.to_vec() } else { to_read.to_vec() },
            data_is_writable: !to_read.is_empty(),
            status_at: status.address,
        })
    }

    /// Moves the data; bytes written to the guest, or `None` for an I/O error.
    fn transfer(&self, ram: &mut Ram, disk: &mut Disk) -> Option<u32> {
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
                    if self.kind == 0 {
                        let mut bytes = vec![0; segment.len as usize];
                        disk.read(at, &mut bytes);
                        store(ram, segment.address, &bytes).ok()?;
                    } else {
                        disk.write(at, segment.bytes(ram).ok()?);
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
                store(ram, segment.address, &id[..len]).ok()?;
                Some(len as u32)
            }
            _ => None,
        }
    }
}
