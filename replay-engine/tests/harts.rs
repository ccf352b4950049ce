//! Several harts: their turns, what wakes them, and what is each one's own.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "harts/guest.rs"]
mod guest;
#[path = "harts/recorded.rs"]
mod recorded;

use guest::{BY_AMO, BY_LR, DONE, IPIS, weaving};
use heddle_proto::{AsyncEvent, Hash};
use heddle_replay_engine::Snapshot;
use heddle_replay_engine::bare::{Bare, Pause};
use heddle_replay_engine::checks::Checks;
use heddle_replay_engine::machine::hart::{Hart, Mode, envcfg, irq, status};
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Exit, Machine, Nobody, RAM_BASE};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::schedule::Seeded;
use heddle_replay_engine::state::{Rest, StateTree};
use heddle_replay_engine::warp::Warp;
use std::collections::HashMap;

const RAM_BYTES: usize = 2 << 20;
/// Instructions of a turn.
const QUANTUM: u64 = 20_000;
const NOP: u32 = 0x13;
const WFI: u32 = 0x1050_0073;
const PAUSE: u32 = 0x0100_000f;
/// j .-4
const BACK: u32 = 0xffdf_f06f;

/// Harts that all begin at the code's first word, each with these registers; no mode is denied
/// any memory.
fn machine(code: &[u32], harts: usize, registers: &[(usize, u64)], shift: u32) -> Machine {
    let mut ram = Ram::new(RAM_BYTES);
    let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &bytes).unwrap();
    let hart = || {
        let mut hart = Hart::new(RAM_BASE);
        hart.pmp.set_address(15, u64::MAX);
        hart.pmp.set_configs(8, 0x1f << 56);
        for (register, value) in registers {
            hart.x[*register] = *value;
        }
        hart
    };
    let mut machine = Machine::new(ram, hart(), shift, vec![]);
    (1..harts).for_each(|_| machine.add_hart(hart()));
    assert_eq!(machine.hart_count(), harts);
    machine
}

fn run_to(machine: &mut Machine, icount: u64) -> Exit {
    loop {
        match machine.run(icount, &mut Nobody) {
            Exit::Work => {}
            exit => return exit,
        }
    }
}

fn rest() -> Rest {
    Rest { warp: Warp::default(), is_started: true }
}

fn digest(machine: &mut Machine) -> Hash {
    let mut tree = StateTree::new(machine);
    tree.digest(machine, &rest())
}

/// The guest's end: its icount and digest.
fn end_of(machine: Machine) -> (u64, Hash) {
    let mut guest = Bare::new(machine, 0);
    assert_eq!(guest.run(u64::MAX), Pause::Off);
    (guest.machine().icount(), digest(guest.machine_mut()))
}

#[test]
fn a_turn_is_so_many_instructions_and_passes_only_when_another_runs() {
    let mut m = machine(&[NOP, BACK], 3, &[], 0);
    let mut current = vec![];
    for icount in [1, QUANTUM, QUANTUM + 1, 2 * QUANTUM, 2 * QUANTUM + 1, 3 * QUANTUM + 1] {
        assert_eq!(run_to(&mut m, icount), Exit::Budget);
        assert_eq!((m.icount(), m.named_hart()), (icount, Some(m.current_hart() as u32)));
        current.push(m.current_hart());
    }
    assert_eq!(current, [0, 0, 1, 1, 2, 0]);
    // One that is alone has no turns.
    let mut m = machine(&[PAUSE, BACK], 1, &[], 0);
    run_to(&mut m, 3 * QUANTUM);
    assert_eq!((m.current_hart(), m.named_hart()), (0, None));
}

#[test]
fn a_pause_ends_the_turn_behind_it() {
    let mut m = machine(&[PAUSE, BACK], 3, &[], 0);
    let mut executed = vec![];
    for icount in 1..=11 {
        run_to(&mut m, icount);
        executed.push(m.current_hart());
    }
    assert_eq!(executed, [0, 1, 2, 0, 0, 1, 1, 2, 2, 0, 0]);
}

