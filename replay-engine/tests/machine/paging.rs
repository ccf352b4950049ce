//! What `sfence.vma` makes the TLB forget, and whose A and D are.

use super::{Machine, RAM_BASE, csr, i, machine, run, step};
use heddle_replay_engine::machine::hart::{Hart, Mode, envcfg};

const ROOT: u64 = 0x4000;
const MIDDLE: u64 = 0x5000;
const LEAF: u64 = 0x6000;
/// Two pages of 4 KiB, and two in one of 2 MiB.
const SMALL: [u64; 2] = [0x4000_0000, 0x4000_1000];
const LARGE: [u64; 2] = [0x4020_0000, 0x4020_1000];
const SFENCE_ALL: u32 = 0x1200_0073;
/// sfence.vma x1; sfence.vma x1, x2
const SFENCE: u32 = 0x1200_8073;
const SFENCE_OF_SPACE: u32 = 0x1220_8073;

fn pte(to: u64, bits: u64) -> u64 {
    (RAM_BASE + to) >> 12 << 10 | bits
}

/// In S: reads at x1 and x3, stores x7 at x6 and x9 at x8, fences, and reads again at x1 and x3
/// to x10 and x11. All of RAM is mapped to itself, too.
fn reads(fence: &[u32], registers: &[(usize, u64)]) -> [u64; 2] {
    let load = |rs1: u32, rd: u32| i(0, rs1, 3, rd, 0x03);
    let store = |rs2: u32, rs1: u32| rs2 << 20 | rs1 << 15 | 3 << 12 | 0x23;
    let mut code = vec![load(1, 10), load(3, 11), store(7, 6), store(9, 8)];
    code.extend(fence);
    code.extend([load(1, 10), load(3, 11)]);
    let mut m = machine(&code, registers);
    let mut ram = m.ram().clone();
    let memory = [
        (ROOT + 8, pte(MIDDLE, 1)),
        (ROOT + 16, pte(0, 0xcf)),
        (MIDDLE, pte(LEAF, 1)),
        (MIDDLE + 8, pte(0, 0xc7)),
        (LEAF, pte(0x7000, 0xc7)),
        (LEAF + 8, pte(0x8000, 0xc7)),
        (0x7000, 70),
        (0x8000, 80),
        (0x9000, 90),
        (0xa000, 100),
        // As large pages are read: offsets 0 and 0x1000 in the first one.
        (0x1000, 10),
    ];
    for (at, value) in memory {
        ram.write(at, &value.to_le_bytes()).unwrap();
    }
    m.hart_mut().mode = Mode::Supervisor;
    m.hart_mut().satp = 8 << 60 | (RAM_BASE + ROOT) >> 12;
    let mut m = Machine::new(ram, m.hart().clone(), 0, vec![]);
    run(&mut m, code.len() as u64);
    assert_eq!(m.hart().mcause, 0);
    [m.hart().x[10], m.hart().x[11]]
}

#[test]
fn a_fence_of_an_address_forgets_that_page_alone() {
    let registers = [
        (1, SMALL[0]),
        (3, SMALL[1]),
        (6, RAM_BASE + LEAF),
        (7, pte(0x9000, 0xc7)),
        (8, RAM_BASE + LEAF + 8),
        (9, pte(0xa000, 0xc7)),
    ];
    assert_eq!(reads(&[], &registers), [70, 80]);
    assert_eq!(reads(&[SFENCE], &registers), [90, 80]);
    assert_eq!(reads(&[SFENCE_OF_SPACE], &registers), [90, 80]);
    assert_eq!(reads(&[SFENCE_ALL], &registers), [90, 100]);
    // As any write to satp that changes it: another address space.
    assert_eq!(reads(&[csr(2, 0x180, 2, 0)], &[&registers[..], &[(2, 1 << 44)]].concat()), [90, 100]);
}

#[test]
fn a_fence_of_an_address_forgets_all_of_a_large_page() {
    // The entry of 2 MiB is replaced by a table of small pages, whose first two are elsewhere.
    let registers = |from: usize| {
        [
            (1, LARGE[from]),
            (3, LARGE[1]),
            (6, RAM_BASE + MIDDLE + 8),
            (7, pte(LEAF, 1)),
            (8, RAM_BASE + 0xb000),
            (9, 0),
        ]
    };
    assert_eq!(reads(&[], &registers(1)), [10, 10]);
    assert_eq!(reads(&[SFENCE], &registers(1)), [80, 80]);
    let [first, second] = reads(&[SFENCE], &registers(0));
    assert_eq!((first, second), (70, 80), "the other page of the large one is forgotten, too");
}

/// ld x5, 0(x1); sd x5, 0(x1); jalr x0, 0(x1)
const LOAD: u32 = 0x0000_b283;
const STORE: u32 = 0x0050_b023;
const JUMP: u32 = 0x0000_8067;

/// In S, an access of a page whose entry has these bits: what it came to, and the bits then.
fn touch(code: u32, bits: u64, menvcfg: u64) -> (u64, u64) {
    let mut m = machine(&[code], &[(1, SMALL[0])]);
    let mut ram = m.ram().clone();
    let nop = 0x13u64;
    let memory = [
        (ROOT + 8, pte(MIDDLE, 1)),
        (ROOT + 16, pte(0, 0xcf)),
        (MIDDLE, pte(LEAF, 1)),
        (LEAF, pte(0x7000, bits)),
        (0x7000, nop),
    ];
    for (at, value) in memory {
        ram.write(at, &value.to_le_bytes()).unwrap();
    }
    let hart = m.hart_mut();
    (hart.mode, hart.menvcfg) = (Mode::Supervisor, menvcfg);
    hart.satp = 8 << 60 | (RAM_BASE + ROOT) >> 12;
    let mut m = Machine::new(ram, m.hart().clone(), 0, vec![]);
    step(&mut m);
    if code == JUMP {
        step(&mut m);
    }
    assert!(m.hart().mcause == 0 || m.hart().mtval == SMALL[0]);
    (m.hart().mcause, m.ram().load::<8>(LEAF).unwrap() & 0xff)
}

#[test]
fn accessed_and_dirty_are_the_hardwares_or_a_page_fault() {
    assert_eq!(Hart::new(RAM_BASE).menvcfg, envcfg::ADUE);
    let cases = [
        (LOAD, 0x0f, (13, 0x0f), (0, 0x4f)),
        (LOAD, 0x8f, (13, 0x8f), (0, 0xcf)),
        (LOAD, 0x4f, (0, 0x4f), (0, 0x4f)),
        (STORE, 0x0f, (15, 0x0f), (0, 0xcf)),
        (STORE, 0x4f, (15, 0x4f), (0, 0xcf)),
        (STORE, 0xcf, (0, 0xcf), (0, 0xcf)),
        (JUMP, 0x0f, (12, 0x0f), (0, 0x4f)),
        (JUMP, 0x4f, (0, 0x4f), (0, 0x4f)),
        // What the entry forbids is forbidden first.
        (STORE, 0x0b, (15, 0x0b), (15, 0x0b)),
    ];
    for (code, bits, without, with) in cases {
        assert_eq!(touch(code, bits, 0), without, "{code:#x} of {bits:#x}");
        assert_eq!(touch(code, bits, envcfg::ADUE), with, "{code:#x} of {bits:#x}, updated");
    }
}
