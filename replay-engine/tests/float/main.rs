//! Floating point against an exact model: every operation, rounding mode and flag.
//!
//! `HEDDLE_SEEDS=N` tries N seeds, `HEDDLE_SEED=S` that one alone.
#![allow(clippy::unwrap_used, missing_docs)]

mod host;
mod model;
mod operands;

use heddle_replay_engine::machine::float::arithmetic::{
    add, divide, multiply, multiply_add, square_root, subtract,
};
use heddle_replay_engine::machine::float::compare::{class, equal, less, less_or_equal, maximum, minimum};
use heddle_replay_engine::machine::float::convert::{Integer, from_integer, to_format, to_integer};
use heddle_replay_engine::machine::float::{Double, Environment, Format, Rounding, Single, flag};
use model::{DOUBLE, Datum, Exact, Layout, Operation, SINGLE, converted};
use num_bigint::BigUint;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::num::FpCategory;

const LAYOUTS: [Layout; 2] = [SINGLE, DOUBLE];
const BINARY: [Operation; 4] = [Operation::Add, Operation::Subtract, Operation::Multiply, Operation::Divide];
const INTEGERS: [Integer; 4] = [Integer::WORD, Integer::WORD_UNSIGNED, Integer::LONG, Integer::LONG_UNSIGNED];

fn seeds(default: u64) -> std::ops::Range<u64> {
    let read = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
    match (read("HEDDLE_SEED"), read("HEDDLE_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (_, count) => 0..count.unwrap_or(default),
    }
}

fn run<F: Format>(operation: Operation, operands: [u64; 3], mode: Rounding) -> (u64, u8) {
    run_in::<F>(operation, operands, Environment::new(mode))
}

fn run_in<F: Format>(operation: Operation, [a, b, c]: [u64; 3], mut env: Environment) -> (u64, u8) {
    let bits = match operation {
        Operation::Add => add::<F>(a, b, &mut env),
        Operation::Subtract => subtract::<F>(a, b, &mut env),
        Operation::Multiply => multiply::<F>(a, b, &mut env),
        Operation::Divide => divide::<F>(a, b, &mut env),
        Operation::Root => square_root::<F>(a, &mut env),
        Operation::MultiplyAdd => multiply_add::<F>(a, b, c, &mut env),
    };
    (bits, env.flags)
}

/// One operation in all rounding modes.
fn check(layout: Layout, operation: Operation, operands: [u64; 3]) {
    for mode in Rounding::ALL {
        let found = match layout {
            SINGLE => run::<Single>(operation, operands, mode),
            _ => run::<Double>(operation, operands, mode),
        };
        let expected = layout.expected(operation, operands, mode);
        assert_eq!(found, expected, "{operation:?} {mode:?} of {operands:#x?}, binary{}", layout.width);
    }
}

fn check_all(layout: Layout, operands: [u64; 3]) {
    for operation in BINARY {
        check(layout, operation, operands);
    }
    check(layout, Operation::Root, operands);
    check(layout, Operation::MultiplyAdd, operands);
}

#[test]
fn all_pairs_of_special_values() {
    for layout in LAYOUTS {
        let specials = layout.specials();
        for (i, a) in specials.iter().enumerate() {
            for (j, b) in specials.iter().enumerate() {
                let c = specials[(7 * i + 13 * j) % specials.len()];
                check_all(layout, [*a, *b, c]);
            }
        }
    }
}

#[test]
fn seeded_operands() {
    for seed in seeds(10) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..400 {
            for layout in LAYOUTS {
                check_all(layout, layout.operands(&mut rng));
            }
        }
    }
}

#[test]
fn what_the_host_computes_to_nearest_even() {
    let mode = Rounding::NearestEven;
    for seed in seeds(10) {
        let mut rng = ChaCha8Rng::seed_from_u64(!seed);
        for _ in 0..2000 {
            let operands = DOUBLE.operands(&mut rng);
            let [x, y, z] = operands.map(f64::from_bits);
            let host = [x + y, x - y, x * y, x / y, x.sqrt(), x.mul_add(y, z)];
            for (operation, number) in
                BINARY.into_iter().chain([Operation::Root, Operation::MultiplyAdd]).zip(host)
            {
                let found = run::<Double>(operation, operands, mode).0;
                let expected = if number.is_nan() { DOUBLE.nan() } else { number.to_bits() };
                assert_eq!(found, expected, "{operation:?} of {operands:#x?}");
            }
            let operands = SINGLE.operands(&mut rng);
            let [x, y, z] = operands.map(|bits| f32::from_bits(bits as u32));
            let host = [x + y, x - y, x * y, x / y, x.sqrt(), x.mul_add(y, z)];
            for (operation, number) in
                BINARY.into_iter().chain([Operation::Root, Operation::MultiplyAdd]).zip(host)
            {
                let found = run::<Single>(operation, operands, mode).0;
                let expected = if number.is_nan() { SINGLE.nan() } else { u64::from(number.to_bits()) };
                assert_eq!(found, expected, "{operation:?} of {operands:#x?}");
            }
        }
    }
}

