//! Which CSRs there are for whom, what they hold, and what `mstatus` forbids.

use super::{ECALL, MRET, Machine, RAM_BASE, WFI, csr, i, machine, step};
use heddle_replay_engine::machine::hart::{Mode, envcfg, irq, status};

const ILLEGAL: u64 = 2;
const SRET: u32 = 0x1020_0073;
const SFENCE_VMA: u32 = 0x1200_0073;
const STIMECMP: u32 = 0x14d;

fn exists(number: u32) -> bool {
    matches!(
        number,
        0x001..=0x003
            | 0x100
            | 0x104..=0x106
            | 0x10a
            | 0x140..=0x144
            | STIMECMP
            | 0x180
            | 0x300..=0x306
            | 0x30a
            | 0x320
            | 0x323..=0x344
            | 0x3a0
            | 0x3a2
            | 0x3b0..=0x3bf
            | 0x7a0..=0x7a4
            | 0xb00
            | 0xb02..=0xb1f
            | 0xc00..=0xc1f
            | 0xf11..=0xf15
    )
}

/// All CSRs, each read (`csrrs x5, csr, x0`), then read and written (`csrrs x5, csr, x6`).
fn all() -> Machine {
    let code: Vec<u32> = (0..4096).flat_map(|number| [csr(2, number, 0, 5), csr(2, number, 6, 5)]).collect();
    let mut machine = machine(&code, &[]);
    machine.hart_mut().mstatus |= status::FS;
    machine
}

fn is_legal(machine: &mut Machine, mode: Mode, number: u32, writes: bool) -> bool {
    let hart = machine.hart_mut();
    hart.mode = mode;
    hart.pc = RAM_BASE + u64::from(number) * 8 + u64::from(writes) * 4;
    hart.mcause = 0;
    step(machine);
    assert!([0, ILLEGAL].contains(&machine.hart().mcause), "{number:#x}");
    machine.hart().mcause == 0
}

#[test]
fn every_csr_is_there_for_whom_it_should_be() {
    let time = 1u64 << 1;
    let everything = 0xffff_ffffu64;
    let cases: [(Mode, u64, u64, u64); 8] = [
        (Mode::Machine, 0, 0, 0),
        (Mode::Supervisor, 0, everything, envcfg::STCE),
        (Mode::Supervisor, everything, 0, 0),
        (Mode::Supervisor, everything & !time, 0, envcfg::STCE),
        (Mode::Supervisor, everything, 0, envcfg::STCE),
        (Mode::User, everything, 0, envcfg::STCE),
        (Mode::User, 0, everything, 0),
        (Mode::User, everything, everything & !time, envcfg::STCE),
    ];
    let mut machine = all();
    for (mode, mcounteren, scounteren, menvcfg) in cases {
        for number in 0..4096u32 {
            let hart = machine.hart_mut();
            (hart.mcounteren, hart.scounteren, hart.menvcfg) = (mcounteren, scounteren, menvcfg);
            let is_privileged = u64::from(number >> 8 & 3) <= mode as u64;
            let enabled = match mode {
                Mode::Machine => everything,
                Mode::Supervisor => mcounteren,
                Mode::User => mcounteren & scounteren,
            };
            let is_enabled = match number {
                0xc00..=0xc1f => enabled >> (number & 31) & 1 != 0,
                STIMECMP => mode == Mode::Machine || (menvcfg != 0 && mcounteren & time != 0),
                _ => true,
            };
            let expected = exists(number) && is_privileged && is_enabled;
            let readable = is_legal(&mut machine, mode, number, false);
            assert_eq!(readable, expected, "{number:#x} read in {mode:?}");
            let writable = is_legal(&mut machine, mode, number, true);
            assert_eq!(writable, expected && number >> 10 != 3, "{number:#x} written in {mode:?}");
        }
    }
}

#[test]
fn registers_hold_what_they_have_bits_for() {
    let ones = u64::MAX;
    let cases: [(u32, u64, u64); 30] = [
        (0x300, ones, 0x8000_000a_007e_79aa),
        (0x300, 2 << 11, 0xa_0000_0000),
        (0x301, 0, 0x8000_0000_0014_112d),
        (0x302, ones, 0xb3ff),
        (0x303, ones, 0x222),
        (0x304, ones, 0xaaa),
        (0x305, ones, !2),
        (0x105, ones, !2),
        (0x306, ones, 0xffff_ffff),
        (0x106, ones, 0xffff_ffff),
        (0x30a, ones, 1 << 63 | 1 << 61 | 1),
        (0x10a, ones, 1),
        (0x320, ones, 5),
        (0x323, ones, 0),
        (0xb03, ones, 0),
        (0xb1f, ones, 0),
        (0x341, ones, !1),
        (0x344, ones, 0x2a2),
        (0x144, ones, 0),
        (0x14d, 7, 7),
        (0x180, 9 << 60 | 5, 0),
        (0x180, 8 << 60 | 3 << 44 | 5, 8 << 60 | 3 << 44 | 5),
        (0x3a0, ones, 0x9f9f_9f9f_9f9f_9f9f),
        (0x3a0, 0x1a, 0),
        (0x3b0, ones, (1 << 54) - 1),
        (0x3be, ones, (1 << 54) - 1),
        (0x3bf, 5, 5),
        (0x7a0, 3, 0),
        (0x7a1, ones, 0),
        (0x7a4, ones, 1),
    ];
    for (number, written, expected) in cases {
        let mut m = machine(&[csr(1, number, 1, 0), csr(2, number, 0, 5)], &[(1, written)]);
        step(&mut m);
        step(&mut m);
        assert_eq!(m.hart().mcause, 0, "{number:#x}");
        assert_eq!(m.hart().x[5], expected, "{number:#x} written with {written:#x}");
    }
}

