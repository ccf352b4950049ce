//! The machine by its specification, and against guests that mean harm.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "machine/bits.rs"]
mod bits;
#[path = "machine/coherence.rs"]
mod coherence;
#[path = "machine/csrs.rs"]
mod csrs;
#[path = "machine/float.rs"]
mod float;
#[path = "machine/paging.rs"]
mod paging;
#[path = "machine/pmp.rs"]
mod pmp;
#[path = "machine/sstc.rs"]
mod sstc;

use heddle_proto::manifest::{MachineSpec, Sleep};
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Disk, Exit, Machine, Nobody, RAM_BASE};
use heddle_replay_engine::schedule::Seeded;
use std::sync::Arc;

const RAM_BYTES: usize = 2 << 20;

/// A machine about to execute `code`, with these registers; no mode is denied any memory.
fn machine(code: &[u32], registers: &[(usize, u64)]) -> Machine {
    let mut ram = Ram::new(RAM_BYTES);
    let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &bytes).unwrap();
    let mut hart = Hart::new(RAM_BASE);
    hart.mtvec = RAM_BASE + 0x10_0000;
    hart.pmp.set_address(15, u64::MAX);
    hart.pmp.set_configs(8, 0x1f << 56);
    for (register, value) in registers {
        hart.x[*register] = *value;
    }
    Machine::new(ram, hart, 0, vec![Disk::new(Arc::from(vec![5; 1 << 16]))])
}

fn run(machine: &mut Machine, instructions: u64) -> Exit {
    let until = machine.icount() + instructions;
    machine.run(until, &mut Nobody)
}

/// One instruction, whatever has to be looked at before it.
fn step(machine: &mut Machine) {
    let until = machine.icount() + 1;
    while machine.run(until, &mut Nobody) == Exit::Work {}
}

fn r(f7: u32, f3: u32, opcode: u32) -> u32 {
    // x3 = x1 op x2
    f7 << 25 | 2 << 20 | 1 << 15 | f3 << 12 | 3 << 7 | opcode
}

fn i(imm: i32, rs1: u32, f3: u32, rd: u32, opcode: u32) -> u32 {
    (imm as u32) << 20 | rs1 << 15 | f3 << 12 | rd << 7 | opcode
}

fn csr(f3: u32, number: u32, rs1: u32, rd: u32) -> u32 {
    number << 20 | rs1 << 15 | f3 << 12 | rd << 7 | 0x73
}

const ECALL: u32 = 0x73;
const WFI: u32 = 0x1050_0073;
const MRET: u32 = 0x3020_0073;

#[test]
fn arithmetic_at_its_edges() {
    let min = i64::MIN as u64;
    let cases: [(u32, u64, u64, u64); 22] = [
        (r(0, 0, 0x33), u64::MAX, 2, 1),                               // add
        (r(0x20, 0, 0x33), 1, 2, u64::MAX),                            // sub
        (r(0, 1, 0x33), 1, 65, 2),                                     // sll takes six bits
        (r(0x20, 5, 0x33), min, 63, u64::MAX),                         // sra
        (r(0, 2, 0x33), min, 0, 1),                                    // slt
        (r(0, 3, 0x33), min, 0, 0),                                    // sltu
        (r(1, 1, 0x33), min, min, 1 << 62),                            // mulh
        (r(1, 2, 0x33), u64::MAX, u64::MAX, u64::MAX),                 // mulhsu: -1 * (2^64-1)
        (r(1, 3, 0x33), u64::MAX, u64::MAX, u64::MAX - 1),             // mulhu
        (r(1, 4, 0x33), 7, 0, u64::MAX),                               // div by zero
        (r(1, 4, 0x33), min, u64::MAX, min),                           // div overflows
        (r(1, 5, 0x33), 7, 0, u64::MAX),                               // divu by zero
        (r(1, 6, 0x33), 7, 0, 7),                                      // rem by zero
        (r(1, 6, 0x33), min, u64::MAX, 0),                             // rem overflows
        (r(1, 7, 0x33), 7, 0, 7),                                      // remu by zero
        (r(0, 0, 0x3b), 0x7fff_ffff, 1, 0xffff_ffff_8000_0000),        // addw
        (r(1, 4, 0x3b), 0x8000_0000, u64::MAX, 0xffff_ffff_8000_0000), // divw overflows
        (r(1, 5, 0x3b), 5, 0, u64::MAX),                               // divuw by zero
        (r(1, 6, 0x3b), 0x8000_0000, u64::MAX, 0),                     // remw overflows
        (r(1, 7, 0x3b), 0x8000_0001, 0, 0xffff_ffff_8000_0001),        // remuw by zero
        (r(0x20, 5, 0x3b), 0x8000_0000, 31, u64::MAX),                 // sraw
        (r(0, 5, 0x3b), 0x8000_0000, 31, 1),                           // srlw
    ];
    for (code, a, b, expected) in cases {
        let mut machine = machine(&[code], &[(1, a), (2, b)]);
        run(&mut machine, 1);
        assert_eq!(machine.hart().x[3], expected, "{code:#010x} of {a:#x} and {b:#x}");
    }
}

