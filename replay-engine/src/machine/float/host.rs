//! The host's floating point, where no flag can change.
//!
//! NX stays raised until software clears it, and while it is, an operation need not
//! find out whether its result is exact. The host is asked if moreover
//!
//! - results are rounded to the nearest, ties to even: the host always does that, and
//!   nothing in Rust may change it;
//! - every operand is a normal number or zero: no infinity, no NaN with a payload of
//!   the host's, and nothing subnormal, on which hosts are slow;
//! - the result is finite and larger than the smallest normal number, or a zero that
//!   comes of a zero: neither NV nor DZ, OF or UF is raised.
//!
//! All else is `None` here, and computed in integers. The bits are those of the
//! integers, on every host: of a sum, product, quotient, root or fused multiplication
//! IEEE 754 allows but one result, and Rust gives that one on x86-64, where it uses
//! SSE2 and never the x87, and on aarch64. `mul_add` is rounded once everywhere: it is
//! an instruction, or else the C library's `fma`, which takes that instruction where
//! the processor has it, and computes the same without.

use super::{Environment, Format, Rounding};
use std::ops::{Add, Div, Mul};

/// A type of the host's floating point.
///
/// Its module is private, so only the types below can be a [`Format`]'s.
pub trait Float: Copy + Add<Output = Self> + Mul<Output = Self> + Div<Output = Self> {
    /// The number whose bit pattern is in the low bits.
    fn of(bits: u64) -> Self;
    /// The number's bit pattern.
    fn bits(self) -> u64;
    /// The square root.
    fn square_root(self) -> Self;
    /// `self * b + c`, rounded once.
    fn multiply_add(self, b: Self, c: Self) -> Self;
}

impl Float for f32 {
    fn of(bits: u64) -> f32 {
        f32::from_bits(bits as u32)
    }
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }
    fn square_root(self) -> f32 {
        self.sqrt()
    }
    fn multiply_add(self, b: f32, c: f32) -> f32 {
        self.mul_add(b, c)
    }
}

impl Float for f64 {
    fn of(bits: u64) -> f64 {
        f64::from_bits(bits)
    }
    fn bits(self) -> u64 {
        self.to_bits()
    }
    fn square_root(self) -> f64 {
        self.sqrt()
    }
    fn multiply_add(self, b: f64, c: f64) -> f64 {
        self.mul_add(b, c)
    }
}

/// `a + b`.
pub(super) fn add<F: Format>(a: u64, b: u64, env: &Environment) -> Option<u64> {
    ask::<F, 2>([a, b], env, |[a, b]| a + b)
}

/// `a * b`.
pub(super) fn multiply<F: Format>(a: u64, b: u64, env: &Environment) -> Option<u64> {
    ask::<F, 2>([a, b], env, |[a, b]| a * b)
}

/// `a * b + c`, rounded once.
pub(super) fn multiply_add<F: Format>(a: u64, b: u64, c: u64, env: &Environment) -> Option<u64> {
    ask::<F, 3>([a, b, c], env, |[a, b, c]| a.multiply_add(b, c))
}

/// `a / b`.
pub(super) fn divide<F: Format>(a: u64, b: u64, env: &Environment) -> Option<u64> {
    ask::<F, 2>([a, b], env, |[a, b]| a / b)
}

/// The square root of `a`.
pub(super) fn square_root<F: Format>(a: u64, env: &Environment) -> Option<u64> {
    ask::<F, 1>([a], env, |[a]| a.square_root())
}

/// What the host computes, if it raises nothing but NX.
fn ask<F: Format, const N: usize>(
    operands: [u64; N],
    env: &Environment,
    compute: impl FnOnce([F::Host; N]) -> F::Host,
) -> Option<u64> {
    let may_ask = env.is_inexact && env.rounding == Rounding::NearestEven;
    if !may_ask || !operands.iter().all(|bits| is_usual::<F>(*bits)) {
        return None;
    }
    let result = compute(operands.map(F::Host::of)).bits();
    let size = magnitude::<F>(result);
    let is_settled = if size == 0 {
        // Exact if `a` or `b` is zero, and else too small a product or quotient. That a
        // fused operation's `c` is zero says nothing: the product may still be too small.
        operands.iter().take(2).any(|bits| magnitude::<F>(*bits) == 0)
    } else {
        // The smallest normal number may have been rounded up to, from what raises UF.
        size > F::SMALLEST_NORMAL && size < F::INFINITY
    };
    is_settled.then_some(result)
}

/// A normal number, or zero.
fn is_usual<F: Format>(bits: u64) -> bool {
    let size = magnitude::<F>(bits);
    size == 0 || (F::SMALLEST_NORMAL..F::INFINITY).contains(&size)
}

fn magnitude<F: Format>(bits: u64) -> u64 {
    bits & (F::SIGN - 1)
}
