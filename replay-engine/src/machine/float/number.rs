//! Taking numbers apart, and the one place where we round results.

use super::{Environment, Format, Rounding, flag};

/// A finite number that is not zero: `significand * 2^exponent`.
///
/// Where the significand is not exact, its last bit is set for all that was lost
/// below it, and enough bits follow the precision for that bit to say only "more".
#[derive(Clone, Copy, Debug)]
pub(super) struct Number {
    pub(super) negative: bool,
    pub(super) exponent: i32,
    pub(super) significand: u128,
}

/// What a bit pattern stands for. NaNs are sorted out before, by [`has_nan`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    /// Zero; whether it is negative.
    Zero(bool),
    /// Infinity; whether it is negative.
    Infinity(bool),
    /// Anything else.
    Finite(Number),
}

impl Value {
    pub(super) fn unpack<F: Format>(bits: u64) -> Value {
        let negative = bits & F::SIGN != 0;
        let fraction = bits & ((1 << F::FRACTION) - 1);
        let magnitude = bits & (F::SIGN - 1);
        if magnitude >= F::INFINITY {
            return Value::Infinity(negative);
        }
        if magnitude == 0 {
            return Value::Zero(negative);
        }
        let field = (magnitude >> F::FRACTION) as i32;
        let hidden = if field == 0 { 0 } else { 1 << F::FRACTION };
        Value::Finite(Number {
            negative,
            exponent: field.max(1) - F::BIAS - F::FRACTION as i32,
            significand: u128::from(fraction | hidden),
        })
    }

    pub(super) fn pack<F: Format>(self, env: &mut Environment) -> u64 {
        match self {
            Value::Zero(negative) => sign::<F>(negative),
            Value::Infinity(negative) => sign::<F>(negative) | F::INFINITY,
            Value::Finite(number) => number.round::<F>(env),
        }
    }

    pub(super) fn is_negative(self) -> bool {
        match self {
            Value::Zero(negative) | Value::Infinity(negative) => negative,
            Value::Finite(number) => number.negative,
        }
    }
}

impl Number {
    /// The same number with its leading bit at `bit`, which must be above or at where it is.
    pub(super) fn lead_at(self, bit: u32) -> Number {
        let up = bit - self.leading_bit();
        Number { significand: self.significand << up, exponent: self.exponent - up as i32, ..self }
    }

    fn leading_bit(self) -> u32 {
        assert!(self.significand != 0, "a finite number is not zero");
        127 - self.significand.leading_zeros()
    }

    /// The number in format `F`, rounded; raises NX, UF and OF.
    pub(super) fn round<F: Format>(self, env: &mut Environment) -> u64 {
        // The leading bit's exponent, once the number is left-aligned.
        let exponent = self.exponent + self.leading_bit() as i32;
        let significand = self.significand << self.significand.leading_zeros();
        if exponent > F::BIAS {
            return self.overflow::<F>(env);
        }
        // Below the normal range, bits of the significand are missing.
        let missing = (1 - F::BIAS - exponent).max(0) as u32;
        let whole = 128 - F::PRECISION;
        let (kept, is_inexact) = env.rounding.shift(self.negative, significand, whole + missing);
        if is_inexact {
            env.raise(flag::NX);
            // Tiny after rounding: with an exponent without bounds, the rounded
            // number would still be below the normal range.
            let reaches_normal =
                missing == 1 && env.rounding.shift(self.negative, significand, whole).0 == 1 << F::PRECISION;
            if missing > 0 && !reaches_normal {
                env.raise(flag::UF);
            }
        }
        // One less than the field: the hidden bit adds it, as it adds one to a
        // subnormal that is rounded up to a normal number, or a carry to the next power.
        let field = (exponent + F::BIAS - 1).max(0) as u64;
        let magnitude = (field << F::FRACTION) + kept as u64;
        if magnitude >= F::INFINITY {
            return self.overflow::<F>(env);
        }
        sign::<F>(self.negative) | magnitude
    }

    fn overflow<F: Format>(self, env: &mut Environment) -> u64 {
        env.raise(flag::OF | flag::NX);
        let stays_finite = match env.rounding {
            Rounding::NearestEven | Rounding::NearestAway => false,
            Rounding::TowardZero => true,
            Rounding::Down => !self.negative,
            Rounding::Up => self.negative,
        };
        sign::<F>(self.negative) | (F::INFINITY - u64::from(stays_finite))
    }

    /// The magnitude as an integer, rounded, and whether that is inexact; `u128::MAX` for
    /// one that no register holds.
    pub(super) fn integer(self, rounding: Rounding) -> (u128, bool) {
        match self.exponent {
            65.. => (u128::MAX, false),
            0..65 => (self.significand << self.exponent, false),
            _ => rounding.shift(self.negative, self.significand, self.exponent.unsigned_abs()),
        }
    }
}

impl Rounding {
    /// `significand / 2^dropped` rounded to an integer, and whether that is inexact.
    /// `dropped` is at least one, and `significand` is not zero.
    fn shift(self, negative: bool, significand: u128, dropped: u32) -> (u128, bool) {
        let kept = significand.checked_shr(dropped).unwrap_or(0);
        // What is dropped, left-aligned. Below half of the last place all are alike.
        let rest = if dropped <= 128 { significand << (128 - dropped) } else { 1 };
        let half = 1u128 << 127;
        let goes_up = match self {
            Rounding::NearestEven => rest > half || (rest == half && kept & 1 == 1),
            Rounding::TowardZero => false,
            Rounding::Down => negative && rest != 0,
            Rounding::Up => !negative && rest != 0,
            Rounding::NearestAway => rest >= half,
        };
        (kept + u128::from(goes_up), rest != 0)
    }
}

/// Whether the result is NaN because an operand is; a signaling one raises NV.
pub(super) fn has_nan<F: Format>(operands: &[u64], env: &mut Environment) -> bool {
    if operands.iter().any(|bits| is_signaling::<F>(*bits)) {
        env.raise(flag::NV);
    }
    operands.iter().any(|bits| is_nan::<F>(*bits))
}

pub(super) fn is_nan<F: Format>(bits: u64) -> bool {
    bits & (F::SIGN - 1) > F::INFINITY
}

pub(super) fn is_signaling<F: Format>(bits: u64) -> bool {
    is_nan::<F>(bits) && bits & F::QUIET == 0
}

pub(super) fn sign<F: Format>(negative: bool) -> u64 {
    if negative { F::SIGN } else { 0 }
}

/// `significand / 2^right`, its last bit set if any that is lost was.
pub(super) fn shift_right_sticky(significand: u128, right: u32) -> u128 {
    let kept = significand.checked_shr(right).unwrap_or(0);
    let lost = if right < 128 { kept << right != significand } else { significand != 0 };
    kept | u128::from(lost)
}
