//! The built-in machine: RV64GC harts with Zba, Zbb and Zbs on QEMU `virt`'s memory map.
//!
//! [`Machine::run`] executes guest code up to an icount and never past it. All
//! that comes from outside the instruction stream goes through [`Outside`] or
//! arrives between runs. Nothing here reads a clock, a file or a thread.

mod bits;
mod clint;
mod code;
mod csr;
pub mod decode;
mod devices;
pub mod disasm;
mod disk;
mod execute;
mod fast;
pub mod fdt;
pub mod float;
pub mod hart;
pub(crate) mod harts;
mod htif;
pub mod loader;
pub mod lookout;
mod memory;
mod output;
mod pairs;
mod plic;
pub mod pmp;
pub mod ram;
mod rom;
mod rtc;
mod run;
#[cfg(test)]
mod run_tests;
mod shown;
mod slots;
mod uart;
mod view;
mod virtio;
mod virtio_block;
mod virtio_console;
mod virtio_net;
mod virtio_rng;
mod virtqueue;

pub use disk::Disk;
pub(crate) use slots::Card;
pub use view::View;
pub use virtio_net::FRAME_BYTES_MAX;

use crate::timer::Timers;
use clint::Clint;
use code::CodeCache;
use fast::FastTlb;
use hart::Hart;
use harts::Harts;
use heddle_proto::ClockKind;
use htif::Htif;
use lookout::Lookout;
use plic::Plic;
use pmp::Regions;
use ram::Ram;
use rom::Rom;
use rtc::Rtc;
use run::{Bounds, NO_PAGE};
use serde::{Deserialize, Serialize};
use uart::Uart;
use virtio_block::VirtioBlock;

/// Where RAM begins.
pub const RAM_BASE: u64 = 0x8000_0000;

/// What the machine asks of the world in the middle of a run.
pub trait Outside {
    /// The value of a recorded clock, read by the instruction at `icount`.
    /// The virtual clock shows `now`.
    fn read_clock(&mut self, clock: ClockKind, now: i64, icount: u64, hart: &Hart) -> i64;
    /// Whether the run must end here; asked at least every 8192 instructions and a block.
    fn must_stop(&mut self) -> bool;
}

/// Nobody outside, for checks of the machine alone: clocks show the icount, and nothing ends a run.
#[derive(Clone, Copy, Debug)]
pub struct Nobody;

impl Outside for Nobody {
    fn read_clock(&mut self, _: ClockKind, _: i64, icount: u64, _: &Hart) -> i64 {
        icount as i64
    }

    fn must_stop(&mut self) -> bool {
        false
    }
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The icount asked for is reached.
    Budget,
    /// Every hart waits in WFI.
    Idle,
    /// Something the caller bounds runs by has changed: a deadline, a bottom half.
    Work,
    /// The guest switched the machine off.
    Shutdown,
    /// [`Outside::must_stop`], or a debugger holds it.
    Stopped,
}

/// The clock that guests see: `icount << shift`, plus the warp bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualClock {
    /// Nanoseconds an instruction, as a power of two.
    pub shift: u32,
    /// Idle time added so far.
    pub bias: i64,
}

impl VirtualClock {
    /// Nanoseconds at `icount`.
    pub fn now(&self, icount: u64) -> i64 {
        ((icount << self.shift) as i64).wrapping_add(self.bias)
    }

    /// The first icount at which the clock shows at least `ns`; rounds up, as QEMU does.
    pub fn icount_at(&self, ns: i64) -> u64 {
        let ns = ns.saturating_sub(self.bias).max(0) as u64;
        ns.div_ceil(1 << self.shift)
    }
}

/// Deferred work of a virtio device: look at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BottomHalf {
    /// Counts up from zero.
    pub id: u64,
    /// The device's slot.
    pub slot: usize,
    /// Which of its queues.
    pub queue: u16,
}

/// A disk and its controller.
#[derive(Clone, Debug)]
pub(crate) struct Drive {
    pub(crate) controller: VirtioBlock,
    pub(crate) disk: Disk,
}

