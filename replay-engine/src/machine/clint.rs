//! CLINT: software interrupts and the machine timers, at QEMU `virt`'s address.
//!
//! ```text
//! 0x0    + 4 * hart   msip
//! 0x4000 + 8 * hart   mtimecmp
//! 0xbff8              mtime; a tick is 100 ns of virtual time, from where it was set
//! ```
//! What would be another hart's reads as zero, and is not written.

use super::hart::irq;
use serde::{Deserialize, Serialize};

/// Nanoseconds a tick: a 10 MHz timebase, as QEMU `virt` has.
pub const TICK_NS: i64 = 100;

/// A hart's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    /// Bit 0 drives MSIP.
    msip: u32,
    /// MTIP is high from this tick on.
    #[serde(serialize_with = "super::shown::hex")]
    mtimecmp: u64,
    /// MTIP as it is driven now.
    timer_line: bool,
}

/// Registers of all harts, by their numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clint {
    harts: Vec<Registers>,
    /// What `mtime` is ahead of virtual time, in ticks; it wraps.
    ahead: u64,
}

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClintWrite {
    /// The compare register of this hart changed: set the line and the timer anew.
    Compare(usize),
    /// `mtime` changed: set all lines and timers anew.
    Time,
    /// MSIP of a hart changed.
    Software,
    /// Nothing.
    Ignored,
}

impl Clint {
    /// Of one hart, after reset: its time has come, as on QEMU.
    pub fn new() -> Clint {
        let mut clint = Clint { harts: vec![], ahead: 0 };
        clint.add_hart();
        clint
    }

    /// One hart more, after reset.
    pub fn add_hart(&mut self) {
        self.harts.push(Registers { msip: 0, mtimecmp: 0, timer_line: true });
    }

    /// Whether it is of so many harts: one from outside may not be.
    pub fn is_whole(&self, harts: usize) -> bool {
        self.harts.len() == harts
    }

    /// MSIP and MTIP of a hart as they are driven.
    pub fn lines(&self, hart: usize) -> u64 {
        let Some(registers) = self.harts.get(hart) else { return 0 };
        let software = if registers.msip != 0 { irq::MSI } else { 0 };
        let timer = if registers.timer_line { irq::MTI } else { 0 };
        software | timer
    }

    /// `mtime` after so many ticks of virtual time.
    pub fn mtime(&self, ticks: u64) -> u64 {
        ticks.wrapping_add(self.ahead)
    }

    /// The tick that a hart's timer is set for.
    pub fn compare(&self, hart: usize) -> u64 {
        self.harts.get(hart).map_or(u64::MAX, |registers| registers.mtimecmp)
    }

    /// Whether the time that a hart's timer is set for has come.
    pub fn set_timer_line(&mut self, hart: usize, has_come: bool) {
        if let Some(registers) = self.harts.get_mut(hart) {
            registers.timer_line = has_come;
        }
    }

    /// Reads `size` bytes at `offset`; `mtime` as it is now.
    pub fn load(&self, offset: u64, size: usize, mtime: u64) -> Option<u64> {
        let part = |value: u64| match (size, offset % 8) {
            (8, 0) => Some(value),
            (4, 0) => Some(value & 0xffff_ffff),
            (4, 4) => Some(value >> 32),
            _ => None,
        };
        match offset {
            0..=0x3fff => match self.harts.get(offset as usize / 4) {
                Some(registers) => (size == 4 && offset % 4 == 0).then_some(u64::from(registers.msip)),
                None => Some(0),
            },
            0x4000..=0xbff7 => match self.harts.get((offset as usize - 0x4000) / 8) {
                Some(registers) => part(registers.mtimecmp),
                None => Some(0),
            },
            0xbff8..=0xbfff => part(mtime),
            _ => None,
        }
    }

