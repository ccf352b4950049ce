//! F and D: what the instructions do around the exact model of their arithmetic.

use crate::encoding::opcode::*;
use crate::interpreter::{LOAD_ACCESS, Plain, Stop, sign_extend, word};
use crate::model::{DOUBLE, Datum, Exact, Layout, Operation, SINGLE, converted};
use heddle_replay_engine::machine::float::{Rounding, flag};
use num_bigint::BigUint;

/// The upper half of a register that holds a binary32.
pub const BOX: u64 = 0xffff_ffff << 32;

/// What an operation gives, for a register of either kind.
enum Answer {
    Float(u64),
    Integer(u64),
}

/// That, and the flags it raises.
type Answered = Result<(Answer, u8), Stop>;

impl Plain {
    /// An instruction of one of F's and D's opcodes.
    pub fn float(&mut self, w: u32, illegal: Stop) -> Result<(), Stop> {
        if !self.has_floats {
            return Err(illegal);
        }
        let rd = (w >> 7 & 0b1_1111) as usize;
        let base = self.x[(w >> 15 & 0b1_1111) as usize];
        let size = match w >> 12 & 0b111 {
            0b010 => 4,
            0b011 => 8,
            // Of no load or store.
            _ => 0,
        };
        match w & 0b111_1111 {
            LOAD_FP | STORE_FP if size == 0 => return Err(illegal),
            LOAD_FP => {
                let address = base.wrapping_add(sign_extend(u64::from(w >> 20), 12));
                let bits = self.load(address, size, LOAD_ACCESS)?;
                self.f[rd] = if size == 4 { bits | BOX } else { bits };
                return Ok(());
            }
            STORE_FP => {
                let offset = sign_extend(u64::from(w >> 25 << 5 | w >> 7 & 0b1_1111), 12);
                let bits = self.f[(w >> 20 & 0b1_1111) as usize];
                return self.store(base.wrapping_add(offset), size, bits);
            }
            _ => {}
        }
        let (layout, other) = match w >> 25 & 0b11 {
            0b00 => (SINGLE, DOUBLE),
            0b01 => (DOUBLE, SINGLE),
            _ => return Err(illegal),
        };
        let (answer, flags) = match w & 0b111_1111 {
            OP_FP => self.operation(w, layout, other, illegal)?,
            fused => self.fused(fused, w, layout, illegal)?,
        };
        match answer {
            Answer::Float(bits) => self.f[rd] = if layout == SINGLE { bits | BOX } else { bits },
            Answer::Integer(value) => self.x[rd] = value,
        }
        self.fcsr |= u64::from(flags);
        Ok(())
    }

    /// The number in a register; what has no box is no binary32.
    fn number(&self, register: u32, layout: Layout) -> u64 {
        let bits = self.f[(register & 0b1_1111) as usize];
        match layout {
            DOUBLE => bits,
            _ if bits & BOX == BOX => bits & !BOX,
            _ => SINGLE.nan(),
        }
    }

    fn rounding(&self, w: u32, illegal: Stop) -> Result<Rounding, Stop> {
        let mode = match w >> 12 & 0b111 {
            0b111 => self.fcsr >> 5,
            mode => u64::from(mode),
        };
        match mode {
            0b000 => Ok(Rounding::NearestEven),
            0b001 => Ok(Rounding::TowardZero),
            0b010 => Ok(Rounding::Down),
            0b011 => Ok(Rounding::Up),
            0b100 => Ok(Rounding::NearestAway),
            // What `frm` holds is not known before.
            _ => Err(match illegal {
                Stop::Exception(cause, value) if w >> 12 & 0b111 == 0b111 => Stop::Fault(cause, value),
                known => known,
            }),
        }
    }

    /// fmadd, fmsub, fnmsub, fnmadd.
    fn fused(&self, opcode: u32, w: u32, layout: Layout, illegal: Stop) -> Answered {
        let mode = self.rounding(w, illegal)?;
        let [a, b, c] = [15, 20, 27].map(|at| self.number(w >> at, layout));
        let minus = layout.sign(true);
        let operands = match opcode {
            MADD => [a, b, c],
            MSUB => [a, b, c ^ minus],
            NMSUB => [a ^ minus, b, c],
            _ => [a ^ minus, b, c ^ minus],
        };
        let (bits, flags) = layout.expected(Operation::MultiplyAdd, operands, mode);
        Ok((Answer::Float(bits), flags))
    }