/// Operands one by one: the special ones, then some seeded.
fn singles(layout: Layout, seed: u64) -> Vec<u64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut operands = layout.specials();
    operands.extend((0..4000).map(|_| layout.operand(&mut rng)));
    // Beside integers and halves of them.
    operands.extend((0..2000).map(|_| {
        let places = rng.next_u64() % 66;
        let integer = (rng.next_u64() >> 1 >> (rng.next_u64() % 63)) as f64;
        let number = integer / (1u64 << (places % 3)) as f64;
        let bits = if layout == SINGLE { u64::from((number as f32).to_bits()) } else { number.to_bits() };
        (bits + places % 3).saturating_sub(1) | layout.sign(places % 2 == 0)
    }));
    operands
}

#[test]
fn conversions_to_integers() {
    for layout in LAYOUTS {
        for bits in singles(layout, 1) {
            for (mode, to) in Rounding::ALL.into_iter().flat_map(|mode| INTEGERS.map(|to| (mode, to))) {
                let mut env = Environment::new(mode);
                let integer = match layout {
                    SINGLE => to_integer::<Single>(bits, to, &mut env),
                    _ => to_integer::<Double>(bits, to, &mut env),
                };
                let expected = layout.to_integer(bits, to.width, to.is_signed, mode);
                assert_eq!((integer, env.flags), expected, "{bits:#x} {mode:?} to {to:?}, {layout:?}");
            }
        }
    }
}

#[test]
fn conversions_from_integers() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut integers: Vec<u64> =
        (0..64).flat_map(|n| [1u64 << n, (1u64 << n) - 1, !(1u64 << n), u64::MAX << n]).collect();
    integers.extend((0..3000).map(|_| rng.next_u64() >> (rng.next_u64() % 64)));
    for register in integers {
        for from in INTEGERS {
            let value = match (from.width, from.is_signed) {
                (32, true) => i128::from(register as i32),
                (32, false) => i128::from(register as u32),
                (_, true) => i128::from(register as i64),
                _ => i128::from(register),
            };
            let exact = Exact::integer(value < 0, BigUint::from(value.unsigned_abs()), 0);
            for mode in Rounding::ALL {
                for layout in LAYOUTS {
                    let mut env = Environment::new(mode);
                    let bits = match layout {
                        SINGLE => from_integer::<Single>(register, from, &mut env),
                        _ => from_integer::<Double>(register, from, &mut env),
                    };
                    let expected = if value == 0 { (0, 0) } else { layout.round(&exact, mode) };
                    assert_eq!((bits, env.flags), expected, "{register:#x} as {from:?} {mode:?}, {layout:?}");
                }
            }
        }
    }
}

#[test]
fn conversions_between_formats() {
    for (from, to) in [(SINGLE, DOUBLE), (DOUBLE, SINGLE)] {
        for bits in singles(from, 3) {
            for mode in Rounding::ALL {
                let mut env = Environment::new(mode);
                let found = match from {
                    SINGLE => to_format::<Single, Double>(bits, &mut env),
                    _ => to_format::<Double, Single>(bits, &mut env),
                };
                let expected = converted(bits, from, to, mode);
                assert_eq!((found, env.flags), expected, "{bits:#x} {mode:?}, {from:?}");
            }
        }
    }
}

/// Bits of `a` and `b` after minimum, maximum, `==`, `<` and `<=`, with their flags.
fn compared<F: Format>(a: u64, b: u64) -> [(u64, u8); 5] {
    let with = |operation: &dyn Fn(&mut Environment) -> u64| {
        let mut env = Environment::new(Rounding::NearestEven);
        (operation(&mut env), env.flags)
    };
    [
        with(&|env| minimum::<F>(a, b, env)),
        with(&|env| maximum::<F>(a, b, env)),
        with(&|env| u64::from(equal::<F>(a, b, env))),
        with(&|env| u64::from(less::<F>(a, b, env))),
        with(&|env| u64::from(less_or_equal::<F>(a, b, env))),
    ]
}

