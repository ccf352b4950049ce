//! Several harts, as gdb's threads: hart 0 is thread 1.
//!
//! All stop together and go together, since a replay has but one way to go: a thread that is
//! stepped takes the others along, in the turns that they had. gdb may still ask for one to go
//! alone, which is how it steps over a breakpoint, and must then hear of no other.
//!
//! ```text
//! hart 0  ....b#...........    b  is at a breakpoint    #  executes
//! hart 1  ......b##########                             .  waits for its turn
//! ```
//! As soon as hart 0 has executed its one instruction gdb is told so, and of hart 1's breakpoint
//! with the next order: nothing is passed over.

use super::riscv::HartRegisters;
use super::target::{Debuggee, ESRCH, Order};
use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::reverse_exec::{ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps};
use gdbstub::target::ext::base::singlethread::SingleThreadBase;
use gdbstub::target::{TargetError, TargetResult};
use heddle_replay_engine::debugger::{Found, Stop};

/// The thread that a hart is.
pub(super) fn thread(hart: usize) -> Tid {
    Tid::MIN.saturating_add(hart)
}

/// The hart that a thread is; gdb may ask for one that is none.
fn hart(thread: Tid) -> usize {
    thread.get() - 1
}

impl Debuggee {
    /// The hart that is to go alone.
    pub(super) fn alone(&self) -> Option<usize> {
        match self.order {
            Order::Continue if self.is_alone => self.named,
            Order::Step(hart) if self.is_alone => Some(hart),
            _ => None,
        }
    }

    /// The hart that gdb is told has stopped so.
    pub(super) fn stopped_hart(&self, stop: Stop) -> usize {
        match (stop, self.order) {
            (Stop::There, Order::Step(hart)) => hart,
            _ => self.alone().unwrap_or(self.session.machine().current_hart()),
        }
    }

    /// Goes on until something is found.
    pub(super) fn run_on(&mut self, is_interrupted: &mut dyn FnMut() -> bool) -> Result<Stop, String> {
        if self.has_news() {
            return Ok(Stop::Found(Found::Breakpoint));
        }
        self.session.run_forward(u64::MAX, is_interrupted)
    }

    /// Goes on until this hart has something found. At a breakpoint behind its next instruction,
    /// where gdb has one to step over that instruction, it is as soon as pc is there: by the
    /// time that its turn comes again the others would have gone by their own breakpoints.
    pub(super) fn run_alone(
        &mut self,
        hart: usize,
        is_interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Stop, String> {
        let stop = self.step_hart(hart, is_interrupted)?;
        if stop != Stop::There {
            return Ok(stop);
        }
        if self.is_at_breakpoint(hart) {
            return Ok(Stop::Found(Found::Breakpoint));
        }
        self.session.run_forward(u64::MAX, is_interrupted)
    }

    /// Goes on until this hart has executed an instruction, the others in their turns before.
    pub(super) fn step_hart(
        &mut self,
        hart: usize,
        is_interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Stop, String> {
        loop {
            if self.has_news() {
                return Ok(Stop::Found(Found::Breakpoint));
            }
            let (here, next) = (self.session.icount(), self.session.machine().current_hart());
            let stop = self.session.run_forward(here + 1, is_interrupted)?;
            if next == hart || stop != Stop::There {
                return Ok(stop);
            }
        }
    }

    /// Whether the next instruction is at a breakpoint that gdb waits for and was not told of.
    /// The session itself looks for those behind here.
    fn has_news(&self) -> bool {
        let current = self.session.machine().current_hart();
        let is_meant = self.alone().is_none_or(|alone| alone == current);
        is_meant && self.told != Some(self.session.icount()) && self.is_at_breakpoint(current)
    }

    fn is_at_breakpoint(&self, hart: usize) -> bool {
        let hart = self.session.machine().hart_at(hart);
        hart.is_some_and(|hart| self.session.points.breakpoints.contains(&hart.pc))
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, registers: &mut HartRegisters, tid: Tid) -> TargetResult<(), Self> {
        let hart = self.session.machine().hart_at(hart(tid)).ok_or(TargetError::Errno(ESRCH))?;
        *registers = HartRegisters::of(hart);
        Ok(())
    }

    fn write_registers(&mut self, _: &HartRegisters, _: Tid) -> TargetResult<(), Self> {
        self.refuse("registers")
    }

    /// As that hart sees it: each may have page tables of its own.
    fn read_addrs(&mut self, address: u64, out: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        self.read_memory(hart(tid), address, out)
    }

    fn write_addrs(&mut self, address: u64, bytes: &[u8], _: Tid) -> TargetResult<(), Self> {
        SingleThreadBase::write_addrs(self, address, bytes)
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), String> {
        (0..self.session.machine().hart_count()).for_each(|hart| thread_is_active(thread(hart)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), String> {
        self.order = Order::Continue;
        (self.named, self.is_alone) = (None, false);
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), String> {
        self.named = Some(hart(tid));
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, Tid, Self>> {
        Some(self)
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, Tid, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), String> {
        self.order = Order::Step(hart(tid));
        Ok(())
    }
}

/// gdb asks for it to step over a breakpoint, by one at the next instruction, and for
/// `scheduler-locking`. The others can't be held, but nothing that they meet is told meanwhile:
/// a gdb that steps one thread takes a stop of another for a fault of its own, and aborts.
impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), String> {
        self.is_alone = true;
        Ok(())
    }
}

/// One instruction of whoever executed it: gdb does not say which thread it means.
impl ReverseStep<Tid> for Debuggee {
    fn reverse_step(&mut self, _: Tid) -> Result<(), String> {
        self.order = Order::ReverseStep;
        Ok(())
    }
}

impl ReverseCont<Tid> for Debuggee {
    fn reverse_cont(&mut self) -> Result<(), String> {
        self.order = Order::ReverseContinue;
        Ok(())
    }
}
