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

/// gdb's error numbers are Linux's. Of a thread that is not there:
pub(super) const ESRCH: u8 = 3;
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
    /// Nothing is to be told but of the one that was named, or is stepped.
    pub(super) is_alone: bool,
    /// Where gdb was last told of the hart whose turn it is there: that it is at a breakpoint
    /// there is no news.
    pub(super) told: Option<u64>,
    software: BTreeSet<u64>,
    hardware: BTreeSet<u64>,
}

impl Debuggee {
    /// A debuggee that stands where the session does.
    pub(super) fn new(session: Session) -> Debuggee {
        let (software, hardware) = (BTreeSet::new(), BTreeSet::new());
        let order = Order::Continue;
        Debuggee { session, order, named: None, is_alone: false, told: None, software, hardware }
    }

    /// The gdb that has set them is gone.
    pub(super) fn forget_points(&mut self) {
        self.software.clear();
        self.hardware.clear();
        self.session.points = Points::default();
        self.told = None;
    }

    /// Goes where it was told to; `None` when gdb has something to say before.
    pub(super) fn go(
        &mut self,
        is_interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Option<MultiThreadStopReason<u64>>, String> {
        let here = self.session.icount();
        self.session.points.only = self.alone();
        let stop = match (self.order, self.alone()) {
            (Order::Continue, None) => self.run_on(is_interrupted)?,
            (Order::Continue, Some(hart)) => self.run_alone(hart, is_interrupted)?,
            (Order::Step(hart), _) => self.step_hart(hart, is_interrupted)?,
            (Order::ReverseContinue, _) => self.session.run_backward(0, is_interrupted)?,
            (Order::ReverseStep, _) => self.session.run_backward(here.saturating_sub(1), is_interrupted)?,
        };
        let hart = self.stopped_hart(stop);
        if stop != Stop::Interrupted {
            let is_current = hart == self.session.machine().current_hart();
            self.told = is_current.then(|| self.session.icount());
        }
        let log = |pos| MultiThreadStopReason::ReplayLog { tid: self.named_thread(hart), pos };
        Ok(Some(match (stop, self.order) {
            (Stop::Interrupted, _) => return Ok(None),
            (Stop::There, Order::ReverseContinue) => log(ReplayLogPosition::Begin),
            (Stop::There, Order::ReverseStep) if here == 0 => log(ReplayLogPosition::Begin),
            (Stop::There, _) => self.done(hart),
            (Stop::End, _) => log(ReplayLogPosition::End),
            (Stop::Found(Found::Breakpoint), _) => self.breakpoint(hart),
            (Stop::Found(Found::Watchpoint(watchpoint)), _) => MultiThreadStopReason::Watch {
                tid: thread(hart),
                kind: gdb_kind(watchpoint.kind),
                addr: watchpoint.address,
            },
        }))
    }

    /// Reads what a hart sees of memory; how many bytes could be read.
    pub(super) fn read_memory(&self, hart: usize, address: u64, out: &mut [u8]) -> TargetResult<usize, Self> {
        let view = self.session.machine().view_of(hart).ok_or(TargetError::Errno(ESRCH))?;
        match view.read(address, out) {
            0 if !out.is_empty() => Err(TargetError::Errno(EFAULT)),
            bytes => Ok(bytes),
        }
    }

    /// Its thread, if gdb is told of more than one.
    fn named_thread(&self, hart: usize) -> Option<Tid> {
        self.session.machine().named_hart().map(|_| thread(hart))
    }

    /// A step is done: by whom, if it could be another.
    fn done(&self, hart: usize) -> MultiThreadStopReason<u64> {
        match self.named_thread(hart) {
            Some(tid) => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            None => MultiThreadStopReason::DoneStep,
        }
    }

    /// gdb's user wants it to stop.
    pub(super) fn interrupted(&self) -> MultiThreadStopReason<u64> {
        match self.named_thread(self.stopped_hart(Stop::Interrupted)) {
            Some(tid) => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGINT },
            None => MultiThreadStopReason::Signal(Signal::SIGINT),
        }
    }

    fn breakpoint(&self, hart: usize) -> MultiThreadStopReason<u64> {
        let pc = self.session.machine().hart_at(hart).map(|hart| hart.pc);
        if pc.is_some_and(|pc| self.hardware.contains(&pc)) {
            MultiThreadStopReason::HwBreak(thread(hart))
        } else {
            MultiThreadStopReason::SwBreak(thread(hart))
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
        self.read_memory(self.session.machine().current_hart(), address, out)
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
