//! The model: exact results as big numbers, rounded as the standard's text says.
//!
//! Slow and plain. It shares nothing with the machine's arithmetic but the names of
//! rounding modes and flags.

use heddle_replay_engine::machine::float::{Rounding, flag};
use num_bigint::{BigInt, BigUint, Sign};

/// A binary interchange format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub precision: u32,
    pub width: u32,
}

pub const SINGLE: Layout = Layout { precision: 24, width: 32 };
pub const DOUBLE: Layout = Layout { precision: 53, width: 64 };

/// What a bit pattern stands for: a NaN, or a sign and a magnitude.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datum {
    Quiet,
    Signaling,
    Infinite,
    /// An integer times a power of two.
    Finite(u64, i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    Root,
    MultiplyAdd,
}

impl Operation {
    fn operands(self) -> usize {
        match self {
            Operation::Root => 1,
            Operation::MultiplyAdd => 3,
            _ => 2,
        }
    }
}

/// A sign and an exact magnitude, an integer times a power of two; `None` is infinite.
type Term = (bool, Option<(BigUint, i64)>);

/// A magnitude that is not zero: `numerator / denominator * 2^exponent`, or its square root.
pub struct Exact {
    pub negative: bool,
    pub numerator: BigUint,
    pub denominator: BigUint,
    pub exponent: i64,
    pub is_root: bool,
}

fn up(value: &BigUint, bits: i64) -> BigUint {
    value << u64::try_from(bits.max(0)).unwrap()
}

fn is_zero(value: &BigUint) -> bool {
    value.bits() == 0
}

impl Exact {
    pub fn integer(negative: bool, numerator: BigUint, exponent: i64) -> Exact {
        Exact { negative, numerator, denominator: BigUint::from(1u8), exponent, is_root: false }
    }

    /// The magnitude times `2^places`, cut to an integer, and whether nothing was cut.
    fn cut(&self, places: i64) -> (BigUint, bool) {
        let shift = self.exponent + if self.is_root { 2 * places } else { places };
        let (numerator, denominator) = (up(&self.numerator, shift), up(&self.denominator, -shift));
        let quotient = &numerator / &denominator;
        let is_whole = &quotient * &denominator == numerator;
        if !self.is_root {
            return (quotient, is_whole);
        }
        let root = quotient.sqrt();
        let is_square = &root * &root == quotient;
        (root, is_whole && is_square)
    }

    /// The magnitude times `2^places`, rounded to an integer, and whether that is exact.
    pub fn rounded(&self, places: i64, mode: Rounding) -> (BigUint, bool) {
        let (halves, is_whole) = self.cut(places + 1);
        let (below, has_half) = (&halves >> 1u32, halves.bit(0));
        let is_exact = is_whole && !has_half;
        let goes_up = match mode {
            Rounding::NearestEven => has_half && (!is_whole || below.bit(0)),
            Rounding::NearestAway => has_half,
            Rounding::TowardZero => false,
            Rounding::Down => !is_exact && self.negative,
            Rounding::Up => !is_exact && !self.negative,
        };
        (below + u32::from(goes_up), is_exact)
    }

    /// The places at which the magnitude, cut, has `precision` bits.
    fn places(&self, precision: u32) -> i64 {
        let guess = self.numerator.bits() as i64 - self.denominator.bits() as i64 + self.exponent;
        let mut places = i64::from(precision) - if self.is_root { guess / 2 } else { guess };
        loop {
            let bits = self.cut(places).0.bits() as i64;
            if bits == i64::from(precision) {
                return places;
            }
            places += i64::from(precision) - bits;
        }
    }
}

impl Layout {
    pub fn exponent_max(self) -> i64 {
        (1 << (self.width - self.precision - 1)) - 1
    }

    pub fn sign(self, negative: bool) -> u64 {
        u64::from(negative) << (self.width - 1)
    }

    pub fn infinity(self) -> u64 {
        ((1 << (self.width - self.precision)) - 1) << (self.precision - 1)
    }

    pub fn nan(self) -> u64 {
        self.infinity() | 1 << (self.precision - 2)
    }

