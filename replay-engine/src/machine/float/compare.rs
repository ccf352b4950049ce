//! Comparisons, minimum and maximum, and classes.

use super::number::{Value, has_nan, is_nan, is_signaling};
use super::{Environment, Format, flag};

/// Whether `a == b`; only a signaling NaN is invalid.
pub fn equal<F: Format>(a: u64, b: u64, env: &mut Environment) -> bool {
    !has_nan::<F>(&[a, b], env) && (a == b || are_zeros::<F>(a, b))
}

/// Whether `a < b`; any NaN is invalid.
pub fn less<F: Format>(a: u64, b: u64, env: &mut Environment) -> bool {
    is_ordered::<F>(a, b, env) && order::<F>(a) < order::<F>(b) && !are_zeros::<F>(a, b)
}

/// Whether `a <= b`; any NaN is invalid.
pub fn less_or_equal<F: Format>(a: u64, b: u64, env: &mut Environment) -> bool {
    is_ordered::<F>(a, b, env) && (order::<F>(a) <= order::<F>(b) || are_zeros::<F>(a, b))
}

/// IEEE 754-2019's minimumNumber: -0 is less than +0, and a number is preferred to a NaN.
pub fn minimum<F: Format>(a: u64, b: u64, env: &mut Environment) -> u64 {
    let smaller = if order::<F>(a) <= order::<F>(b) { a } else { b };
    prefer_number::<F>(a, b, smaller, env)
}

/// IEEE 754-2019's maximumNumber.
pub fn maximum<F: Format>(a: u64, b: u64, env: &mut Environment) -> u64 {
    let larger = if order::<F>(a) >= order::<F>(b) { a } else { b };
    prefer_number::<F>(a, b, larger, env)
}

/// `fclass`: one bit of ten.
pub fn class<F: Format>(a: u64) -> u64 {
    let negative = a & F::SIGN != 0;
    let mirrored = |positive: u32| if negative { 7 - positive } else { positive };
    let bit = match Value::unpack::<F>(a) {
        _ if is_signaling::<F>(a) => 8,
        _ if is_nan::<F>(a) => 9,
        Value::Zero(_) => mirrored(4),
        Value::Finite(number) if number.significand >> F::FRACTION == 0 => mirrored(5),
        Value::Finite(_) => mirrored(6),
        Value::Infinity(_) => mirrored(7),
    };
    1 << bit
}

fn prefer_number<F: Format>(a: u64, b: u64, chosen: u64, env: &mut Environment) -> u64 {
    if !has_nan::<F>(&[a, b], env) {
        return chosen;
    }
    match (is_nan::<F>(a), is_nan::<F>(b)) {
        (true, true) => F::NAN,
        (true, false) => b,
        (false, _) => a,
    }
}

fn is_ordered<F: Format>(a: u64, b: u64, env: &mut Environment) -> bool {
    let is_nan = has_nan::<F>(&[a, b], env);
    if is_nan {
        env.raise(flag::NV);
    }
    !is_nan
}

fn are_zeros<F: Format>(a: u64, b: u64) -> bool {
    (a | b) & (F::SIGN - 1) == 0
}

/// Orders numbers as integers, -0 just below +0.
fn order<F: Format>(bits: u64) -> i64 {
    let magnitude = (bits & (F::SIGN - 1)) as i64;
    if bits & F::SIGN != 0 { !magnitude } else { magnitude }
}
