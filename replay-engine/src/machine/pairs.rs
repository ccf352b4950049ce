//! Pairs of operations that often follow each other, and are dispatched as one.
//!
//! Chosen by counting neighbours over the boot of a Linux and over an integer benchmark.

use super::decode::{Code, Op};

/// Makes pairs of a block's operations, from the first on. Both operations stay as they are.
pub(super) fn pair_up(ops: &mut [Op]) {
    let mut at = 0;
    while let [first, second, ..] = &mut ops[at..] {
        match pair(first.code, second.code) {
            Some(code) => {
                first.run = code;
                at += 2;
            }
            None => at += 1,
        }
    }
}

fn pair(first: Code, second: Code) -> Option<Code> {
    use Code::*;
    Some(match (first, second) {
        (Addi, Addi) => AddiAddi,
        (Add, Add) => AddAdd,
        (Xor, Xor) => XorXor,
        (Srliw, Slliw) => SrliwSlliw,
        (Addw, Addw) => AddwAddw,
        (Addw, Srliw) => AddwSrliw,
        (Slli, Srli) => SlliSrli,
        (Srli, Slli) => SrliSlli,
        (Slli, Add) => SlliAdd,
        (Srli, Add) => SrliAdd,
        (Xor, Or) => XorOr,
        (Or, Or) => OrOr,
        (Or, Xor) => OrXor,
        (Slliw, Or) => SlliwOr,
        (Slli, Or) => SlliOr,
        (Or, Addw) => OrAddw,
        (Addw, Or) => AddwOr,
        (Xor, Addw) => XorAddw,
        (Mulw, Addw) => MulwAddw,
        (Addi, Mulw) => AddiMulw,
        (Xor, Andi) => XorAndi,
        (Srliw, Addi) => SrliwAddi,
        (Andi, Slli) => AndiSlli,
        (Addi, Xor) => AddiXor,
        (Addi, Add) => AddiAdd,
        (Add, Addi) => AddAddi,
        (Addi, Addw) => AddiAddw,
        (Addi, Addiw) => AddiAddiw,
        (Xor, Addiw) => XorAddiw,
        (Addi, Andi) => AddiAndi,
        (Lw, Addi) => LwAddi,
        (Ld, Add) => LdAdd,
        (Ld, Addi) => LdAddi,
        (Lw, Xor) => LwXor,
        (Lbu, Addi) => LbuAddi,
        (Lbu, Andi) => LbuAndi,
        (Lbu, Srliw) => LbuSrliw,
        (Ld, Xor) => LdXor,
        (Ld, Or) => LdOr,
        (Lw, Lw) => LwLw,
        (Ld, Ld) => LdLd,
        (Lbu, Lbu) => LbuLbu,
        (Ld, Sd) => LdSd,
        (Add, Lw) => AddLw,
        (Add, Ld) => AddLd,
        (Add, Lbu) => AddLbu,
        (Addi, Ld) => AddiLd,
        (Addi, Lw) => AddiLw,
        (Addi, Sd) => AddiSd,
        (Addi, Sw) => AddiSw,
        (Sd, Sd) => SdSd,
        (Sd, Ld) => SdLd,
        (Sd, Addi) => SdAddi,
        (Sw, Addi) => SwAddi,
        (Sb, Sb) => SbSb,
        (Addw, Bne) => AddwBne,
        (Addi, Bne) => AddiBne,
        (Addi, Beq) => AddiBeq,
        (Addi, Bltu) => AddiBltu,
        (Andi, Bne) => AndiBne,
        (Andi, Beq) => AndiBeq,
        (Add, Beq) => AddBeq,
        (Add, Bge) => AddBge,
        (Addiw, Bne) => AddiwBne,
        (Ld, Bne) => LdBne,
        (Ld, Beq) => LdBeq,
        (Lbu, Bne) => LbuBne,
        (Lbu, Beq) => LbuBeq,
        (Sb, Bne) => SbBne,
        (Add, Jal) => AddJal,
        (Addi, Jal) => AddiJal,
        (Addi, Jalr) => AddiJalr,
        (Auipc, Jalr) => AuipcJalr,
        _ => return None,
    })
}
