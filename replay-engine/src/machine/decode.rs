//! Decoding: 16- and 32-bit instructions to one small operation each.

use super::{bits, float};

/// What an operation does.
///
/// The order has a meaning: what changes pc from `Jal` to `Bgeu`, what ends a block from
/// `Illegal` to `Csrrci`, bit operations from `Sh1add`, then floating point from `Flw`,
/// then, from `FcvtW`, the floating point that gives an integer; last, from `AddiAddi`, pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[rustfmt::skip]
#[allow(missing_docs)]
pub enum Code {
    Lui, Auipc, Jal, Jalr,
    Beq, Bne, Blt, Bge, Bltu, Bgeu,
    Lb, Lh, Lw, Ld, Lbu, Lhu, Lwu, Sb, Sh, Sw, Sd,
    Addi, Slti, Sltiu, Xori, Ori, Andi, Slli, Srli, Srai,
    Add, Sub, Sll, Slt, Sltu, Xor, Srl, Sra, Or, And,
    Addiw, Slliw, Srliw, Sraiw, Addw, Subw, Sllw, Srlw, Sraw,
    Mul, Mulh, Mulhsu, Mulhu, Div, Divu, Rem, Remu,
    Mulw, Divw, Divuw, Remw, Remuw,
    LrW, LrD, ScW, ScD,
    AmoswapW, AmoaddW, AmoxorW, AmoandW, AmoorW, AmominW, AmomaxW, AmominuW, AmomaxuW,
    AmoswapD, AmoaddD, AmoxorD, AmoandD, AmoorD, AmominD, AmomaxD, AmominuD, AmomaxuD,
    Illegal, Pause, FenceI, Ecall, Ebreak, Mret, Sret, Wfi, SfenceVma,
    Csrrw, Csrrs, Csrrc, Csrrwi, Csrrsi, Csrrci,
    Sh1add, Sh2add, Sh3add, AddUw, Sh1addUw, Sh2addUw, Sh3addUw, SlliUw,
    Andn, Orn, Xnor, Clz, Ctz, Cpop, Clzw, Ctzw, Cpopw, Min, Max, Minu, Maxu,
    SextB, SextH, ZextH, Rol, Ror, Rori, Rolw, Rorw, Roriw, OrcB, Rev8,
    Bset, Bclr, Binv, Bext, Bseti, Bclri, Binvi, Bexti,
    Flw, Fld, Fsw, Fsd, Fmadd, Fmsub, Fnmsub, Fnmadd,
    Fadd, Fsub, Fmul, Fdiv, Fsqrt, Fsgnj, Fsgnjn, Fsgnjx, Fmin, Fmax,
    FcvtFormat, FcvtFromW, FcvtFromWu, FcvtFromL, FcvtFromLu, FmvFromX,
    FcvtW, FcvtWu, FcvtL, FcvtLu, FmvX, Feq, Flt, Fle, Fclass,
    Fence,
    AddiAddi, AddAdd, XorXor, SrliwSlliw, AddwAddw, AddwSrliw, SlliSrli, SrliSlli, SlliAdd, SrliAdd,
    XorOr, OrOr, OrXor, SlliwOr, SlliOr, OrAddw, AddwOr, XorAddw, MulwAddw, AddiMulw, XorAndi,
    SrliwAddi, AndiSlli, AddiXor, AddiAdd, AddAddi, AddiAddw, AddiAddiw, XorAddiw, AddiAndi, LwAddi,
    LdAdd, LdAddi, LwXor, LbuAddi, LbuAndi, LbuSrliw, LdXor, LdOr, LwLw, LdLd, LbuLbu, LdSd, AddLw,
    AddLd, AddLbu, AddiLd, AddiLw, AddiSd, AddiSw, SdSd, SdLd, SdAddi, SwAddi, SbSb, AddwBne,
    AddiBne, AddiBeq, AddiBltu, AndiBne, AndiBeq, AddBeq, AddBge, AddiwBne, LdBne, LdBeq, LbuBne,
    LbuBeq, SbBne, AddJal, AddiJal, AddiJalr, AuipcJalr,
}

/// A register number that swallows writes: x0 as a destination.
pub const SINK: u8 = 32;

/// Zihintpause's hint: a fence of writes before nothing.
const PAUSE: u32 = 0x0100_000f;

