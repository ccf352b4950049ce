//! Replaying: what each role does when the log decides.

use crate::emulator::{Emulator, Log, Step, World};
use crate::timer::TimerClock;
use heddle_proto::verdict::Side;
use heddle_proto::{Body, CheckpointKind, ClockKind, DivergenceKind, Event, Role};

/// A replay asks the world for nothing.
pub struct NoWorld;

impl World for NoWorld {
    fn now(&mut self, _: ClockKind) -> i64 {
        0
    }
    fn entropy(&mut self, _: &mut [u8]) {}
    fn must_exit(&mut self) -> bool {
        false
    }
}

impl Emulator {
    fn next_event(&mut self) -> Option<Event> {
        let Log::Replayer(replayer) = &mut self.log else { return None };
        let next = replayer.peek().cloned();
        if next.is_none() {
            self.has_ended = true;
        }
        next
    }

    /// One turn of the vCPU thread's loop, of at most `instructions`.
    pub fn replay_vcpu(&mut self, instructions: u64) -> Step {
        let Some(next) = self.next_event() else { return Step::Ended };
        if self.has_ended {
            return Step::Ended;
        }
        let icount = self.machine.icount;
        if !self.rest.is_started {
            return self.offer(&[]);
        }
        if icount < next.icount {
            return self.run_towards(next.icount.min(icount + instructions.max(1)));
        }
        match next.body {
            // The instruction at this icount is to read the clock, or to switch off.
            Body::Clock { clock: ClockKind::Host, .. } if next.role == Role::Vcpu => self.run_one(&next),
            Body::Shutdown { .. } if next.role == Role::Vcpu => self.run_one(&next),
            Body::Checkpoint(_) => self.offer(&self.sites(Role::Vcpu)),
            _ => self.run_one(&next),
        }
    }

    /// One turn of the iothread's loop.
    pub fn replay_iothread(&mut self) -> Step {
        let Some(next) = self.next_event() else { return Step::Ended };
        if self.has_ended {
            return Step::Ended;
        }
        // Before the first checkpoint the vCPU goes nowhere, so both have to be asked.
        if self.rest.is_started && self.machine.icount < next.icount {
            return Step::Wait;
        }
        self.offer(&self.sites(Role::Iothread))
    }

    /// The checkpoints that `role` could run now; unpinned, those of either role.
    fn sites(&self, role: Role) -> Vec<CheckpointKind> {
        let is_pinned = match &self.log {
            Log::Replayer(replayer) => replayer.is_pinned(),
            Log::Recorder(_) => true,
        };
        let timers = &self.machine.timers;
        let is_started = self.rest.is_started;
        let is_idle = self.machine.is_idle();
        let has_virtual_rt = timers.deadline(TimerClock::VirtualRt).is_some();
        let has_host = timers.deadline(TimerClock::Host).is_some();
        [
            (Role::Vcpu, is_started, CheckpointKind::ClockWarpAccount),
            (Role::Vcpu, self.virtual_timer_is_due(), CheckpointKind::ClockVirtual),
            (Role::Iothread, !is_started, CheckpointKind::Init),
            (Role::Iothread, is_started && is_idle, CheckpointKind::ClockWarpStart),
            (Role::Iothread, has_virtual_rt, CheckpointKind::ClockVirtualRt),
            (Role::Iothread, has_host, CheckpointKind::ClockHost),
            (Role::Iothread, is_started, CheckpointKind::Shutdown),
        ]
        .into_iter()
        .filter(|(owner, is_offered, _)| *is_offered && (*owner == role || !is_pinned))
        .map(|(_, _, kind)| kind)
        .collect()
    }

    /// Offers sites to the log, and runs the one whose turn it is.
    fn offer(&mut self, offered: &[CheckpointKind]) -> Step {
        let (icount, pc) = (self.machine.icount, self.pc());
        let Log::Replayer(replayer) = &mut self.log else { return Step::Ended };
        match replayer.checkpoint(offered, icount, pc) {
            Some(kind) => self.run_site(kind),
            _ if replayer.outcome().is_some() => {
                self.has_ended = true;
                return Step::Ended;
            }
            _ => return Step::Wait,
        }
        self.after()
    }

