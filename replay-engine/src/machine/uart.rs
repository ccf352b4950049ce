//! 16550 UART: the console. Sending takes no time, as with QEMU's.

use super::output::Output;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Depth of the receive FIFO.
const FIFO: usize = 16;
/// Typed bytes that wait for room in the FIFO; more are dropped, as a terminal does.
pub const BACKLOG_BYTES_MAX: usize = 64 << 10;

const LSR_DATA: u8 = 1;
const LSR_IDLE: u8 = 0x60;
const IER_DATA: u8 = 1;
const IER_SENT: u8 = 2;

/// Registers, FIFO, and what was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uart {
    #[serde(serialize_with = "super::shown::hex")]
    ier: u8,
    #[serde(serialize_with = "super::shown::hex")]
    lcr: u8,
    #[serde(serialize_with = "super::shown::hex")]
    mcr: u8,
    #[serde(serialize_with = "super::shown::hex")]
    scratch: u8,
    fifo_on: bool,
    #[serde(serialize_with = "super::shown::bytes")]
    divisor: [u8; 2],
    /// The transmitter-empty interrupt waits to be seen.
    sent_pending: bool,
    #[serde(serialize_with = "super::shown::bytes")]
    fifo: VecDeque<u8>,
    #[serde(serialize_with = "super::shown::bytes")]
    backlog: VecDeque<u8>,
    /// What was sent.
    pub output: Output,
}

impl Uart {
    /// After reset.
    pub fn new() -> Uart {
        Uart {
            ier: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            fifo_on: false,
            divisor: [0; 2],
            sent_pending: false,
            fifo: VecDeque::new(),
            backlog: VecDeque::new(),
            output: Output::default(),
        }
    }

    /// Bytes typed at the console.
    pub fn receive(&mut self, data: &[u8]) {
        let room = BACKLOG_BYTES_MAX.saturating_sub(self.backlog.len());
        self.backlog.extend(&data[..data.len().min(room)]);
        self.fill();
    }

    /// Typed bytes that wait.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    fn fill(&mut self) {
        let depth = if self.fifo_on { FIFO } else { 1 };
        while self.fifo.len() < depth {
            let Some(byte) = self.backlog.pop_front() else { break };
            self.fifo.push_back(byte);
        }
    }

    /// Whether the interrupt line is high.
    pub fn line(&self) -> bool {
        (self.ier & IER_DATA != 0 && !self.fifo.is_empty()) || (self.ier & IER_SENT != 0 && self.sent_pending)
    }

    /// Reads register `offset`.
    pub fn load(&mut self, offset: u64) -> u8 {
        let divisor_on = self.lcr & 0x80 != 0;
        match offset {
            0 if divisor_on => self.divisor[0],
            0 => {
                let byte = self.fifo.pop_front().unwrap_or(0);
                self.fill();
                byte
            }
            1 if divisor_on => self.divisor[1],
            1 => self.ier,
            2 => self.interrupt_identity(),
            3 => self.lcr,
            4 => self.mcr,
            5 => LSR_IDLE | if self.fifo.is_empty() { 0 } else { LSR_DATA },
            6 => 0xb0,
            7 => self.scratch,
            _ => 0,
        }
    }

    fn interrupt_identity(&mut self) -> u8 {
        let fifo_bits = if self.fifo_on { 0xc0 } else { 0 };
        if self.ier & IER_DATA != 0 && !self.fifo.is_empty() {
            fifo_bits | 4
        } else if self.ier & IER_SENT != 0 && self.sent_pending {
            self.sent_pending = false;
            fifo_bits | 2
        } else {
            fifo_bits | 1
        }
    }

    /// Writes register `offset`; returns the byte sent, if one was.
    pub fn store(&mut self, offset: u64, value: u8) -> Option<u8> {
        let divisor_on = self.lcr & 0x80 != 0;
        match offset {
            0 if divisor_on => self.divisor[0] = value,
            0 => {
                self.sent_pending = true;
                self.output.byte(value);
                return Some(value);
            }
            1 if divisor_on => self.divisor[1] = value,
            1 => {
                if value & IER_SENT != 0 && self.ier & IER_SENT == 0 {
                    self.sent_pending = true;
                }
                self.ier = value & 15;
            }
            2 => {
                self.fifo_on = value & 1 != 0;
                if value & 2 != 0 {
                    self.fifo.clear();
                }
                self.fill();
            }
            3 => self.lcr = value,
            4 => self.mcr = value,
            7 => self.scratch = value,
            _ => {}
        }
        None
    }
}

impl Default for Uart {
    fn default() -> Self {
        Self::new()
    }
}