/// A decoded instruction.
///
/// - `rd` is [`SINK`] for x0, so that executing needs no test.
/// - `imm` is the sign-extended immediate; the CSR number for `Csr*`; the raw bits for `Illegal`;
///   of floating point what `float/decode.rs` draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Op {
    pub code: Code,
    pub rd: u8,
    pub rs1: u8,
    pub rs2: u8,
    pub imm: i32,
    /// Bytes of the instruction, 2 or 4.
    pub len: u8,
    /// In a block: where in its page the next one begins. Then `imm` of what adds it to pc is
    /// relative to the page, too.
    pub next: u16,
    /// In a block: what is done here: `code`, or that and the next one's.
    pub run: Code,
}

/// Decodes the instruction in the low bits of `bits`.
pub fn decode(bits: u32) -> Op {
    if bits & 3 == 3 {
        decode_32(bits, 4)
    } else {
        let half = bits as u16;
        match expand(half) {
            Some(wide) => decode_32(wide, 2),
            None => illegal(u32::from(half), 2),
        }
    }
}

fn illegal(bits: u32, len: u8) -> Op {
    Op { code: Code::Illegal, rd: SINK, rs1: 0, rs2: 0, imm: bits as i32, len, next: 0, run: Code::Illegal }
}

fn decode_32(w: u32, len: u8) -> Op {
    use Code::*;
    let rd = ((w >> 7) & 31) as u8;
    let rs1 = ((w >> 15) & 31) as u8;
    let rs2 = ((w >> 20) & 31) as u8;
    let f3 = (w >> 12) & 7;
    let f7 = w >> 25;
    let i_imm = (w as i32) >> 20;
    let s_imm = ((w as i32) >> 25 << 5) | ((w >> 7) & 31) as i32;
    let b_imm = ((w as i32) >> 31 << 12)
        | (((w >> 7) & 1) << 11) as i32
        | (((w >> 25) & 0x3f) << 5) as i32
        | (((w >> 8) & 15) << 1) as i32;
    let u_imm = (w & 0xffff_f000) as i32;
    let j_imm = ((w as i32) >> 31 << 20)
        | (w & 0xff000) as i32
        | (((w >> 20) & 1) << 11) as i32
        | (((w >> 21) & 0x3ff) << 1) as i32;
    let shamt6 = (w >> 20 & 63) as i32;
    let shamt5 = (w >> 20 & 31) as i32;
    let (code, imm) = match w & 0x7f {
        0x37 => (Lui, u_imm),
        0x17 => (Auipc, u_imm),
        0x6f => (Jal, j_imm),
        0x67 if f3 == 0 => (Jalr, i_imm),
        0x63 => match f3 {
            0 => (Beq, b_imm),
            1 => (Bne, b_imm),
            4 => (Blt, b_imm),
            5 => (Bge, b_imm),
            6 => (Bltu, b_imm),
            7 => (Bgeu, b_imm),
            _ => (Illegal, 0),
        },
        0x03 => ([Lb, Lh, Lw, Ld, Lbu, Lhu, Lwu, Illegal][f3 as usize], i_imm),
        0x23 => match f3 {
            0 => (Sb, s_imm),
            1 => (Sh, s_imm),
            2 => (Sw, s_imm),
            3 => (Sd, s_imm),
            _ => (Illegal, 0),
        },
        0x13 => match (f3, w >> 26) {
            (0, _) => (Addi, i_imm),
            (1, 0) => (Slli, shamt6),
            (2, _) => (Slti, i_imm),
            (3, _) => (Sltiu, i_imm),
            (4, _) => (Xori, i_imm),
            (5, 0) => (Srli, shamt6),
            (5, 0x10) => (Srai, shamt6),
            (6, _) => (Ori, i_imm),
            (7, _) => (Andi, i_imm),
            _ => bits::decode(w),
        },
        0x1b => match (f3, f7) {
            (0, _) => (Addiw, i_imm),
            (1, 0) => (Slliw, shamt5),
            (5, 0) => (Srliw, shamt5),
            (5, 0x20) => (Sraiw, shamt5),
            _ => bits::decode(w),
        },
        0x33 => match f7 {
            0 => ([Add, Sll, Slt, Sltu, Xor, Srl, Or, And][f3 as usize], 0),
            1 => ([Mul, Mulh, Mulhsu, Mulhu, Div, Divu, Rem, Remu][f3 as usize], 0),
            0x20 if f3 == 0 => (Sub, 0),
            0x20 if f3 == 5 => (Sra, 0),
            _ => bits::decode(w),
        },
        0x3b => match (f7, f3) {
            (0, 0) => (Addw, 0),
            (0, 1) => (Sllw, 0),
            (0, 5) => (Srlw, 0),
            (0x20, 0) => (Subw, 0),
            (0x20, 5) => (Sraw, 0),
            (1, 0) => (Mulw, 0),
            (1, 4) => (Divw, 0),
            (1, 5) => (Divuw, 0),
            (1, 6) => (Remw, 0),
            (1, 7) => (Remuw, 0),
            _ => bits::decode(w),
        },
        0x07 | 0x27 | 0x43 | 0x47 | 0x4b | 0x4f | 0x53 => {
            return float::decode::decode(w, len).unwrap_or_else(|| illegal(w, len));
        }
        0x2f => (atomic(w >> 27, f3, rs2), 0),
        0x0f => match f3 {
            0 if w == PAUSE => (Pause, 0),
            0 => (Fence, 0),
            1 => (FenceI, 0),
            _ => (Illegal, 0),
        },
        0x73 => match f3 {
            0 => (system(w), 0),
            4 => (Illegal, 0),
            _ => (
                [Illegal, Csrrw, Csrrs, Csrrc, Illegal, Csrrwi, Csrrsi, Csrrci][f3 as usize],
                (w >> 20) as i32,
            ),
        },
        _ => (Illegal, 0),
    };
    if code == Illegal {
        return illegal(w, len);
    }
    Op { code, rd: if rd == 0 { SINK } else { rd }, rs1, rs2, imm, len, next: 0, run: code }
}

