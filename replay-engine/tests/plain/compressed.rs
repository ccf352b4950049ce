//! RV64C: each compressed instruction as the 32-bit one it stands for, by the specification's
//! tables.

use crate::encoding::opcode::*;
use crate::encoding::{b_type, i_type, j_type, r_type, s_type, u_type};
use crate::interpreter::sign_extend;

/// The stack pointer.
const SP: u32 = 2;

/// An immediate in pieces: the bits of `h` from `top` on downwards are these of it.
fn immediate(h: u32, top: u32, places: &[u32]) -> u32 {
    let mut value = 0;
    for (at, place) in (0..=top).rev().zip(places) {
        value |= (h >> at & 1) << place;
    }
    value
}

/// The 32-bit form; `None`, if it is reserved or not compressed at all.
pub fn expand(half: u16) -> Option<u32> {
    let h = u32::from(half);
    let signed = |value: u32, bits: u32| sign_extend(u64::from(value), bits) as u32;
    // Registers of five bits, and of three, which are x8 to x15.
    let (upper, lower) = (h >> 7 & 0b1_1111, h >> 2 & 0b1_1111);
    let (upper_short, lower_short) = (8 + (h >> 7 & 0b111), 8 + (h >> 2 & 0b111));
    // imm[5], then imm[4:0]; offsets of words and doublewords, from a register and from the stack.
    let six = immediate(h, 12, &[5]) | immediate(h, 6, &[4, 3, 2, 1, 0]);
    let word = immediate(h, 12, &[5, 4, 3]) | immediate(h, 6, &[2, 6]);
    let double = immediate(h, 12, &[5, 4, 3]) | immediate(h, 6, &[7, 6]);
    let word_from_stack = immediate(h, 12, &[5]) | immediate(h, 6, &[4, 3, 2, 7, 6]);
    let double_from_stack = immediate(h, 12, &[5]) | immediate(h, 6, &[4, 3, 8, 7, 6]);
    let word_to_stack = immediate(h, 12, &[5, 4, 3, 2, 7, 6]);
    let double_to_stack = immediate(h, 12, &[5, 4, 3, 8, 7, 6]);
    Some(match (h & 0b11, h >> 13) {
        // c.addi4spn
        (0b00, 0b000) => match immediate(h, 12, &[5, 4, 9, 8, 7, 6, 2, 3]) {
            0 => return None,
            imm => i_type(imm, SP, 0b000, lower_short, OP_IMM),
        },
        // c.fld, c.lw, c.ld
        (0b00, 0b001) => i_type(double, upper_short, 0b011, lower_short, LOAD_FP),
        (0b00, 0b010) => i_type(word, upper_short, 0b010, lower_short, LOAD),
        (0b00, 0b011) => i_type(double, upper_short, 0b011, lower_short, LOAD),
        // c.fsd, c.sw, c.sd
        (0b00, 0b101) => s_type(double, lower_short, upper_short, 0b011, STORE_FP),
        (0b00, 0b110) => s_type(word, lower_short, upper_short, 0b010, STORE),
        (0b00, 0b111) => s_type(double, lower_short, upper_short, 0b011, STORE),
        // c.addi, c.addiw, c.li
        (0b01, 0b000) => i_type(signed(six, 6), upper, 0b000, upper, OP_IMM),
        (0b01, 0b001) if upper != 0 => i_type(signed(six, 6), upper, 0b000, upper, OP_IMM_32),
        (0b01, 0b010) => i_type(signed(six, 6), 0, 0b000, upper, OP_IMM),
        // c.addi16sp
        (0b01, 0b011) if upper == SP => match immediate(h, 12, &[9]) | immediate(h, 6, &[4, 6, 8, 7, 5]) {
            0 => return None,
            imm => i_type(signed(imm, 10), SP, 0b000, SP, OP_IMM),
        },
        // c.lui
        (0b01, 0b011) if six != 0 => u_type(signed(six, 6), upper, LUI),
        (0b01, 0b100) => arithmetic(h, six, signed(six, 6), upper_short, lower_short)?,
        // c.j
        (0b01, 0b101) => j_type(signed(immediate(h, 12, &[11, 4, 9, 8, 10, 6, 7, 3, 2, 1, 5]), 12), 0),
        // c.beqz, c.bnez
        (0b01, funct3 @ (0b110 | 0b111)) => {
            let offset = immediate(h, 12, &[8, 4, 3]) | immediate(h, 6, &[7, 6, 2, 1, 5]);
            b_type(signed(offset, 9), 0, upper_short, funct3 & 1)
        }
        // c.slli
        (0b10, 0b000) => i_type(six, upper, 0b001, upper, OP_IMM),
        // c.fldsp, c.lwsp, c.ldsp
        (0b10, 0b001) => i_type(double_from_stack, SP, 0b011, upper, LOAD_FP),
        (0b10, 0b010) if upper != 0 => i_type(word_from_stack, SP, 0b010, upper, LOAD),
        (0b10, 0b011) if upper != 0 => i_type(double_from_stack, SP, 0b011, upper, LOAD),
        (0b10, 0b100) => match (h >> 12 & 1, upper, lower) {
            (0, 0, 0) => return None,
            // c.jr, c.mv
            (0, _, 0) => i_type(0, upper, 0b000, 0, JALR),
            (0, ..) => r_type(0, lower, 0, 0b000, upper, OP),
            // c.ebreak, c.jalr, c.add
            (_, 0, 0) => i_type(1, 0, 0b000, 0, SYSTEM),
            (_, _, 0) => i_type(0, upper, 0b000, 1, JALR),
            _ => r_type(0, lower, upper, 0b000, upper, OP),
        },
        // c.fsdsp, c.swsp, c.sdsp
        (0b10, 0b101) => s_type(double_to_stack, lower, SP, 0b011, STORE_FP),
        (0b10, 0b110) => s_type(word_to_stack, lower, SP, 0b010, STORE),
        (0b10, 0b111) => s_type(double_to_stack, lower, SP, 0b011, STORE),
        _ => return None,
    })
}

/// c.srli to c.addw: the second quadrant's `100`, on `rd` and `rs2`.
fn arithmetic(h: u32, shift: u32, imm: u32, rd: u32, rs2: u32) -> Option<u32> {
    Some(match (h >> 10 & 0b11, h >> 12 & 1, h >> 5 & 0b11) {
        // c.srli, c.srai, c.andi
        (0b00, ..) => i_type(shift, rd, 0b101, rd, OP_IMM),
        (0b01, ..) => i_type(0b0100_0000_0000 | shift, rd, 0b101, rd, OP_IMM),
        (0b10, ..) => i_type(imm, rd, 0b111, rd, OP_IMM),
        // c.sub, c.xor, c.or, c.and
        (_, 0, 0b00) => r_type(0b010_0000, rs2, rd, 0b000, rd, OP),
        (_, 0, 0b01) => r_type(0, rs2, rd, 0b100, rd, OP),
        (_, 0, 0b10) => r_type(0, rs2, rd, 0b110, rd, OP),
        (_, 0, _) => r_type(0, rs2, rd, 0b111, rd, OP),
        // c.subw, c.addw
        (_, _, 0b00) => r_type(0b010_0000, rs2, rd, 0b000, rd, OP_32),
        (_, _, 0b01) => r_type(0, rs2, rd, 0b000, rd, OP_32),
        _ => return None,
    })
}
