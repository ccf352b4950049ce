//! What `sfence.vma` makes the TLB forget, whose A and D are, and accesses of two pages.

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

/// The frames of [`SMALL`], which are no neighbours, and turned round.
const FRAMES: [u64; 2] = [0xb000, 0x8000];
/// What the first page ends with, and the second begins with.
const OLD: [u64; 2] = [0x8182_8384_8586_8788, 0x9192_9394_9596_9798];
/// What lies behind the first frame, and before the second.
const BESIDE: u64 = 0x4142_4344_4546_4748;
const NEW: u64 = 0xc1c2_c3c4_c5c6_c7c8;
/// x5 before anything is loaded.
const NOTHING: u64 = 0x5555_5555_5555_5555;
const TRAPS: u64 = RAM_BASE + 0x10_0000;
/// V R W X A D.
const WHOLE: u64 = 0xcf;
/// Funct3 and bytes.
const STORES: [(u32, usize); 3] = [(1, 2), (2, 4), (3, 8)];
const LOADS: [(u32, usize); 5] = [(1, 2), (2, 4), (3, 8), (5, 2), (6, 4)];
/// PMP's rights.
const READ: u64 = 1;
const ALL: u64 = 7;

/// x5 = what is at x1.
fn load_at(funct3: u32) -> u32 {
    i(0, 1, funct3, 5, 0x03)
}

/// x2 is stored at x1.
fn store_at(funct3: u32) -> u32 {
    2 << 20 | 1 << 15 | funct3 << 12 | 0x23
}

/// In S, before `code`, with x1 at `at`, x3 at the second page: the two are mapped by entries of
/// these bits, and PMP gives the second frame these rights. S takes its own exceptions.
fn neighbours(code: &[u32], at: u64, bits: [u64; 2], rights: u64) -> Machine {
    let mut m = machine(code, &[(1, at), (2, NEW), (3, SMALL[1]), (5, NOTHING)]);
    let mut ram = m.ram().clone();
    let memory = [
        (ROOT + 8, pte(MIDDLE, 1)),
        (ROOT + 16, pte(0, WHOLE)),
        (MIDDLE, pte(LEAF, 1)),
        (LEAF, pte(FRAMES[0], bits[0])),
        (LEAF + 8, pte(FRAMES[1], bits[1])),
        (FRAMES[0] + 0xff8, OLD[0]),
        (FRAMES[0] + 0x1000, BESIDE),
        (FRAMES[1] - 8, BESIDE),
        (FRAMES[1], OLD[1]),
    ];
    for (at, value) in memory {
        ram.write(at, &value.to_le_bytes()).unwrap();
    }
    let hart = m.hart_mut();
    (hart.mode, hart.satp) = (Mode::Supervisor, 8 << 60 | (RAM_BASE + ROOT) >> 12);
    (hart.medeleg, hart.stvec) = (1 << 5 | 1 << 7 | 1 << 13 | 1 << 15, TRAPS);
    // The first entry is the second frame's, as a naturally aligned page.
    hart.pmp.set_address(0, (RAM_BASE + FRAMES[1]) >> 2 | 0x1ff);
    hart.pmp.set_configs(0, 0x18 | rights);
    Machine::new(ram, m.hart().clone(), 0, vec![])
}

/// What the pages end and begin with, as one.
fn border(m: &Machine) -> [u8; 16] {
    assert_eq!(m.ram().load::<8>(FRAMES[0] + 0x1000), Some(BESIDE), "behind the first frame");
    assert_eq!(m.ram().load::<8>(FRAMES[1] - 8), Some(BESIDE), "before the second frame");
    let (first, second) = (m.ram().slice(FRAMES[0] + 0xff8, 8), m.ram().slice(FRAMES[1], 8));
    [first.unwrap(), second.unwrap()].concat().try_into().unwrap()
}

/// ld and sd of x6 on either side of x3, so that both pages are known to be read and written.
fn warm() -> Vec<u32> {
    let store = |offset: u32| (offset >> 5) << 25 | 6 << 20 | 3 << 15 | 3 << 12 | (offset & 31) << 7 | 0x23;
    vec![i(-8, 3, 3, 6, 0x03), store(0xff8), i(0, 3, 3, 6, 0x03), store(0)]
}

