//! Device accesses, interrupt lines, and what timers and async events do.
//!
//! The memory map is QEMU `virt`'s.

use super::clint::{ClintWrite, TICK_NS};
use super::hart::{Hart, Trap, irq};
use super::memory::Access;
use super::rtc::{AlarmTimer, Rtc};
use super::{Machine, Outside};
use crate::role;
use crate::timer::{TimerClock, TimerId};
use heddle_proto::{AsyncEvent, ClockKind, Role};

/// Device addresses.
#[allow(missing_docs)]
pub mod map {
    pub const TEST: u64 = 0x10_0000;
    pub const RTC: u64 = 0x10_1000;
    pub const CLINT: u64 = 0x200_0000;
    pub const CLINT_BYTES: u64 = 0x1_0000;
    pub const PLIC: u64 = 0xc00_0000;
    pub const PLIC_BYTES: u64 = 0x60_0000;
    pub const UART: u64 = 0x1000_0000;
    pub const VIRTIO: u64 = 0x1000_1000;
    pub const VIRTIO_BYTES: u64 = 0x1000;
    pub const VIRTIO_SLOTS: u64 = heddle_proto::manifest::VIRTIO_SLOTS as u64;
    pub const UART_IRQ: u32 = 10;
    pub const RTC_IRQ: u32 = 11;
    pub const VIRTIO_IRQ: u32 = 1;
}

/// The guest asked for a reset; like `-no-reboot`, that ends the run, with this code.
pub const RESET_CODE: u16 = 0;

/// Deadlines behind this do not come in 146 years of virtual time, and are none: no sum of two
/// times overflows.
const NEVER: i64 = i64::MAX / 2;

impl Machine {
    pub(super) fn load_device(
        &mut self,
        va: u64,
        pa: u64,
        size: usize,
        outside: &mut dyn Outside,
    ) -> Result<u64, Trap> {
        let value = match pa {
            map::CLINT..=0x200_ffff => self.clint.load(pa - map::CLINT, size, self.mtime()),
            map::PLIC..=0xc5f_ffff if size == 4 && pa % 4 == 0 => {
                let value = self.plic.load(pa - map::PLIC);
                self.update_lines();
                Some(u64::from(value))
            }
            map::UART..=0x1000_00ff if size == 1 => {
                let value = self.uart.load(pa - map::UART);
                self.update_lines();
                Some(u64::from(value))
            }
            map::RTC..=0x10_1fff if size == 4 => {
                let offset = pa - map::RTC;
                let now = if Rtc::load_reads_clock(offset) {
                    outside.read_clock(ClockKind::Host, self.seen_now(), self.icount, &self.hart)
                } else {
                    0
                };
                self.attention = true;
                Some(u64::from(self.rtc.load(offset, now)))
            }
            _ if self.rom.has(pa) => self.rom.load(pa, size),
            map::TEST..=0x10_0fff => Some(0),
            map::VIRTIO..=0x1000_8fff => self.load_virtio(pa - map::VIRTIO, size),
            _ => None,
        };
        value.ok_or(Access::Load.access_fault(va))
    }

    pub(super) fn store_device(
        &mut self,
        va: u64,
        pa: u64,
        size: usize,
        value: u64,
        outside: &mut dyn Outside,
    ) -> Result<(), Trap> {
        let done = match pa {
            map::CLINT..=0x200_ffff => self.store_clint(pa - map::CLINT, size, value),
            map::PLIC..=0xc5f_ffff if size == 4 && pa % 4 == 0 => {
                self.plic.store(pa - map::PLIC, value as u32);
                self.update_lines();
                Some(())
            }
            map::UART..=0x1000_00ff if size == 1 => {
                if let Some(byte) = self.uart.store(pa - map::UART, value as u8) {
                    self.console.push(byte);
                }
                self.update_lines();
                Some(())
            }
            map::RTC..=0x10_1fff if size == 4 => {
                self.store_rtc(pa - map::RTC, value as u32, outside);
                Some(())
            }
            map::TEST..=0x10_0fff => {
                self.shutdown = match value & 0xffff {
                    0x5555 => Some(0),
                    0x3333 => Some((value >> 16) as u16),
                    0x7777 => {
                        self.wants_reset = true;
                        Some(RESET_CODE)
                    }
                    _ => None,
                };
                self.attention = true;
                Some(())
            }
            map::VIRTIO..=0x1000_8fff if size == 4 => {
                self.store_virtio(pa - map::VIRTIO, value as u32);
                Some(())
            }
            // Nothing is written, and nothing said, as on QEMU.
            _ if self.rom.has(pa) => Some(()),
            _ => None,
        };
        done.ok_or(Access::Store.access_fault(va))
    }