    pub fn parse(self, bits: u64) -> (bool, Datum) {
        let stored = self.precision - 1;
        let fraction = bits & ((1 << stored) - 1);
        let field = bits >> stored & ((1 << (self.width - self.precision)) - 1);
        let least = 1 - self.exponent_max() - i64::from(stored);
        let datum = if bits & self.infinity() == self.infinity() {
            match fraction {
                0 => Datum::Infinite,
                _ if fraction >> (stored - 1) == 1 => Datum::Quiet,
                _ => Datum::Signaling,
            }
        } else if field == 0 {
            Datum::Finite(fraction, least)
        } else {
            Datum::Finite(fraction | 1 << stored, least + field as i64 - 1)
        };
        (bits >> (self.width - 1) & 1 == 1, datum)
    }

    /// `exact` in this format, and the flags that raises.
    pub fn round(self, exact: &Exact, mode: Rounding) -> (u64, u8) {
        let precision = i64::from(self.precision);
        let (largest, least) = (self.exponent_max(), 1 - self.exponent_max());
        // As if the exponent had no bounds.
        let free_places = exact.places(self.precision);
        let free = exact.rounded(free_places, mode).0;
        let free_exponent = free.bits() as i64 - 1 - free_places;
        let sign = self.sign(exact.negative);
        if free_exponent > largest {
            let to_infinity = match mode {
                Rounding::NearestEven | Rounding::NearestAway => true,
                Rounding::TowardZero => false,
                Rounding::Down => exact.negative,
                Rounding::Up => !exact.negative,
            };
            let magnitude = if to_infinity { self.infinity() } else { self.infinity() - 1 };
            return (sign | magnitude, flag::OF | flag::NX);
        }
        // As it is stored: no bit lies below the smallest subnormal number.
        let places = free_places.min(precision - 1 - least);
        let (stored, is_exact) = exact.rounded(places, mode);
        let is_tiny = free_exponent < least;
        let flags = match (is_exact, is_tiny) {
            (true, _) => 0,
            (false, false) => flag::NX,
            (false, true) => flag::NX | flag::UF,
        };
        let exponent = stored.bits() as i64 - 1 - places;
        let magnitude = if is_zero(&stored) || exponent < least {
            u64::try_from(&stored).unwrap()
        } else {
            let aligned = &stored >> (stored.bits() - u64::from(self.precision));
            let field = (exponent + largest) as u64;
            (field << (self.precision - 1)) + u64::try_from(&aligned).unwrap() - (1 << (self.precision - 1))
        };
        (sign | magnitude, flags)
    }

    /// The result and flags of `operation`.
    pub fn expected(self, operation: Operation, operands: [u64; 3], mode: Rounding) -> (u64, u8) {
        let data = operands.map(|bits| self.parse(bits));
        let used = &data[..operation.operands()];
        let is_signaling = used.iter().any(|(_, datum)| *datum == Datum::Signaling);
        let is_nan = is_signaling || used.iter().any(|(_, datum)| *datum == Datum::Quiet);
        let invalid = (self.nan(), flag::NV);
        let is_no_product = |a: Datum, b: Datum| a == Datum::Infinite && matches!(b, Datum::Finite(0, _));
        let multiplies = matches!(operation, Operation::Multiply | Operation::MultiplyAdd);
        let (a, b) = (data[0].1, data[1].1);
        if multiplies && (is_no_product(a, b) || is_no_product(b, a)) {
            return invalid;
        }
        if is_nan {
            return (self.nan(), if is_signaling { flag::NV } else { 0 });
        }
        let [a, b, c] = data.map(|(negative, datum)| match datum {
            Datum::Finite(integer, exponent) => (negative, Some((BigUint::from(integer), exponent))),
            _ => (negative, None),
        });
        match operation {
            Operation::Add => self.sum(a, b, mode),
            Operation::Subtract => self.sum(a, (!b.0, b.1), mode),
            Operation::Multiply => match product(a, b) {
                (negative, None) => (self.sign(negative) | self.infinity(), 0),
                (negative, Some((integer, _))) if is_zero(&integer) => (self.sign(negative), 0),
                (negative, Some((integer, exponent))) => {
                    self.round(&Exact::integer(negative, integer, exponent), mode)
                }
            },
            Operation::MultiplyAdd => self.sum(product(a, b), c, mode),
            Operation::Divide => self.quotient(a, b, mode),
            Operation::Root => self.root(a, mode),
        }
    }

