//! What gdb is told of several harts: all that they meet, but nothing of another one's while
//! one goes alone.
#![allow(clippy::unwrap_used)]

use super::target::{Debuggee, Order};
use super::threads::thread;
use gdbstub::common::Signal;
use gdbstub::stub::MultiThreadStopReason as Reason;
use gdbstub::target::ext::base::multithread::{
    MultiThreadResume, MultiThreadSchedulerLocking, MultiThreadSingleStep,
};
use gdbstub::target::ext::breakpoints::{HwBreakpoint, HwWatchpoint, SwBreakpoint, WatchKind};
use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{Event, Hash, Position};
use heddle_replay_engine::debugger::{Origin, Session};
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Machine, RAM_BASE};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::{AsyncQueue, Build, Emulator, LogEnd, Replayer, schedule};

const HARTS: usize = 3;
const PAUSE: u64 = RAM_BASE + 4;
const LOAD: u64 = RAM_BASE + 8;
const ADD: u64 = RAM_BASE + 0xc;
/// The word that all harts load.
const WORD: u64 = RAM_BASE + 0x1000;

/// Three harts with turns of four instructions. They execute, by icount:
///
/// ```text
/// hart 0  0 csrr  1 pause                   6 load  7 add  8 bne  9 pause
/// hart 1  2 csrr  3 pause                  10 load 11 add 12 bne 13 pause
/// hart 2  4 csrr  5 pause                  14 load 15 add 16 bne 17 pause  and so on
/// ```
const CODE: [u32; 8] = [
    0xf140_2573, //  0  csrr a0, mhartid
    0x0100_000f, //  4  pause
    0x0004_2383, //  8  lw t2, 0(s0)
    0x0012_8293, //  c  addi t0, t0, 1
    0xfe92_9ae3, // 10  bne t0, s1, 0x4
    0x0005_1063, // 14  bnez a0, 0x14
    0x0129_a023, // 18  sw s2, 0(s3)
    0x0000_006f, // 1c  j 0x1c
];

fn machine() -> Machine {
    let mut ram = Ram::new(1 << 20);
    let bytes: Vec<u8> = CODE.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &bytes).unwrap();
    let hart = || {
        let mut hart = Hart::new(RAM_BASE);
        // s0, s1: the word, and how often; s2, s3: what switches off, and where.
        for (register, value) in [(8, WORD), (9, 50), (18, 0x5555), (19, 0x10_0000)] {
            hart.x[register] = value;
        }
        hart
    };
    let mut machine = Machine::new(ram, hart(), 3, vec![]);
    (1..HARTS).for_each(|_| machine.add_hart(hart()));
    machine
}

fn positions() -> Positions {
    Positions { check_every: 10_000, digest_every: 50_000, snapshot_every: 0, snapshots_at: vec![] }
}

/// A recording in memory, without snapshots.
struct Recorded(Vec<Event>);

impl BlockSource for Recorded {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        Err(format!("there are no blocks, and {} are wanted", hashes.len()))
    }
}

impl Origin for Recorded {
    fn emulator(&mut self, from: Position) -> Result<Emulator, String> {
        let events = self.0[from.event as usize..].to_vec();
        let replayer = Replayer::new(Box::new(events.into_iter()), from, LogEnd::Complete);
        Ok(Emulator::replay(machine(), replayer, positions(), Sleep::On, Build::default()))
    }

    fn snapshots(&self) -> Vec<(Position, Hash)> {
        vec![]
    }
}

/// A debuggee that stands at an icount.
fn debuggee(at: u64) -> Debuggee {
    let queue = AsyncQueue::default();
    let mut emulator = Emulator::record(machine(), positions(), Sleep::On, queue.clone());
    let events = schedule::record(&mut emulator, &queue, 1, vec![], 1_000_000);
    assert!(emulator.has_ended(), "the guest did not end");
    let mut session = Session::new(Box::new(Recorded(events))).unwrap();
    session.goto(at).unwrap();
    session.settle();
    Debuggee::new(session)
}

impl Debuggee {
    fn breaks_at(&mut self, address: u64) {
        assert!(self.add_sw_breakpoint(address, 4).is_ok());
    }

    fn breaks_no_more_at(&mut self, address: u64) {
        assert!(self.remove_sw_breakpoint(address, 4).is_ok());
    }

    /// Goes, and is told something: where, and what.
    fn heard(&mut self) -> (u64, Reason<u64>) {
        let reason = self.go(&mut || false).unwrap().unwrap();
        (self.session.icount(), reason)
    }

    /// `vCont;c`.
    fn continued(&mut self) -> (u64, Reason<u64>) {
        self.clear_resume_actions().unwrap();
        self.heard()
    }

    /// `vCont;c:THREAD`.
    fn continued_alone(&mut self, hart: usize) -> (u64, Reason<u64>) {
        self.clear_resume_actions().unwrap();
        self.set_resume_action_continue(thread(hart), None).unwrap();
        self.set_resume_action_scheduler_lock().unwrap();
        self.heard()
    }

