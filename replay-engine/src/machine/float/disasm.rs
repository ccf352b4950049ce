//! Disassembly of F and D.

use super::super::decode::{Code, Op};
use super::super::disasm::{float_register_name, mnemonic, register_name};
use super::decode::DYNAMIC;

const ROUNDINGS: [&str; 8] = ["rne", "rtz", "rdn", "rup", "rmm", "reserved", "reserved", "dyn"];

/// The instruction as an assembler would write it.
pub(in crate::machine) fn disassemble(op: &Op) -> String {
    use Code::*;
    let f = |n: u8| float_register_name(usize::from(n));
    let x = |n: u8| register_name(usize::from(n));
    let rounding = match op.rounding() {
        rm if !op.code.rounds() || rm == DYNAMIC => String::new(),
        rm => format!(", {}", ROUNDINGS[usize::from(rm)]),
    };
    let name = name(op);
    let (rd, rs1, rs2) = (f(op.rd), f(op.rs1), f(op.rs2));
    match op.code {
        Flw | Fld => format!("{name} {rd}, {}({})", op.imm, x(op.rs1)),
        Fsw | Fsd => format!("{name} {rs2}, {}({})", op.imm, x(op.rs1)),
        Fmadd | Fmsub | Fnmsub | Fnmadd => format!("{name} {rd}, {rs1}, {rs2}, {}{rounding}", f(op.rs3())),
        Fsqrt | FcvtFormat => format!("{name} {rd}, {rs1}{rounding}"),
        FcvtFromW | FcvtFromWu | FcvtFromL | FcvtFromLu | FmvFromX => {
            format!("{name} {rd}, {}{rounding}", x(op.rs1))
        }
        FcvtW | FcvtWu | FcvtL | FcvtLu | FmvX | Fclass => {
            format!("{name} {}, {rs1}{rounding}", x(op.rd))
        }
        Feq | Flt | Fle => format!("{name} {}, {rs1}, {rs2}", x(op.rd)),
        _ => format!("{name} {rd}, {rs1}, {rs2}{rounding}"),
    }
}

/// The mnemonic with its format or formats.
fn name(op: &Op) -> String {
    use Code::*;
    let (format, other, moved) = if op.is_double() { ("d", "s", "d") } else { ("s", "d", "w") };
    match op.code {
        Flw | Fld | Fsw | Fsd => mnemonic(op.code),
        FcvtFormat => format!("fcvt.{format}.{other}"),
        FcvtFromW => format!("fcvt.{format}.w"),
        FcvtFromWu => format!("fcvt.{format}.wu"),
        FcvtFromL => format!("fcvt.{format}.l"),
        FcvtFromLu => format!("fcvt.{format}.lu"),
        FmvFromX => format!("fmv.{moved}.x"),
        FmvX => format!("fmv.x.{moved}"),
        code => format!("{}.{format}", mnemonic(code)),
    }
}