#[test]
fn the_turn_passes_from_who_waits_and_the_machine_is_idle_when_all_do() {
    let mut m = machine(&[NOP, WFI, BACK], 3, &[], 0);
    assert_eq!(run_to(&mut m, 2), Exit::Budget);
    assert!(!m.is_idle() && m.current_hart() == 0);
    assert_eq!(run_to(&mut m, 100), Exit::Idle);
    assert!(m.is_idle() && m.icount() == 6 && m.current_hart() == 2);
    let before = digest(&mut m);
    assert_eq!(run_to(&mut m, 100), Exit::Idle);
    assert_eq!(digest(&mut m), before, "where all wait, a look changes nothing");
    // One of them is woken; it has but a jump and the next WFI to execute.
    m.hart_at_mut(1).unwrap().mie = irq::SSI;
    m.hart_at_mut(1).unwrap().mip_soft = irq::SSI;
    assert!(!m.is_idle());
    assert_eq!(run_to(&mut m, 7), Exit::Budget);
    assert_eq!((m.current_hart(), m.hart().pc), (1, RAM_BASE + 4));
}

#[test]
fn each_hart_has_its_number_and_counters_count_all() {
    // csrr x5, mhartid; csrr x6, mcycle; csrr x7, minstret; pause; j .
    let code = [0xf140_22f3, 0xb000_2373, 0xb020_23f3, PAUSE, 0x6f];
    let mut m = machine(&code, 8, &[], 0);
    run_to(&mut m, 32);
    for (number, hart) in m.all_harts().enumerate() {
        let icount = 4 * number as u64;
        assert_eq!(hart.x[5..8], [number as u64, icount + 1, icount + 2]);
    }
    assert!(m.hart_at(7).is_some() && m.hart_at(8).is_none());
}

#[test]
fn harts_that_wake_each_other_count_exactly() {
    for (harts, rounds, counts) in [(1, 4, 3000), (2, 6, 10_000), (3, 4, 30_000), (8, 3, 12_345)] {
        let mut guest = Bare::new(weaving(harts, rounds, counts), 0);
        assert_eq!(guest.run(100_000_000), Pause::Off, "{harts} harts");
        let word = |at: u64| guest.machine().ram().load::<8>(at).unwrap();
        let sum = harts as u64 * rounds * counts;
        assert_eq!((word(BY_AMO), word(BY_LR)), (sum, sum), "{harts} harts");
        assert_eq!(word(DONE), harts as u64);
        assert!(word(IPIS) > 0, "{harts} harts");
    }
}

#[test]
fn where_runs_are_cut_changes_nothing() {
    for seed in 0..8 {
        let mut rng = Seeded::new(seed);
        let make = || weaving(2 + seed as usize % 4, 3, 4000);
        let (end, last) = end_of(make());
        let (mut whole, mut cut) = (Bare::new(make(), 0), Bare::new(make(), 0));
        let mut places: Vec<u64> = (0..16).map(|_| 1 + rng.below(end - 1)).collect();
        // Where turns end, and beside that.
        places.extend([QUANTUM - 1, QUANTUM, QUANTUM + 1]);
        places.sort_unstable();
        for at in places {
            assert_eq!(whole.run(at), Pause::Budget);
            while cut.machine().icount() < at {
                let scale = rng.below(16);
                let next = cut.machine().icount() + 1 + rng.below(1 << scale);
                cut.run(next.min(at));
            }
            assert_eq!(cut.machine().current_hart(), whole.machine().current_hart(), "seed {seed} at {at}");
            assert_eq!(digest(cut.machine_mut()), digest(whole.machine_mut()), "seed {seed} at {at}");
        }
        for guest in [&mut whole, &mut cut] {
            assert_eq!(guest.run(u64::MAX), Pause::Off);
            assert_eq!((guest.machine().icount(), digest(guest.machine_mut())), (end, last), "seed {seed}");
        }
    }
}

/// Blocks of snapshots, by hash.
#[derive(Clone, Default)]
struct Blocks(HashMap<Hash, Vec<u8>>);

impl BlockSource for Blocks {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        hashes.iter().map(|hash| self.0.get(hash).cloned().ok_or(format!("no block {hash}"))).collect()
    }
}

/// A snapshot of `machine`, which was like `loaded`.
fn snapshot(machine: &mut Machine, mut loaded: Machine) -> (Snapshot, Blocks) {
    let mut tree = StateTree::new(&mut loaded);
    let snapshot = tree.snapshot(machine, &rest(), Checks::default(), 0);
    let blocks = Blocks(snapshot.blocks.iter().cloned().collect());
    (snapshot, blocks)
}

fn restore(machine: &mut Machine, root: Hash, blocks: &mut Blocks) -> Result<(), String> {
    StateTree::new(machine).restore(machine, root, blocks).map(drop)
}