#[test]
fn x0_stays_zero_and_compressed_code_runs() {
    // addi x0, x0, 5; c.li a0, -3; c.addi a0, 1; c.slli a0, 4; c.mv a1, a0; c.add a1, a0
    let halves: [u16; 8] = [0x0013, 0x0050, 0x5575, 0x0505, 0x0512, 0x85aa, 0x95aa, 0x0001];
    let words: Vec<u32> =
        halves.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect();
    let mut machine = machine(&words, &[]);
    run(&mut machine, 6);
    assert_eq!(machine.hart().x[0], 0);
    assert_eq!(machine.hart().x[10], (-32i64) as u64);
    assert_eq!(machine.hart().x[11], (-64i64) as u64);
    assert_eq!(machine.hart().pc, RAM_BASE + 4 + 10);
}

#[test]
fn atomics_and_reservations() {
    let at = RAM_BASE + 0x1000;
    let amo = |f5: u32, f3: u32| f5 << 27 | 2 << 20 | 1 << 15 | f3 << 12 | 3 << 7 | 0x2f;
    let cases: [(u32, u64, u64, u64); 5] = [
        (amo(0, 2), 0xffff_ffff, 1, 0),              // amoadd.w wraps to 32 bits
        (amo(0x10, 2), 1, 0xffff_ffff, 0xffff_ffff), // amomin.w is signed
        (amo(0x18, 2), 1, 0xffff_ffff, 1),           // amominu.w is not
        (amo(0x14, 3), u64::MAX, 1, 1),              // amomax.d
        (amo(0x1c, 3), u64::MAX, 1, u64::MAX),       // amomaxu.d
    ];
    for (code, memory, operand, expected) in cases {
        // sd x4, 0(x1), then the atomic.
        let store = 4 << 20 | 1 << 15 | 3 << 12 | 0x23;
        let mut machine = machine(&[store, code], &[(1, at), (2, operand), (4, memory)]);
        run(&mut machine, 2);
        let wide = if code >> 12 & 7 == 3 { 8 } else { 4 };
        let found = machine.ram().slice(0x1000, wide).unwrap();
        assert_eq!(found, &expected.to_le_bytes()[..wide], "{code:#010x}");
    }
    // lr.d x5, (x1); sc.d x6, x2, (x1) succeeds; a second sc.d fails.
    let lr = 0x02 << 27 | 1 << 15 | 3 << 12 | 5 << 7 | 0x2f;
    let sc = |rd: u32| 0x03 << 27 | 2 << 20 | 1 << 15 | 3 << 12 | rd << 7 | 0x2f;
    let mut m = machine(&[lr, sc(6), sc(7)], &[(1, at), (2, 77)]);
    run(&mut m, 3);
    assert_eq!((m.hart().x[6], m.hart().x[7]), (0, 1));
    // A kick between the two breaks the reservation.
    let mut m = machine(&[lr, sc(6)], &[(1, at), (2, 77)]);
    run(&mut m, 1);
    m.hart_mut().kick_pending = true;
    m.take_kick();
    run(&mut m, 1);
    assert_eq!((m.hart().x[6], m.hart().kicks), (1, 1));
    // Misaligned: a store/AMO exception.
    let mut m = machine(&[sc(6)], &[(1, at + 1)]);
    run(&mut m, 1);
    assert_eq!((m.hart().mcause, m.hart().mtval), (6, at + 1));
}

