//! The session as gdb's target: registers, memory, breakpoints, and ways to go.

use super::riscv::{HartRegisters, Riscv64};
use super::threads::thread;
use gdbstub::common::{Signal, Tid};
use gdbstub::outputln;
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::reverse_exec::{
    ReplayLogPosition, ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps,
};
use gdbstub::target::ext::base::singlethread::{
    SingleThreadBase, SingleThreadResume, SingleThreadResumeOps, SingleThreadSingleStep,
    SingleThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use heddle_proto::verdict::on_hart;
use heddle_replay_engine::debugger::{AccessKind, Found, Points, Session, Stop, Watchpoint};
use std::collections::BTreeSet;

/// gdb's error numbers are Linux's.
const EFAULT: u8 = 14;
const EROFS: u8 = 30;
/// Most watchpoints: each is compared with every instruction.
const WATCHPOINTS_MAX: usize = 64;

/// Which way gdb wants to go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Continue,
    /// Of the hart of this number.
    Step(usize),
    ReverseContinue,
    ReverseStep,
}

/// A session, and what gdb has asked of it.
pub(super) struct Debuggee {
    pub(super) session: Session,
    pub(super) order: Order,
    /// The hart that is to continue, if one was named.
    pub(super) named: Option<usize>,
    /// Nothing is to be told but of that one.
    pub(super) is_alone: bool,
    software: BTreeSet<u64>,
    hardware: BTreeSet<u64>,
}

impl Debuggee {
    /// A debuggee that stands where the session does.
    pub(super) fn new(session: Session) -> Debuggee {
        let (software, hardware) = (BTreeSet::new(), BTreeSet::new());
        Debuggee { session, order: Order::Continue, named: None, is_alone: false, software, hardware }
    }

    /// The gdb that has set them is gone.
    pub(super) fn forget_points(&mut self) {
        self.software.clear();
        self.hardware.clear();
        self.session.points = Points::default();
    }

    /// Goes where it was told to; `None` when gdb has something to say before.
    pub(super) fn go(
        &mut self,
        is_interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Option<MultiThreadStopReason<u64>>, String> {
        let here = self.session.icount();
        let stop = match self.order {
            Order::Continue => self.run_on(is_interrupted)?,
            Order::Step(hart) => self.step_hart(hart, is_interrupted)?,
            Order::ReverseContinue => self.session.run_backward(0, is_interrupted)?,
            Order::ReverseStep => self.session.run_backward(here.saturating_sub(1), is_interrupted)?,
        };
        let log = |pos| MultiThreadStopReason::ReplayLog { tid: self.named_thread(), pos };
        Ok(Some(match (stop, self.order) {
            (Stop::Interrupted, _) => return Ok(None),
            (Stop::There, Order::ReverseContinue) => log(ReplayLogPosition::Begin),
            (Stop::There, Order::ReverseStep) if here == 0 => log(ReplayLogPosition::Begin),
            (Stop::There, _) => self.done(),
            (Stop::End, _) => log(ReplayLogPosition::End),
            (Stop::Found(Found::Breakpoint), _) => self.breakpoint(),
            (Stop::Found(Found::Watchpoint(watchpoint)), _) => MultiThreadStopReason::Watch {
                tid: self.current_thread(),
                kind: gdb_kind(watchpoint.kind),
                addr: watchpoint.address,
            },
        }))
    }

    /// Goes on until something is found, by the one hart that gdb waits for, if it does.
    fn run_on(&mut self, is_interrupted: &mut dyn FnMut() -> bool) -> Result<Stop, String> {
        let only = self.named.filter(|_| self.is_alone);
        loop {
            let stop = self.session.run_forward(u64::MAX, is_interrupted)?;
            let is_others = only.is_some_and(|hart| hart != self.session.machine().current_hart());
            if !(is_others && stop == Stop::Found(Found::Breakpoint)) {
                return Ok(stop);
            }
        }
    }

    /// Goes on until this hart has executed an instruction, the others in their turns before.
    fn step_hart(&mut self, hart: usize, is_interrupted: &mut dyn FnMut() -> bool) -> Result<Stop, String> {
        loop {
            let (here, next) = (self.session.icount(), self.session.machine().current_hart());
            let stop = self.session.run_forward(here + 1, is_interrupted)?;
            if next == hart || stop != Stop::There {
                return Ok(stop);
            }
        }
    }

    /// The thread of the hart that executes the next instruction.
    fn current_thread(&self) -> Tid {
        thread(self.session.machine().current_hart())
    }

    /// The same, if gdb is told of more than one.
    fn named_thread(&self) -> Option<Tid> {
        self.session.machine().named_hart().map(|_| self.current_thread())
    }

    /// A step is done: by whom, if it could be another.
    fn done(&self) -> MultiThreadStopReason<u64> {
        let stepped = match self.order {
            Order::Step(hart) => self.named_thread().map(|_| thread(hart)),
            _ => self.named_thread(),
        };
        match stepped {
            Some(tid) => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            None => MultiThreadStopReason::DoneStep,
        }
    }

    /// gdb's user wants it to stop.
    pub(super) fn interrupted(&self) -> MultiThreadStopReason<u64> {
        match self.named_thread() {
            Some(tid) => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGINT },
            None => MultiThreadStopReason::Signal(Signal::SIGINT),
        }
    }

