//! Several harts, as gdb's threads: hart 0 is thread 1.
//!
//! All stop together and go together, since a replay has but one way to go: a thread that is
//! stepped takes the others along, in the turns that they had.

use super::riscv::HartRegisters;
use super::target::{Debuggee, Order};
use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::reverse_exec::{ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps};
use gdbstub::target::ext::base::singlethread::SingleThreadBase;
use gdbstub::target::{TargetError, TargetResult};

/// Linux's number for a thread that is not there.
const ESRCH: u8 = 3;

/// The thread that a hart is.
pub(super) fn thread(hart: usize) -> Tid {
    Tid::MIN.saturating_add(hart)
}

/// The hart that a thread is; gdb may ask for one that is none.
fn hart(thread: Tid) -> usize {
    thread.get() - 1
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

    /// As the hart sees it whose turn it is: another may have other page tables.
    fn read_addrs(&mut self, address: u64, out: &mut [u8], _: Tid) -> TargetResult<usize, Self> {
        SingleThreadBase::read_addrs(self, address, out)
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

/// gdb asks for it to step over a breakpoint, by one at the next instruction. The others can't
/// be held, but nothing that they meet is told meanwhile: gdb waits for the one thread.
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
