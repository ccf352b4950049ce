//! Decoding of F and D.
//!
//! One code serves both formats; what has no field of its own in an [`Op`] is in `imm`:
//!
//! ```text
//! 12       8          3   2      0
//!  |  rs3  |  0 ... | D |   rm   |     D: binary64
//! ```
//!
//! Loads and stores have their offset there. Registers are numbered as the instruction
//! has them, except an integer destination, which is as everywhere ([`SINK`] for x0).

use super::super::decode::{Code, Op, SINK};
use super::Rounding;

/// `rm`: the rounding mode is `frm`'s.
pub(super) const DYNAMIC: u8 = 7;
const DOUBLE: i32 = 1 << 3;
const RS3: u32 = 8;

impl Op {
    /// The instruction's `rm`, or 0 where it has none.
    pub(super) fn rounding(self) -> u8 {
        (self.imm & 7) as u8
    }

    /// The operation is on binary64; for a conversion between formats, its result is.
    pub(super) fn is_double(self) -> bool {
        self.imm & DOUBLE != 0
    }

    /// The register added by a fused multiplication.
    pub(super) fn rs3(self) -> u8 {
        (self.imm >> RS3 & 31) as u8
    }
}

/// The instruction `w`, whose opcode is one of F's and D's; `None` is an illegal one.
pub(in crate::machine) fn decode(w: u32, len: u8) -> Option<Op> {
    use Code::*;
    let field = |at: u32| (w >> at & 31) as u8;
    let f3 = w >> 12 & 7;
    let op = |code: Code, imm: i32| {
        let rd = if code.writes_integer() && field(7) == 0 { SINK } else { field(7) };
        Op { code, rd, rs1: field(15), rs2: field(20), imm, len, next: 0, run: code }
    };
    let offset = (w as i32) >> 20;
    match w & 0x7f {
        0x07 if f3 == 2 => return Some(op(Flw, offset)),
        0x07 if f3 == 3 => return Some(op(Fld, offset)),
        0x27 if f3 == 2 => return Some(op(Fsw, offset & !31 | i32::from(field(7)))),
        0x27 if f3 == 3 => return Some(op(Fsd, offset & !31 | i32::from(field(7)))),
        0x07 | 0x27 => return None,
        _ => {}
    }
    let format = match w >> 25 & 3 {
        0 => 0,
        1 => DOUBLE,
        _ => return None,
    };
    let code = match w & 0x7f {
        0x43 => Fmadd,
        0x47 => Fmsub,
        0x4b => Fnmsub,
        0x4f => Fnmadd,
        _ => operation(w >> 27, field(20), f3, format == 0)?,
    };
    let mut imm = format;
    if code.rounds() {
        let is_reserved = Rounding::from_bits(f3 as u8).is_none() && f3 as u8 != DYNAMIC;
        if is_reserved {
            return None;
        }
        imm |= f3 as i32;
    }
    if w & 0x7f != 0x53 {
        imm |= i32::from(field(27)) << RS3;
    }
    Some(op(code, imm))
}

/// An operation of opcode `OP-FP`.
fn operation(f5: u32, rs2: u8, f3: u32, is_single: bool) -> Option<Code> {
    use Code::*;
    Some(match (f5, rs2, f3) {
        (0x00, ..) => Fadd,
        (0x01, ..) => Fsub,
        (0x02, ..) => Fmul,
        (0x03, ..) => Fdiv,
        (0x0b, 0, _) => Fsqrt,
        (0x04, _, 0) => Fsgnj,
        (0x04, _, 1) => Fsgnjn,
        (0x04, _, 2) => Fsgnjx,
        (0x05, _, 0) => Fmin,
        (0x05, _, 1) => Fmax,
        // The other format's number: there are two.
        (0x08, 1, _) if is_single => FcvtFormat,
        (0x08, 0, _) if !is_single => FcvtFormat,
        (0x14, _, 0) => Fle,
        (0x14, _, 1) => Flt,
        (0x14, _, 2) => Feq,
        (0x18, 0, _) => FcvtW,
        (0x18, 1, _) => FcvtWu,
        (0x18, 2, _) => FcvtL,
        (0x18, 3, _) => FcvtLu,
        (0x1a, 0, _) => FcvtFromW,
        (0x1a, 1, _) => FcvtFromWu,
        (0x1a, 2, _) => FcvtFromL,
        (0x1a, 3, _) => FcvtFromLu,
        (0x1c, 0, 0) => FmvX,
        (0x1c, 0, 1) => Fclass,
        (0x1e, 0, 0) => FmvFromX,
        _ => return None,
    })
}

impl Code {
    /// An instruction of F or D.
    #[inline(always)]
    pub fn is_float(self) -> bool {
        (Code::Flw as u8..=Code::Fclass as u8).contains(&(self as u8))
    }

    /// A floating-point operation whose destination is an integer register.
    pub(super) fn writes_integer(self) -> bool {
        (Code::FcvtW as u8..=Code::Fclass as u8).contains(&(self as u8))
    }

    /// The operation has a rounding mode; a reserved one is illegal even where nothing is rounded.
    pub(super) fn rounds(self) -> bool {
        use Code::*;
        matches!(self, Fmadd | Fmsub | Fnmsub | Fnmadd | Fadd | Fsub | Fmul | Fdiv | Fsqrt | FcvtFormat)
            || matches!(
                self,
                FcvtFromW | FcvtFromWu | FcvtFromL | FcvtFromLu | FcvtW | FcvtWu | FcvtL | FcvtLu
            )
    }
}
