//! The supervisor's own timer: `stimecmp`.

use super::{Machine, Nobody, RAM_BASE, csr, machine, step};
use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{Hash, Position};
use heddle_replay_engine::machine::Exit;
use heddle_replay_engine::machine::hart::{Mode, envcfg, irq, status};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::{AsyncQueue, Build, Emulator, LogEnd, Replayer, schedule};
use std::collections::HashMap;

const STIMECMP: u32 = 0x14d;
const CYCLE: u32 = 0xc00;
const MIP: u32 = 0x344;
/// j .
const STAY: u32 = 0x6f;
const NOP: u32 = 0x13;
const SUPERVISOR_TIMER: u64 = 1 << 63 | 5;
/// Where the handler of the timer is: the fifth of a vector that is so far into the code.
const VECTOR: u64 = 64;

/// In S with the timer's interrupt delegated and enabled: sets the timer for tick `due` and
/// stays. The handler reads the cycles to x5 and switches off.
fn waiting(due: u64, shift: u32) -> Machine {
    let switch_off = 11 << 20 | 10 << 15 | 2 << 12 | 0x23;
    let mut code = vec![NOP; VECTOR as usize / 4 + 5];
    code[..2].copy_from_slice(&[csr(1, STIMECMP, 1, 0), STAY]);
    code.extend([csr(2, CYCLE, 0, 5), switch_off, STAY]);
    let mut m = machine(&code, &[(1, due), (10, 0x10_0000), (11, 0x5555)]);
    let hart = m.hart_mut();
    hart.mode = Mode::Supervisor;
    hart.stvec = (RAM_BASE + VECTOR) | 1;
    (hart.mideleg, hart.mie) = (irq::SUPERVISOR, irq::STI);
    hart.mstatus |= status::SIE;
    (hart.menvcfg, hart.mcounteren) = (envcfg::STCE, 7);
    Machine::new(m.ram().clone(), m.hart().clone(), shift, vec![])
}

fn run_to(m: &mut Machine, icount: u64) {
    while m.run(icount, &mut Nobody) == Exit::Work {}
    assert_eq!(m.icount(), icount);
}

#[test]
fn the_interrupt_is_pending_so_many_ticks_behind_the_write() {
    // Behind which 1 ns had passed, of no tick.
    let mut m = waiting(50, 0);
    for (icount, is_pending) in [(1, false), (5000, false), (5001, true)] {
        run_to(&mut m, icount);
        m.run_virtual_timers();
        assert_eq!(m.hart().mip() & irq::STI != 0, is_pending, "at {icount}");
        assert_eq!(m.hart().pc, RAM_BASE + 4);
    }
    step(&mut m);
    let hart = m.hart();
    assert_eq!((hart.mode, hart.scause, hart.sepc), (Mode::Supervisor, SUPERVISOR_TIMER, RAM_BASE + 4));
    assert_eq!((hart.x[5], hart.pc), (5001, RAM_BASE + VECTOR + 5 * 4 + 4));
    // One that is over is pending at once; without STCE there is none.
    let mut m = waiting(0, 0);
    step(&mut m);
    step(&mut m);
    assert_eq!((m.hart().scause, m.hart().sepc, m.hart().x[5]), (SUPERVISOR_TIMER, RAM_BASE + 4, 1));
    let mut m = waiting(0, 0);
    (m.hart_mut().mode, m.hart_mut().menvcfg) = (Mode::Machine, 0);
    step(&mut m);
    step(&mut m);
    m.run_virtual_timers();
    assert_eq!((m.hart().mip() & irq::STI, m.hart().pc), (0, RAM_BASE + 4));
}

#[test]
fn software_has_the_pending_bit_only_while_the_timer_has_not() {
    let code = [
        csr(1, MIP, 1, 0),
        csr(2, MIP, 0, 5),
        csr(1, 0x30a, 2, 0),
        csr(2, MIP, 0, 6),
        csr(1, MIP, 0, 0),
        csr(1, STIMECMP, 0, 0),
        csr(2, MIP, 0, 7),
        csr(1, 0x30a, 0, 0),
        csr(2, MIP, 0, 8),
    ];
    let mut m = machine(&code, &[(1, irq::STI), (2, envcfg::STCE)]);
    code.iter().for_each(|_| step(&mut m));
    // The CLINT's time has come since the reset.
    let expected = [irq::STI, 0, irq::STI, irq::STI].map(|bits| bits | irq::MTI);
    assert_eq!(m.hart().x[5..9], expected);
}

#[test]
fn time_set_to_its_end_is_no_deadline_of_who_has_no_timer() {
    // sd x1, 0(x2)
    let store = 1 << 20 | 2 << 15 | 3 << 12 | 0x23;
    for (stce, pending) in [(0, irq::MTI), (envcfg::STCE, irq::MTI | irq::STI)] {
        // stimecmp is all ones, as after reset.
        let mut m = machine(&[csr(1, 0x30a, 3, 0), store, NOP], &[(1, u64::MAX), (2, 0x200_bff8), (3, stce)]);
        step(&mut m);
        step(&mut m);
        m.run_virtual_timers();
        assert_eq!(m.hart().mip(), pending, "{stce:#x}");
    }
}

struct Blocks(HashMap<Hash, Vec<u8>>);

impl BlockSource for Blocks {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        hashes.iter().map(|hash| self.0.get(hash).cloned().ok_or(format!("no block {hash}"))).collect()
    }
}

#[test]
fn every_recording_and_replay_has_it_at_the_same_icount() {
    let positions =
        || Positions { check_every: 10_000, digest_every: 50_000, snapshot_every: 0, snapshots_at: vec![] };
    for seed in 0..20 {
        let queue = AsyncQueue::default();
        let mut emulator = Emulator::record(waiting(5001, 3), positions(), Sleep::On, queue.clone());
        let events = schedule::record(&mut emulator, &queue, seed, vec![], 1_000_000);
        assert!(emulator.has_ended(), "seed {seed}: the guest did not end");
        // 500,100 ns are 62,512.5 instructions of 8 ns, behind the first.
        assert_eq!(emulator.machine().hart().x[5], 62_514, "seed {seed}");
        let digest = emulator.digest();

        let replay = |from: Position| {
            let events: Vec<_> = events[from.event as usize..].to_vec();
            let replayer = Replayer::new(Box::new(events.into_iter()), from, LogEnd::Complete);
            Emulator::replay(waiting(5001, 3), replayer, positions(), Sleep::On, Build::default())
        };
        let mut whole = replay(Position::default());
        assert!(schedule::advance(&mut whole, 30_000));
        let snapshot = whole.snapshot();
        schedule::replay(&mut whole, seed + 1);
        let mut blocks = Blocks(snapshot.blocks.into_iter().collect());
        let mut part = replay(snapshot.position);
        assert_eq!(part.restore(snapshot.root, &mut blocks).unwrap(), snapshot.position);
        schedule::replay(&mut part, seed + 2);
        for emulator in [&mut whole, &mut part] {
            let verdict = emulator.verdict().unwrap();
            assert!(verdict.is_match(), "seed {seed}: {:?}", verdict.outcome);
            assert_eq!(verdict.digest, Some(digest), "seed {seed}");
        }
    }
}
