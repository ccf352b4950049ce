//! A hart's registers by name, for people.

use crate::machine::disasm::{float_register_name, register_name};
use crate::machine::hart::Hart;
use crate::machine::pmp;

/// x0..x31 by their ABI names.
pub fn integers(hart: &Hart) -> Vec<(&'static str, u64)> {
    hart.x.iter().take(32).enumerate().map(|(n, value)| (register_name(n), *value)).collect()
}

/// f0..f31 by their ABI names, as bits.
pub fn floats(hart: &Hart) -> Vec<(&'static str, u64)> {
    hart.f.iter().enumerate().map(|(n, value)| (float_register_name(n), *value)).collect()
}

const PMP_ADDRESSES: [&str; pmp::ENTRIES] = [
    "pmpaddr0",
    "pmpaddr1",
    "pmpaddr2",
    "pmpaddr3",
    "pmpaddr4",
    "pmpaddr5",
    "pmpaddr6",
    "pmpaddr7",
    "pmpaddr8",
    "pmpaddr9",
    "pmpaddr10",
    "pmpaddr11",
    "pmpaddr12",
    "pmpaddr13",
    "pmpaddr14",
    "pmpaddr15",
];

/// The CSRs that a guest could read at an icount, by name.
pub fn csrs(hart: &Hart, icount: u64) -> Vec<(&'static str, u64)> {
    let mut csrs = vec![
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
        ("mcountinhibit", hart.mcountinhibit),
        ("menvcfg", hart.menvcfg),
        ("stvec", hart.stvec),
        ("sepc", hart.sepc),
        ("scause", hart.scause),
        ("stval", hart.stval),
        ("sscratch", hart.sscratch),
        ("scounteren", hart.scounteren),
        ("senvcfg", hart.senvcfg),
        ("satp", hart.satp),
        ("stimecmp", hart.stimecmp),
        ("mcycle", hart.cycle(icount)),
        ("minstret", hart.instret(icount)),
        ("mhpmcounter3", hart.kicks),
        ("fcsr", u64::from(hart.fcsr)),
        ("pmpcfg0", hart.pmp.configs(0)),
        ("pmpcfg2", hart.pmp.configs(8)),
    ];
    let addresses = PMP_ADDRESSES.iter().enumerate();
    csrs.extend(addresses.map(|(entry, name)| (*name, hart.pmp.address(entry))));
    csrs
}