/// The machine. What the inner loop goes to all the time comes first, and close together: see
/// [`Machine::run_in_place`].
#[repr(C, align(4096))]
pub struct Machine {
    /// Instructions executed, by all harts together.
    pub(crate) icount: u64,
    /// The virtual page that the code cache's current one is at, while it is known.
    here: u64,
    fast: FastTlb,
    pub(crate) ram: Ram,
    /// Look up before the next instruction: interrupts, or a reason to leave.
    attention: bool,
    /// A reason for the caller to look, see [`Exit::Work`].
    work: bool,
    /// The hart whose turn it is; the others are in `harts`.
    pub(crate) hart: Hart,
    harts: Harts,
    rom: Rom,
    pub(crate) clint: Clint,
    pub(crate) plic: Plic,
    pub(crate) uart: Uart,
    pub(crate) rtc: Rtc,
    pub(crate) drives: Vec<Drive>,
    pub(crate) cards: Vec<Card>,
    pub(crate) timers: Timers,
    pub(crate) clock: VirtualClock,
    pub(crate) bottom_halves: Vec<BottomHalf>,
    pub(crate) next_bottom_half: u64,
    pub(crate) next_request: u64,
    pub(crate) shutdown: Option<u16>,
    /// Requests put in flight since they were last taken; not state.
    pub(crate) submitted: Vec<u64>,
    /// Bytes that UART and virtio console have sent since they were last taken, in their
    /// order; not state.
    pub(crate) console: Vec<u8>,
    /// Frames sent since they were last taken; not state.
    pub(crate) frames: Vec<Vec<u8>>,
    /// Registers folded before every instruction, when somebody looks for a
    /// difference that does not last; not state.
    pub(crate) trace: Option<u64>,
    /// What a debugger looks for, while it does; not state.
    pub(crate) lookout: Option<Box<Lookout>>,
    /// The doublewords that the guest's ELF names for HTIF; its contents are RAM.
    htif: Option<Htif>,
    /// The guest switched off by asking for a reset; not state.
    wants_reset: bool,
    /// Instructions that could not be done, of those executed since the machine was made; not
    /// state.
    faults: u64,
    code: CodeCache,
    /// What PMP's entries come to.
    regions: Regions,
    /// Data accesses are translated or checked, with this mode's rights.
    data_paging: Option<hart::Mode>,
}

impl Machine {
    /// A machine at power-on: `ram` loaded, and one hart about to execute.
    pub fn new(ram: Ram, hart: Hart, shift: u32, disks: Vec<Disk>) -> Machine {
        let pages = ram.len() / ram::PAGE;
        let regions = Regions::of(&hart.pmp);
        let mut machine = Machine {
            hart,
            harts: Harts::one(),
            ram,
            rom: Rom::default(),
            clint: Clint::new(),
            plic: Plic::new(),
            uart: Uart::new(),
            rtc: Rtc::default(),
            drives: disks.into_iter().map(|disk| Drive { controller: VirtioBlock::new(), disk }).collect(),
            cards: vec![],
            timers: Timers::default(),
            clock: VirtualClock { shift, bias: 0 },
            bottom_halves: vec![],
            next_bottom_half: 0,
            next_request: 0,
            icount: 0,
            shutdown: None,
            submitted: vec![],
            console: vec![],
            frames: vec![],
            trace: None,
            lookout: None,
            htif: None,
            wants_reset: false,
            faults: 0,
            code: CodeCache::new(pages),
            here: NO_PAGE,
            fast: FastTlb::new(),
            attention: true,
            work: false,
            regions,
            data_paging: None,
        };
        machine.update_lines();
        machine.update_paging();
        machine
    }

    /// Instructions executed so far.
    pub fn icount(&self) -> u64 {
        self.icount
    }

    /// How many of the instructions executed since the machine was made could not be done and
    /// took no virtual time. QEMU's icount is without them.
    pub fn faults(&self) -> u64 {
        self.faults
    }

    /// The hart whose turn it is.
    pub fn hart(&self) -> &Hart {
        &self.hart
    }

    /// The hart whose turn it is, to plant a fault in.
    pub fn hart_mut(&mut self) -> &mut Hart {
        &mut self.hart
    }