#[test]
fn a_snapshot_in_mid_turn_goes_on_as_if_it_had_not_been() {
    for harts in [1, 2, 5] {
        let make = || weaving(harts, 2, 9000);
        let (end, last) = end_of(make());
        for part in 1..8 {
            let mut guest = Bare::new(make(), 0);
            guest.run(end * part / 8 + 17);
            let (snapshot, mut blocks) = snapshot(guest.machine_mut(), make());
            let mut restored = make();
            restore(&mut restored, snapshot.root, &mut blocks).unwrap();
            assert_eq!(restored.current_hart(), guest.machine().current_hart());
            assert_eq!(digest(&mut restored), digest(guest.machine_mut()));
            for mut guest in [guest, Bare::new(restored, 0)] {
                assert_eq!(guest.run(u64::MAX), Pause::Off);
                assert_eq!((guest.machine().icount(), digest(guest.machine_mut())), (end, last));
            }
        }
    }
}

#[test]
fn a_snapshot_of_other_harts_or_of_an_impossible_turn_is_refused() {
    let make = |harts| weaving(harts, 2, 9000);
    let mut guest = Bare::new(make(3), 0);
    guest.run(50_000);
    let (snapshot, mut blocks) = snapshot(guest.machine_mut(), make(3));
    restore(&mut make(3), snapshot.root, &mut blocks).unwrap();
    for harts in [1, 2, 4] {
        let error = restore(&mut make(harts), snapshot.root, &mut blocks).unwrap_err();
        assert_eq!(error, format!("harts of the snapshot: 3; of the manifest's machine: {harts}"));
    }
    // The leaf is the hart, in one byte, and the turn's end, in three, of seven bits each.
    let (_, root) = snapshot.blocks.last().unwrap();
    let leaf = root.windows(6).position(|bytes| bytes == b"\x04turn\x04").unwrap() + 6;
    for (byte, value) in [(0, 3), (0, 0x7f), (3, 0), (3, 0x7f)] {
        let mut changed = root.clone();
        changed[leaf + byte] = value;
        let hash = Hash::of(&changed);
        blocks.0.insert(hash, changed);
        let error = restore(&mut make(3), hash, &mut blocks).unwrap_err();
        assert!(error.starts_with("a turn of hart "), "{error}");
    }
}

/// Sets the hart's timer, CLINT's or `stimecmp`, for tick a1 and waits. The handler, at 0x20,
/// notes cause and time, and sets none.
fn timing(stimecmp: bool) -> Vec<u32> {
    let mut code = vec![
        0xf140_2573, //  0  csrr a0, mhartid
        0x0035_1293, //  4  slli t0, a0, 3
        0x0092_82b3, //  8  add t0, t0, s1
        0x00b2_b023, //  c  sd a1, 0(t0)
        0x3046_1073, // 10  csrw mie, a2
        0x3004_6073, // 14  csrsi mstatus, 8
        WFI,         // 18
        BACK,        // 1c
        0x3420_23f3, // 20  csrr t2, mcause
        0xc010_2e73, // 24  rdtime t3
        0x0045_1e93, // 28  slli t4, a0, 4
        0x008e_8eb3, // 2c  add t4, t4, s0
        0x007e_b023, // 30  sd t2, 0(t4)
        0x01ce_b423, // 34  sd t3, 8(t4)
        0xfff0_0f13, // 38  li t5, -1
        0x01e2_b023, // 3c  sd t5, 0(t0)
        0x3020_0073, // 40  mret
    ];
    if stimecmp {
        code[3] = 0x14d5_9073; // csrw stimecmp, a1
        code[15] = 0x14df_1073; // csrw stimecmp, t5
    }
    code
}

#[test]
fn each_timer_is_that_of_its_hart() {
    const TICKS: [u64; 4] = [7000, 3000, 9000, 5000];
    for (stimecmp, line) in [(false, irq::MTI), (true, irq::STI)] {
        let registers = [(8, RAM_BASE + 0x1000), (9, 0x200_4000), (12, line)];
        let mut m = machine(&timing(stimecmp), TICKS.len(), &registers, 0);
        for (number, tick) in TICKS.into_iter().enumerate() {
            let hart = m.hart_at_mut(number).unwrap();
            (hart.x[11], hart.mtvec, hart.menvcfg) = (tick, RAM_BASE + 0x20, envcfg::STCE);
        }
        let mut guest = Bare::new(m, 0);
        assert_eq!(guest.run(1_000_000), Pause::Stuck, "it waits, and no timer is set");
        let cause = 1 << 63 | u64::from(line.trailing_zeros());
        for (number, tick) in TICKS.into_iter().enumerate() {
            let word = |at: u64| guest.machine().ram().load::<8>(0x1000 + 16 * number as u64 + at);
            assert_eq!((word(0), word(8)), (Some(cause), Some(tick)), "hart {number}");
        }
    }
}