fn atomic(f5: u32, f3: u32, rs2: u8) -> Code {
    use Code::*;
    let (word, double) = match f5 {
        0x02 if rs2 == 0 => (LrW, LrD),
        0x03 => (ScW, ScD),
        0x01 => (AmoswapW, AmoswapD),
        0x00 => (AmoaddW, AmoaddD),
        0x04 => (AmoxorW, AmoxorD),
        0x0c => (AmoandW, AmoandD),
        0x08 => (AmoorW, AmoorD),
        0x10 => (AmominW, AmominD),
        0x14 => (AmomaxW, AmomaxD),
        0x18 => (AmominuW, AmominuD),
        0x1c => (AmomaxuW, AmomaxuD),
        _ => return Illegal,
    };
    match f3 {
        2 => word,
        3 => double,
        _ => Illegal,
    }
}

fn system(w: u32) -> Code {
    match w {
        0x0000_0073 => Code::Ecall,
        0x0010_0073 => Code::Ebreak,
        0x3020_0073 => Code::Mret,
        0x1020_0073 => Code::Sret,
        0x1050_0073 => Code::Wfi,
        _ if w >> 25 == 9 && w & 0x7fff == 0x73 => Code::SfenceVma,
        _ => Code::Illegal,
    }
}

/// Expands a 16-bit instruction (RV64C) to its 32-bit form.
fn expand(h: u16) -> Option<u32> {
    let h = u32::from(h);
    let bit = |from: u32, to: u32| ((h >> from) & 1) << to;
    let bits = |from: u32, len: u32, to: u32| ((h >> from) & ((1 << len) - 1)) << to;
    let rd = (h >> 7) & 31;
    let rs2 = (h >> 2) & 31;
    let rd_ = 8 + ((h >> 2) & 7);
    let rs1_ = 8 + ((h >> 7) & 7);
    let imm6 = ((bit(12, 5) | bits(2, 5, 0)) << 26) as i32 >> 26;
    let i = |imm: i32, rs1: u32, f3: u32, rd: u32, op: u32| {
        ((imm as u32) << 20) | rs1 << 15 | f3 << 12 | rd << 7 | op
    };
    let s = |imm: u32, rs2: u32, rs1: u32, f3: u32| {
        (imm >> 5) << 25 | rs2 << 20 | rs1 << 15 | f3 << 12 | (imm & 31) << 7 | 0x23
    };
    let r = |f7: u32, rs2: u32, rs1: u32, f3: u32, rd: u32, op: u32| {
        f7 << 25 | rs2 << 20 | rs1 << 15 | f3 << 12 | rd << 7 | op
    };
    // Makes an integer store one of floating point.
    let float_store = 0x23 ^ 0x27;
    let cl_w = bits(10, 3, 3) | bit(6, 2) | bit(5, 6);
    let cl_d = bits(10, 3, 3) | bits(5, 2, 6);
    let wide = match (h & 3, h >> 13) {
        (0, 0) => {
            let imm = bits(11, 2, 4) | bits(7, 4, 6) | bit(6, 2) | bit(5, 3);
            if imm == 0 {
                return None;
            }
            i(imm as i32, 2, 0, rd_, 0x13)
        }
        (0, 1) => i(cl_d as i32, rs1_, 3, rd_, 0x07),
        (0, 2) => i(cl_w as i32, rs1_, 2, rd_, 0x03),
        (0, 3) => i(cl_d as i32, rs1_, 3, rd_, 0x03),
        (0, 5) => s(cl_d, rd_, rs1_, 3) | float_store,
        (0, 6) => s(cl_w, rd_, rs1_, 2),
        (0, 7) => s(cl_d, rd_, rs1_, 3),
        (1, 0) => i(imm6, rd, 0, rd, 0x13),
        (1, 1) if rd != 0 => i(imm6, rd, 0, rd, 0x1b),
        (1, 2) => i(imm6, 0, 0, rd, 0x13),
        (1, 3) if rd == 2 => {
            let imm = (bit(12, 9) | bit(6, 4) | bit(5, 6) | bits(3, 2, 7) | bit(2, 5)) << 22;
            let imm = imm as i32 >> 22;
            if imm == 0 {
                return None;
            }
            i(imm, 2, 0, 2, 0x13)
        }
        (1, 3) if imm6 != 0 => ((imm6 as u32) << 12) | rd << 7 | 0x37,
        (1, 4) => match (h >> 10) & 3 {
            0 => i(imm6 & 63, rs1_, 5, rs1_, 0x13),
            1 => i((imm6 & 63) | 0x400, rs1_, 5, rs1_, 0x13),
            2 => i(imm6, rs1_, 7, rs1_, 0x13),
            _ => match (bit(12, 0), (h >> 5) & 3) {
                (0, 0) => r(0x20, rd_, rs1_, 0, rs1_, 0x33),
                (0, 1) => r(0, rd_, rs1_, 4, rs1_, 0x33),
                (0, 2) => r(0, rd_, rs1_, 6, rs1_, 0x33),
                (0, _) => r(0, rd_, rs1_, 7, rs1_, 0x33),
                (_, 0) => r(0x20, rd_, rs1_, 0, rs1_, 0x3b),
                (_, 1) => r(0, rd_, rs1_, 0, rs1_, 0x3b),
                _ => return None,
            },
        },
        (1, 5) => {
            let imm = bit(12, 11)
                | bit(11, 4)
                | bits(9, 2, 8)
                | bit(8, 10)
                | bit(7, 6)
                | bit(6, 7)
                | bits(3, 3, 1)
                | bit(2, 5);
            let imm = ((imm << 20) as i32 >> 20) as u32;
            (imm >> 20 & 1) << 31 | (imm >> 1 & 0x3ff) << 21 | (imm >> 11 & 1) << 20 | (imm & 0xff000) | 0x6f
        }
        (1, f @ (6 | 7)) => {
            let imm = bit(12, 8) | bits(10, 2, 3) | bits(5, 2, 6) | bits(3, 2, 1) | bit(2, 5);
            let imm = ((imm << 23) as i32 >> 23) as u32;
            (imm >> 12 & 1) << 31
                | (imm >> 5 & 0x3f) << 25
                | rs1_ << 15
                | (f - 6) << 12
                | (imm >> 1 & 15) << 8
                | (imm >> 11 & 1) << 7
                | 0x63
        }
        (2, 0) => i(imm6 & 63, rd, 1, rd, 0x13),
        (2, 1) => {
            let imm = bit(12, 5) | bits(5, 2, 3) | bits(2, 3, 6);
            i(imm as i32, 2, 3, rd, 0x07)
        }
        (2, 2) if rd != 0 => {
            let imm = bit(12, 5) | bits(4, 3, 2) | bits(2, 2, 6);
            i(imm as i32, 2, 2, rd, 0x03)
        }
        (2, 3) if rd != 0 => {
            let imm = bit(12, 5) | bits(5, 2, 3) | bits(2, 3, 6);
            i(imm as i32, 2, 3, rd, 0x03)
        }
        (2, 4) => match (bit(12, 0), rd, rs2) {
            (0, 0, 0) => return None,
            (0, _, 0) => i(0, rd, 0, 0, 0x67),
            (0, _, _) => r(0, rs2, 0, 0, rd, 0x33),
            (_, 0, 0) => 0x0010_0073,
            (_, _, 0) => i(0, rd, 0, 1, 0x67),
            (_, _, _) => r(0, rs2, rd, 0, rd, 0x33),
        },
        (2, 5) => s(bits(10, 3, 3) | bits(7, 3, 6), rs2, 2, 3) | float_store,
        (2, 6) => s(bits(9, 4, 2) | bits(7, 2, 6), rs2, 2, 2),
        (2, 7) => s(bits(10, 3, 3) | bits(7, 3, 6), rs2, 2, 3),
        _ => return None,
    };
    Some(wide)
}