    fn breakpoint(&self) -> MultiThreadStopReason<u64> {
        let tid = self.current_thread();
        if self.hardware.contains(&self.session.machine().hart().pc) {
            MultiThreadStopReason::HwBreak(tid)
        } else {
            MultiThreadStopReason::SwBreak(tid)
        }
    }

    fn update_breakpoints(&mut self) {
        self.session.points.breakpoints = self.software.union(&self.hardware).copied().collect();
    }

    /// The answer to whatever would make this another execution than the recorded one.
    pub(super) fn refuse<T>(&self, what: &str) -> TargetResult<T, Debuggee> {
        tracing::warn!(
            icount = self.session.icount(),
            "gdb wants to write {what}: a replay is not to be changed"
        );
        Err(TargetError::Errno(EROFS))
    }
}

fn gdb_kind(kind: AccessKind) -> WatchKind {
    match kind {
        AccessKind::Read => WatchKind::Read,
        AccessKind::Write => WatchKind::Write,
        AccessKind::Any => WatchKind::ReadWrite,
    }
}

fn watchpoint(address: u64, bytes: u64, kind: WatchKind) -> Watchpoint {
    let kind = match kind {
        WatchKind::Read => AccessKind::Read,
        WatchKind::Write => AccessKind::Write,
        WatchKind::ReadWrite => AccessKind::Any,
    };
    Watchpoint { address, bytes, kind }
}

impl Target for Debuggee {
    type Arch = Riscv64;
    type Error = String;

    fn base_ops(&mut self) -> BaseOps<'_, Riscv64, String> {
        if self.session.machine().hart_count() == 1 {
            BaseOps::SingleThread(self)
        } else {
            BaseOps::MultiThread(self)
        }
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for Debuggee {
    fn read_registers(&mut self, registers: &mut HartRegisters) -> TargetResult<(), Self> {
        *registers = HartRegisters::of(self.session.machine().hart());
        Ok(())
    }

    fn write_registers(&mut self, _: &HartRegisters) -> TargetResult<(), Self> {
        self.refuse("registers")
    }

    fn read_addrs(&mut self, address: u64, out: &mut [u8]) -> TargetResult<usize, Self> {
        match self.session.machine().peek(address, out) {
            0 if !out.is_empty() => Err(TargetError::Errno(EFAULT)),
            bytes => Ok(bytes),
        }
    }

    fn write_addrs(&mut self, _: u64, bytes: &[u8]) -> TargetResult<(), Self> {
        // gdb asks with nothing whether it could write binary data.
        if bytes.is_empty() { Ok(()) } else { self.refuse("memory") }
    }

    fn support_resume(&mut self) -> Option<SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

/// A replay takes no signals: the log has what happens to it.
impl SingleThreadResume for Debuggee {
    fn resume(&mut self, _: Option<Signal>) -> Result<(), String> {
        self.order = Order::Continue;
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, (), Self>> {
        Some(self)
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, (), Self>> {
        Some(self)
    }
}

impl SingleThreadSingleStep for Debuggee {
    fn step(&mut self, _: Option<Signal>) -> Result<(), String> {
        self.order = Order::Step(0);
        Ok(())
    }
}

impl ReverseStep<()> for Debuggee {
    fn reverse_step(&mut self, _: ()) -> Result<(), String> {
        self.order = Order::ReverseStep;
        Ok(())
    }
}

impl ReverseCont<()> for Debuggee {
    fn reverse_cont(&mut self) -> Result<(), String> {
        self.order = Order::ReverseContinue;
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

/// No instruction is replaced by another: code is compared with where pc is.
impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.software.insert(address);
        self.update_breakpoints();
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let was_there = self.software.remove(&address);
        self.update_breakpoints();
        Ok(was_there)
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.hardware.insert(address);
        self.update_breakpoints();
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let was_there = self.hardware.remove(&address);
        self.update_breakpoints();
        Ok(was_there)
    }
}

/// On RISC-V gdb takes it that a watchpoint stops before the access: it steps once without
/// the watchpoint, in the way it goes, then looks at the memory.
impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(&mut self, address: u64, bytes: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let watchpoints = &mut self.session.points.watchpoints;
        if watchpoints.len() >= WATCHPOINTS_MAX || bytes == 0 {
            return Ok(false);
        }
        watchpoints.push(watchpoint(address, bytes, kind));
        Ok(true)
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        bytes: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let watchpoints = &mut self.session.points.watchpoints;
        let gone = watchpoint(address, bytes, kind);
        let at = watchpoints.iter().position(|watchpoint| *watchpoint == gone);
        Ok(at.map(|at| watchpoints.swap_remove(at)).is_some())
    }
}

impl MonitorCmd for Debuggee {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), String> {
        let position = self.session.position();
        match command {
            b"icount" => outputln!(out, "icount {}", position.icount),
            b"where" => {
                let machine = self.session.machine();
                let pc = machine.hart().pc;
                let instruction = machine.instruction_at(pc);
                outputln!(
                    out,
                    "icount {}, event {}: pc {pc:#x}{}  {instruction}",
                    position.icount,
                    position.event,
                    on_hart(machine.named_hart())
                );
                if let Some(ending) = self.session.ending() {
                    outputln!(out, "{ending}");
                }
            }
            _ => outputln!(
                out,
                "monitor icount: instructions so far; monitor where: also event and instruction"
            ),
        }
        Ok(())
    }
}
