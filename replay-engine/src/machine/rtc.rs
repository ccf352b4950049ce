//! Goldfish RTC: the host's wall clock, and an alarm on it.
//!
//! ```text
//! 0x00  TIME_LOW      0x08  ALARM_LOW      0x10  IRQ_ENABLED      0x18  ALARM_STATUS
//! 0x04  TIME_HIGH     0x0c  ALARM_HIGH     0x14  CLEAR_ALARM      0x1c  CLEAR_INTERRUPT
//! ```
//! Times are nanoseconds, in two words. As on QEMU:
//! - A read of `TIME_LOW` latches what `TIME_HIGH` then reads.
//! - A write of either sets that half of the time: the guest's time is the host clock plus an offset.
//! - A write of `ALARM_LOW` sets the alarm; its upper half was written before. If its time has
//!   come, it goes off at once. The registers keep it when it has gone off or was cleared.
//! - An alarm that is set stays where it is on the host clock, also when the time is set.
//!
//! Each of these reads the host clock, which is an event. QEMU's time begins at a whole second;
//! here it is the host's, to the nanosecond, until the guest sets it.

use serde::{Deserialize, Serialize};

const TIME_LOW: u64 = 0x00;
const TIME_HIGH: u64 = 0x04;
const ALARM_LOW: u64 = 0x08;
const ALARM_HIGH: u64 = 0x0c;
const IRQ_ENABLED: u64 = 0x10;
const CLEAR_ALARM: u64 = 0x14;
const ALARM_STATUS: u64 = 0x18;
const CLEAR_INTERRUPT: u64 = 0x1c;

/// Registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtc {
    /// The guest's time less the host clock; wraps.
    time_offset: u64,
    /// What `TIME_HIGH` reads.
    time_high: u32,
    /// The guest's time at which the alarm goes off, or went off last.
    alarm: u64,
    is_alarm_set: bool,
    irq_enabled: bool,
    irq_pending: bool,
}

/// What becomes of the alarm's timer, which is on the host clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlarmTimer {
    /// It is armed for this time, which is never negative.
    Arm(i64),
    /// It is disarmed.
    Disarm,
}

impl Rtc {
    /// Whether a read of the register at `offset` reads the host clock.
    pub fn load_reads_clock(offset: u64) -> bool {
        offset == TIME_LOW
    }

    /// Whether a write to the register at `offset` reads the host clock.
    pub fn store_reads_clock(offset: u64) -> bool {
        matches!(offset, TIME_LOW | TIME_HIGH | ALARM_LOW)
    }

    /// Reads a register; `now` is the host clock where [`Rtc::load_reads_clock`] says so.
    pub fn load(&mut self, offset: u64, now: i64) -> u32 {
        match offset {
            TIME_LOW => {
                let time = self.time(now);
                self.time_high = (time >> 32) as u32;
                time as u32
            }
            TIME_HIGH => self.time_high,
            ALARM_LOW => self.alarm as u32,
            ALARM_HIGH => (self.alarm >> 32) as u32,
            IRQ_ENABLED => u32::from(self.irq_enabled),
            ALARM_STATUS => u32::from(self.is_alarm_set),
            _ => 0,
        }
    }

    /// Writes a register; `now` is the host clock where [`Rtc::store_reads_clock`] says so. The
    /// interrupt line may have changed.
    pub fn store(&mut self, offset: u64, value: u32, now: i64) -> Option<AlarmTimer> {
        match offset {
            TIME_LOW => self.set_time(with_low(self.time(now), value), now),
            TIME_HIGH => self.set_time(with_high(self.time(now), value), now),
            ALARM_LOW => {
                self.alarm = with_low(self.alarm, value);
                return Some(self.set_alarm(now));
            }
            ALARM_HIGH => self.alarm = with_high(self.alarm, value),
            IRQ_ENABLED => self.irq_enabled = value & 1 != 0,
            CLEAR_ALARM => {
                self.is_alarm_set = false;
                return Some(AlarmTimer::Disarm);
            }
            CLEAR_INTERRUPT => self.irq_pending = false,
            _ => {}
        }
        None
    }

