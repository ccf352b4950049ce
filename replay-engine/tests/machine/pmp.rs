//! Physical memory protection, access by access.

use super::{ECALL, MRET, Machine, RAM_BASE, RAM_BYTES, csr, step};
use heddle_replay_engine::machine::hart::{Hart, Mode, status};
use heddle_replay_engine::machine::ram::Ram;

const R: u8 = 1;
const W: u8 = 2;
const X: u8 = 4;
const TOR: u8 = 1 << 3;
const NA4: u8 = 2 << 3;
const NAPOT: u8 = 3 << 3;
const LOCKED: u8 = 1 << 7;

const HANDLER: u64 = 0x10_0000;
const DATA: u64 = RAM_BASE + 0x8000;
/// lw x5, 0(x1); ld x5, 0(x1); sw x2, 0(x1); sd x2, 0(x1); jalr x0, 0(x1); addi x5, x0, 1
const LW: u32 = 0x0000_a283;
const LD: u32 = 0x0000_b283;
const SW: u32 = 0x0020_a023;
const SD: u32 = 0x0020_b023;
const JUMP: u32 = 0x0000_8067;
const SET_X5: u32 = 0x0010_0293;

const FETCH_DENIED: u64 = 1;
const LOAD_DENIED: u64 = 5;
const STORE_DENIED: u64 = 7;

/// The address register of a naturally aligned region.
fn napot(from: u64, bytes: u64) -> u64 {
    from >> 2 | (bytes / 8 - 1)
}

/// The first page of RAM, where code lies, to execute and to read.
fn code_page() -> (u8, u64) {
    (NAPOT | R | X, napot(RAM_BASE, 4096))
}

/// A machine in `mode` about to execute `code`, under these entries, with memory at these offsets.
fn guarded(mode: Mode, entries: &[(u8, u64)], code: &[u32], memory: &[(u64, &[u8])], at: u64) -> Machine {
    let mut ram = Ram::new(RAM_BYTES);
    let code: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &code).unwrap();
    for (at, bytes) in memory {
        ram.write(*at, bytes).unwrap();
    }
    let mut hart = Hart::new(RAM_BASE);
    hart.mtvec = RAM_BASE + HANDLER;
    hart.mode = mode;
    hart.x[1] = at;
    for (n, (config, address)) in entries.iter().enumerate() {
        hart.pmp.set_address(n, *address);
        let others = hart.pmp.configs(n & 8);
        hart.pmp.set_configs(n & 8, others | u64::from(*config) << (8 * (n & 7)));
    }
    Machine::new(ram, hart, 0, vec![])
}

/// What an access of `at` came to: `mcause`, or zero; `mtval` must say where.
fn cause(mode: Mode, entries: &[(u8, u64)], code: u32, at: u64) -> u64 {
    let mut m = guarded(mode, entries, &[code], &[(0x8000, &SET_X5.to_le_bytes())], at);
    step(&mut m);
    if code == JUMP && m.hart().mcause == 0 {
        assert_eq!(m.hart().pc, at);
        step(&mut m);
        assert!(m.hart().mcause != 0 || m.hart().x[5] == 1);
    }
    assert!(m.hart().mcause == 0 || m.hart().mtval == at);
    m.hart().mcause
}

/// The entries of a region at [`DATA`], in all ways; the smallest is 4 bytes.
fn regions(config: u8) -> [Vec<(u8, u64)>; 4] {
    let page = code_page();
    [
        vec![page, (config | NA4, DATA >> 2)],
        vec![page, (config | NAPOT, napot(DATA, 8))],
        vec![page, (config | NAPOT, napot(DATA, 4096))],
        vec![page, (0, DATA >> 2), (config | TOR, (DATA + 4) >> 2)],
    ]
}

