//! Several harts on one thread: they have turns, one after the other by their numbers.
//!
//! ```text
//! hart 0  ########............########    # executes   . waits for its turn
//! hart 1  ........########    ........      waits in WFI
//! hart 2  ................####               (or said `pause`)
//! icount  0      20k     40k 50k          counts what all of them have executed
//! ```
//! The hart whose turn it is is the machine's `hart`. The others are parked here, each with
//! what is derived from it, so that a turn begins with what the hart's last one has learnt.
//!
//! - A turn passes when another instruction is about to run, and never at a run's end: a run
//!   leaves a turn that is over as it is. So where runs are cut changes nothing.
//! - Where every hart waits nothing passes, since nobody may ever look there.
//! - With one hart there are no turns.

use super::Machine;
use super::fast::FastTlb;
use super::hart::Hart;
use super::pmp::Regions;
use super::run::NO_PAGE;
use heddle_proto::manifest;
use serde::{Deserialize, Serialize};

/// Most harts.
const HARTS_MAX: usize = manifest::HARTS_MAX as usize;

/// Instructions of a turn, 160 us at the usual shift. Long enough that what a turn costs, a
/// fraction of a microsecond and some cold lines of the host's cache, is lost in it; short
/// enough that a hart which spins for another, or waits for the answer to its IPI, gets it
/// while a guest's own tick, of milliseconds, lasts.
pub(crate) const QUANTUM: u64 = 20_000;

/// A hart that waits for its turn, with what is derived from it.
struct Parked {
    hart: Hart,
    fast: FastTlb,
    regions: Regions,
}

/// The harts whose turn it is not, and the one whose it is.
pub(super) struct Harts {
    /// By number; there is none for the current one.
    parked: Vec<Option<Box<Parked>>>,
    current: usize,
    /// The icount at which the current one's turn is over.
    turn_end: u64,
}

/// Whose turn it is, and up to which icount: state, where there are several harts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Turn {
    hart: usize,
    end: u64,
}

impl Harts {
    /// One hart, whose turn never ends.
    pub(super) fn one() -> Harts {
        Harts { parked: vec![None], current: 0, turn_end: u64::MAX }
    }

    /// See [`Harts::turn_end`]: no run goes on past it without a look at whose turn is next.
    #[inline(always)]
    pub(super) fn turn_end(&self) -> u64 {
        self.turn_end
    }
}

impl Machine {
    /// Adds a hart, which gets the next number. Before the first instruction.
    pub fn add_hart(&mut self, hart: Hart) {
        assert!(self.hart_count() < HARTS_MAX, "the manifest bounds the harts");
        let regions = Regions::of(&hart.pmp);
        self.harts.parked.push(Some(Box::new(Parked { hart, fast: FastTlb::new(), regions })));
        self.harts.turn_end = self.icount + QUANTUM;
        self.clint.add_hart();
        self.plic.add_hart();
        self.carry_lines();
    }

    /// How many harts there are.
    pub fn hart_count(&self) -> usize {
        self.harts.parked.len()
    }

    /// Whose turn it is: the number of [`Machine::hart`].
    pub fn current_hart(&self) -> usize {
        self.harts.current
    }

    /// The same for reports, which name a hart only where there are several.
    pub fn named_hart(&self) -> Option<u32> {
        (self.hart_count() > 1).then_some(self.harts.current as u32)
    }

    /// A hart by its number.
    pub fn hart_at(&self, number: usize) -> Option<&Hart> {
        self.hart_and_regions(number).map(|(hart, _)| hart)
    }

    /// A hart by its number, and what its PMP's entries come to.
    pub(super) fn hart_and_regions(&self, number: usize) -> Option<(&Hart, &Regions)> {
        match self.harts.parked.get(number)? {
            Some(parked) => Some((&parked.hart, &parked.regions)),
            None => Some((&self.hart, &self.regions)),
        }
    }

    /// A hart by its number, to put state in.
    pub fn hart_at_mut(&mut self, number: usize) -> Option<&mut Hart> {
        match self.harts.parked.get_mut(number)? {
            Some(parked) => Some(&mut parked.hart),
            None => Some(&mut self.hart),
        }
    }

    /// All harts, by number.
    pub fn all_harts(&self) -> impl Iterator<Item = &Hart> {
        self.harts.parked.iter().map(move |parked| match parked {
            Some(parked) => &parked.hart,
            None => &self.hart,
        })
    }

    /// Passes the turn, if it is over or the hart waits, to the next hart that does not wait.
    /// Only when nothing ends the run here any more but that all of them wait: then nothing
    /// may change.
    pub(super) fn pass_turn(&mut self) {
        let waits = self.hart.is_waiting();
        if self.icount < self.harts.turn_end && !waits {
            return;
        }
        match self.next_hart() {
            Some(next) => {
                // What the others do meanwhile to the place reserved is not watched.
                self.hart.reservation = None;
                self.make_current(next);
            }
            None if waits => return,
            None => {}
        }
        self.harts.turn_end = self.icount.saturating_add(QUANTUM);
    }

    /// The next hart that has something to execute, by turns; not the current one.
    fn next_hart(&self) -> Option<usize> {
        let (count, current) = (self.hart_count(), self.harts.current);
        let has_work = |number: &usize| self.hart_at(*number).is_some_and(|hart| !hart.is_waiting());
        (1..count).map(|ahead| (current + ahead) % count).find(has_work)
    }

    /// Parks the current hart, and puts this one in its place.
    fn make_current(&mut self, number: usize) {
        let Some(mut next) = self.harts.parked.get_mut(number).and_then(Option::take) else { return };
        std::mem::swap(&mut self.hart, &mut next.hart);
        std::mem::swap(&mut self.fast, &mut next.fast);
        std::mem::swap(&mut self.regions, &mut next.regions);
        let before = std::mem::replace(&mut self.harts.current, number);
        self.harts.parked[before] = Some(next);
        // The page being executed was the other's.
        self.here = NO_PAGE;
        // Nobody has told the parked one which pages ceased to take any store.
        self.fast.forget_stores();
        self.update_paging();
    }

    /// `pause`: what the hart waits for, another may do now. Its turn is over behind this
    /// instruction.
    pub(super) fn end_turn(&mut self) {
        if self.hart_count() > 1 {
            self.harts.turn_end = self.icount + 1;
            self.attention = true;
        }
    }

    /// State of parked harts was put in from outside: what is derived from it is made anew.
    pub(super) fn refresh_parked(&mut self) {
        for parked in self.harts.parked.iter_mut().flatten() {
            parked.regions = Regions::of(&parked.hart.pmp);
            parked.fast.forget();
        }
    }

    /// The turn, where there are several harts.
    pub(crate) fn turn(&self) -> Option<Turn> {
        let Harts { current, turn_end, .. } = self.harts;
        (self.hart_count() > 1).then_some(Turn { hart: current, end: turn_end })
    }

    /// Puts a turn in that comes from outside, and may be none of this machine's. Behind its
    /// icount and its harts.
    pub(crate) fn set_turn(&mut self, turn: Turn) -> Result<(), String> {
        let Turn { hart, end } = turn;
        let left = end.checked_sub(self.icount);
        if hart >= self.hart_count() || left.is_none_or(|left| left > QUANTUM) {
            let (count, icount) = (self.hart_count(), self.icount);
            return Err(format!(
                "a turn of hart {hart} up to icount {end} is none of {count} harts' at icount {icount}"
            ));
        }
        self.make_current(hart);
        self.harts.turn_end = end;
        Ok(())
    }
}