    /// State was put in from outside: what is derived from it is made anew.
    pub(crate) fn refresh(&mut self) {
        self.code = CodeCache::new(self.ram.len() / ram::PAGE);
        self.here = NO_PAGE;
        self.watch_again();
        self.regions = Regions::of(&self.hart.pmp);
        self.fast.forget();
        self.refresh_parked();
        self.update_paging();
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Pages of RAM written since the last call.
    pub(crate) fn take_dirty(&mut self) -> Vec<u32> {
        self.fast.forget_stores();
        self.ram.take_dirty()
    }

    /// The virtual clock now, in nanoseconds.
    pub fn virtual_now(&self) -> i64 {
        self.clock.now(self.icount)
    }

    /// The guest's exit code, once it has switched the machine off.
    pub fn shutdown(&self) -> Option<u16> {
        self.shutdown
    }

    /// Whether the guest switched the machine off by asking for a reset.
    pub fn wants_reset(&self) -> bool {
        self.wants_reset
    }

    /// Whether every hart waits in WFI with nothing to wake it.
    pub fn is_idle(&self) -> bool {
        self.all_harts().all(Hart::is_waiting)
    }

    /// Whether a block request or a bottom half is outstanding.
    pub fn has_outstanding(&self) -> bool {
        !self.bottom_halves.is_empty()
            || self.drives.iter().any(|drive| !drive.controller.in_flight.is_empty())
    }

    /// Executes until `until` instructions have been executed in all, or a reason to leave.
    ///
    /// A pending kick is taken first, by [`Machine::take_kick`].
    pub fn run(&mut self, until: u64, outside: &mut dyn Outside) -> Exit {
        self.run_within(Bounds { until, enough: until }, outside)
    }

    /// The same, but `enough` are enough: it then ends some instructions later, where that is
    /// cheaper. Never past `until`.
    pub(crate) fn run_about(&mut self, enough: u64, until: u64, outside: &mut dyn Outside) -> Exit {
        self.run_within(Bounds { until, enough: enough.min(until) }, outside)
    }

    fn run_within(&mut self, bounds: Bounds, outside: &mut dyn Outside) -> Exit {
        assert!(!self.hart.kick_pending, "account_warp_timer takes kicks before guest code runs");
        if self.icount >= bounds.enough {
            return Exit::Budget;
        }
        self.attention = true;
        match (&self.trace, &self.lookout) {
            (None, None) => self.run_in_place(bounds, outside, run::STEPS_MAX),
            _ => self.run_loop::<true>(bounds, outside),
        }
    }

    /// Shows the next instruction to the lookout; whether the run is held before it.
    fn look_out(&mut self) -> bool {
        let Some(lookout) = &self.lookout else { return false };
        let bits = if lookout.reads_code() { self.view().bits(self.hart.pc) } else { None };
        let (icount, number, hart) = (self.icount, self.current_hart(), &self.hart);
        self.lookout.as_mut().is_some_and(|lookout| lookout.look(icount, number, hart, bits))
    }

    /// Whether a lookout has ended the run before the instruction at pc.
    pub(crate) fn is_held(&self) -> bool {
        self.lookout.as_ref().is_some_and(|lookout| lookout.is_holding())
    }

    /// Wakes or takes an interrupt, or says why to leave the run.
    #[cold]
    fn attend(&mut self, code: &mut CodeCache, outside: &mut dyn Outside) -> Option<Exit> {
        self.attention = false;
        if self.ram.has_stale_code() {
            code.forget(self.ram.take_stale_code());
            self.here = NO_PAGE;
            self.see_tohost();
        }
        if outside.must_stop() {
            return Some(Exit::Stopped);
        }
        if self.shutdown.is_some() {
            return Some(Exit::Shutdown);
        }
        if std::mem::take(&mut self.work) {
            return Some(Exit::Work);
        }
        self.pass_turn();
        if self.hart.is_idle {
            if !self.hart.has_wakeup() {
                return Some(Exit::Idle);
            }
            self.hart.is_idle = false;
        }
        if let Some(cause) = self.hart.pending_interrupt() {
            self.hart.enter_trap(1 << 63 | cause, 0);
            self.update_paging();
        }
        None
    }

    /// If the iothread kicked the hart out of its run, the hart now looks at its
    /// lines, and so do the others; its reservation does not survive that.
    pub fn take_kick(&mut self) {
        if !std::mem::take(&mut self.hart.kick_pending) {
            return;
        }
        self.hart.kicks = self.hart.kicks.wrapping_add(1);
        self.hart.reservation = None;
        self.carry_lines();
    }

    /// The id that the next bottom half or block request would get, whichever is larger.
    pub fn next_async(&self) -> u64 {
        self.next_bottom_half.max(self.next_request)
    }

    /// Console bytes sent since the last call.
    pub fn take_console(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.console)
    }

    /// Requests put in flight since the last call.
    pub fn take_submitted(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.submitted)
    }
}