#[test]
fn supervisor_and_user_get_what_an_entry_permits() {
    for rights in [0, R, R | W, X, R | X, R | W | X] {
        for (mode, lock) in [(Mode::Supervisor, 0), (Mode::User, 0), (Mode::User, LOCKED)] {
            for entries in regions(rights | lock) {
                let expected = |right: u8, denied: u64| if rights & right != 0 { 0 } else { denied };
                assert_eq!(cause(mode, &entries, LW, DATA), expected(R, LOAD_DENIED), "{entries:x?}");
                assert_eq!(cause(mode, &entries, SW, DATA), expected(W, STORE_DENIED), "{entries:x?}");
                assert_eq!(cause(mode, &entries, JUMP, DATA), expected(X, FETCH_DENIED), "{entries:x?}");
                assert_eq!(cause(mode, &entries, LW, DATA - 4), LOAD_DENIED, "{entries:x?}");
                assert_eq!(cause(mode, &entries, SW, DATA + 4096), STORE_DENIED, "{entries:x?}");
            }
        }
    }
}

#[test]
fn without_an_entry_only_machine_mode_goes_on() {
    for (mode, expected) in [(Mode::Machine, 0), (Mode::Supervisor, FETCH_DENIED), (Mode::User, FETCH_DENIED)]
    {
        let mut m = guarded(mode, &[], &[LW], &[], DATA);
        step(&mut m);
        assert_eq!(m.hart().mcause, expected, "{mode:?}");
        assert_eq!(m.hart().mtval, if expected == 0 { 0 } else { RAM_BASE });
    }
    // MPRV: data with the rights of S.
    let mut m = guarded(Mode::Machine, &[code_page()], &[LW], &[], DATA);
    m.hart_mut().mstatus |= status::MPRV | 1 << status::MPP_SHIFT;
    let mut m = Machine::new(m.ram().clone(), m.hart().clone(), 0, vec![]);
    step(&mut m);
    assert_eq!((m.hart().mcause, m.hart().mtval), (LOAD_DENIED, DATA));
}

#[test]
fn machine_mode_is_bound_by_locked_entries_alone() {
    for rights in [0, R, R | W, X, R | W | X] {
        for entries in regions(rights) {
            for code in [LW, SW, JUMP] {
                assert_eq!(cause(Mode::Machine, &entries, code, DATA), 0, "{entries:x?}");
            }
        }
        for entries in regions(rights | LOCKED) {
            let expected = |right: u8, denied: u64| if rights & right != 0 { 0 } else { denied };
            assert_eq!(cause(Mode::Machine, &entries, LW, DATA), expected(R, LOAD_DENIED), "{entries:x?}");
            assert_eq!(cause(Mode::Machine, &entries, SW, DATA), expected(W, STORE_DENIED), "{entries:x?}");
            assert_eq!(cause(Mode::Machine, &entries, JUMP, DATA), expected(X, FETCH_DENIED), "{entries:x?}");
            assert_eq!(cause(Mode::Machine, &entries, SW, DATA - 4), 0, "{entries:x?}");
        }
    }
    // What is locked stays: csrw pmpcfg0, x0; csrw pmpaddr1, x0; lw.
    let code = [csr(1, 0x3a0, 0, 0), csr(1, 0x3b1, 0, 0), LW];
    let mut m = guarded(Mode::Machine, &[code_page(), (LOCKED | NA4, DATA >> 2)], &code, &[], DATA);
    (0..3).for_each(|_| step(&mut m));
    assert_eq!((m.hart().mcause, m.hart().mtval), (LOAD_DENIED, DATA));
    assert_eq!((m.hart().pmp.configs(0), m.hart().pmp.address(0)), (0x9000, napot(RAM_BASE, 4096)));
}