#[test]
fn an_access_of_two_pages_has_the_bytes_of_both() {
    let before: [u8; 16] = [OLD[0].to_le_bytes(), OLD[1].to_le_bytes()].concat().try_into().unwrap();
    for prefix in [vec![], warm()] {
        let count = prefix.len() as u64 + 1;
        for (funct3, bytes) in LOADS {
            for ahead in 1..bytes {
                let code = [&prefix[..], &[load_at(funct3)]].concat();
                let mut m = neighbours(&code, SMALL[1] - ahead as u64, [WHOLE; 2], ALL);
                run(&mut m, count);
                let mut value = [0; 8];
                value[..bytes].copy_from_slice(&before[8 - ahead..][..bytes]);
                let value = u64::from_le_bytes(value);
                let shift = if funct3 < 4 { 64 - 8 * bytes } else { 0 };
                let expected = ((value << shift) as i64 >> shift) as u64;
                assert_eq!(m.hart().x[5], expected, "load {funct3} from {ahead} before the border");
                assert_eq!((m.hart().scause, border(&m)), (0, before));
            }
        }
        for (funct3, bytes) in STORES {
            for ahead in 1..bytes {
                let code = [&prefix[..], &[store_at(funct3)]].concat();
                let mut m = neighbours(&code, SMALL[1] - ahead as u64, [WHOLE; 2], ALL);
                run(&mut m, count);
                let mut expected = before;
                expected[8 - ahead..][..bytes].copy_from_slice(&NEW.to_le_bytes()[..bytes]);
                assert_eq!(border(&m), expected, "store {funct3} at {ahead} before the border");
                assert_eq!(m.hart().scause, 0);
            }
        }
    }
}

#[test]
fn an_access_of_two_pages_makes_both_accessed_and_dirty() {
    let entries = |m: &Machine| [LEAF, LEAF + 8].map(|at| m.ram().load::<8>(at).unwrap() & 0xff);
    for (code, expected) in [(load_at(3), 0x47), (store_at(3), 0xc7)] {
        let mut m = neighbours(&[code], SMALL[1] - 3, [0x07; 2], ALL);
        step(&mut m);
        assert_eq!((m.hart().scause, entries(&m)), (0, [expected; 2]), "{code:#x}");
    }
}

/// Loads and stores across the border, under these entries and rights, each end with this cause
/// (none is 0) at `value`, or else at the access's own first byte; nothing has moved then.
fn check_faults(bits: [u64; 2], rights: u64, causes: [u64; 2], value: Option<u64>) {
    let loads = LOADS.map(|(funct3, bytes)| (load_at(funct3), bytes, causes[0]));
    let stores = STORES.map(|(funct3, bytes)| (store_at(funct3), bytes, causes[1]));
    for (code, bytes, cause) in loads.into_iter().chain(stores) {
        for ahead in 1..bytes {
            let at = SMALL[1] - ahead as u64;
            let mut m = neighbours(&[code], at, bits, rights);
            let before = border(&m);
            step(&mut m);
            let hart = m.hart();
            let context = format!("{code:#x}, {ahead} before the border, entries {bits:x?}, PMP {rights}");
            assert_eq!((hart.scause, hart.mcause), (cause, 0), "{context}");
            if cause == 0 {
                continue;
            }
            assert_eq!(hart.stval, value.unwrap_or(at), "{context}");
            assert_eq!((hart.sepc, hart.pc, hart.x[5]), (RAM_BASE, TRAPS, NOTHING), "{context}");
            assert_eq!(border(&m), before, "{context}");
        }
    }
}

#[test]
fn a_second_page_that_faults_is_named_and_nothing_is_stored_in_the_first() {
    let second = Some(SMALL[1]);
    // Invalid; read-only; X alone; the user's.
    check_faults([WHOLE, 0], ALL, [13, 15], second);
    check_faults([WHOLE, 0xc3], ALL, [0, 15], second);
    check_faults([WHOLE, 0xc9], ALL, [13, 15], second);
    check_faults([WHOLE, 0xdf], ALL, [13, 15], second);
    // The first page's fault comes first.
    check_faults([0, WHOLE], ALL, [13, 15], None);
    check_faults([0xc3, WHOLE], ALL, [0, 15], None);
    check_faults([0, 0], ALL, [13, 15], None);
}

#[test]
fn a_second_page_that_pmp_denies_is_named_and_nothing_is_stored_in_the_first() {
    let second = Some(SMALL[1]);
    check_faults([WHOLE; 2], ALL, [0, 0], None);
    check_faults([WHOLE; 2], READ, [0, 7], second);
    check_faults([WHOLE; 2], 0, [5, 7], second);
    // Either page's fault is found before the second one's memory is asked.
    check_faults([0, WHOLE], 0, [13, 15], None);
    check_faults([WHOLE, 0], 0, [13, 15], second);
}
