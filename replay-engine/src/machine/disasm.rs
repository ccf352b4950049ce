//! Disassembly, for verdicts and divergence cards.

use super::decode::{Code, Op, SINK};
use super::float;

const NAMES: [&str; 33] = [
    "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5", "a6",
    "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6", "zero",
];

/// The ABI name of register `n`.
pub fn register_name(n: usize) -> &'static str {
    NAMES[n.min(SINK as usize)]
}

const FLOAT_NAMES: [&str; 32] = [
    "ft0", "ft1", "ft2", "ft3", "ft4", "ft5", "ft6", "ft7", "fs0", "fs1", "fa0", "fa1", "fa2", "fa3", "fa4",
    "fa5", "fa6", "fa7", "fs2", "fs3", "fs4", "fs5", "fs6", "fs7", "fs8", "fs9", "fs10", "fs11", "ft8",
    "ft9", "ft10", "ft11",
];

/// The ABI name of floating-point register `n`.
pub fn float_register_name(n: usize) -> &'static str {
    FLOAT_NAMES[n & 31]
}

/// The instruction as an assembler would write it, for the one at `pc`.
pub fn disassemble(op: &Op, pc: u64) -> String {
    use Code::*;
    let name = mnemonic(op.code);
    let (rd, rs1, rs2) = (NAMES[op.rd as usize], NAMES[op.rs1 as usize], NAMES[op.rs2 as usize]);
    let imm = op.imm;
    let target = pc.wrapping_add(imm as i64 as u64);
    match op.code {
        Illegal => format!("illegal {imm:#010x}"),
        Lui | Auipc => format!("{name} {rd}, {:#x}", imm as u32 >> 12),
        Jal => format!("{name} {rd}, {target:#x}"),
        Jalr | Lb | Lh | Lw | Ld | Lbu | Lhu | Lwu => format!("{name} {rd}, {imm}({rs1})"),
        Beq | Bne | Blt | Bge | Bltu | Bgeu => format!("{name} {rs1}, {rs2}, {target:#x}"),
        Sb | Sh | Sw | Sd => format!("{name} {rs2}, {imm}({rs1})"),
        Addi | Slti | Sltiu | Xori | Ori | Andi | Slli | Srli | Srai | Addiw | Slliw | Srliw | Sraiw
        | SlliUw | Rori | Roriw | Bseti | Bclri | Binvi | Bexti => {
            format!("{name} {rd}, {rs1}, {imm}")
        }
        code if code.is_unary() => format!("{name} {rd}, {rs1}"),
        code if code.is_float() => float::disasm::disassemble(op),
        LrW | LrD => format!("{name} {rd}, ({rs1})"),
        code if (ScW as u8..=AmomaxuD as u8).contains(&(code as u8)) => {
            format!("{name} {rd}, {rs2}, ({rs1})")
        }
        Fence | Pause | FenceI | Ecall | Ebreak | Mret | Sret | Wfi => name,
        SfenceVma => format!("{name} {rs1}, {rs2}"),
        Csrrw | Csrrs | Csrrc => format!("{name} {rd}, {imm:#x}, {rs1}"),
        Csrrwi | Csrrsi | Csrrci => format!("{name} {rd}, {imm:#x}, {}", op.rs1),
        _ => format!("{name} {rd}, {rs1}, {rs2}"),
    }
}

/// `AmoaddW` -> `amoadd.w`, `SfenceVma` -> `sfence.vma`.
pub(super) fn mnemonic(code: Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('.');
        }
        name.push(c.to_ascii_lowercase());
    }
    name
}