#[test]
fn comparisons_and_classes() {
    for layout in LAYOUTS {
        let specials = layout.specials();
        for a in &specials {
            for b in &specials {
                let found = match layout {
                    SINGLE => compared::<Single>(*a, *b),
                    _ => compared::<Double>(*a, *b),
                };
                assert_eq!(found, expected_comparisons(layout, *a, *b), "{a:#x} and {b:#x}, {layout:?}");
            }
            let found = if layout == SINGLE { class::<Single>(*a) } else { class::<Double>(*a) };
            assert_eq!(found, expected_class(layout, *a), "{a:#x}, {layout:?}");
        }
    }
}

fn expected_comparisons(layout: Layout, a: u64, b: u64) -> [(u64, u8); 5] {
    let (x, y) = (layout.to_host(a), layout.to_host(b));
    let is_signaling = [a, b].iter().any(|bits| layout.parse(*bits).1 == Datum::Signaling);
    let raised = |is_invalid: bool| if is_invalid { flag::NV } else { 0 };
    let is_nan = x.is_nan() || y.is_nan();
    let (least, most) = match (x.is_nan(), y.is_nan()) {
        (true, true) => (layout.nan(), layout.nan()),
        (true, false) => (b, b),
        (false, true) => (a, a),
        // -0 is less than +0 here, though equal in comparisons.
        (false, false) if x < y || (x == y && x.is_sign_negative()) => (a, b),
        (false, false) => (b, a),
    };
    [
        (least, raised(is_signaling)),
        (most, raised(is_signaling)),
        (u64::from(x == y), raised(is_signaling)),
        (u64::from(x < y), raised(is_nan)),
        (u64::from(x <= y), raised(is_nan)),
    ]
}

fn expected_class(layout: Layout, bits: u64) -> u64 {
    let (negative, datum) = layout.parse(bits);
    let category = match layout {
        SINGLE => f32::from_bits(bits as u32).classify(),
        _ => f64::from_bits(bits).classify(),
    };
    let bit = match (category, negative) {
        (FpCategory::Infinite, true) => 0,
        (FpCategory::Normal, true) => 1,
        (FpCategory::Subnormal, true) => 2,
        (FpCategory::Zero, true) => 3,
        (FpCategory::Zero, false) => 4,
        (FpCategory::Subnormal, false) => 5,
        (FpCategory::Normal, false) => 6,
        (FpCategory::Infinite, false) => 7,
        (FpCategory::Nan, _) if datum == Datum::Signaling => 8,
        (FpCategory::Nan, _) => 9,
    };
    1 << bit
}

/// Where implementations differ: flags known by heart.
#[test]
fn flags_at_the_edges() {
    let (most, least) = (f64::MAX.to_bits(), f64::MIN_POSITIVE.to_bits());
    let half = 0.5f64.to_bits();
    let cases = [
        // Overflow that stays finite still overflows.
        (Operation::Multiply, [most, most, 0], Rounding::TowardZero, (most, flag::OF | flag::NX)),
        // A tie that goes up to the smallest normal number is tiny: 53 bits of it are below.
        (Operation::MultiplyAdd, [half, 1, least - 1], Rounding::NearestEven, (least, flag::NX | flag::UF)),
        // A quarter closer, 53 bits round to that number too: not tiny after rounding.
        (Operation::MultiplyAdd, [0.75f64.to_bits(), 1, least - 1], Rounding::NearestEven, (least, flag::NX)),
        (Operation::Divide, [least, 2f64.to_bits(), 0], Rounding::NearestEven, (least >> 1, 0)),
        // An exact subnormal result raises nothing.
        (Operation::Add, [least, 1, 0], Rounding::Up, (least + 1, 0)),
        // Infinity times zero is invalid even where a quiet NaN is added.
        (
            Operation::MultiplyAdd,
            [DOUBLE.infinity(), 0, DOUBLE.nan()],
            Rounding::Up,
            (DOUBLE.nan(), flag::NV),
        ),
        (Operation::Divide, [half, 0, 0], Rounding::Up, (DOUBLE.infinity(), flag::DZ)),
        (Operation::Divide, [DOUBLE.infinity(), 0, 0], Rounding::Up, (DOUBLE.infinity(), 0)),
        // A sum that cancels is -0 only when rounding down.
        (Operation::Subtract, [half, half, 0], Rounding::Down, (DOUBLE.sign(true), 0)),
        (Operation::Subtract, [half, half, 0], Rounding::NearestAway, (0, 0)),
    ];
    for (operation, operands, mode, expected) in cases {
        let found = run::<Double>(operation, operands, mode);
        assert_eq!(found, expected, "{operation:?} {mode:?} of {operands:#x?}");
    }
}