#[test]
fn counters_stand_while_they_are_inhibited() {
    let code = [
        csr(1, 0x320, 1, 0),
        i(0, 0, 0, 0, 0x13),
        csr(2, 0xb00, 0, 5),
        csr(2, 0xb02, 0, 6),
        csr(1, 0xb02, 2, 0),
        csr(1, 0x320, 0, 0),
        csr(2, 0xb00, 0, 7),
        csr(2, 0xb02, 0, 8),
    ];
    let mut m = machine(&code, &[(1, 5), (2, 1000)]);
    code.iter().for_each(|_| step(&mut m));
    assert_eq!(m.hart().x[5..9], [1, 1, 1, 1001]);
}

#[test]
fn what_raises_an_exception_does_not_retire() {
    let code = [ECALL, csr(2, 0xb02, 0, 5), csr(2, 0xb00, 0, 6), 0, csr(2, 0xc02, 0, 7)];
    let mut m = machine(&code, &[]);
    m.hart_mut().mtvec = RAM_BASE + 4;
    (0..4).for_each(|_| step(&mut m));
    m.hart_mut().pc = RAM_BASE + 16;
    step(&mut m);
    assert_eq!(m.hart().x[5..8], [0, 2, 2], "one of two, two cycles, two of four");
    // It stands while it is inhibited, and an interrupt is no instruction.
    let mut m = machine(&code, &[]);
    (m.hart_mut().mtvec, m.hart_mut().mcountinhibit) = (RAM_BASE + 4, 4);
    (0..2).for_each(|_| step(&mut m));
    assert_eq!(m.hart().x[5], 0);
    let mut m = machine(&[code[1]], &[]);
    let hart = m.hart_mut();
    (hart.mtvec, hart.pc) = (RAM_BASE, RAM_BASE + 64);
    (hart.mie, hart.mip_soft) = (irq::SSI, irq::SSI);
    hart.mstatus |= status::MIE;
    step(&mut m);
    assert_eq!((m.hart().mcause, m.hart().x[5]), (1 << 63 | 1, 0));
}

#[test]
fn mstatus_forbids_and_returns_leave_mprv_behind() {
    let cases = [
        (WFI, status::TW),
        (SRET, status::TSR),
        (SFENCE_VMA, status::TVM),
        (csr(2, 0x180, 0, 5), status::TVM),
        (csr(1, 0x180, 6, 0), status::TVM),
    ];
    let cause = |code: u32, mode: Mode, status: u64| {
        let mut m = machine(&[code], &[]);
        let hart = m.hart_mut();
        (hart.mode, hart.sepc) = (mode, RAM_BASE + 64);
        hart.mstatus |= status;
        step(&mut m);
        let is_told = m.hart().mcause == 0 || m.hart().mtval == u64::from(code);
        assert!(is_told, "an illegal instruction's bits are in mtval");
        m.hart().mcause
    };
    for (code, bit) in cases {
        assert_eq!(cause(code, Mode::Machine, bit), 0, "{code:#x} in M");
        assert_eq!(cause(code, Mode::Supervisor, bit), ILLEGAL, "{code:#x} in S, forbidden");
        assert_eq!(cause(code, Mode::Supervisor, 0), 0, "{code:#x} in S");
        assert_eq!(cause(code, Mode::User, 0), ILLEGAL, "{code:#x} in U");
    }
    assert_eq!(cause(MRET, Mode::Supervisor, 0), ILLEGAL);
    for (code, previous, stays) in [(MRET, 3u64, true), (MRET, 1, false), (MRET, 0, false), (SRET, 3, false)]
    {
        let mut m = machine(&[code], &[]);
        m.hart_mut().mstatus |= status::MPRV | previous << status::MPP_SHIFT;
        step(&mut m);
        assert_eq!(m.hart().mstatus & status::MPRV != 0, stays, "{code:#x} to {previous}");
    }
}