    fn store_clint(&mut self, offset: u64, size: usize, value: u64) -> Option<()> {
        let now = self.mtime();
        match self.clint.store(offset, size, value, now)? {
            ClintWrite::Time => self.follow_mtime(),
            ClintWrite::Compare(hart) => {
                let has_come = self.set_timer(TimerId::Clint(hart), Some(self.clint.compare(hart)));
                self.clint.set_timer_line(hart, has_come);
            }
            ClintWrite::Software | ClintWrite::Ignored => {}
        }
        self.update_lines();
        Some(())
    }

    /// `stimecmp`, or whether it drives STIP, was written.
    pub(super) fn follow_stimecmp(&mut self) {
        let compare = self.hart.supervisor_compare();
        let id = TimerId::Supervisor(self.current_hart());
        self.hart.stimecmp_passed = self.set_timer(id, compare);
        self.update_lines();
    }

    /// The virtual clock as the instruction sees it that is being executed: behind it, as on
    /// QEMU, where an instruction counts before it is done.
    pub(super) fn seen_now(&self) -> i64 {
        self.clock.now(self.icount + 1)
    }

    /// What the CLINT's `mtime` shows to the instruction that is being executed.
    pub(super) fn mtime(&self) -> u64 {
        self.clint.mtime((self.seen_now() / TICK_NS) as u64)
    }

    /// Whether time has come to tick `compare`, if there is one; until then a timer is armed for
    /// it, unless it is too far away ever to come. By QEMU's rule for when that is, which counts
    /// whole ticks from now: up to a tick late.
    fn set_timer(&mut self, id: TimerId, compare: Option<u64>) -> bool {
        let ticks = compare.map(|compare| compare.saturating_sub(self.mtime()));
        let wait = ticks.map(|ticks| i64::try_from(ticks).unwrap_or(i64::MAX).saturating_mul(TICK_NS));
        let due = wait.map(|wait| self.seen_now().saturating_add(wait)).filter(|due| *due <= NEVER);
        match due {
            Some(due) if ticks != Some(0) => self.timers.arm(TimerClock::Virtual, id, due),
            _ => self.timers.disarm(TimerClock::Virtual, id),
        }
        self.leave_for_work();
        ticks == Some(0)
    }

    /// `mtime` was written: every hart's compare registers are met at other times.
    fn follow_mtime(&mut self) {
        for number in 0..self.hart_count() {
            let has_come = self.set_timer(TimerId::Clint(number), Some(self.clint.compare(number)));
            self.clint.set_timer_line(number, has_come);
            let compare = self.hart_at(number).and_then(Hart::supervisor_compare);
            let has_come = self.set_timer(TimerId::Supervisor(number), compare);
            if let Some(hart) = self.hart_at_mut(number) {
                hart.stimecmp_passed = has_come;
            }
        }
    }

    fn store_rtc(&mut self, offset: u64, value: u32, outside: &mut dyn Outside) {
        let now = if Rtc::store_reads_clock(offset) {
            outside.read_clock(ClockKind::Host, self.seen_now(), self.icount, &self.hart)
        } else {
            0
        };
        // The read may have ended the execution.
        self.attention = true;
        let timer = self.rtc.store(offset, value, now);
        match timer {
            Some(AlarmTimer::Arm(at)) => self.timers.arm(TimerClock::Host, TimerId::RtcAlarm, at),
            Some(AlarmTimer::Disarm) => self.timers.disarm(TimerClock::Host, TimerId::RtcAlarm),
            None => {}
        }
        if timer.is_some() {
            self.leave_for_work();
        }
        self.update_lines();
    }

