//! CLINT: software interrupts and the machine timer, at QEMU `virt`'s address.
//!
//! `0x0` msip, `0x4000` mtimecmp, `0xbff8` mtime; a tick is 100 ns of virtual time.

use serde::{Deserialize, Serialize};

/// Nanoseconds a tick: a 10 MHz timebase, as QEMU `virt` has.
pub const TICK_NS: i64 = 100;

/// Registers of the one hart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clint {
    /// Bit 0 drives MSIP.
    pub msip: u32,
    /// MTIP is high from this tick on.
    pub mtimecmp: u64,
    /// MTIP as it is driven now.
    pub timer_line: bool,
}

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClintWrite {
    /// The compare register changed: set the line and the timer anew.
    Compare,
    /// MSIP changed.
    Software,
    /// Nothing.
    Ignored,
}

impl Clint {
    /// After reset: no timer.
    pub fn new() -> Clint {
        Clint { msip: 0, mtimecmp: u64::MAX, timer_line: false }
    }

    /// Reads `size` bytes at `offset`; `ticks` is mtime now.
    pub fn load(&self, offset: u64, size: usize, ticks: u64) -> Option<u64> {
        let register = |value: u64, at: u64| match (size, offset - at) {
            (8, 0) => Some(value),
            (4, 0) => Some(value & 0xffff_ffff),
            (4, 4) => Some(value >> 32),
            _ => None,
        };
        match offset {
            0 if size == 4 => Some(u64::from(self.msip)),
            0x4000..=0x4007 => register(self.mtimecmp, 0x4000),
            0xbff8..=0xbfff => register(ticks, 0xbff8),
            4..=0x3fff | 0x4008..=0xbff7 => Some(0),
            _ => None,
        }
    }

    /// Writes `size` bytes at `offset`.
    pub fn store(&mut self, offset: u64, size: usize, value: u64) -> Option<ClintWrite> {
        match (offset, size) {
            (0, 4) => {
                self.msip = value as u32 & 1;
                Some(ClintWrite::Software)
            }
            (0x4000, 8) => {
                self.mtimecmp = value;
                Some(ClintWrite::Compare)
            }
            (0x4000, 4) => {
                self.mtimecmp = self.mtimecmp & !0xffff_ffff | value & 0xffff_ffff;
                Some(ClintWrite::Compare)
            }
            (0x4004, 4) => {
                self.mtimecmp = self.mtimecmp & 0xffff_ffff | value << 32;
                Some(ClintWrite::Compare)
            }
            (0..=0xbfff, 4 | 8) => Some(ClintWrite::Ignored),
            _ => None,
        }
    }
}

impl Default for Clint {
    fn default() -> Self {
        Self::new()
    }
}
