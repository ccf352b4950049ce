//! The emulator: a machine, its log, and the sites where the two roles meet.
//!
//! Both roles step the same emulator, one at a time: two threads under a lock,
//! or a seeded schedule in one thread. What they do is the same in record and in
//! replay; only who decides differs: the world, or the log.

use crate::builds::{Build, Fault};
use crate::checks::Checks;
use crate::machine::hart::Hart;
use crate::machine::{Machine, Outside};
use crate::page_tree::BlockSource;
use crate::queue::AsyncQueue;
use crate::recorder::Recorder;
use crate::replayer::{ReplayEnd, Replayer};
use crate::state::{COVERAGE, Rest, Snapshot, StateTree, leaf_values};
use crate::timer::{TimerClock, TimerId};
use crate::warp::Warp;
use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::verdict::{Proof, Side};
use heddle_proto::{
    AsyncEvent, Body, CheckpointKind, ClockKind, Divergence, DivergenceKind, Event, Hash, Outcome, Position,
    QemuEvent, Verdict,
};
use serde_json::Value;

/// The real world, as a recording sees it.
pub trait World {
    /// A clock, in nanoseconds. Each call may give a later value, never an earlier one.
    fn now(&mut self, clock: ClockKind) -> i64;
    /// Fills `out` with bytes that nobody can guess.
    fn entropy(&mut self, out: &mut [u8]);
    /// Whether the vCPU should leave its run soon, for the other role.
    fn must_exit(&mut self) -> bool;
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something was done; step again.
    Continue,
    /// Nothing to do until the other role or the world has done something.
    Wait,
    /// The execution has ended.
    Ended,
}

/// The log, on either side.
#[expect(clippy::large_enum_variant, reason = "one per emulator, never moved around")]
pub enum Log {
    /// Events are written as they happen.
    Recorder(Recorder),
    /// Events are taken as they were written.
    Replayer(Replayer),
}

/// A guest being recorded or replayed.
pub struct Emulator {
    pub(crate) machine: Machine,
    pub(crate) log: Log,
    pub(crate) rest: Rest,
    pub(crate) checks: Checks,
    pub(crate) positions: Positions,
    tree: StateTree,
    /// Captured at these icounts too, without a mark in the log.
    capture_at: Vec<u64>,
    snapshots: Vec<Snapshot>,
    pub(crate) fault: Option<Fault>,
    sleep: Sleep,
    pub(crate) has_ended: bool,
    /// Where the bounded slice of guest code began.
    pub(crate) slice_start: u64,
    from: Position,
    final_digest: Option<Hash>,
}

impl Emulator {
    /// A guest about to be recorded from power-on.
    pub fn record(machine: Machine, positions: Positions, sleep: Sleep, queue: AsyncQueue) -> Emulator {
        let log = Log::Recorder(Recorder::new(queue));
        Emulator::new(machine, log, positions, sleep, Build::default())
    }

    /// A guest about to be replayed from power-on.
    pub fn replay(
        machine: Machine,
        replayer: Replayer,
        positions: Positions,
        sleep: Sleep,
        build: Build,
    ) -> Emulator {
        Emulator::new(machine, Log::Replayer(replayer), positions, sleep, build)
    }

    fn new(mut machine: Machine, log: Log, positions: Positions, sleep: Sleep, build: Build) -> Emulator {
        let tree = StateTree::new(&mut machine);
        Emulator {
            machine,
            log,
            rest: Rest { warp: Warp::default(), is_started: false },
            checks: Checks::default(),
            positions,
            tree,
            capture_at: vec![],
            snapshots: vec![],
            fault: build.fault,
            sleep,
            has_ended: false,
            slice_start: 0,
            from: Position::default(),
            final_digest: None,
        }
    }

    /// Puts a snapshot's state in, before the first step.
    pub fn restore(&mut self, root: Hash, source: &mut dyn BlockSource) -> Result<Position, String> {
        let restored = self.tree.restore(&mut self.machine, root, source)?;
        self.rest = restored.rest;
        self.checks = restored.checks;
        self.from = restored.position;
        // A fault at or before the snapshot is not in the recorded state.
        self.fault = self.fault.filter(|fault| fault.icount > restored.position.icount);
        Ok(restored.position)
    }

