//! Code that is stored, executed, and stored again: what was learnt of its page must go.

use super::{Machine, RAM_BASE, i, machine, run};
use heddle_replay_engine::machine::hart::Mode;

/// Where the routine is that is stored, and the page table, from RAM's begin.
const ROUTINE: u64 = 0x1000;
const ROOT: u64 = 0x4000;
/// RAM once more, where addresses are translated.
const ALIAS: u64 = 0x4000_0000;

/// addi x10, x0, value; jalr x0, 0(x31)
fn routine(value: u64) -> u64 {
    0x000f_8067 << 32 | value << 20 | 0x513
}

/// In this mode: stores a routine at `stored_at`, calls it at `called_at`, and so on, with one
/// of two by turns. What eight calls gave, a byte each.
fn calls(mode: Mode, satp: u64, stored_at: u64, called_at: u64) -> u64 {
    let code = [
        0x0020_b023,           // sd x2, 0(x1)
        i(0, 4, 0, 31, 0x67),  // jalr x31, 0(x4)
        i(8, 11, 1, 11, 0x13), // slli x11, x11, 8
        0x00a5_e5b3,           // or x11, x11, x10
        0x0031_4133,           // xor x2, x2, x3: the other routine
        0xfedf_f06f,           // j .-20
    ];
    let registers = [(1, stored_at), (2, routine(1)), (3, routine(1) ^ routine(2)), (4, called_at)];
    let mut m = machine(&code, &registers);
    let mut ram = m.ram().clone();
    // Two gigapages of RAM, one of them where it is.
    for entry in [1, 2] {
        ram.write(ROOT + 8 * entry, &(RAM_BASE >> 12 << 10 | 0xcf).to_le_bytes()).unwrap();
    }
    (m.hart_mut().mode, m.hart_mut().satp) = (mode, satp);
    let mut m = Machine::new(ram, m.hart().clone(), 0, vec![]);
    // Each round is these and the routine's two.
    run(&mut m, 8 * (code.len() as u64 + 2));
    assert_eq!((m.hart().mcause, m.hart().pc), (0, RAM_BASE), "{mode:?}");
    m.hart().x[11]
}

#[test]
fn code_that_is_stored_again_runs_as_it_is() {
    let at = RAM_BASE + ROUTINE;
    for mode in [Mode::Machine, Mode::Supervisor, Mode::User] {
        assert_eq!(calls(mode, 0, at, at), 0x0102_0102_0102_0102, "{mode:?}");
    }
    let satp = 8 << 60 | (RAM_BASE + ROOT) >> 12;
    for (stored_at, called_at) in [(at, at), (ALIAS + ROUTINE, at), (at, ALIAS + ROUTINE)] {
        let found = calls(Mode::Supervisor, satp, stored_at, called_at);
        assert_eq!(found, 0x0102_0102_0102_0102, "stored at {stored_at:#x}, called at {called_at:#x}");
    }
}