#[test]
fn a_device_interrupts_the_context_that_enables_it_and_no_other() {
    let code = [
        0x0020_a023, //  0  sw x2, 0(x1)
        0x0041_a023, //  4  sw x4, 0(x3)
        0x0062_8023, //  8  sb x6, 0(x5)
        WFI,         //  c
        BACK,        // 10
        0x0004_2383, // 14  lw t2, 0(s0)
        0x0074_a023, // 18  sw t2, 0(s1)
        0x0009_4e03, // 1c  lbu t3, 0(s2)
        0x0074_2023, // 20  sw t2, 0(s0)
        0x1020_0073, // 24  sret
    ];
    // The UART's priority, its bit of context 3, and its interrupt on received data; that
    // context's claim, memory, and the UART's data.
    let setup: [(usize, u64); 6] =
        [(1, 0xc00_0028), (2, 1), (3, 0xc00_2180), (4, 1 << 10), (5, 0x1000_0001), (6, 1)];
    let handler: [(usize, u64); 3] = [(8, 0xc20_3004), (9, RAM_BASE + 0x1000), (18, 0x1000_0000)];
    let mut m = machine(&code, 3, &[&setup[..], &handler[..]].concat(), 0);
    for number in 1..3 {
        let hart = m.hart_at_mut(number).unwrap();
        (hart.pc, hart.mie) = (RAM_BASE + 0xc, irq::ALL & !irq::MTI);
    }
    let hart = m.hart_at_mut(1).unwrap();
    (hart.mode, hart.stvec, hart.mideleg) = (Mode::Supervisor, RAM_BASE + 0x14, irq::SUPERVISOR);
    hart.mstatus |= status::SIE;
    assert_eq!(run_to(&mut m, 1000), Exit::Idle);
    assert!(m.run_async(&AsyncEvent::Char { data: b"x".to_vec() }));
    // But for the CLINT's time, which has come at reset.
    let pending = |m: &Machine| m.all_harts().map(|hart| hart.mip() & !irq::MTI).collect::<Vec<u64>>();
    assert_eq!(pending(&m), [0, irq::SEI, 0]);
    assert_eq!(run_to(&mut m, 1000), Exit::Idle);
    assert_eq!(m.ram().load::<4>(0x1000), Some(10), "it was claimed");
    assert_eq!(pending(&m), [0, 0, 0]);
    let causes: Vec<(u64, u64)> = m.all_harts().map(|hart| (hart.mcause, hart.scause)).collect();
    assert_eq!(causes, [(0, 0), (0, 1 << 63 | 9), (0, 0)]);
    assert_eq!(m.hart_at(1).unwrap().x[28], u64::from(b'x'));
}

/// Hart 0 stores a routine, one of two by turns, hart 1 calls it, and so on: what hart 0 has
/// learnt of the page is from before hart 1 executed it.
#[test]
fn code_that_another_hart_stores_again_runs_as_it_is() {
    let code = [
        0xf140_22f3, //  0  csrr x5, mhartid
        0x0002_9a63, //  4  bnez x5, 0x18
        0x0020_b023, //  8  sd x2, 0(x1)
        0x0031_4133, //  c  xor x2, x2, x3: the other routine
        PAUSE,       // 10
        0xff5f_f06f, // 14  j 0x8
        0x0000_100f, // 18  fence.i
        0x0000_8fe7, // 1c  jalr x31, 0(x1)
        0x0085_9593, // 20  slli x11, x11, 8
        0x00a5_e5b3, // 24  or x11, x11, x10
        PAUSE,       // 28
        0xfedf_f06f, // 2c  j 0x18
    ];
    // addi x10, x0, value; jalr x0, 0(x31)
    let routine = |value: u64| 0x000f_8067 << 32 | value << 20 | 0x513;
    let registers = [(1, RAM_BASE + 0x1000), (2, routine(1)), (3, routine(1) ^ routine(2))];
    let mut m = machine(&code, 2, &registers, 0);
    // The first turns are of 5 and 9 instructions, the others of 4 and 8.
    run_to(&mut m, 14 + 7 * 12);
    let hart = m.hart_at(1).unwrap();
    assert_eq!((hart.x[11], hart.mcause), (0x0102_0102_0102_0102, 0));
}