    /// The alarm went off.
    pub fn expire(&mut self) {
        self.is_alarm_set = false;
        self.irq_pending = true;
    }

    /// Whether the interrupt line is high.
    pub fn line(&self) -> bool {
        self.irq_enabled && self.irq_pending
    }

    /// The guest's time when the host clock shows `now`.
    fn time(&self, now: i64) -> u64 {
        self.time_offset.wrapping_add(now as u64)
    }

    fn set_time(&mut self, time: u64, now: i64) {
        self.time_offset = time.wrapping_sub(now as u64);
    }

    fn set_alarm(&mut self, now: i64) -> AlarmTimer {
        if self.alarm <= self.time(now) {
            self.expire();
            return AlarmTimer::Disarm;
        }
        self.is_alarm_set = true;
        // What the host clock can't show is in the past, as it is for QEMU's timers.
        AlarmTimer::Arm((self.alarm.wrapping_sub(self.time_offset) as i64).max(0))
    }
}

fn with_low(word: u64, low: u32) -> u64 {
    word >> 32 << 32 | u64::from(low)
}

fn with_high(word: u64, high: u32) -> u64 {
    u64::from(high) << 32 | word & 0xffff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 0x1797_9cff_e25c_0000;
    /// What a guest may set the time to: other than the host's in both words.
    const THEN: u64 = 0x0100_0000_ffff_0000;

    fn time(rtc: &mut Rtc, now: i64) -> u64 {
        let low = rtc.load(TIME_LOW, now);
        u64::from(rtc.load(TIME_HIGH, 0)) << 32 | u64::from(low)
    }

    fn alarm(rtc: &mut Rtc) -> u64 {
        u64::from(rtc.load(ALARM_HIGH, 0)) << 32 | u64::from(rtc.load(ALARM_LOW, 0))
    }

    fn set_alarm(rtc: &mut Rtc, at: u64, now: i64) -> Option<AlarmTimer> {
        assert_eq!(rtc.store(ALARM_HIGH, (at >> 32) as u32, 0), None);
        rtc.store(ALARM_LOW, at as u32, now)
    }

    /// One whose time was set to [`THEN`] at [`NOW`], and whose interrupt is enabled.
    fn of_another_time() -> Rtc {
        let mut rtc = Rtc::default();
        assert_eq!(rtc.store(TIME_HIGH, (THEN >> 32) as u32, NOW), None);
        assert_eq!(rtc.store(TIME_LOW, THEN as u32, NOW), None);
        assert_eq!(rtc.store(IRQ_ENABLED, 1, 0), None);
        rtc
    }

    #[test]
    fn the_time_is_the_host_clock_and_its_upper_half_is_latched() {
        let mut rtc = Rtc::default();
        assert_eq!(rtc.load(TIME_HIGH, NOW), 0);
        assert_eq!(time(&mut rtc, NOW), NOW as u64);
        assert_eq!(rtc.load(TIME_LOW, NOW + (1 << 32) + 5), NOW as u32 + 5);
        assert_eq!(rtc.load(TIME_HIGH, NOW), (NOW >> 32) as u32 + 1);
        let read: Vec<u64> = (0..0x24).step_by(4).filter(|at| Rtc::load_reads_clock(*at)).collect();
        let written: Vec<u64> = (0..0x24).step_by(4).filter(|at| Rtc::store_reads_clock(*at)).collect();
        assert_eq!((read, written), (vec![TIME_LOW], vec![TIME_LOW, TIME_HIGH, ALARM_LOW]));
    }

    #[test]
    fn a_half_of_the_time_is_set_and_goes_on_from_there() {
        let mut rtc = Rtc::default();
        assert_eq!(rtc.store(TIME_HIGH, 2, NOW), None);
        assert_eq!(rtc.load(TIME_HIGH, 0), 0, "only a read of TIME_LOW latches it");
        assert_eq!(time(&mut rtc, NOW), 2 << 32 | 0xe25c_0000);
        assert_eq!(rtc.store(TIME_LOW, 5, NOW + 10), None);
        assert_eq!(time(&mut rtc, NOW + 10), 2 << 32 | 5);
        assert_eq!(time(&mut rtc, NOW + 1010), 2 << 32 | 1005);
        let mut rtc = of_another_time();
        assert_eq!(time(&mut rtc, NOW + 0x1_0000), 0x0100_0001_0000_0000);
        // Ahead of the host's, as far as it goes.
        for half in [TIME_LOW, TIME_HIGH] {
            rtc.store(half, u32::MAX, NOW);
        }
        assert_eq!((time(&mut rtc, NOW), time(&mut rtc, NOW + 1)), (u64::MAX, 0));
    }

    #[test]
    fn an_alarm_is_on_the_host_clock_and_its_registers_outlast_it() {
        let mut rtc = of_another_time();
        assert_eq!(set_alarm(&mut rtc, THEN + 70_000, NOW + 500), Some(AlarmTimer::Arm(NOW + 70_000)));
        assert_eq!((alarm(&mut rtc), rtc.load(ALARM_STATUS, 0), rtc.line()), (THEN + 70_000, 1, false));
        // The time being set moves it in the guest's eyes, not on the host clock.
        assert_eq!(rtc.store(TIME_HIGH, 7, NOW + 600), None);
        assert_eq!((alarm(&mut rtc), rtc.load(ALARM_STATUS, 0)), (THEN + 70_000, 1));
        rtc.expire();
        assert_eq!((alarm(&mut rtc), rtc.load(ALARM_STATUS, 0), rtc.line()), (THEN + 70_000, 0, true));
        assert_eq!(rtc.store(CLEAR_INTERRUPT, 0, 0), None);
        assert!(!rtc.line());
    }

    #[test]
    fn an_alarm_whose_time_has_come_goes_off_at_once() {
        for (at, is_at_once) in [(THEN - 1, true), (THEN, true), (THEN + 1, false), (0, true)] {
            let mut rtc = of_another_time();
            let timer = set_alarm(&mut rtc, at, NOW);
            assert_eq!(timer == Some(AlarmTimer::Disarm), is_at_once, "{at:#x}");
            assert_eq!((rtc.line(), rtc.load(ALARM_STATUS, 0)), (is_at_once, u32::from(!is_at_once)));
            assert_eq!(alarm(&mut rtc), at);
        }
        // Beyond what the host clock can show: set, for a time that has passed.
        let mut rtc = Rtc::default();
        assert_eq!(set_alarm(&mut rtc, u64::MAX, NOW), Some(AlarmTimer::Arm(0)));
        assert_eq!(rtc.load(ALARM_STATUS, 0), 1);
    }

    #[test]
    fn clearing_the_alarm_clears_no_interrupt() {
        let mut rtc = of_another_time();
        set_alarm(&mut rtc, THEN, NOW);
        set_alarm(&mut rtc, THEN + 9, NOW);
        assert_eq!(rtc.store(CLEAR_ALARM, 0, 0), Some(AlarmTimer::Disarm));
        assert_eq!((alarm(&mut rtc), rtc.load(ALARM_STATUS, 0), rtc.line()), (THEN + 9, 0, true));
        // Disabled it is pending still; of the value only the lowest bit counts.
        rtc.store(IRQ_ENABLED, 2, 0);
        assert_eq!((rtc.load(IRQ_ENABLED, 0), rtc.line()), (0, false));
        rtc.store(IRQ_ENABLED, 3, 0);
        assert_eq!((rtc.load(IRQ_ENABLED, 0), rtc.line()), (1, true));
        for at in [CLEAR_ALARM, CLEAR_INTERRUPT, 0x20] {
            assert_eq!(rtc.load(at, NOW), 0);
        }
        assert_eq!((rtc.store(ALARM_STATUS, 1, 0), rtc.store(0x20, 1, 0)), (None, None));
        assert_eq!(rtc.load(ALARM_STATUS, 0), 0);
    }
}