    /// An instruction of opcode `OP-FP`.
    fn operation(&self, w: u32, layout: Layout, other: Layout, illegal: Stop) -> Answered {
        let (a, b) = (self.number(w >> 15, layout), self.number(w >> 20, layout));
        let raw = self.f[(w >> 15 & 0b1_1111) as usize];
        let x = self.x[(w >> 15 & 0b1_1111) as usize];
        let (function, field, funct3) = (w >> 27, w >> 20 & 0b1_1111, w >> 12 & 0b111);
        let minus = layout.sign(true);
        let arithmetic = |operation: Operation| -> Answered {
            let mode = self.rounding(w, illegal)?;
            let (bits, flags) = layout.expected(operation, [a, b, 0], mode);
            Ok((Answer::Float(bits), flags))
        };
        let float = |(bits, flags): (u64, u8)| -> Answered { Ok((Answer::Float(bits), flags)) };
        let integer = |(value, flags): (u64, u8)| -> Answered { Ok((Answer::Integer(value), flags)) };
        match (function, field, funct3) {
            (0b00000, ..) => arithmetic(Operation::Add),
            (0b00001, ..) => arithmetic(Operation::Subtract),
            (0b00010, ..) => arithmetic(Operation::Multiply),
            (0b00011, ..) => arithmetic(Operation::Divide),
            (0b01011, 0, _) => arithmetic(Operation::Root),
            // fsgnj, fsgnjn, fsgnjx.
            (0b00100, _, 0b000) => float((a & !minus | b & minus, 0)),
            (0b00100, _, 0b001) => float((a & !minus | !b & minus, 0)),
            (0b00100, _, 0b010) => float((a ^ b & minus, 0)),
            // fmin, fmax.
            (0b00101, _, 0b000) => float(chosen(layout, a, b, position(layout, a) < position(layout, b))),
            (0b00101, _, 0b001) => float(chosen(layout, a, b, position(layout, a) > position(layout, b))),
            // fcvt between formats.
            (0b01000, 0b0_0001, _) if layout == SINGLE => {
                float(converted(self.number(w >> 15, other), other, layout, self.rounding(w, illegal)?))
            }
            (0b01000, 0b0_0000, _) if layout == DOUBLE => {
                float(converted(self.number(w >> 15, other), other, layout, self.rounding(w, illegal)?))
            }
            // fle, flt, feq.
            (0b10100, _, 0b000) => {
                let holds = is_equal(layout, a, b) || position(layout, a) < position(layout, b);
                integer(compared(layout, a, b, holds, false))
            }
            (0b10100, _, 0b001) => {
                let holds = !is_equal(layout, a, b) && position(layout, a) < position(layout, b);
                integer(compared(layout, a, b, holds, false))
            }
            (0b10100, _, 0b010) => integer(compared(layout, a, b, is_equal(layout, a, b), true)),
            // fcvt.w, fcvt.wu, fcvt.l, fcvt.lu; and back.
            (0b11000, 0b0_0000..=0b0_0011, _) => {
                let width = if field & 0b10 == 0 { 32 } else { 64 };
                integer(layout.to_integer(a, width, field & 1 == 0, self.rounding(w, illegal)?))
            }
            (0b11010, 0b0_0000..=0b0_0011, _) => {
                let value = match field {
                    0b0_0000 => i128::from(x as i32),
                    0b0_0001 => i128::from(x as u32),
                    0b0_0010 => i128::from(x as i64),
                    _ => i128::from(x),
                };
                float(rounded(value, layout, self.rounding(w, illegal)?))
            }
            // fmv.x, fclass, fmv.w.x and fmv.d.x.
            (0b11100, 0, 0b000) => integer((if layout == SINGLE { word(raw) } else { raw }, 0)),
            (0b11100, 0, 0b001) => integer((1 << class(layout, a), 0)),
            (0b11110, 0, 0b000) => float((if layout == SINGLE { x & !BOX } else { x }, 0)),
            _ => Err(illegal),
        }
    }
}

fn is_signaling(layout: Layout, bits: u64) -> bool {
    layout.parse(bits).1 == Datum::Signaling
}

fn is_nan(layout: Layout, bits: u64) -> bool {
    matches!(layout.parse(bits).1, Datum::Quiet | Datum::Signaling)
}

/// Where a number lies among all: -0 just below +0.
fn position(layout: Layout, bits: u64) -> i128 {
    let magnitude = i128::from(bits & (layout.sign(true) - 1));
    if bits & layout.sign(true) == 0 { magnitude } else { -1 - magnitude }
}

fn is_equal(layout: Layout, a: u64, b: u64) -> bool {
    a == b || (a | b) & (layout.sign(true) - 1) == 0
}

/// The smaller or larger number, and the flags; a NaN only if there is no number.
fn chosen(layout: Layout, a: u64, b: u64, is_first: bool) -> (u64, u8) {
    let is_invalid = is_signaling(layout, a) || is_signaling(layout, b);
    let bits = match (is_nan(layout, a), is_nan(layout, b)) {
        (true, true) => layout.nan(),
        (true, false) => b,
        (false, true) => a,
        (false, false) => if_else(is_first, a, b),
    };
    (bits, if is_invalid { flag::NV } else { 0 })
}

fn if_else(is_first: bool, first: u64, second: u64) -> u64 {
    if is_first { first } else { second }
}

/// Whether what `holds` of numbers holds; `is_quiet` takes no offence at a quiet NaN.
fn compared(layout: Layout, a: u64, b: u64, holds: bool, is_quiet: bool) -> (u64, u8) {
    let is_unordered = is_nan(layout, a) || is_nan(layout, b);
    let is_invalid = is_signaling(layout, a) || is_signaling(layout, b) || (is_unordered && !is_quiet);
    (u64::from(holds && !is_unordered), if is_invalid { flag::NV } else { 0 })
}

fn rounded(value: i128, to: Layout, mode: Rounding) -> (u64, u8) {
    if value == 0 {
        return (0, 0);
    }
    to.round(&Exact::integer(value < 0, BigUint::from(value.unsigned_abs()), 0), mode)
}

/// The number of `fclass`'s bit.
fn class(layout: Layout, bits: u64) -> u32 {
    let hidden = 1u64 << (layout.precision - 1);
    match layout.parse(bits) {
        (true, Datum::Infinite) => 0,
        (true, Datum::Finite(0, _)) => 3,
        (true, Datum::Finite(integer, _)) if integer < hidden => 2,
        (true, Datum::Finite(..)) => 1,
        (false, Datum::Finite(0, _)) => 4,
        (false, Datum::Finite(integer, _)) if integer < hidden => 5,
        (false, Datum::Finite(..)) => 6,
        (false, Datum::Infinite) => 7,
        (_, Datum::Signaling) => 8,
        (_, Datum::Quiet) => 9,
    }
}
