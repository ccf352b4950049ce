//! Goldfish RTC: the host's wall clock, and an alarm on it.
//!
//! Reading `TIME_LOW` reads the host clock, which is an event, and latches `TIME_HIGH`.

use serde::{Deserialize, Serialize};

/// Registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtc {
    time_high: u32,
    alarm_high: u32,
    /// Deadline of the running alarm.
    pub alarm: Option<i64>,
    irq_enabled: bool,
    irq_pending: bool,
}

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RtcWrite {
    /// The alarm was set or cleared.
    Alarm,
    /// The line may have changed.
    Line,
}

impl Rtc {
    /// Whether the register at `offset` reads the host clock.
    pub fn reads_clock(offset: u64) -> bool {
        offset == 0
    }

    /// Reads a register; `now` is the host clock where [`Rtc::reads_clock`] says so.
    pub fn load(&mut self, offset: u64, now: i64) -> u32 {
        match offset {
            0 => {
                self.time_high = (now >> 32) as u32;
                now as u32
            }
            4 => self.time_high,
            0x10 => u32::from(self.irq_enabled),
            0x18 => u32::from(self.alarm.is_some()),
            _ => 0,
        }
    }

    /// Writes a register.
    pub fn store(&mut self, offset: u64, value: u32) -> Option<RtcWrite> {
        match offset {
            8 => {
                self.alarm = Some(i64::from(self.alarm_high) << 32 | i64::from(value));
                return Some(RtcWrite::Alarm);
            }
            0xc => self.alarm_high = value,
            0x10 => self.irq_enabled = value & 1 != 0,
            0x14 => {
                self.alarm = None;
                return Some(RtcWrite::Alarm);
            }
            0x1c => self.irq_pending = false,
            _ => return None,
        }
        Some(RtcWrite::Line)
    }

    /// The alarm went off.
    pub fn expire(&mut self) {
        self.alarm = None;
        self.irq_pending = true;
    }

    /// Whether the interrupt line is high.
    pub fn line(&self) -> bool {
        self.irq_enabled && self.irq_pending
    }
}
