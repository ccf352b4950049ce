//! A hart's registers by name, for people.

use crate::machine::Machine;
use crate::machine::disasm::{float_register_name, register_name};

/// x0..x31 by their ABI names.
pub fn integers(machine: &Machine) -> Vec<(&'static str, u64)> {
    machine.hart().x.iter().take(32).enumerate().map(|(n, value)| (register_name(n), *value)).collect()
}

/// f0..f31 by their ABI names, as bits.
pub fn floats(machine: &Machine) -> Vec<(&'static str, u64)> {
    machine.hart().f.iter().enumerate().map(|(n, value)| (float_register_name(n), *value)).collect()
}

/// The CSRs that a guest could read here, by name.
pub fn csrs(machine: &Machine) -> Vec<(&'static str, u64)> {
    let (hart, icount) = (machine.hart(), machine.icount());
    vec![
        ("mstatus", hart.status()),
        ("mie", hart.mie),
        ("mip", hart.mip()),
        ("medeleg", hart.medeleg),
        ("mideleg", hart.mideleg),
        ("mtvec", hart.mtvec),
        ("mepc", hart.mepc),
        ("mcause", hart.mcause),
        ("mtval", hart.mtval),
        ("mscratch", hart.mscratch),
        ("mcounteren", hart.mcounteren),
        ("stvec", hart.stvec),
        ("sepc", hart.sepc),
        ("scause", hart.scause),
        ("stval", hart.stval),
        ("sscratch", hart.sscratch),
        ("scounteren", hart.scounteren),
        ("satp", hart.satp),
        ("mcycle", icount.wrapping_add(hart.cycle_offset)),
        ("minstret", icount.wrapping_add(hart.instret_offset)),
        ("mhpmcounter3", hart.kicks),
        ("fcsr", u64::from(hart.fcsr)),
    ]
}
