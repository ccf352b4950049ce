//! virtio entropy device.
//!
//! A notification schedules a bottom half; the bottom half pops requests, and each is
//! answered at once, on the same role, by an event that has the bytes: as QEMU's does.

use super::ram::Ram;
use super::virtio::{FEATURE_VERSION_1, Identity, Transport};
use super::virtqueue::Chain;
use serde::{Deserialize, Serialize};

/// What it is.
pub const IDENTITY: Identity = Identity { id: 4, features: FEATURE_VERSION_1, queues: 1 };
const QUEUE: u16 = 0;
/// Most bytes that answer one request: a device need not fill a buffer, and a driver that
/// means harm must not fill the log. Linux asks for 64.
pub const ENTROPY_BYTES_MAX: usize = 1024;

/// The transport, and requests that wait for their bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioRng {
    /// Registers and queue.
    pub transport: Transport,
    /// Requests popped and not answered, oldest first; none between two events.
    waiting: Vec<Chain>,
}

impl VirtioRng {
    /// After reset.
    pub fn new() -> VirtioRng {
        VirtioRng { transport: Transport::new(&IDENTITY), waiting: vec![] }
    }

    /// The driver has reset the transport.
    pub fn reset(&mut self) {
        self.waiting.clear();
    }

    /// Pops all available requests. One without room is given back as it is.
    pub fn pop_requests(&mut self, ram: &mut Ram) {
        for _ in 0..self.transport.offered(QUEUE, ram) {
            match self.transport.pop(QUEUE, ram) {
                Some(chain) if chain.capacity() == 0 => {
                    self.transport.give_back(QUEUE, ram, chain.head, Ok(0));
                }
                Some(chain) => self.waiting.push(chain),
                None => break,
            }
        }
    }

    /// Bytes that the oldest request takes, if there is one.
    pub fn wanted(&self) -> Option<usize> {
        self.waiting.first().map(|chain| chain.capacity().min(ENTROPY_BYTES_MAX as u64) as usize)
    }

    /// Answers the oldest request.
    pub fn answer(&mut self, ram: &mut Ram, entropy: &[u8]) {
        if self.waiting.is_empty() {
            return;
        }
        let chain = self.waiting.remove(0);
        let written = chain.write(ram, entropy);
        self.transport.give_back(QUEUE, ram, chain.head, written);
    }
}

impl Default for VirtioRng {
    fn default() -> Self {
        Self::new()
    }
}
