//! Zba, Zbb and Zbs: bit by bit, as the specification describes what they do.

use crate::encoding::opcode::{OP, OP_32, OP_IMM, OP_IMM_32};
use crate::interpreter::{sign_extend, word};

/// What the instruction gives for the values of its registers; `None`, if none of the three
/// extensions has it.
pub fn operate(w: u32, a: u64, b: u64) -> Option<u64> {
    // rs2's place, which some have a part of their function in.
    let field = w >> 20 & 0b1_1111;
    let (shift, bit) = (u64::from(w >> 20 & 0b11_1111), b & 0b11_1111);
    let low = a & 0xffff_ffff;
    Some(match (w & 0b111_1111, w >> 25, w >> 12 & 0b111) {
        // sh1add, sh2add, sh3add; add.uw and these with .uw; slli.uw.
        (OP, 0b001_0000, 0b010) => (a << 1).wrapping_add(b),
        (OP, 0b001_0000, 0b100) => (a << 2).wrapping_add(b),
        (OP, 0b001_0000, 0b110) => (a << 3).wrapping_add(b),
        (OP_32, 0b000_0100, 0b000) => low.wrapping_add(b),
        (OP_32, 0b001_0000, 0b010) => (low << 1).wrapping_add(b),
        (OP_32, 0b001_0000, 0b100) => (low << 2).wrapping_add(b),
        (OP_32, 0b001_0000, 0b110) => (low << 3).wrapping_add(b),
        (OP_IMM_32, 0b000_0100 | 0b000_0101, 0b001) => low << shift,
        // andn, orn, xnor.
        (OP, 0b010_0000, 0b111) => a & !b,
        (OP, 0b010_0000, 0b110) => a | !b,
        (OP, 0b010_0000, 0b100) => !(a ^ b),
        // clz, ctz, cpop, sext.b, sext.h; the first three of words.
        (OP_IMM, 0b011_0000, 0b001) => match field {
            0b0_0000 => leading_zeros(a, 64),
            0b0_0001 => trailing_zeros(a, 64),
            0b0_0010 => ones(a, 64),
            0b0_0100 => sign_extend(a, 8),
            0b0_0101 => sign_extend(a, 16),
            _ => return None,
        },
        (OP_IMM_32, 0b011_0000, 0b001) => match field {
            0b0_0000 => leading_zeros(a, 32),
            0b0_0001 => trailing_zeros(a, 32),
            0b0_0010 => ones(a, 32),
            _ => return None,
        },
        // min, minu, max, maxu.
        (OP, 0b000_0101, 0b100) => either((a as i64) < (b as i64), a, b),
        (OP, 0b000_0101, 0b101) => either(a < b, a, b),
        (OP, 0b000_0101, 0b110) => either((a as i64) < (b as i64), b, a),
        (OP, 0b000_0101, 0b111) => either(a < b, b, a),
        // zext.h.
        (OP_32, 0b000_0100, 0b100) if field == 0 => a & 0xffff,
        // rol, ror, rori, rolw, rorw, roriw.
        (OP, 0b011_0000, 0b001) => rotated(a, 64, bit),
        (OP, 0b011_0000, 0b101) => rotated(a, 64, 64 - bit),
        (OP_IMM, 0b011_0000 | 0b011_0001, 0b101) => rotated(a, 64, 64 - shift),
        (OP_32, 0b011_0000, 0b001) => word(rotated(a, 32, b & 0b1_1111)),
        (OP_32, 0b011_0000, 0b101) => word(rotated(a, 32, 32 - (b & 0b1_1111))),
        (OP_IMM_32, 0b011_0000, 0b101) => word(rotated(a, 32, 32 - u64::from(field))),
        // orc.b, rev8.
        (OP_IMM, 0b001_0100, 0b101) if field == 0b0_0111 => each_byte(a, |n, byte| {
            let whole = either(byte == 0, 0, 0xff);
            whole << (8 * n)
        }),
        (OP_IMM, 0b011_0101, 0b101) if field == 0b1_1000 => each_byte(a, |n, byte| byte << (56 - 8 * n)),
        // bclr, bext, binv, bset, and with the bit's number in the instruction.
        (OP, 0b010_0100, 0b001) => a & !power(bit),
        (OP, 0b010_0100, 0b101) => a >> bit & 1,
        (OP, 0b011_0100, 0b001) => a ^ power(bit),
        (OP, 0b001_0100, 0b001) => a | power(bit),
        (OP_IMM, 0b010_0100 | 0b010_0101, 0b001) => a & !power(shift),
        (OP_IMM, 0b010_0100 | 0b010_0101, 0b101) => a >> shift & 1,
        (OP_IMM, 0b011_0100 | 0b011_0101, 0b001) => a ^ power(shift),
        (OP_IMM, 0b001_0100 | 0b001_0101, 0b001) => a | power(shift),
        _ => return None,
    })
}

fn either(is_first: bool, first: u64, second: u64) -> u64 {
    if is_first { first } else { second }
}

/// Two to the power of `n`.
fn power(n: u64) -> u64 {
    1 << n
}

fn leading_zeros(value: u64, width: u32) -> u64 {
    (0..width).rev().take_while(|n| value >> n & 1 == 0).count() as u64
}

fn trailing_zeros(value: u64, width: u32) -> u64 {
    (0..width).take_while(|n| value >> n & 1 == 0).count() as u64
}

fn ones(value: u64, width: u32) -> u64 {
    (0..width).filter(|n| value >> n & 1 == 1).count() as u64
}

/// Each of the lower `width` bits `by` places further up, round about.
fn rotated(value: u64, width: u64, by: u64) -> u64 {
    (0..width).map(|n| (value >> n & 1) << ((n + by) % width)).sum()
}

/// The sum of what becomes of each byte by its number.
fn each_byte(value: u64, becomes: impl Fn(u64, u64) -> u64) -> u64 {
    (0..8).map(|n| becomes(n, value >> (8 * n) & 0xff)).sum()
}
