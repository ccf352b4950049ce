//! A guest with nobody to record it: one thread, no log, and no time but its own.
//!
//! Idle time is jumped over, and the wall clock moves with the virtual one from where it
//! was set, so that the same program does the same every time. A guest has neither disks
//! nor other devices here but those that every machine has.

use crate::machine::hart::Hart;
use crate::machine::{Machine, Outside};
use crate::queue::TYPED_BYTES_MAX;
use crate::timer::TimerClock;
use heddle_proto::{AsyncEvent, ClockKind};

/// Why a guest does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It has executed as much as was asked for.
    Budget,
    /// It waits in WFI, and no timer will wake it.
    Stuck,
    /// It has switched itself off.
    Off,
}

/// The guest.
pub struct Bare {
    machine: Machine,
    /// The wall clock when the virtual clock shows zero, in nanoseconds.
    epoch_ns: i64,
}

impl Bare {
    /// A guest about to run. The wall clock shows `epoch_ns` at its start.
    pub fn new(machine: Machine, epoch_ns: i64) -> Bare {
        Bare { machine, epoch_ns }
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine, for its console.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Runs until `until` instructions have been executed in all, or a reason to pause.
    pub fn run(&mut self, until: u64) -> Pause {
        loop {
            if let Some(pause) = self.advance(until) {
                return pause;
            }
        }
    }

    /// The same up to the next deadline, or over one idle time; none, if there is more to do.
    pub fn advance(&mut self, until: u64) -> Option<Pause> {
        if self.machine.shutdown().is_some() {
            return Some(Pause::Off);
        }
        self.run_timers();
        if self.machine.icount() >= until {
            return Some(Pause::Budget);
        }
        let deadline = self.deadline();
        if self.machine.is_idle() {
            let Some(deadline) = deadline else { return Some(Pause::Stuck) };
            let idle = deadline.saturating_sub(self.machine.virtual_now()).max(0);
            let clock = &mut self.machine.clock;
            clock.bias = clock.bias.saturating_add(idle);
            return None;
        }
        let due = deadline.map_or(until, |deadline| self.machine.clock.icount_at(deadline));
        self.machine.run(due.min(until), &mut Watch { epoch_ns: self.epoch_ns });
        None
    }

    /// Whether the console has room for what is typed.
    pub fn takes_input(&self) -> bool {
        self.machine.uart.backlog() < TYPED_BYTES_MAX
    }

    /// Bytes typed at the console.
    pub fn type_in(&mut self, data: Vec<u8>) {
        self.machine.run_async(&AsyncEvent::Char { data });
    }

    /// When the next timer is due, on the virtual clock.
    fn deadline(&self) -> Option<i64> {
        let timers = &self.machine.timers;
        let alarm = timers.deadline(TimerClock::Host).map(|at| at.saturating_sub(self.epoch_ns));
        [timers.deadline(TimerClock::Virtual), alarm].into_iter().flatten().min()
    }

    fn run_timers(&mut self) {
        self.machine.run_virtual_timers();
        let now = self.machine.virtual_now().saturating_add(self.epoch_ns);
        while self.machine.timers.take_expired(TimerClock::Host, now).is_some() {
            self.machine.expire_alarm();
        }
    }
}

/// The clocks as the guest's own time has them.
struct Watch {
    epoch_ns: i64,
}

impl Outside for Watch {
    fn read_clock(&mut self, clock: ClockKind, now: i64, _: u64, _: &Hart) -> i64 {
        match clock {
            ClockKind::Host => now.saturating_add(self.epoch_ns),
            ClockKind::VirtualRt => now,
        }
    }

    fn must_stop(&mut self) -> bool {
        false
    }
}