#[test]
fn traps_delegation_and_returns() {
    // ecall from M.
    let mut m = machine(&[ECALL], &[]);
    run(&mut m, 1);
    assert_eq!((m.hart().mcause, m.hart().mepc, m.hart().pc), (11, RAM_BASE, RAM_BASE + 0x10_0000));
    // mret to U, where an ecall is delegated to S.
    let code = [csr(1, 0x302, 1, 0), csr(1, 0x105, 2, 0), csr(1, 0x341, 3, 0), MRET, ECALL];
    let mut m = machine(&code, &[(1, 1 << 8), (2, RAM_BASE + 0x2000), (3, RAM_BASE + 16)]);
    run(&mut m, 5);
    let hart = m.hart();
    assert_eq!((hart.scause, hart.sepc, hart.pc, hart.mode as u8), (8, RAM_BASE + 16, RAM_BASE + 0x2000, 1));
    // A supervisor's CSR from U, and an unknown one from M, are illegal; mtval has the bits.
    let code = [csr(1, 0x341, 3, 0), MRET, csr(2, 0x100, 0, 5)];
    let mut m = machine(&code, &[(3, RAM_BASE + 8)]);
    run(&mut m, 3);
    assert_eq!((m.hart().mcause, m.hart().mtval), (2, u64::from(code[2])));
    let mut m = machine(&[csr(2, 0x7c0, 0, 5)], &[]);
    run(&mut m, 1);
    assert_eq!(m.hart().mcause, 2);
    // A load from where nothing is.
    let mut m = machine(&[i(0, 1, 3, 5, 0x03)], &[(1, 0x4000_0000)]);
    run(&mut m, 1);
    assert_eq!((m.hart().mcause, m.hart().mtval), (5, 0x4000_0000));
    // Across the end of RAM: mtval has what is behind it, and a store leaves what is before.
    let end = RAM_BASE + RAM_BYTES as u64;
    for (code, cause) in [(i(0, 1, 3, 5, 0x03), 5), (2 << 20 | 1 << 15 | 3 << 12 | 0x23, 7)] {
        let mut m = machine(&[code], &[(1, end - 3), (2, u64::MAX)]);
        run(&mut m, 1);
        assert_eq!((m.hart().mcause, m.hart().mtval), (cause, end));
        assert_eq!(m.ram().load::<2>(RAM_BYTES as u64 - 3), Some(0));
    }
    // mcycle and minstret count; a write takes effect before the next read.
    let mut m = machine(&[csr(1, 0xb02, 1, 0), csr(2, 0xb02, 0, 5)], &[(1, 1000)]);
    run(&mut m, 2);
    assert_eq!(m.hart().x[5], 1000);
}

#[test]
fn wfi_waits_for_what_is_enabled_even_if_masked() {
    // msip is written, mie has MSIE, mstatus.MIE is off: WFI does not wait.
    let store_word = 2 << 20 | 1 << 15 | 2 << 12 | 0x23;
    let mut m = machine(
        &[store_word, csr(1, 0x304, 3, 0), WFI, i(1, 0, 0, 5, 0x13)],
        &[(1, 0x200_0000), (2, 1), (3, 8)],
    );
    assert_eq!(run(&mut m, 4), Exit::Budget);
    assert_eq!(m.hart().x[5], 1);
    // Nothing enabled: it waits, and its instruction counts.
    let mut m = machine(&[WFI], &[]);
    assert_eq!(run(&mut m, 10), Exit::Idle);
    assert_eq!(m.icount(), 1);
}

