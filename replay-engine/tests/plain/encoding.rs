//! The 32-bit formats: opcodes, and instructions put together of their fields.
//!
//! Immediates that may be negative are two's complement; bits that the format has no room for go.

/// The lowest seven bits of an instruction.
pub mod opcode {
    pub const LOAD: u32 = 0b000_0011;
    pub const LOAD_FP: u32 = 0b000_0111;
    pub const MISC_MEM: u32 = 0b000_1111;
    pub const OP_IMM: u32 = 0b001_0011;
    pub const AUIPC: u32 = 0b001_0111;
    pub const OP_IMM_32: u32 = 0b001_1011;
    pub const STORE: u32 = 0b010_0011;
    pub const STORE_FP: u32 = 0b010_0111;
    pub const AMO: u32 = 0b010_1111;
    pub const OP: u32 = 0b011_0011;
    pub const LUI: u32 = 0b011_0111;
    pub const OP_32: u32 = 0b011_1011;
    pub const MADD: u32 = 0b100_0011;
    pub const MSUB: u32 = 0b100_0111;
    pub const NMSUB: u32 = 0b100_1011;
    pub const NMADD: u32 = 0b100_1111;
    pub const OP_FP: u32 = 0b101_0011;
    pub const BRANCH: u32 = 0b110_0011;
    pub const JALR: u32 = 0b110_0111;
    pub const JAL: u32 = 0b110_1111;
    pub const SYSTEM: u32 = 0b111_0011;
}

use opcode::{BRANCH, JAL};

pub fn r_type(funct7: u32, rs2: u32, rs1: u32, funct3: u32, rd: u32, opcode: u32) -> u32 {
    funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode
}

pub fn i_type(imm: u32, rs1: u32, funct3: u32, rd: u32, opcode: u32) -> u32 {
    (imm & 0xfff) << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode
}

pub fn s_type(imm: u32, rs2: u32, rs1: u32, funct3: u32, opcode: u32) -> u32 {
    (imm >> 5 & 0x7f) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (imm & 0x1f) << 7 | opcode
}

pub fn b_type(imm: u32, rs2: u32, rs1: u32, funct3: u32) -> u32 {
    let upper = (imm >> 12 & 1) << 31 | (imm >> 5 & 0x3f) << 25;
    let lower = (imm >> 1 & 0xf) << 8 | (imm >> 11 & 1) << 7;
    upper | rs2 << 20 | rs1 << 15 | funct3 << 12 | lower | BRANCH
}

/// `imm` is the upper twenty bits alone.
pub fn u_type(imm: u32, rd: u32, opcode: u32) -> u32 {
    (imm & 0xf_ffff) << 12 | rd << 7 | opcode
}

pub fn j_type(imm: u32, rd: u32) -> u32 {
    let lower = (imm >> 1 & 0x3ff) << 21 | (imm >> 11 & 1) << 20;
    (imm >> 20 & 1) << 31 | lower | (imm >> 12 & 0xff) << 12 | rd << 7 | JAL
}
