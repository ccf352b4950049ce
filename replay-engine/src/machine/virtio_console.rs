//! virtio console: one port, without multiport.
//!
//! What is typed comes as async events and waits here for the driver's buffers; what the
//! guest prints is sent by a bottom half, as QEMU's is.

use super::output::Output;
use super::ram::Ram;
use super::virtio::{FEATURE_VERSION_1, Identity, Transport};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What it is.
pub const IDENTITY: Identity = Identity { id: 3, features: FEATURE_VERSION_1, queues: 2 };
/// The queue of buffers for what is typed.
pub const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Typed bytes that wait for buffers; more are dropped, as the UART does.
const BACKLOG_BYTES_MAX: usize = 64 << 10;
/// Most bytes a driver may print at once: twice what Linux writes to a port.
const PRINT_BYTES_MAX: usize = 64 << 10;

/// The transport, what is typed, and what was printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioConsole {
    /// Registers and queues.
    pub transport: Transport,
    #[serde(serialize_with = "super::shown::bytes")]
    backlog: VecDeque<u8>,
    /// What was printed.
    pub output: Output,
}

impl VirtioConsole {
    /// After reset.
    pub fn new() -> VirtioConsole {
        let transport = Transport::new(&IDENTITY);
        VirtioConsole { transport, backlog: VecDeque::new(), output: Output::default() }
    }

    /// Typed bytes that wait.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Bytes typed at the console.
    pub fn receive(&mut self, ram: &mut Ram, data: &[u8]) {
        let room = BACKLOG_BYTES_MAX.saturating_sub(self.backlog.len());
        self.backlog.extend(&data[..data.len().min(room)]);
        self.fill(ram);
    }

    /// Puts what waits into the driver's buffers.
    pub fn fill(&mut self, ram: &mut Ram) {
        for _ in 0..self.transport.offered(RECEIVE, ram) {
            if self.backlog.is_empty() {
                break;
            }
            let Some(chain) = self.transport.pop(RECEIVE, ram) else { break };
            let count = chain.capacity().min(self.backlog.len() as u64) as usize;
            let typed: Vec<u8> = self.backlog.drain(..count).collect();
            let written = chain.write(ram, &typed);
            self.transport.give_back(RECEIVE, ram, chain.head, written);
        }
    }

    /// Sends all that the driver wants printed; the bytes.
    pub fn transmit(&mut self, ram: &mut Ram) -> Vec<u8> {
        let mut printed = vec![];
        for _ in 0..self.transport.offered(TRANSMIT, ram) {
            let Some(chain) = self.transport.pop(TRANSMIT, ram) else { break };
            let Ok(Some(bytes)) = chain.read(ram, PRINT_BYTES_MAX) else {
                self.transport.fail();
                break;
            };
            bytes.iter().for_each(|byte| self.output.byte(*byte));
            printed.extend(bytes);
            self.transport.give_back(TRANSMIT, ram, chain.head, Ok(0));
        }
        printed
    }
}

impl Default for VirtioConsole {
    fn default() -> Self {
        Self::new()
    }
}