    pub(super) fn leave_for_work(&mut self) {
        self.work = true;
        self.attention = true;
    }

    /// A hart's lines as all devices drive them now.
    fn device_lines(&self, number: usize, hart: &Hart) -> u64 {
        let supervisor = if hart.stimecmp_passed { irq::STI } else { 0 };
        self.clint.lines(number) | supervisor | self.plic.lines(number)
    }

    /// Every hart has its lines as they are driven now.
    pub(super) fn carry_lines(&mut self) {
        let harts = self.all_harts().enumerate();
        let lines: Vec<u64> = harts.map(|(number, hart)| self.device_lines(number, hart)).collect();
        for (number, lines) in lines.into_iter().enumerate() {
            if let Some(hart) = self.hart_at_mut(number) {
                hart.lines = lines;
            }
        }
    }

    /// Carries device lines to the harts. What this does depends on the thread:
    /// the vCPU thread sets them directly; the iothread has to kick the vCPU
    /// out of its run, which then looks itself. The kick is that of the hart whose turn it is.
    pub(super) fn update_lines(&mut self) {
        self.plic.set_level(map::UART_IRQ, self.uart.line());
        self.plic.set_level(map::RTC_IRQ, self.rtc.line());
        for (source, line) in (map::VIRTIO_IRQ..).zip(self.virtio_lines()) {
            self.plic.set_level(source, line);
        }
        let follows = |(number, hart): (usize, &Hart)| hart.lines == self.device_lines(number, hart);
        if self.all_harts().enumerate().all(follows) {
            return;
        }
        match role::current() {
            Role::Vcpu => {
                self.carry_lines();
                self.attention = true;
            }
            Role::Iothread => self.hart.kick_pending = true,
        }
    }

    /// Whether an async event has its counterpart: its request is in flight.
    pub fn expects(&self, event: &AsyncEvent) -> bool {
        match event {
            AsyncEvent::BottomHalf { id } => self.bottom_halves.iter().any(|half| half.id == *id),
            AsyncEvent::Block { id } => {
                self.drives.iter().any(|d| d.controller.in_flight.iter().any(|r| r.id == *id))
            }
            AsyncEvent::Char { .. } => true,
        }
    }

    /// Runs an async event on the current role. `false`: no such bottom half or
    /// request is outstanding.
    pub fn run_async(&mut self, event: &AsyncEvent) -> bool {
        match event {
            AsyncEvent::BottomHalf { id } => {
                let Some(at) = self.bottom_halves.iter().position(|half| half.id == *id) else {
                    return false;
                };
                let half = self.bottom_halves.remove(at);
                self.run_queue(half);
            }
            AsyncEvent::Block { id } => {
                let owner = self
                    .drives
                    .iter_mut()
                    .find(|drive| drive.controller.in_flight.iter().any(|r| r.id == *id));
                let Some(drive) = owner else { return false };
                drive.controller.complete(*id, &mut self.ram, &mut drive.disk);
            }
            AsyncEvent::Char { data } => self.uart.receive(data),
        }
        self.update_lines();
        true
    }

    /// Runs the virtual clock's expired timers, on the vCPU.
    pub fn run_virtual_timers(&mut self) {
        let now = self.virtual_now();
        while let Some(id) = self.timers.take_expired(TimerClock::Virtual, now) {
            match id {
                TimerId::Clint(number) => self.clint.set_timer_line(number, true),
                TimerId::Supervisor(number) => {
                    if let Some(hart) = self.hart_at_mut(number) {
                        hart.stimecmp_passed = true;
                    }
                }
                TimerId::RtcAlarm | TimerId::Warp => {}
            }
        }
        self.update_lines();
    }

    /// The RTC's alarm went off, on the iothread.
    pub fn expire_alarm(&mut self) {
        self.rtc.expire();
        self.update_lines();
    }
}