    fn run_site(&mut self, kind: CheckpointKind) {
        let world = &mut NoWorld;
        match kind {
            CheckpointKind::Init => self.start(world),
            CheckpointKind::ClockWarpStart => self.start_warp_timer(world),
            CheckpointKind::ClockWarpAccount => self.account_warp_timer(world),
            CheckpointKind::ClockVirtual => self.run_virtual_timers(world),
            CheckpointKind::ClockVirtualRt => self.run_virtual_rt_timers(world),
            CheckpointKind::ClockHost => self.run_host_timers(world),
            // QEMU's alone: this machine offers no such site.
            CheckpointKind::ResetRequested | CheckpointKind::SuspendRequested | CheckpointKind::Reset => {}
            CheckpointKind::Shutdown => {
                self.pass_checkpoint(kind, world);
                // The code is the log's: the switch-off came from outside.
                let Log::Replayer(replayer) = &mut self.log else { return };
                let code = match replayer.peek().map(|event| &event.body) {
                    Some(Body::Shutdown { code }) => *code,
                    _ => 0,
                };
                self.end(code);
            }
        }
    }

    fn after(&mut self) -> Step {
        let Log::Replayer(replayer) = &self.log else { return Step::Ended };
        self.has_ended |= replayer.outcome().is_some();
        if self.has_ended { Step::Ended } else { Step::Continue }
    }

    /// Runs the guest to `until`. If it can't, nobody can: the log's next event is elsewhere.
    fn run_towards(&mut self, until: u64) -> Step {
        let icount = self.machine.icount;
        if let Some(found) = self.cannot_run() {
            return self.diverge(DivergenceKind::WrongIcount, found);
        }
        self.run_guest(until, &mut NoWorld);
        if self.machine.icount == icount && !self.has_ended && self.machine.is_idle() {
            return self.diverge(DivergenceKind::WrongIcount, "the vCPU idle");
        }
        self.after()
    }

    /// What keeps guest code from running here, if anything does.
    fn cannot_run(&self) -> Option<&'static str> {
        if self.must_account() {
            Some("checkpoint ClockWarpAccount due")
        } else if self.virtual_timer_is_due() {
            Some("checkpoint ClockVirtual due")
        } else if self.machine.is_idle() {
            Some("the vCPU idle")
        } else {
            None
        }
    }

    /// Runs the one instruction that the log's next event should come from.
    fn run_one(&mut self, expected: &Event) -> Step {
        let before = self.position();
        if let Some(found) = self.cannot_run() {
            return self.diverge(DivergenceKind::WrongKind, found);
        }
        // A pending wake-up may take several looks before the instruction runs.
        for _ in 0..4 {
            self.run_guest(before.icount + 1, &mut NoWorld);
            if self.position() != before || self.has_ended {
                break;
            }
            // A debugger looks at it first; it comes when the debugger goes on.
            if self.machine.is_held() {
                return Step::Continue;
            }
        }
        let is_consumed = self.position().event > before.event;
        if !is_consumed && !self.has_ended {
            let kind = match expected.body {
                Body::Clock { .. } | Body::Shutdown { .. } => DivergenceKind::WrongIcount,
                _ => DivergenceKind::WrongKind,
            };
            return self.diverge(kind, "an instruction without an event");
        }
        self.after()
    }

    fn diverge(&mut self, kind: DivergenceKind, what: &str) -> Step {
        let (pc, icount) = (self.pc(), self.machine.icount);
        if let Log::Replayer(replayer) = &mut self.log {
            let found = Side { what: what.into(), role: Some(Role::Vcpu), icount };
            replayer.diverge_from_next(kind, found, pc);
        }
        self.has_ended = true;
        Step::Ended
    }
}