#[test]
fn sv39_translates_sets_bits_and_keeps_what_the_tlb_has() {
    let (root, middle, leaf) = (0x4000u64, 0x5000u64, 0x6000u64);
    let pte = |to: u64, bits: u64| (RAM_BASE + to) >> 12 << 10 | bits;
    // Enter S with paging; read va 0x40000000 twice, the second time after the entry was changed
    // through an identity mapping, then once more after sfence.vma.
    let code = [
        csr(1, 0x180, 1, 0), // satp
        csr(1, 0x341, 2, 0), // mepc
        csr(1, 0x300, 3, 0), // mstatus: MPP = S
        MRET,
        i(0, 4, 3, 5, 0x03),                // ld x5, 0(x4)
        7 << 20 | 6 << 15 | 3 << 12 | 0x23, // sd x7, 0(x6)
        i(0, 4, 3, 8, 0x03),                // ld x8, 0(x4): stale
        0x1200_0073,                        // sfence.vma
        i(0, 4, 3, 9, 0x03),                // ld x9, 0(x4)
    ];
    let registers = [
        (1, 8 << 60 | (RAM_BASE + root) >> 12),
        (2, RAM_BASE + 16),
        (3, 1 << 11),
        (4, 0x4000_0000),
        (6, RAM_BASE + leaf),
        (7, pte(0x8000, 0xc7)),
    ];
    let mut m = machine(&code, &registers);
    let mut put = |at: u64, value: u64| {
        // Written before the machine runs, so the decode cache and the TLB know nothing of it.
        let bytes = value.to_le_bytes();
        let mut ram = m.ram().clone();
        ram.write(at, &bytes).unwrap();
        m = Machine::new(ram, m.hart().clone(), 0, vec![]);
    };
    put(root + 8, pte(middle, 1));
    put(root + 16, (RAM_BASE >> 12 << 10) | 0xcf); // a gigapage, identity, for code and tables
    put(middle, pte(leaf, 1));
    put(leaf, pte(0x7000, 0x07)); // V R W, neither A nor D
    put(0x7000, 111);
    put(0x8000, 222);
    run(&mut m, 9);
    let x = &m.hart().x;
    assert_eq!((x[5], x[8], x[9]), (111, 111, 222), "the second read uses the stale translation");
    let mut first = machine(&code[..5], &registers);
    for (at, value) in [
        (root + 8, pte(middle, 1)),
        (root + 16, (RAM_BASE >> 12 << 10) | 0xcf),
        (middle, pte(leaf, 1)),
        (leaf, pte(0x7000, 0x07)),
    ] {
        let mut ram = first.ram().clone();
        ram.write(at, &value.to_le_bytes()).unwrap();
        first = Machine::new(ram, first.hart().clone(), 0, vec![]);
    }
    run(&mut first, 5);
    assert_eq!(first.ram().load::<8>(leaf), Some(pte(0x7000, 0x47)), "A is set by a read, D is not");
}

/// Instructions that mean harm: whatever is in memory, the machine traps and goes on.
#[test]
fn random_programs_never_panic() {
    let programs = if std::env::var_os("HEDDLE_FULL").is_some() { 3000 } else { 300 };
    for seed in 0..programs {
        let mut rng = Seeded::new(seed);
        let opcodes = [
            0x33, 0x13, 0x3b, 0x1b, 0x03, 0x23, 0x63, 0x6f, 0x67, 0x37, 0x17, 0x73, 0x2f, 0x0f, 0x07, 0x27,
            0x43, 0x47, 0x4b, 0x4f, 0x53, 0x53, 0x53,
        ];
        let code: Vec<u32> = (0..4096)
            .map(|_| {
                let word = rng.draw() as u32;
                if rng.below(4) == 0 { word } else { word & !0x7f | opcodes[rng.below(23) as usize] }
            })
            .collect();
        let devices = [
            0x10_0000,
            0x10_1000,
            0x200_4000,
            0x200_bff8,
            0xc00_0000,
            0xc20_0000,
            0x1000_0000,
            0x1000_1000,
            0x1000_1050,
        ];
        let registers: Vec<(usize, u64)> = (1..32)
            .map(|n| {
                let value = match rng.below(4) {
                    0 => rng.draw(),
                    1 => devices[rng.below(9) as usize] + rng.below(64) * 4,
                    _ => RAM_BASE + rng.below(RAM_BYTES as u64),
                };
                (n, value)
            })
            .collect();
        let mut m = machine(&code, &registers);
        m.hart_mut().mtvec = RAM_BASE + rng.below(4096) * 4;
        m.hart_mut().mstatus |= rng.below(4) << 13;
        for _ in 0..40 {
            run(&mut m, 200);
            m.take_kick();
            for id in 0..m.next_async() {
                m.run_async(&heddle_proto::AsyncEvent::BottomHalf { id });
                m.run_async(&heddle_proto::AsyncEvent::Block { id });
            }
            m.take_kick();
            if m.is_idle() {
                m.run_async(&heddle_proto::AsyncEvent::Char { data: vec![b'x'; 20] });
                m.hart_mut().is_idle = false;
            }
        }
    }
}

