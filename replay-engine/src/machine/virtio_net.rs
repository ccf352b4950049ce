//! virtio network card: two queues, no offloads, no merged buffers.
//!
//! A frame from outside is an async event with its bytes. A frame that the guest sends is
//! taken by a bottom half: recording, it goes out; replaying, only its fold counts.

use super::output::Output;
use super::ram::Ram;
use super::virtio::{FEATURE_VERSION_1, Identity, Transport};
use serde::{Deserialize, Serialize};

const FEATURE_MAC: u64 = 1 << 5;
/// What it is.
pub const IDENTITY: Identity = Identity { id: 1, features: FEATURE_VERSION_1 | FEATURE_MAC, queues: 2 };
/// The queue of buffers for frames from outside.
pub const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// QEMU's default for its first card, 52:54:00:12:34:56, as the configuration has it.
pub const MAC: u64 = u64::from_le_bytes([0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0, 0]);
/// `struct virtio_net_hdr` with `num_buffers`; the offload fields before that stay zero.
const HEADER_BYTES: usize = 12;
const NUM_BUFFERS_AT: usize = 10;
/// Largest frame: 1500 bytes, and the Ethernet header with a VLAN tag. A longer one is dropped.
pub const FRAME_BYTES_MAX: usize = 1518;

/// The transport, and what was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioNet {
    /// Registers and queues.
    pub transport: Transport,
    /// What was sent.
    pub output: Output,
}

impl VirtioNet {
    /// After reset.
    pub fn new() -> VirtioNet {
        VirtioNet { transport: Transport::new(&IDENTITY), output: Output::default() }
    }

    /// Whether the driver has a buffer for a frame. Of a broken ring the frame will tell.
    pub fn takes_frames(&self, ram: &Ram) -> bool {
        self.transport.waiting(RECEIVE, ram) != Ok(0)
    }

    /// A frame came in. Without a buffer that is large enough it is dropped.
    pub fn receive(&mut self, ram: &mut Ram, frame: &[u8]) {
        let Some(chain) = self.transport.pop(RECEIVE, ram) else { return };
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[NUM_BUFFERS_AT] = 1;
        bytes.extend_from_slice(frame);
        if chain.capacity() < bytes.len() as u64 {
            return self.transport.unpop(RECEIVE);
        }
        let written = chain.write(ram, &bytes);
        self.transport.give_back(RECEIVE, ram, chain.head, written);
    }

    /// Takes all frames that the driver wants sent.
    pub fn transmit(&mut self, ram: &mut Ram) -> Vec<Vec<u8>> {
        let mut frames = vec![];
        for _ in 0..self.transport.offered(TRANSMIT, ram) {
            let Some(chain) = self.transport.pop(TRANSMIT, ram) else { break };
            match chain.read(ram, HEADER_BYTES + FRAME_BYTES_MAX) {
                Ok(Some(bytes)) if bytes.len() >= HEADER_BYTES => {
                    let frame = &bytes[HEADER_BYTES..];
                    self.output.frame(frame);
                    frames.push(frame.to_vec());
                }
                // Longer than any frame.
                Ok(None) => {}
                _ => {
                    self.transport.fail();
                    break;
                }
            }
            self.transport.give_back(TRANSMIT, ram, chain.head, Ok(0));
        }
        frames
    }
}

impl Default for VirtioNet {
    fn default() -> Self {
        Self::new()
    }
}
