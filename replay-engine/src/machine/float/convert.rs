//! Conversions between integers and both formats.

use super::number::{Number, Value, has_nan, is_nan};
use super::{Environment, Format, flag};

/// An integer type of the instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integer {
    /// 32 or 64.
    pub width: u32,
    /// Two's complement.
    pub is_signed: bool,
}

impl Integer {
    /// `w`.
    pub const WORD: Integer = Integer { width: 32, is_signed: true };
    /// `wu`.
    pub const WORD_UNSIGNED: Integer = Integer { width: 32, is_signed: false };
    /// `l`.
    pub const LONG: Integer = Integer { width: 64, is_signed: true };
    /// `lu`.
    pub const LONG_UNSIGNED: Integer = Integer { width: 64, is_signed: false };

    /// The largest magnitude on one side of zero.
    fn bound(self, negative: bool) -> u128 {
        match (self.is_signed, negative) {
            (true, true) => 1 << (self.width - 1),
            (true, false) => (1 << (self.width - 1)) - 1,
            (false, true) => 0,
            (false, false) => (1 << self.width) - 1,
        }
    }
}

/// `a` as an integer, as it is put in a register: 32 bits are sign-extended, also
/// unsigned ones. What does not fit is invalid and gives the nearest that does; NaN the largest.
pub fn to_integer<F: Format>(a: u64, to: Integer, env: &mut Environment) -> u64 {
    let value = Value::unpack::<F>(a);
    let (magnitude, is_inexact) = match value {
        Value::Zero(_) => (0, false),
        Value::Infinity(_) => (u128::MAX, false),
        Value::Finite(number) => number.integer(env.rounding),
    };
    let negative = value.is_negative() && !is_nan::<F>(a);
    let bound = to.bound(negative);
    if magnitude > bound {
        env.raise(flag::NV);
    } else if is_inexact {
        env.raise(flag::NX);
    }
    let magnitude = magnitude.min(bound) as u64;
    let integer = if negative { magnitude.wrapping_neg() } else { magnitude };
    if to.width == 32 { integer as i32 as u64 } else { integer }
}

/// The integer in the register `a`, in format `F`.
pub fn from_integer<F: Format>(a: u64, from: Integer, env: &mut Environment) -> u64 {
    let (negative, magnitude) = match from {
        Integer::WORD => ((a as i32) < 0, u64::from((a as i32).unsigned_abs())),
        Integer::WORD_UNSIGNED => (false, u64::from(a as u32)),
        Integer { is_signed: true, .. } => ((a as i64) < 0, (a as i64).unsigned_abs()),
        _ => (false, a),
    };
    if magnitude == 0 {
        return 0;
    }
    Number { negative, exponent: 0, significand: u128::from(magnitude) }.round::<F>(env)
}

/// `a` of format `From` in format `To`.
pub fn to_format<From: Format, To: Format>(a: u64, env: &mut Environment) -> u64 {
    if has_nan::<From>(&[a], env) {
        return To::NAN;
    }
    Value::unpack::<From>(a).pack::<To>(env)
}