#[test]
fn an_access_across_a_border_is_denied() {
    let end = DATA + 0x804;
    let top = [code_page(), (0, DATA >> 2), (TOR | R | W, end >> 2), (NAPOT | R | W | X, u64::MAX)];
    for (mode, entries) in [
        (Mode::Supervisor, &top[..3]),
        (Mode::Supervisor, &top[..]),
        (Mode::User, &top[..]),
        (Mode::Machine, &top[..]),
    ] {
        let outside = if mode != Mode::Machine && entries.len() == 3 { LOAD_DENIED } else { 0 };
        assert_eq!(cause(mode, entries, LW, end - 4), 0, "{mode:?}");
        assert_eq!(cause(mode, entries, LW, end), outside, "{mode:?}");
        assert_eq!(cause(mode, entries, LD, end - 4), LOAD_DENIED, "{mode:?}");
        assert_eq!(cause(mode, entries, SD, end - 4), STORE_DENIED, "{mode:?}");
        assert_eq!(cause(mode, entries, SD, end - 12), 0, "{mode:?}");
    }
    // Of whatever size: what lies in the entry only in part is denied, also unlocked. Across a
    // page there are two accesses, each in one entry.
    let all = R | W | X;
    let small = [code_page(), (NAPOT | all, napot(DATA, 8)), (NAPOT | all, u64::MAX)];
    for mode in [Mode::Machine, Mode::Supervisor] {
        for (at, is_cut) in [(DATA - 4, false), (DATA, false), (DATA + 1, true), (DATA + 8, false)] {
            let (load, store) = if is_cut { (LOAD_DENIED, STORE_DENIED) } else { (0, 0) };
            assert_eq!(cause(mode, &small, LD, at), load, "{mode:?} at {at:#x}");
            assert_eq!(cause(mode, &small, SD, at), store, "{mode:?} at {at:#x}");
        }
        assert_eq!(cause(mode, &small, LW, DATA + 3), 0, "{mode:?}");
    }
    // Across a page, each byte is asked for, and none moves before all may.
    let entries = [code_page(), (NAPOT | R | W, napot(DATA, 4096))];
    let mut m = guarded(Mode::User, &entries, &[SD], &[], DATA + 4092);
    m.hart_mut().x[2] = u64::MAX;
    step(&mut m);
    assert_eq!((m.hart().mcause, m.ram().load::<4>(0x8ffc)), (STORE_DENIED, Some(0)));
}

#[test]
fn code_runs_up_to_a_border() {
    // addi x5, x5, 1; c.nop; addi x5, x5, 1, whose upper half is behind the border.
    let code: [&[u8]; 3] =
        [&0x0012_8293u32.to_le_bytes(), &1u16.to_le_bytes(), &0x0012_8293u32.to_le_bytes()];
    let code = code.concat();
    for (mode, lock) in [(Mode::Supervisor, 0), (Mode::Machine, LOCKED)] {
        let entries =
            [code_page(), (0, DATA >> 2), (TOR | X, (DATA + 8) >> 2), (lock | NAPOT, napot(DATA, 4096))];
        let mut m = guarded(mode, &entries, &[JUMP], &[(0x8000, &code[..])], DATA);
        for _ in 0..3 {
            step(&mut m);
        }
        assert_eq!((m.hart().mcause, m.hart().pc, m.hart().x[5]), (0, DATA + 6, 1), "{mode:?}");
        step(&mut m);
        let hart = m.hart();
        assert_eq!((hart.mcause, hart.mepc, hart.mtval), (FETCH_DENIED, DATA + 6, DATA + 8), "{mode:?}");
        assert_eq!(hart.x[5], 1);
    }
}

#[test]
fn a_changed_entry_holds_for_the_next_access() {
    // In S: lw; ecall. In M: csrw pmpcfg0, x3; csrw mepc, x6; mret. In S again: lw.
    let handler = [csr(1, 0x3a0, 3, 0), csr(1, 0x341, 6, 0), MRET].map(u32::to_le_bytes).concat();
    let entries = [code_page(), (NAPOT | R, napot(DATA, 4096))];
    let mut m = guarded(Mode::Supervisor, &entries, &[LW, ECALL], &[(HANDLER, &handler)], DATA);
    let closed = u64::from(code_page().0);
    (m.hart_mut().x[3], m.hart_mut().x[6]) = (closed, RAM_BASE);
    for _ in 0..5 {
        step(&mut m);
    }
    assert_eq!((m.hart().mode, m.hart().pc, m.hart().mcause), (Mode::Supervisor, RAM_BASE, 9));
    step(&mut m);
    assert_eq!((m.hart().mcause, m.hart().mtval), (LOAD_DENIED, DATA));
}