/// A driver that means harm: random queues, descriptors and notifications.
#[test]
fn hostile_virtio_queues_never_panic_and_never_reach_outside_of_ram() {
    for seed in 0..400 {
        let mut rng = Seeded::new(seed);
        let mut ram = Ram::new(RAM_BYTES);
        let near = |rng: &mut Seeded| match rng.below(6) {
            0 => rng.draw(),
            1 => RAM_BASE + RAM_BYTES as u64 - rng.below(32),
            _ => RAM_BASE + 0x1_0000 + rng.below(0x2000),
        };
        for at in (0x1_0000..0x1_2000u64).step_by(16) {
            let flags = rng.below(8) << 32 | rng.below(300) << 48;
            let len = if rng.below(8) == 0 { rng.draw() & 0xffff_ffff } else { rng.below(5000) };
            ram.write(at, &near(&mut rng).to_le_bytes()).unwrap();
            ram.write(at + 8, &(flags | len).to_le_bytes()).unwrap();
        }
        // sw x2, 0(x1); addi pairs are not needed: each store has registers of its own.
        let store = 2 << 20 | 1 << 15 | 2 << 12 | 0x23;
        ram.write(0, &u32::to_le_bytes(store)).unwrap();
        let disk = Disk::new(Arc::from(vec![5; 1 << 16]));
        let mut m = Machine::new(ram, Hart::new(RAM_BASE), 0, vec![disk]);
        let queue = [0x80u64, 0x90, 0xa0].map(|register| (register, near(&mut rng)));
        let mut writes: Vec<(u64, u64)> = vec![(0x38, rng.below(300)), (0x44, 1), (0x70, 15)];
        for (register, at) in queue {
            writes.extend([(register, at & 0xffff_ffff), (register + 4, at >> 32)]);
        }
        writes.extend([(0x50, 0), (0x50, 0)]);
        for (register, value) in writes {
            m.hart_mut().pc = RAM_BASE;
            m.hart_mut().x[1] = 0x1000_1000 + register;
            m.hart_mut().x[2] = value;
            while run(&mut m, 1) == Exit::Work {}
        }
        for id in 0..m.next_async().min(2000) {
            m.run_async(&heddle_proto::AsyncEvent::BottomHalf { id });
            m.run_async(&heddle_proto::AsyncEvent::Block { id });
        }
    }
}

#[test]
fn a_damaged_elf_is_an_error_and_never_a_panic() {
    let elf = heddle_replay_engine::guest::LOOM_ELF;
    let spec = MachineSpec {
        harts: 1,
        memory_bytes: 4 << 20,
        shift: 0,
        sleep: Sleep::On,
        bios: None,
        kernel: None,
        initrd: None,
        dtb: None,
        seed: None,
        append: String::new(),
        drives: vec![],
        devices: vec![],
    };
    let build = |bytes: Vec<u8>| {
        let images = Images { kernel: Some(Arc::from(bytes)), ..Images::default() };
        loader::build(&spec, &images).map(drop)
    };
    build(elf.to_vec()).unwrap();
    for cut in 0..256 {
        assert!(build(elf[..cut].to_vec()).is_err(), "cut at {cut}");
    }
    let mut rng = Seeded::new(3);
    for _ in 0..4000 {
        let mut bytes = elf.to_vec();
        // The headers are where lengths and offsets are.
        let at = rng.below(240) as usize;
        bytes[at] = rng.draw() as u8;
        let _ = build(bytes);
    }
}
