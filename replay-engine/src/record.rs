//! Recording: what each role does when the world decides.

use crate::emulator::{Emulator, Log, Step, World};
use crate::timer::TimerClock;
use heddle_proto::ClockKind;

/// A spinning guest meets a checkpoint at least every so many nanoseconds of virtual time, and
/// sooner where somebody has something for it and kicks it.
const SLICE_NS: u64 = 10_000_000;

impl Emulator {
    /// One turn of the vCPU thread's loop, which ends behind the first block that comes to
    /// `instructions`, if nothing ends it before.
    pub fn record_vcpu(&mut self, world: &mut dyn World, instructions: u64) -> Step {
        if self.has_ended {
            return Step::Ended;
        }
        if !self.rest.is_started {
            return Step::Wait;
        }
        let slice = (SLICE_NS >> self.machine.clock.shift).max(1);
        let is_runnable = !self.machine.is_idle();
        let slice_ended = self.machine.icount >= self.slice_start + slice;
        let runs_again = is_runnable && (self.rest.warp.start.is_some() || slice_ended);
        let has_news = self.has_async() || self.rest.warp.wake || self.machine.hart.kick_pending;
        if runs_again || has_news {
            self.account_warp_timer(world);
        }
        if self.virtual_timer_is_due() && !self.must_account() {
            self.run_virtual_timers(world);
        }
        if self.machine.is_idle() {
            return if has_news { Step::Continue } else { Step::Wait };
        }
        let enough = (self.slice_start + slice).min(self.machine.icount.saturating_add(instructions.max(1)));
        self.run_guest_about(enough, u64::MAX, world);
        if self.has_ended { Step::Ended } else { Step::Continue }
    }

    /// One turn of the iothread's loop.
    pub fn record_iothread(&mut self, world: &mut dyn World) -> Step {
        if self.has_ended {
            return Step::Ended;
        }
        if !self.rest.is_started {
            self.start(world);
            return Step::Continue;
        }
        if let Some(code) = self.queue_shutdown() {
            self.switch_off(code, world);
            return Step::Ended;
        }
        let mut step = Step::Wait;
        if self.machine.is_idle() && !self.rest.warp.wake {
            let may_start = self.rest.warp.start.is_none() && self.may_warp();
            if may_start || self.has_async() {
                self.start_warp_timer(world);
                step = Step::Continue;
            }
        }
        if self.is_due(TimerClock::VirtualRt, ClockKind::VirtualRt, world) {
            self.run_virtual_rt_timers(world);
            step = Step::Continue;
        }
        if self.is_due(TimerClock::Host, ClockKind::Host, world) {
            self.run_host_timers(world);
            step = Step::Continue;
        }
        step
    }

    fn is_due(&self, timers: TimerClock, clock: ClockKind, world: &mut dyn World) -> bool {
        self.machine.timers.deadline(timers).is_some_and(|deadline| deadline <= world.now(clock))
    }

    fn has_async(&self) -> bool {
        let Log::Recorder(recorder) = &self.log else { return false };
        !self.machine.bottom_halves.is_empty() || !recorder.queue.is_empty(self.machine.room())
    }

    fn queue_shutdown(&self) -> Option<u16> {
        let Log::Recorder(recorder) = &self.log else { return None };
        recorder.queue.shutdown_requested()
    }
}