    /// Writes `size` bytes at `offset`, while `mtime` shows `now`.
    pub fn store(&mut self, offset: u64, size: usize, value: u64, now: u64) -> Option<ClintWrite> {
        let part = |old: u64| match (size, offset % 8) {
            (8, _) => value,
            (_, 0) => old & !0xffff_ffff | value & 0xffff_ffff,
            _ => old & 0xffff_ffff | value << 32,
        };
        match (offset, size) {
            (0..=0x3fff, 4) if offset % 4 == 0 => {
                let Some(registers) = self.harts.get_mut(offset as usize / 4) else {
                    return Some(ClintWrite::Ignored);
                };
                registers.msip = value as u32 & 1;
                Some(ClintWrite::Software)
            }
            (0x4000..=0xbff7, 4 | 8) if offset % size as u64 == 0 => {
                let hart = (offset as usize - 0x4000) / 8;
                let Some(registers) = self.harts.get_mut(hart) else { return Some(ClintWrite::Ignored) };
                registers.mtimecmp = part(registers.mtimecmp);
                Some(ClintWrite::Compare(hart))
            }
            (0xbff8..=0xbfff, 4 | 8) if offset % size as u64 == 0 => {
                self.ahead = self.ahead.wrapping_add(part(now).wrapping_sub(now));
                Some(ClintWrite::Time)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn of(harts: usize) -> Clint {
        let mut clint = Clint::new();
        (1..harts).for_each(|_| clint.add_hart());
        clint
    }

    #[test]
    fn each_hart_has_its_registers_and_no_other_is_there() {
        let mut clint = of(3);
        for hart in 0..3u64 {
            assert_eq!(clint.store(4 * hart, 4, 3, 0), Some(ClintWrite::Software));
            let compare = clint.store(0x4000 + 8 * hart, 8, 1000 + hart, 0);
            assert_eq!(compare, Some(ClintWrite::Compare(hart as usize)));
            assert_eq!(clint.load(4 * hart, 4, 0), Some(1));
            assert_eq!(clint.load(0x4000 + 8 * hart, 8, 0), Some(1000 + hart));
            assert_eq!(clint.compare(hart as usize), 1000 + hart);
        }
        assert!(clint.is_whole(3) && !clint.is_whole(2));
        for (offset, size) in [(12, 4), (0x4018, 8), (0x4018, 4), (0x3ffc, 4), (0xbff0, 8)] {
            assert_eq!(clint.store(offset, size, u64::MAX, 0), Some(ClintWrite::Ignored), "{offset:#x}");
            assert_eq!(clint.load(offset, size, 0), Some(0), "{offset:#x}");
        }
        assert_eq!((clint.compare(3), clint.lines(3)), (u64::MAX, 0));
    }

    #[test]
    fn halves_of_a_compare_register_and_of_the_time_are_apart() {
        let mut clint = of(2);
        clint.store(0x4008, 4, 7, 0);
        clint.store(0x400c, 4, 5, 0);
        assert_eq!(clint.compare(1), 5 << 32 | 7);
        assert_eq!((clint.load(0x4008, 4, 0), clint.load(0x400c, 4, 0)), (Some(7), Some(5)));
        let ticks = 3 << 32 | 9;
        assert_eq!((clint.load(0xbff8, 4, ticks), clint.load(0xbffc, 4, ticks)), (Some(9), Some(3)));
        assert_eq!(clint.load(0xbff8, 8, ticks), Some(ticks));
        for (offset, size) in [(0, 8), (1, 4), (0x4004, 8), (0x4001, 4), (0, 1), (0xc000, 4)] {
            assert_eq!(clint.load(offset, size, 0), None, "{offset:#x}");
        }
        assert_eq!((clint.store(0, 1, 1, 0), clint.store(0xc000, 4, 1, 0)), (None, None));
        // Time goes on from where it is set.
        assert_eq!(clint.store(0xbff8, 8, 50, 1000), Some(ClintWrite::Time));
        assert_eq!((clint.mtime(1000), clint.mtime(1007)), (50, 57));
        assert_eq!(clint.store(0xbffc, 4, 2, 57), Some(ClintWrite::Time));
        assert_eq!(clint.mtime(1007), 2 << 32 | 57);
    }

    #[test]
    fn lines_are_the_harts_own() {
        let mut clint = of(2);
        clint.store(4, 4, 1, 0);
        (0..2).for_each(|hart| clint.set_timer_line(hart, false));
        clint.set_timer_line(0, true);
        clint.set_timer_line(2, true);
        assert_eq!((clint.lines(0), clint.lines(1)), (irq::MTI, irq::MSI));
        clint.store(4, 4, 2, 0);
        assert_eq!(clint.lines(1), 0);
    }
}