    /// `vCont;s:THREAD`, and `;c` if the others go, too.
    fn stepped(&mut self, hart: usize, is_alone: bool) -> (u64, Reason<u64>) {
        self.clear_resume_actions().unwrap();
        self.set_resume_action_step(thread(hart), None).unwrap();
        if is_alone {
            self.set_resume_action_scheduler_lock().unwrap();
        }
        self.heard()
    }
}

/// A breakpoint that this hart is at.
fn at_breakpoint(hart: usize) -> Reason<u64> {
    Reason::SwBreak(thread(hart))
}

/// This hart is about to load the word that is watched.
fn at_load(hart: usize) -> Reason<u64> {
    Reason::Watch { tid: thread(hart), kind: WatchKind::Read, addr: WORD }
}

fn done(hart: usize) -> Reason<u64> {
    Reason::SignalWithThread { tid: thread(hart), signal: Signal::SIGTRAP }
}

#[test]
fn who_is_stepped_over_a_breakpoint_takes_no_other_past_it() {
    let mut debuggee = debuggee(0);
    debuggee.breaks_at(PAUSE);
    // Every pause, in the order in which they are executed.
    for (n, icount) in [1, 3, 5, 9, 13, 17, 21].into_iter().enumerate() {
        let hart = n % HARTS;
        assert_eq!(debuggee.continued(), (icount, at_breakpoint(hart)));
        // As gdb does it: without this breakpoint, with one at the next instruction.
        debuggee.breaks_no_more_at(PAUSE);
        debuggee.breaks_at(LOAD);
        assert_eq!(debuggee.continued_alone(hart), (icount + 1, at_breakpoint(hart)));
        debuggee.breaks_no_more_at(LOAD);
        debuggee.breaks_at(PAUSE);
    }
}

#[test]
fn a_breakpoint_where_another_ended_is_told_with_the_next_order() {
    let mut debuggee = debuggee(9);
    debuggee.breaks_at(LOAD);
    // Behind its pause hart 0 is at the breakpoint; it is hart 1's turn, which is there, too.
    assert_eq!(debuggee.stepped(0, true), (10, done(0)));
    assert_eq!(debuggee.continued(), (10, at_breakpoint(1)));
    assert_eq!(debuggee.continued(), (14, at_breakpoint(2)));
    assert!(debuggee.remove_sw_breakpoint(LOAD, 4).is_ok());
    assert!(debuggee.add_hw_breakpoint(LOAD, 4).is_ok());
    assert_eq!(debuggee.continued(), (18, Reason::HwBreak(thread(0))));
}

#[test]
fn while_one_goes_alone_nothing_is_told_of_the_others() {
    let mut debuggee = debuggee(6);
    assert!(debuggee.add_hw_watchpoint(WORD, 4, WatchKind::Read).is_ok());
    debuggee.breaks_at(ADD);
    // Its own load is told, not those of harts 0 and 1 before it, nor their breakpoints.
    assert_eq!(debuggee.continued_alone(2), (14, at_load(2)));
    assert_eq!(debuggee.stepped(2, true), (14, at_load(2)));
    assert!(debuggee.remove_hw_watchpoint(WORD, 4, WatchKind::Read).is_ok());
    assert_eq!(debuggee.continued_alone(2), (15, at_breakpoint(2)));
    // Then again of all of them.
    assert!(debuggee.add_hw_watchpoint(WORD, 4, WatchKind::Read).is_ok());
    assert_eq!(debuggee.continued(), (18, at_load(0)));
    // Alone, and with nothing to stop at, it goes to the end, which is told as its own.
    debuggee.forget_points();
    let (_, reason) = debuggee.continued_alone(2);
    assert!(matches!(reason, Reason::ReplayLog { tid: Some(tid), .. } if tid == thread(2)), "{reason:?}");
}

#[test]
fn who_is_stepped_lets_the_others_meet_their_breakpoints() {
    let mut debuggee = debuggee(6);
    debuggee.breaks_at(ADD);
    assert_eq!(debuggee.stepped(2, false), (7, at_breakpoint(0)));
    assert_eq!(debuggee.stepped(2, false), (11, at_breakpoint(1)));
    assert_eq!(debuggee.stepped(2, false), (15, done(2)));
    // Alone it is not held up by them. The step ends at one of its own.
    let mut debuggee = self::debuggee(6);
    debuggee.breaks_at(ADD);
    assert_eq!(debuggee.stepped(2, true), (15, done(2)));
    // Backwards nobody is alone.
    debuggee.order = Order::ReverseContinue;
    assert_eq!(debuggee.heard(), (11, at_breakpoint(1)));
}

#[test]
fn an_interruption_is_told_of_the_one_that_goes_alone() {
    for (is_alone, hart) in [(false, 0), (true, 2)] {
        let mut debuggee = debuggee(6);
        debuggee.clear_resume_actions().unwrap();
        if is_alone {
            debuggee.set_resume_action_continue(thread(2), None).unwrap();
            debuggee.set_resume_action_scheduler_lock().unwrap();
        }
        assert_eq!(debuggee.go(&mut || true), Ok(None));
        let interrupted = Reason::SignalWithThread { tid: thread(hart), signal: Signal::SIGINT };
        assert_eq!(debuggee.interrupted(), interrupted);
    }
}