/// Sv39 in S: a gigapage for code, and [`VA`] at [`DATA`] by a page whose entry has these bits.
fn paged(closed: &[(u8, u64)], code: u32, bits: u64) -> Machine {
    let pte = |to: u64, bits: u64| (((RAM_BASE + to) >> 12 << 10) | bits).to_le_bytes();
    let tables = [
        (0x4000 + 8, pte(0x5000, 1)),
        (0x4000 + 16, ((RAM_BASE >> 12 << 10) | 0xcf).to_le_bytes()),
        (0x5000, pte(0x6000, 1)),
        (0x6000, pte(0x8000, bits)),
        (0x8000, u64::from(SET_X5).to_le_bytes()),
    ];
    let memory: Vec<(u64, &[u8])> = tables.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
    let entries = [closed, &[(NAPOT | R | W | X, u64::MAX)]].concat();
    let mut m = guarded(Mode::Supervisor, &entries, &[code], &memory, VA);
    m.hart_mut().satp = 8 << 60 | (RAM_BASE + 0x4000) >> 12;
    Machine::new(m.ram().clone(), m.hart().clone(), 0, vec![])
}

const VA: u64 = 0x4000_0000;
const ACCESSED: u64 = 0x4f;
const DIRTY: u64 = 0xcf;

#[test]
fn a_page_walk_is_an_access_too() {
    let page = |at: u64, rights: u8| (NAPOT | rights, napot(RAM_BASE + at, 4096));
    let cause = |closed: &[(u8, u64)], code: u32, bits: u64| {
        let mut m = paged(closed, code, bits);
        step(&mut m);
        if code == JUMP {
            step(&mut m);
        }
        assert!(m.hart().mcause == 0 || m.hart().mtval == VA);
        m.hart().mcause
    };
    let all = [(LW, LOAD_DENIED), (SW, STORE_DENIED), (JUMP, FETCH_DENIED)];
    for (code, denied) in all {
        assert_eq!(cause(&[], code, DIRTY), 0);
        for table in [0x5000, 0x6000, 0x8000] {
            assert_eq!(cause(&[page(table, 0)], code, DIRTY), denied, "{table:#x}");
        }
        // A table that is only read does, unless an entry has to be changed.
        assert_eq!(cause(&[page(0x6000, R)], code, DIRTY), 0);
        assert_eq!(cause(&[page(0x6000, R)], code, 0xf), denied);
    }
    assert_eq!(cause(&[page(0x6000, R)], LW, ACCESSED), 0);
    assert_eq!(cause(&[page(0x6000, R)], SW, ACCESSED), STORE_DENIED);
    // The page's rights and PMP's, both; a page fault comes before the memory is asked.
    assert_eq!(cause(&[page(0x8000, R)], SW, DIRTY), STORE_DENIED);
    assert_eq!(cause(&[page(0x8000, X)], JUMP, DIRTY), 0);
    assert_eq!(cause(&[page(0x8000, 0)], SW, DIRTY & !4), 15);
}

#[test]
fn what_may_be_executed_may_not_be_read_under_mxr() {
    // An X-only page, X-only memory: fetched from, then read.
    let closed = [(NAPOT | X, napot(DATA, 4096))];
    let mut m = paged(&closed, JUMP, 0xc9);
    m.hart_mut().mstatus |= status::MXR;
    step(&mut m);
    step(&mut m);
    assert_eq!((m.hart().mcause, m.hart().x[5]), (0, 1));
    let mut m = paged(&closed, LW, 0xc9);
    m.hart_mut().mstatus |= status::MXR;
    step(&mut m);
    assert_eq!((m.hart().mcause, m.hart().mtval), (LOAD_DENIED, VA));
}
