//! The session: one live replay, and the ways to move it.

use super::memory::Memory;
use super::{Found, Origin, Points};
use crate::emulator::{Emulator, Step};
use crate::machine::Machine;
use crate::machine::lookout::{Lookout, Search};
use crate::replayer::ReplayEnd;
use crate::role;
use heddle_proto::{Hash, Position, Role};
use serde_json::Value;

/// Instructions between two snapshots in memory, and between two looks at whether to go on:
/// what a replay does in about the time that a restore takes.
const SPACING: u64 = 1 << 20;

/// Why a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Where it was to go.
    There,
    /// At something that was looked for.
    Found(Found),
    /// The replay has ended before; [`Session::ending`] says how.
    End,
    /// Whoever waits wants something else.
    Interrupted,
}

/// A replay that is moved.
pub struct Session {
    origin: Box<dyn Origin>,
    /// The recording's snapshots, ascending.
    snapshots: Vec<(Position, Hash)>,
    memory: Memory,
    spacing: u64,
    emulator: Emulator,
    is_settled: bool,
    /// What stops [`Session::run_forward`] and [`Session::run_backward`].
    pub points: Points,
}

impl Session {
    /// A session at power-on.
    pub fn new(origin: Box<dyn Origin>) -> Result<Session, String> {
        Session::with_spacing(origin, SPACING)
    }

    /// The same, with a snapshot in memory every `spacing` instructions.
    pub fn with_spacing(mut origin: Box<dyn Origin>, spacing: u64) -> Result<Session, String> {
        assert!(spacing > 0, "a session comes forward between two snapshots");
        let emulator = origin.emulator(Position::default())?;
        let mut snapshots = origin.snapshots();
        snapshots.sort_unstable();
        Ok(Session {
            origin,
            snapshots,
            memory: Memory::default(),
            spacing,
            emulator,
            is_settled: false,
            points: Points::default(),
        })
    }

    /// Instructions executed.
    pub fn icount(&self) -> u64 {
        self.emulator.machine().icount()
    }

    /// Where the replay stands.
    pub fn position(&self) -> Position {
        self.emulator.position()
    }

    /// The machine as it is now.
    pub fn machine(&self) -> &Machine {
        self.emulator.machine()
    }

    /// The digest of the state now.
    pub fn digest(&mut self) -> Hash {
        self.emulator.digest()
    }

    /// The parts of that digest, by name.
    pub fn leaves(&mut self) -> Vec<(String, Hash)> {
        self.emulator.leaves()
    }

    /// The values of those that are no memory: harts, devices, timers.
    pub fn leaf_values(&self) -> Vec<(String, Value)> {
        self.emulator.leaf_values()
    }

    /// How the replay ended, if it stands at its end.
    pub fn ending(&mut self) -> Option<String> {
        if !self.emulator.has_ended() {
            return None;
        }
        let outcome = self.emulator.replayer().and_then(|replayer| replayer.outcome().cloned());
        Some(match outcome {
            Some(ReplayEnd::Match) | None => match self.machine().shutdown() {
                Some(code) => format!("the guest ends here, with exit code {code}"),
                None => "the log ends here".into(),
            },
            Some(ReplayEnd::Diverged(mut divergence)) => {
                divergence.hart = self.machine().named_hart();
                format!("the replay diverges: {divergence}")
            }
            Some(ReplayEnd::Failed(error)) => format!("the replay can't go on: {error}"),
        })
    }

    /// Whether the replay has come to its end by a divergence.
    pub fn has_diverged(&mut self) -> bool {
        let outcome = self.emulator.replayer().and_then(|replayer| replayer.outcome());
        matches!(outcome, Some(ReplayEnd::Diverged(_)))
    }

    /// Arrives at `icount`.
    pub fn goto(&mut self, icount: u64) -> Result<Stop, String> {
        let here = self.icount();
        let is_ahead = here < icount || (here == icount && !self.is_settled);
        let nearest = self.nearest(icount);
        let is_nearer = nearest.is_some_and(|(position, _)| position.icount > here);
        if !is_ahead || is_nearer {
            self.restore(nearest)?;
        }
        self.advance(icount, &mut || false)
    }

    /// Lets the log's events of this icount happen, up to the next instruction.
    pub fn settle(&mut self) {
        if self.is_settled || self.emulator.has_ended() {
            return;
        }
        let next = self.icount() + 1;
        self.look(Search::Here);
        drive(&mut self.emulator, next);
        self.stop_looking();
        self.is_settled = true;
    }

    /// Goes forward to `to`, to the first breakpoint behind here, or before the first access
    /// to what is watched, from here on. Ends settled.
    ///
    /// An access stops a run as often as one begins at it: who has seen it goes one
    /// instruction without that watchpoint.
    pub fn run_forward(&mut self, to: u64, is_interrupted: &mut dyn FnMut() -> bool) -> Result<Stop, String> {
        if !self.points.is_empty() {
            self.look(Search::First(self.icount()));
        }
        let stop = self.advance(to, is_interrupted);
        self.stop_looking();
        self.settle();
        stop
    }

