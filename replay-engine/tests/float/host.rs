//! The host's arithmetic, asked once NX is raised, against the integers: bits and flags.

use crate::model::{DOUBLE, Layout, Operation, SINGLE};
use crate::{LAYOUTS, run_in, seeds};
use heddle_replay_engine::machine::float::{Double, Environment, Rounding, Single, flag};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const OPERATIONS: [Operation; 6] = [
    Operation::Add,
    Operation::Subtract,
    Operation::Multiply,
    Operation::Divide,
    Operation::Root,
    Operation::MultiplyAdd,
];

/// The result and what it raises; `is_inexact` says whether NX was raised before.
fn run_after(
    layout: Layout,
    operation: Operation,
    operands: [u64; 3],
    mode: Rounding,
    is_inexact: bool,
) -> (u64, u8) {
    let env = Environment { is_inexact, ..Environment::new(mode) };
    match layout {
        SINGLE => run_in::<Single>(operation, operands, env),
        _ => run_in::<Double>(operation, operands, env),
    }
}

/// One operation in all rounding modes, with NX raised before and with nothing.
/// Whether the host was asked, and did not say that its result is inexact.
fn check(layout: Layout, operation: Operation, operands: [u64; 3], from: &str) -> bool {
    let mut was_asked = false;
    for mode in Rounding::ALL {
        let expected = run_after(layout, operation, operands, mode, false);
        let found = run_after(layout, operation, operands, mode, true);
        assert_eq!(
            (found.0, found.1 | flag::NX),
            (expected.0, expected.1 | flag::NX),
            "{from}: {operation:?} {mode:?} of {operands:#x?}, binary{}",
            layout.width
        );
        was_asked |= found.1 != expected.1;
    }
    was_asked
}

#[test]
fn all_pairs_of_special_values_with_nx_raised() {
    for layout in LAYOUTS {
        let specials = layout.specials();
        for (i, a) in specials.iter().enumerate() {
            for (j, b) in specials.iter().enumerate() {
                let c = specials[(7 * i + 13 * j) % specials.len()];
                for operation in OPERATIONS {
                    check(layout, operation, [*a, *b, c], "special values");
                }
            }
        }
    }
}

#[test]
fn seeded_operands_with_nx_raised() {
    for seed in seeds(10) {
        let from = format!("HEDDLE_SEED={seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut asked = 0u32;
        for _ in 0..2000 {
            for layout in LAYOUTS {
                let operands = layout.operands(&mut rng);
                for operation in OPERATIONS {
                    asked += u32::from(check(layout, operation, operands, &from));
                }
            }
        }
        // Of 24,000; exact results are not counted, and many operands are left to the integers.
        assert!(asked > 1000, "{from}: the host was asked {asked} times");
    }
}

#[test]
fn only_to_nearest_even_and_with_nx_raised() {
    for layout in LAYOUTS {
        // All six results are inexact.
        let operands = match layout {
            SINGLE => [1.1f32, 0.03, 7.7].map(|number| u64::from(number.to_bits())),
            _ => [1.1f64, 0.03, 7.7].map(f64::to_bits),
        };
        for operation in OPERATIONS {
            for mode in Rounding::ALL {
                for is_inexact in [false, true] {
                    let was_asked = is_inexact && mode == Rounding::NearestEven;
                    let raised = run_after(layout, operation, operands, mode, is_inexact).1;
                    let expected = if was_asked { 0 } else { flag::NX };
                    assert_eq!(raised, expected, "{operation:?} {mode:?}, {is_inexact}, {layout:?}");
                }
            }
        }
    }
}

/// Where it is close whether the host may be asked: values and flags known by heart.
#[test]
fn flags_at_the_edges_with_nx_raised() {
    use Operation::{Add, Divide, Multiply, MultiplyAdd, Root, Subtract};
    let (most, least, infinity) = (f64::MAX, f64::MIN_POSITIVE, f64::INFINITY);
    // Half of it is a tie that goes up to the smallest normal number, and is tiny.
    let twice = least * (2.0 - f64::EPSILON);
    let (tiny, huge) = (flag::UF | flag::NX, flag::OF | flag::NX);
    let cases = [
        (Multiply, [twice, 0.5, 0.0], (least, tiny)),
        (Divide, [twice, 2.0, 0.0], (least, tiny)),
        (MultiplyAdd, [twice, 0.5, 0.0], (least, tiny)),
        // An exact subnormal result raises nothing.
        (Divide, [least, 2.0, 0.0], (least / 2.0, 0)),
        // A zero that is rounded to.
        (Multiply, [1e-200, 1e-200, 0.0], (0.0, tiny)),
        (Divide, [1e-200, 1e200, 0.0], (0.0, tiny)),
        (MultiplyAdd, [1e-200, 1e-200, 0.0], (0.0, tiny)),
        (MultiplyAdd, [-1e-200, 1e-200, 0.0], (-0.0, tiny)),
        // One that is exact.
        (Add, [0.0, -0.0, 0.0], (0.0, 0)),
        (Add, [-0.0, -0.0, 0.0], (-0.0, 0)),
        (Subtract, [1.5, 1.5, 0.0], (0.0, 0)),
        (Multiply, [-0.0, 5.0, 0.0], (-0.0, 0)),
        (Divide, [0.0, -5.0, 0.0], (-0.0, 0)),
        (Root, [-0.0, 0.0, 0.0], (-0.0, 0)),
        (MultiplyAdd, [0.0, 5.0, -0.0], (0.0, 0)),
        (MultiplyAdd, [0.0, -5.0, -0.0], (-0.0, 0)),
        (MultiplyAdd, [0.0, 5.0, least], (least, 0)),
        // Too large, but not where only the product is.
        (Add, [most, most, 0.0], (infinity, huge)),
        (Multiply, [most, -2.0, 0.0], (-infinity, huge)),
        (Divide, [most, 0.5, 0.0], (infinity, huge)),
        (MultiplyAdd, [most, 2.0, 1.0], (infinity, huge)),
        (MultiplyAdd, [most, 2.0, -most], (most, 0)),
        (Divide, [1.0, -0.0, 0.0], (-infinity, flag::DZ)),
    ];
    for (operation, numbers, (number, flags)) in cases {
        let operands = numbers.map(f64::to_bits);
        let found = run_after(DOUBLE, operation, operands, Rounding::NearestEven, true);
        assert_eq!(found, (number.to_bits(), flags), "{operation:?} of {numbers:?}");
    }
}
