//! Bit manipulation: Zba, Zbb and Zbs.

use super::decode::Code;

/// The operation and immediate of an instruction of opcode `OP`, `OP-32`, `OP-IMM` or `OP-IMM-32`.
pub(super) fn decode(w: u32) -> (Code, i32) {
    let f3 = w >> 12 & 7;
    match w & 0x7f {
        0x33 => (register(w >> 25, f3), 0),
        0x3b => (register_word(w >> 25, f3, w >> 20 & 31), 0),
        0x13 => (immediate(w >> 20, f3), (w >> 20 & 63) as i32),
        _ => (immediate_word(w >> 20, f3), (w >> 20 & 63) as i32),
    }
}

fn register(f7: u32, f3: u32) -> Code {
    use Code::*;
    match (f7, f3) {
        (0x10, 2) => Sh1add,
        (0x10, 4) => Sh2add,
        (0x10, 6) => Sh3add,
        (0x20, 4) => Xnor,
        (0x20, 6) => Orn,
        (0x20, 7) => Andn,
        (0x05, 4) => Min,
        (0x05, 5) => Minu,
        (0x05, 6) => Max,
        (0x05, 7) => Maxu,
        (0x30, 1) => Rol,
        (0x30, 5) => Ror,
        (0x14, 1) => Bset,
        (0x24, 1) => Bclr,
        (0x24, 5) => Bext,
        (0x34, 1) => Binv,
        _ => Illegal,
    }
}

fn register_word(f7: u32, f3: u32, rs2: u32) -> Code {
    use Code::*;
    match (f7, f3) {
        (0x04, 0) => AddUw,
        (0x04, 4) if rs2 == 0 => ZextH,
        (0x10, 2) => Sh1addUw,
        (0x10, 4) => Sh2addUw,
        (0x10, 6) => Sh3addUw,
        (0x30, 1) => Rolw,
        (0x30, 5) => Rorw,
        _ => Illegal,
    }
}

fn immediate(imm12: u32, f3: u32) -> Code {
    use Code::*;
    match (f3, imm12, imm12 >> 6) {
        (1, 0x600, _) => Clz,
        (1, 0x601, _) => Ctz,
        (1, 0x602, _) => Cpop,
        (1, 0x604, _) => SextB,
        (1, 0x605, _) => SextH,
        (1, _, 0x0a) => Bseti,
        (1, _, 0x12) => Bclri,
        (1, _, 0x1a) => Binvi,
        (5, 0x287, _) => OrcB,
        (5, 0x6b8, _) => Rev8,
        (5, _, 0x12) => Bexti,
        (5, _, 0x18) => Rori,
        _ => Illegal,
    }
}

fn immediate_word(imm12: u32, f3: u32) -> Code {
    use Code::*;
    match (f3, imm12, imm12 >> 6) {
        (1, 0x600, _) => Clzw,
        (1, 0x601, _) => Ctzw,
        (1, 0x602, _) => Cpopw,
        (1, _, 0x02) => SlliUw,
        (5, _, 0x18) if imm12 & 32 == 0 => Roriw,
        _ => Illegal,
    }
}

impl Code {
    /// An instruction of Zba, Zbb or Zbs.
    #[inline(always)]
    pub fn is_bit_operation(self) -> bool {
        (Code::Sh1add as u8..Code::Flw as u8).contains(&(self as u8))
    }

    /// An operation on one register.
    pub(super) fn is_unary(self) -> bool {
        use Code::*;
        matches!(self, Clz | Ctz | Cpop | Clzw | Ctzw | Cpopw | SextB | SextH | ZextH | OrcB | Rev8)
    }
}

/// The result of `code` on the values of `rs1` and `rs2`.
#[inline(never)]
#[rustfmt::skip]
pub(super) fn execute(code: Code, a: u64, b: u64, imm: u64) -> u64 {
    use Code::*;
    let word = u64::from(a as u32);
    let bit = |n: u64| 1u64 << (n & 63);
    match code {
        Sh1add => (a << 1).wrapping_add(b),
        Sh2add => (a << 2).wrapping_add(b),
        Sh3add => (a << 3).wrapping_add(b),
        AddUw => word.wrapping_add(b),
        Sh1addUw => (word << 1).wrapping_add(b),
        Sh2addUw => (word << 2).wrapping_add(b),
        Sh3addUw => (word << 3).wrapping_add(b),
        SlliUw => word << (imm & 63),
        Andn => a & !b,
        Orn => a | !b,
        Xnor => !(a ^ b),
        Clz => u64::from(a.leading_zeros()),
        Ctz => u64::from(a.trailing_zeros()),
        Cpop => u64::from(a.count_ones()),
        Clzw => u64::from((a as u32).leading_zeros()),
        Ctzw => u64::from((a as u32).trailing_zeros()),
        Cpopw => u64::from((a as u32).count_ones()),
        Min => (a as i64).min(b as i64) as u64,
        Max => (a as i64).max(b as i64) as u64,
        Minu => a.min(b),
        Maxu => a.max(b),
        SextB => a as i8 as u64,
        SextH => a as i16 as u64,
        ZextH => u64::from(a as u16),
        Rol => a.rotate_left((b & 63) as u32),
        Ror => a.rotate_right((b & 63) as u32),
        Rori => a.rotate_right((imm & 63) as u32),
        Rolw => (a as u32).rotate_left((b & 31) as u32) as i32 as u64,
        Rorw => (a as u32).rotate_right((b & 31) as u32) as i32 as u64,
        Roriw => (a as u32).rotate_right((imm & 31) as u32) as i32 as u64,
        OrcB => u64::from_le_bytes(a.to_le_bytes().map(|byte| if byte == 0 { 0 } else { 0xff })),
        Rev8 => a.swap_bytes(),
        Bset => a | bit(b),
        Bclr => a & !bit(b),
        Binv => a ^ bit(b),
        Bext => a >> (b & 63) & 1,
        Bseti => a | bit(imm),
        Bclri => a & !bit(imm),
        Binvi => a ^ bit(imm),
        Bexti => a >> (imm & 63) & 1,
        _ => unreachable!("{code:?} is not a bit operation"),
    }
}