    /// Captures snapshots at these icounts, ascending, without marks in the log.
    pub fn capture_at(&mut self, icounts: Vec<u64>) {
        self.capture_at = icounts;
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine, for lockstep runs and console output.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// The page trees and the emulator's own state.
    pub fn parts(&self) -> (&StateTree, &Rest) {
        (&self.tree, &self.rest)
    }

    /// The digest of the state now.
    pub fn digest(&mut self) -> Hash {
        self.tree.digest(&mut self.machine, &self.rest)
    }

    /// The parts that the digest is made of, by name, each with its hash.
    pub fn leaves(&mut self) -> Vec<(String, Hash)> {
        self.digest();
        self.tree.leaf_hashes(&self.machine, &self.rest)
    }

    /// The values of those that are no memory: harts, devices, timers.
    pub fn leaf_values(&self) -> Vec<(String, Value)> {
        leaf_values(&self.machine, &self.rest)
    }

    /// A snapshot of the state now, without a mark in the log: the new blocks since the last.
    pub fn snapshot(&mut self) -> Snapshot {
        let event = self.position().event;
        self.tree.snapshot(&mut self.machine, &self.rest, self.checks, event)
    }

    /// Where the execution stands.
    pub fn position(&self) -> Position {
        let event = match &self.log {
            Log::Recorder(recorder) => recorder.index(),
            Log::Replayer(replayer) => replayer.index(),
        };
        Position { icount: self.machine.icount(), event }
    }

    /// Whether the execution has ended.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Recorded events since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        match &mut self.log {
            Log::Recorder(recorder) => recorder.take_events(),
            Log::Replayer(_) => vec![],
        }
    }

    /// Snapshots since the last call.
    pub fn take_snapshots(&mut self) -> Vec<Snapshot> {
        std::mem::take(&mut self.snapshots)
    }

    /// When the iothread has something to do, by clock.
    pub fn deadline(&self, clock: TimerClock) -> Option<i64> {
        self.machine.timers.deadline(clock)
    }

    /// Whether the vCPU has nothing to execute.
    pub fn is_idle(&self) -> bool {
        self.machine.is_idle()
    }

    /// The replayer, in a replay.
    pub fn replayer(&mut self) -> Option<&mut Replayer> {
        match &mut self.log {
            Log::Recorder(_) => None,
            Log::Replayer(replayer) => Some(replayer),
        }
    }

    /// Ends the replay as stalled: a watchdog saw no progress.
    pub fn stall(&mut self, waiting_for: &str) {
        let (pc, icount) = (self.machine.hart().pc, self.machine.icount());
        let found = Side { what: waiting_for.into(), role: None, icount };
        if let Log::Replayer(replayer) = &mut self.log {
            replayer.diverge_from_next(DivergenceKind::Stall, found, pc);
        }
        self.has_ended = true;
    }

    /// Ends the replay without a verdict.
    pub fn give_up(&mut self, why: &str) {
        if let Log::Replayer(replayer) = &mut self.log {
            replayer.finish(ReplayEnd::Failed(why.into()));
        }
        self.has_ended = true;
    }

    /// Ends the replay where it stands, as a match: it was asked to come this far.
    pub fn conclude(&mut self) {
        if let Log::Replayer(replayer) = &mut self.log {
            replayer.finish(ReplayEnd::Match);
        }
        self.has_ended = true;
    }

    /// The verdict of an ended replay; an error means: could not tell.
    pub fn verdict(&mut self) -> Result<Verdict, String> {
        let (to, from) = (self.position(), self.from);
        let digest = self.final_digest.unwrap_or_else(|| self.digest());
        let Log::Replayer(replayer) = &self.log else {
            return Err("a recording has no verdict".into());
        };
        let outcome = match replayer.outcome() {
            Some(ReplayEnd::Match) => Outcome::Match,
            Some(ReplayEnd::Diverged(divergence)) => {
                // It ended there, so it is still that hart's turn.
                let hart = self.machine.named_hart();
                Outcome::Diverged(Box::new(Divergence { hart, ..(**divergence).clone() }))
            }
            Some(ReplayEnd::Failed(error)) => return Err(error.clone()),
            None => return Err("the replay has not ended".into()),
        };
        Ok(Verdict {
            outcome,
            from,
            to,
            instructions: to.icount - from.icount,
            events: to.event - from.event,
            role_checked: replayer.role_checked,
            role_mismatches: replayer.role_mismatches,
            checkpoints: replayer.checkpoints(),
            digest: Some(digest),
            coverage: COVERAGE.into(),
            proof: if from == Position::default() && replayer.goes_to_the_end() {
                Proof::Whole
            } else {
                Proof::Spans
            },
        })
    }

    pub(crate) fn pc(&self) -> u64 {
        self.machine.hart.pc
    }

    /// Notes an event that just happened in the checks.
    fn note(&mut self, event: &Event) {
        self.checks.event(event, &self.machine.hart);
    }

    /// A checkpoint: its event, then the async queue, flushed here on this role.
    pub(crate) fn pass_checkpoint(&mut self, kind: CheckpointKind, world: &mut dyn World) {
        let icount = self.machine.icount;
        let event = match &mut self.log {
            Log::Recorder(recorder) => recorder.event(icount, Body::Checkpoint(kind)),
            Log::Replayer(replayer) => replayer.take_checkpoint(),
        };
        self.note(&event);
        self.flush_async_events(world);
    }

    fn flush_async_events(&mut self, world: &mut dyn World) {
        while let Some(event) = self.next_async() {
            let has_run = match &event.body {
                Body::Async(body) => self.machine.run_async(body),
                Body::Qemu(body) => self.machine.receive(body),
                _ => false,
            };
            if has_run {
                self.note(&event);
                self.feed_entropy(world);
            } else {
                let pc = self.pc();
                match &mut self.log {
                    // A completion for a request that a device reset has dropped.
                    Log::Recorder(_) => {}
                    Log::Replayer(replayer) => return replayer.no_such_async(&event, pc),
                }
            }
        }
    }

    /// What a bottom half has asked of the world's entropy is answered at once, on its role.
    fn feed_entropy(&mut self, world: &mut dyn World) {
        while let Some(bytes) = self.machine.entropy_wanted() {
            let (icount, pc) = (self.machine.icount, self.pc());
            let event = match &mut self.log {
                Log::Recorder(recorder) => {
                    let mut data = vec![0; bytes];
                    world.entropy(&mut data);
                    recorder.event(icount, Body::Qemu(QemuEvent::Random { result: 0, data }))
                }
                Log::Replayer(replayer) => match replayer.read_entropy(bytes, icount, pc) {
                    Some(event) => event,
                    None => return,
                },
            };
            if let Body::Qemu(QemuEvent::Random { data, .. }) = &event.body {
                self.machine.give_entropy(data);
            }
            self.note(&event);
        }
    }

    fn next_async(&mut self) -> Option<Event> {
        let (icount, pc) = (self.machine.icount, self.pc());
        match &mut self.log {
            Log::Recorder(recorder) => {
                let half = self.machine.bottom_halves.first();
                let body = match half {
                    Some(half) => Body::Async(AsyncEvent::BottomHalf { id: half.id }),
                    None => loop {
                        let body = recorder.queue.pop(self.machine.room())?;
                        let Body::Async(event) = &body else { break body };
                        if self.machine.expects(event) {
                            break body;
                        }
                    },
                };
                Some(recorder.event(icount, body))
            }
            Log::Replayer(replayer) => replayer.next_async(icount, pc),
        }
    }

    /// A recorded clock, read at the vCPU's icount by whichever role runs.
    fn read_clock(&mut self, clock: ClockKind, world: &mut dyn World) -> i64 {
        let icount = self.machine.icount;
        let mut tape = Tape { log: &mut self.log, checks: &mut self.checks, world };
        tape.read_clock(clock, self.machine.virtual_now(), icount, &self.machine.hart)
    }

    /// iothread: the machine's first checkpoint.
    pub(crate) fn start(&mut self, world: &mut dyn World) {
        self.pass_checkpoint(CheckpointKind::Init, world);
        self.rest.is_started = true;
    }

    /// iothread, when every vCPU is idle: notes VirtualRt and arms the warp timer.
    pub(crate) fn start_warp_timer(&mut self, world: &mut dyn World) {
        self.pass_checkpoint(CheckpointKind::ClockWarpStart, world);
        if !self.machine.is_idle() {
            return;
        }
        let deadline = self.machine.timers.deadline(TimerClock::Virtual);
        match self.sleep {
            Sleep::On => {
                let now = self.read_clock(ClockKind::VirtualRt, world);
                let start = *self.rest.warp.start.get_or_insert(now);
                if let Some(deadline) = deadline {
                    let due =
                        start.saturating_add(deadline.saturating_sub(self.machine.virtual_now()).max(0));
                    self.machine.timers.arm(TimerClock::VirtualRt, TimerId::Warp, due);
                }
            }
            Sleep::Off if self.machine.has_outstanding() => {}
            Sleep::Off => {
                self.rest.warp.start = Some(self.machine.virtual_now());
                self.rest.warp.jump = deadline;
                self.rest.warp.wake = deadline.is_some();
            }
        }
    }

    /// vCPU, before guest code runs again: adds the idle time to the bias.
    pub(crate) fn account_warp_timer(&mut self, world: &mut dyn World) {
        self.pass_checkpoint(CheckpointKind::ClockWarpAccount, world);
        if let Some(start) = self.rest.warp.start {
            let idle = match self.sleep {
                Sleep::On => self.read_clock(ClockKind::VirtualRt, world).saturating_sub(start),
                Sleep::Off => {
                    self.rest.warp.jump.map_or(0, |to| to.saturating_sub(self.machine.virtual_now()))
                }
            };
            // The virtual clock never goes backwards.
            self.machine.clock.bias = self.machine.clock.bias.saturating_add(idle.max(0));
        }
        self.machine.timers.disarm(TimerClock::VirtualRt, TimerId::Warp);
        self.rest.warp = Warp::default();
        self.machine.take_kick();
        self.slice_start = self.machine.icount;
    }

    /// vCPU: the virtual clock's timers are due.
    pub(crate) fn run_virtual_timers(&mut self, world: &mut dyn World) {
        self.pass_checkpoint(CheckpointKind::ClockVirtual, world);
        self.machine.run_virtual_timers();
    }

    /// iothread: VirtualRt's timers are due.
    pub(crate) fn run_virtual_rt_timers(&mut self, world: &mut dyn World) {
        self.pass_checkpoint(CheckpointKind::ClockVirtualRt, world);
        let now = self.read_clock(ClockKind::VirtualRt, world);
        while let Some(TimerId::Warp) = self.machine.timers.take_expired(TimerClock::VirtualRt, now) {
            self.rest.warp.wake = true;
        }
    }

    /// iothread: the host clock's timers are due.
    pub(crate) fn run_host_timers(&mut self, world: &mut dyn World) {
        self.pass_checkpoint(CheckpointKind::ClockHost, world);
        let now = self.read_clock(ClockKind::Host, world);
        while let Some(TimerId::RtcAlarm) = self.machine.timers.take_expired(TimerClock::Host, now) {
            self.machine.expire_alarm();
        }
    }

    /// iothread: the machine is switched off from outside.
    pub(crate) fn switch_off(&mut self, code: u16, world: &mut dyn World) {
        self.pass_checkpoint(CheckpointKind::Shutdown, world);
        self.end(code);
    }

    /// Whether idle time may be warped over now.
    pub(crate) fn may_warp(&self) -> bool {
        self.sleep == Sleep::On || !self.machine.has_outstanding()
    }

    /// Whether the vCPU must account before guest code may run.
    pub(crate) fn must_account(&self) -> bool {
        self.rest.warp.start.is_some() || self.rest.warp.wake || self.machine.hart.kick_pending
    }

    pub(crate) fn virtual_timer_is_due(&self) -> bool {
        let deadline = self.machine.timers.deadline(TimerClock::Virtual);
        deadline.is_some_and(|deadline| deadline <= self.machine.virtual_now())
    }

    /// Runs the guest to `until`, or to the next fixed position, fault or deadline.
    pub(crate) fn run_guest(&mut self, until: u64, world: &mut dyn World) {
        self.run_guest_about(until, until, world);
    }

    /// The same, but `enough` are enough, and some more do no harm.
    pub(crate) fn run_guest_about(&mut self, enough: u64, until: u64, world: &mut dyn World) {
        let before = self.machine.icount;
        let mut until = until.min(self.positions.next_after(before));
        if let Some(at) = self.capture_at.iter().copied().find(|at| *at > before) {
            until = until.min(at);
        }
        if let Some(fault) = self.fault.filter(|fault| fault.icount > before) {
            until = until.min(fault.icount);
        }
        if let Some(deadline) = self.machine.timers.deadline(TimerClock::Virtual) {
            until = until.min(self.machine.clock.icount_at(deadline));
        }
        let mut tape = Tape { log: &mut self.log, checks: &mut self.checks, world };
        self.machine.run_about(enough, until, &mut tape);
        if self.machine.icount > before {
            if let Log::Replayer(replayer) = &mut self.log {
                replayer.progress();
            }
            self.arrive();
        }
        if let Some(code) = self.machine.shutdown {
            self.end(code);
        }
    }

    /// The vCPU has just reached an icount by executing: a planted fault, a fixed
    /// position, a capture, in this order.
    fn arrive(&mut self) {
        let icount = self.machine.icount;
        if let Some(fault) = self.fault.filter(|fault| fault.icount == icount) {
            self.machine.hart.x[fault.register as usize & 31] ^= 1 << fault.bit;
        }
        let is_fixed = icount % self.positions.check_every == 0 || self.positions.is_digest(icount);
        if is_fixed {
            self.checks.fold(&self.machine.hart);
            self.mark(Body::Check { value: self.checks.running, output: self.machine.output() });
            if self.positions.is_digest(icount) {
                self.mark_digest();
            }
        }
        let is_snapshot = self.positions.is_snapshot(icount) && matches!(self.log, Log::Recorder(_));
        if is_snapshot || self.capture_at.binary_search(&icount).is_ok() {
            let event = self.position().event;
            let snapshot = self.tree.snapshot(&mut self.machine, &self.rest, self.checks, event);
            self.snapshots.push(snapshot);
        }
    }

    fn mark_digest(&mut self) -> Hash {
        let root = self.digest();
        let history = self.checks.digest(root);
        self.mark(Body::Digest { root, history });
        root
    }

    /// Writes a mark, or compares it with the log's.
    fn mark(&mut self, body: Body) -> Option<Event> {
        let (icount, pc) = (self.machine.icount, self.pc());
        match &mut self.log {
            Log::Recorder(recorder) => Some(recorder.event(icount, body)),
            Log::Replayer(replayer) => replayer.expect(icount, &body, pc),
        }
    }

    /// The guest is off: final marks, and the end of the log.
    pub(crate) fn end(&mut self, code: u16) {
        let pc = self.pc();
        self.machine.shutdown = Some(code);
        if let Some(event) = self.mark(Body::Shutdown { code }) {
            self.note(&event);
            self.final_digest = Some(self.mark_digest());
            self.mark(Body::End);
        }
        if let Log::Replayer(replayer) = &mut self.log
            && replayer.outcome().is_none()
        {
            replayer.expect_nothing(pc);
        }
        self.has_ended = true;
    }
}

/// The log as a running machine sees it.
struct Tape<'a> {
    log: &'a mut Log,
    checks: &'a mut Checks,
    world: &'a mut dyn World,
}

impl Outside for Tape<'_> {
    fn read_clock(&mut self, clock: ClockKind, _: i64, icount: u64, hart: &Hart) -> i64 {
        let (event, value) = match self.log {
            Log::Recorder(recorder) => {
                let value = self.world.now(clock);
                (recorder.event(icount, Body::Clock { clock, value }), value)
            }
            Log::Replayer(replayer) => match replayer.read_clock(clock, icount, hart.pc) {
                Some(read) => read,
                None => return 0,
            },
        };
        self.checks.event(&event, hart);
        value
    }

    fn must_stop(&mut self) -> bool {
        match &*self.log {
            Log::Recorder(_) => self.world.must_exit(),
            Log::Replayer(replayer) => replayer.outcome().is_some(),
        }
    }
}