    fn sum(self, a: Term, b: Term, mode: Rounding) -> (u64, u8) {
        let ((m, e), (n, f)) = match (a.1, b.1) {
            (None, None) if a.0 != b.0 => return (self.nan(), flag::NV),
            (None, _) => return (self.sign(a.0) | self.infinity(), 0),
            (_, None) => return (self.sign(b.0) | self.infinity(), 0),
            (Some(a), Some(b)) => (a, b),
        };
        let least = e.min(f);
        let signed = |negative: bool, magnitude: BigUint| {
            BigInt::from_biguint(if negative { Sign::Minus } else { Sign::Plus }, magnitude)
        };
        let sum = signed(a.0, up(&m, e - least)) + signed(b.0, up(&n, f - least));
        match sum.sign() {
            Sign::NoSign if a.0 == b.0 => (self.sign(a.0), 0),
            Sign::NoSign => (self.sign(mode == Rounding::Down), 0),
            sign => self.round(&Exact::integer(sign == Sign::Minus, sum.magnitude().clone(), least), mode),
        }
    }

    fn quotient(self, a: Term, b: Term, mode: Rounding) -> (u64, u8) {
        let negative = a.0 != b.0;
        let (infinity, zero) = (self.sign(negative) | self.infinity(), self.sign(negative));
        match (a.1, b.1) {
            (None, None) => (self.nan(), flag::NV),
            (None, _) => (infinity, 0),
            (_, None) => (zero, 0),
            (Some((m, _)), Some((n, _))) if is_zero(&m) && is_zero(&n) => (self.nan(), flag::NV),
            (Some((m, _)), _) if is_zero(&m) => (zero, 0),
            (_, Some((n, _))) if is_zero(&n) => (infinity, flag::DZ),
            (Some((m, e)), Some((n, f))) => {
                let exponent = e - f;
                let exact = Exact { negative, numerator: m, denominator: n, exponent, is_root: false };
                self.round(&exact, mode)
            }
        }
    }

    fn root(self, a: Term, mode: Rounding) -> (u64, u8) {
        match a {
            (negative, Some((integer, _))) if is_zero(&integer) => (self.sign(negative), 0),
            (true, _) => (self.nan(), flag::NV),
            (_, None) => (self.infinity(), 0),
            (_, Some((integer, exponent))) => {
                let exact = Exact { is_root: true, ..Exact::integer(false, integer, exponent) };
                self.round(&exact, mode)
            }
        }
    }

    /// `bits` as an integer of `width` bits, sign-extended from 32, and the flags that raises.
    pub fn to_integer(self, bits: u64, width: u32, is_signed: bool, mode: Rounding) -> (u64, u8) {
        let one = || BigInt::from(1u8);
        let (least, most) = if is_signed {
            (-(one() << (width - 1)), (one() << (width - 1)) - 1u8)
        } else {
            (BigInt::ZERO, (one() << width) - 1u8)
        };
        let (negative, datum) = self.parse(bits);
        let (value, flags) = match datum {
            Datum::Quiet | Datum::Signaling => (most, flag::NV),
            Datum::Infinite => (if negative { least } else { most }, flag::NV),
            Datum::Finite(integer, exponent) => {
                let exact = Exact::integer(negative, BigUint::from(integer), exponent);
                let (magnitude, is_exact) = exact.rounded(0, mode);
                let value = if negative { -BigInt::from(magnitude) } else { BigInt::from(magnitude) };
                match value {
                    value if value < least => (least, flag::NV),
                    value if value > most => (most, flag::NV),
                    value => (value, if is_exact { 0 } else { flag::NX }),
                }
            }
        };
        // Two's complement by adding 2^64.
        let wrapped = (value + (one() << 64u32)) % (one() << 64u32);
        let register = u64::try_from(&wrapped).unwrap();
        (if width == 32 { register as i32 as u64 } else { register }, flags)
    }
}

/// The exact product; it is known to be one.
fn product(a: Term, b: Term) -> Term {
    let magnitude = match (a.1, b.1) {
        (Some((m, e)), Some((n, f))) => Some((m * n, e + f)),
        _ => None,
    };
    (a.0 != b.0, magnitude)
}

/// A number of one format in another, and the flags of it.
pub fn converted(bits: u64, from: Layout, to: Layout, mode: Rounding) -> (u64, u8) {
    match from.parse(bits) {
        (_, Datum::Signaling) => (to.nan(), flag::NV),
        (_, Datum::Quiet) => (to.nan(), 0),
        (negative, Datum::Infinite) => (to.sign(negative) | to.infinity(), 0),
        (negative, Datum::Finite(0, _)) => (to.sign(negative), 0),
        (negative, Datum::Finite(integer, exponent)) => {
            to.round(&Exact::integer(negative, BigUint::from(integer), exponent), mode)
        }
    }
}