    /// Goes back to `to`, to the last breakpoint before here, or behind the last access to
    /// what is watched, up to here. Ends settled. The mirror of [`Session::run_forward`].
    pub fn run_backward(
        &mut self,
        to: u64,
        is_interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Stop, String> {
        // Nothing that was looked for lies at or behind `end`. Each look goes twice as far back
        // as the one before, since each costs a restore.
        let (mut end, mut window) = (self.icount(), 1);
        let mut stop = (to, Stop::There);
        while end > to && !self.points.is_empty() {
            let nearest = self.nearest(end.saturating_sub(window));
            let from = nearest.map_or(0, |(position, _)| position.icount).max(to);
            window = (end - from).saturating_mul(2);
            self.goto(from)?;
            self.look(Search::Last);
            let scanned = self.advance(end, is_interrupted);
            let found = self.stop_looking();
            if scanned? == Stop::Interrupted {
                stop = (end, Stop::Interrupted);
                break;
            }
            if let Some((at, found)) = found {
                stop = (at, Stop::Found(found));
                break;
            }
            end = from;
        }
        self.goto(stop.0)?;
        self.settle();
        Ok(stop.1)
    }

    /// The last snapshot at or before `icount`; without one, it is power-on.
    fn nearest(&self, icount: u64) -> Option<(Position, Hash)> {
        let behind = self.snapshots.partition_point(|(position, _)| position.icount <= icount);
        let own = behind.checked_sub(1).map(|at| self.snapshots[at]);
        own.max(self.memory.nearest(icount))
    }

    fn restore(&mut self, snapshot: Option<(Position, Hash)>) -> Result<(), String> {
        let from = snapshot.map_or_else(Position::default, |(position, _)| position);
        let mut emulator = self.origin.emulator(from)?;
        if let Some((_, root)) = snapshot {
            let found = emulator.restore(root, &mut self.memory.source(&mut *self.origin))?;
            if found != from {
                return Err(format!("the snapshot stands at {found}, not at {from}"));
            }
        }
        self.memory.restored(from.icount);
        self.emulator = emulator;
        self.is_settled = false;
        Ok(())
    }

    /// Runs on to `to`, or until a lookout holds it; snapshots are kept on the way.
    fn advance(&mut self, to: u64, is_interrupted: &mut dyn FnMut() -> bool) -> Result<Stop, String> {
        while self.icount() < to {
            if self.emulator.has_ended() {
                return Ok(Stop::End);
            }
            if is_interrupted() {
                return Ok(Stop::Interrupted);
            }
            let here = self.icount();
            let next = (here / self.spacing + 1).saturating_mul(self.spacing);
            drive(&mut self.emulator, next.min(to));
            let machine = self.emulator.machine_mut();
            machine.take_console();
            machine.take_submitted();
            machine.take_frames();
            let is_held = machine.is_held();
            self.is_settled = is_held || machine.icount() == here;
            if is_held {
                let found = machine.lookout.as_ref().and_then(|lookout| lookout.found());
                return Ok(found.map_or(Stop::There, |(_, found)| Stop::Found(found)));
            }
            if self.icount() == next && !self.emulator.has_ended() {
                self.keep()?;
            }
        }
        Ok(Stop::There)
    }

    /// Keeps the state now, unless the recording or the memory has it.
    fn keep(&mut self) -> Result<(), String> {
        let icount = self.icount();
        let is_own = self.snapshots.iter().any(|(position, _)| position.icount == icount);
        if is_own || self.memory.has(icount) {
            return Ok(());
        }
        let snapshot = self.emulator.snapshot();
        self.memory.keep(snapshot, &mut *self.origin)
    }

    fn look(&mut self, search: Search) {
        let Points { breakpoints, watchpoints, only } = &self.points;
        let breakpoints = breakpoints.iter().copied().collect();
        let lookout = Lookout::new(search, breakpoints, watchpoints.clone(), *only);
        self.emulator.machine_mut().lookout = Some(Box::new(lookout));
    }

    /// Ends the search; what it has noted, with the icount to stop at.
    fn stop_looking(&mut self) -> Option<(u64, Found)> {
        let lookout = self.emulator.machine_mut().lookout.take();
        lookout.and_then(|lookout| lookout.found())
    }
}

/// Replays up to icount `to`, in one thread, roles taking turns, or until a lookout holds the
/// vCPU. A budget never changes what happens, so this may be an instruction at a time.
fn drive(emulator: &mut Emulator, to: u64) {
    while !emulator.has_ended() && emulator.machine().icount() < to && !emulator.machine().is_held() {
        let run = to - emulator.machine().icount();
        let step = role::enter(Role::Vcpu, || emulator.replay_vcpu(run));
        if step == Step::Wait {
            role::enter(Role::Iothread, || emulator.replay_iothread());
        }
    }
}
