//! The F and D extensions: IEEE 754-2008 arithmetic, then the instructions.
//!
//! Arithmetic takes and gives bit patterns, in the low bits of a `u64`. Each
//! operation finds its exact result, or one with a sticky last bit, and rounds it
//! once, in `number.rs`. The host's flags and its NaNs are its own: its floating point
//! is used only where the result has the same bits and no flag can change, which
//! `host.rs` decides.

pub mod arithmetic;
pub mod compare;
pub mod convert;
pub(super) mod decode;
pub(super) mod disasm;
mod execute;
mod host;
mod number;

/// A binary interchange format.
pub trait Format {
    /// Bits of the significand, the hidden one among them.
    const PRECISION: u32;
    /// Bits of the whole.
    const WIDTH: u32;
    /// The host's type of the same format.
    type Host: host::Float;

    /// Bits of the significand that are stored.
    const FRACTION: u32 = Self::PRECISION - 1;
    /// Added to an exponent to store it; also the largest exponent.
    const BIAS: i32 = (1 << (Self::WIDTH - Self::PRECISION - 1)) - 1;
    /// The sign bit.
    const SIGN: u64 = 1 << (Self::WIDTH - 1);
    /// The smallest normal number.
    const SMALLEST_NORMAL: u64 = 1 << Self::FRACTION;
    /// Positive infinity.
    const INFINITY: u64 = Self::SIGN - (1 << Self::FRACTION);
    /// The bit that makes a NaN quiet.
    const QUIET: u64 = 1 << (Self::FRACTION - 1);
    /// The canonical NaN: what every operation gives that gives one.
    const NAN: u64 = Self::INFINITY | Self::QUIET;
}

/// binary32.
pub enum Single {}

impl Format for Single {
    const PRECISION: u32 = 24;
    const WIDTH: u32 = 32;
    type Host = f32;
}

/// binary64.
pub enum Double {}

impl Format for Double {
    const PRECISION: u32 = 53;
    const WIDTH: u32 = 64;
    type Host = f64;
}

/// Where a result goes that lies between two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest; of two as near to the even one.
    NearestEven,
    /// Towards zero.
    TowardZero,
    /// Towards negative infinity.
    Down,
    /// Towards positive infinity.
    Up,
    /// To the nearest; of two as near away from zero.
    NearestAway,
}

impl Rounding {
    /// All of them, in the order of their encoding.
    pub const ALL: [Rounding; 5] =
        [Rounding::NearestEven, Rounding::TowardZero, Rounding::Down, Rounding::Up, Rounding::NearestAway];

    /// From an instruction's `rm` or from `frm`; the others are reserved.
    pub fn from_bits(bits: u8) -> Option<Rounding> {
        Rounding::ALL.get(usize::from(bits)).copied()
    }
}

/// Bits of `fflags`.
pub mod flag {
    /// Inexact.
    pub const NX: u8 = 1;
    /// Underflow: tiny after rounding, and inexact.
    pub const UF: u8 = 2;
    /// Overflow.
    pub const OF: u8 = 4;
    /// A finite number was divided by zero.
    pub const DZ: u8 = 8;
    /// Invalid operation.
    pub const NV: u8 = 16;
}

/// What an operation is done under, and what it raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Environment {
    /// How results are rounded.
    pub rounding: Rounding,
    /// Flags raised so far, see [`flag`]; not always NX if `is_inexact`.
    pub flags: u8,
    /// NX was raised before, so that raising it once more changes nothing.
    pub is_inexact: bool,
}

impl Environment {
    /// Nothing is raised yet, nor was before.
    pub fn new(rounding: Rounding) -> Environment {
        Environment { rounding, flags: 0, is_inexact: false }
    }

    pub(crate) fn raise(&mut self, flags: u8) {
        self.flags |= flags;
    }

    /// The result of an invalid operation.
    pub(crate) fn invalid<F: Format>(&mut self) -> u64 {
        self.raise(flag::NV);
        F::NAN
    }
}
