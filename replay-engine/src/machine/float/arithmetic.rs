//! Sums, products, quotients and roots.
//!
//! Each is the host's where that makes no difference, see `host.rs`.

use super::number::{Number, Value, has_nan, shift_right_sticky};
use super::{Environment, Format, Rounding, flag, host};

/// Where [`total`] puts the leading bit of both terms: a bit is left for the carry.
const TERM_LEAD: u32 = 126;

/// `a + b`.
pub fn add<F: Format>(a: u64, b: u64, env: &mut Environment) -> u64 {
    if let Some(sum) = host::add::<F>(a, b, env) {
        return sum;
    }
    if has_nan::<F>(&[a, b], env) {
        return F::NAN;
    }
    total::<F>(Value::unpack::<F>(a), Value::unpack::<F>(b), env)
}

/// `a - b`.
pub fn subtract<F: Format>(a: u64, b: u64, env: &mut Environment) -> u64 {
    add::<F>(a, b ^ F::SIGN, env)
}

/// `a * b`.
pub fn multiply<F: Format>(a: u64, b: u64, env: &mut Environment) -> u64 {
    if let Some(product) = host::multiply::<F>(a, b, env) {
        return product;
    }
    if has_nan::<F>(&[a, b], env) {
        return F::NAN;
    }
    match product(Value::unpack::<F>(a), Value::unpack::<F>(b)) {
        Some(product) => product.pack::<F>(env),
        None => env.invalid::<F>(),
    }
}

/// `a * b + c`, rounded once.
pub fn multiply_add<F: Format>(a: u64, b: u64, c: u64, env: &mut Environment) -> u64 {
    if let Some(sum) = host::multiply_add::<F>(a, b, c, env) {
        return sum;
    }
    let is_nan = has_nan::<F>(&[a, b, c], env);
    if has_nan::<F>(&[a, b], env) {
        return F::NAN;
    }
    // Infinity times zero is invalid even if a quiet NaN is added.
    let Some(product) = product(Value::unpack::<F>(a), Value::unpack::<F>(b)) else {
        return env.invalid::<F>();
    };
    if is_nan {
        return F::NAN;
    }
    total::<F>(product, Value::unpack::<F>(c), env)
}

/// `a / b`.
pub fn divide<F: Format>(a: u64, b: u64, env: &mut Environment) -> u64 {
    use Value::{Finite, Infinity, Zero};
    if let Some(quotient) = host::divide::<F>(a, b, env) {
        return quotient;
    }
    if has_nan::<F>(&[a, b], env) {
        return F::NAN;
    }
    let (a, b) = (Value::unpack::<F>(a), Value::unpack::<F>(b));
    let negative = a.is_negative() != b.is_negative();
    let quotient = match (a, b) {
        (Infinity(_), Infinity(_)) | (Zero(_), Zero(_)) => return env.invalid::<F>(),
        (Infinity(_), _) => Infinity(negative),
        (Zero(_), _) | (_, Infinity(_)) => Zero(negative),
        (Finite(_), Zero(_)) => {
            env.raise(flag::DZ);
            Infinity(negative)
        }
        (Finite(a), Finite(b)) => {
            // 64 bits by 64 bits, moved up by 64: a quotient of 64 or 65 bits, and a remainder.
            let (a, b) = (a.lead_at(127), b.lead_at(63));
            let (quotient, rest) = (a.significand / b.significand, a.significand % b.significand);
            let significand = quotient | u128::from(rest != 0);
            Finite(Number { negative, exponent: a.exponent - b.exponent, significand })
        }
    };
    quotient.pack::<F>(env)
}

/// The square root of `a`.
pub fn square_root<F: Format>(a: u64, env: &mut Environment) -> u64 {
    if let Some(root) = host::square_root::<F>(a, env) {
        return root;
    }
    if has_nan::<F>(&[a], env) {
        return F::NAN;
    }
    let root = match Value::unpack::<F>(a) {
        Value::Finite(number) if !number.negative => {
            // An even exponent, and 64 bits of root.
            let high = number.lead_at(127);
            let even = if high.exponent % 2 == 0 { high } else { number.lead_at(126) };
            let root = even.significand.isqrt();
            let significand = root | u128::from(root * root != even.significand);
            Value::Finite(Number { negative: false, exponent: even.exponent / 2, significand })
        }
        positive @ (Value::Zero(_) | Value::Infinity(false)) => positive,
        Value::Finite(_) | Value::Infinity(true) => return env.invalid::<F>(),
    };
    root.pack::<F>(env)
}

/// The exact product; none of infinity and zero.
fn product(a: Value, b: Value) -> Option<Value> {
    use Value::{Finite, Infinity, Zero};
    let negative = a.is_negative() != b.is_negative();
    Some(match (a, b) {
        (Infinity(_), Zero(_)) | (Zero(_), Infinity(_)) => return None,
        (Infinity(_), _) | (_, Infinity(_)) => Infinity(negative),
        (Zero(_), _) | (_, Zero(_)) => Zero(negative),
        (Finite(a), Finite(b)) => Finite(Number {
            negative,
            exponent: a.exponent + b.exponent,
            significand: a.significand * b.significand,
        }),
    })
}

/// The sum of two exact values, rounded.
fn total<F: Format>(a: Value, b: Value, env: &mut Environment) -> u64 {
    use Value::{Finite, Infinity, Zero};
    // A sum that cancels is +0, but -0 when rounding down.
    let nothing = Zero(env.rounding == Rounding::Down);
    let sum = match (a, b) {
        (Infinity(a), Infinity(b)) if a != b => return env.invalid::<F>(),
        (Infinity(_), _) => a,
        (_, Infinity(_)) => b,
        (Zero(a), Zero(b)) => {
            if a == b {
                Zero(a)
            } else {
                nothing
            }
        }
        (Zero(_), Finite(_)) => b,
        (Finite(_), Zero(_)) => a,
        (Finite(a), Finite(b)) => finite_total(a, b).map_or(nothing, Finite),
    };
    sum.pack::<F>(env)
}

/// The sum of two exact numbers, sticky; `None` is zero.
///
/// Many leading bits cancel only if the exponents are at most one apart, and then
/// nothing is lost: a product has at most 106 bits of the 127.
fn finite_total(a: Number, b: Number) -> Option<Number> {
    let (a, b) = (a.lead_at(TERM_LEAD), b.lead_at(TERM_LEAD));
    let a_is_larger = (a.exponent, a.significand) >= (b.exponent, b.significand);
    let (large, small) = if a_is_larger { (a, b) } else { (b, a) };
    let apart = large.exponent.abs_diff(small.exponent);
    let moved = shift_right_sticky(small.significand, apart);
    let significand =
        if large.negative == small.negative { large.significand + moved } else { large.significand - moved };
    (significand != 0).then_some(Number { significand, ..large })
}
