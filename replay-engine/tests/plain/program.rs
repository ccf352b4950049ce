//! Random programs, and what they begin with.
//!
//! Three in four are woven of loops, jumps ahead and what lies between, and begin again at their
//! end; what can't be done is left out by a trap handler:
//!
//! ```text
//! BASE + 4 KiB - some   code, which mostly reaches into the next page; then the handler
//! BASE + 8 KiB          data, where most pointers point: one may point into the code, beside it,
//!                       between doublewords or to the end of memory
//! BASE + 16 KiB         nothing
//! ```
//!
//! The others are memory full of instructions, so that wherever a jump goes there is one more,
//! and stores change what is executed.

use crate::encoding::opcode::*;
use crate::encoding::{b_type, i_type, j_type, r_type, u_type};
use crate::floats::BOX;
use crate::instructions::{COUNTERS, HANDLERS, Maker, POINTERS, halves};
use crate::interpreter::{BASE, Plain};
use crate::model::{DOUBLE, SINGLE};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

pub const RAM_BYTES: usize = 16 << 10;
const PAGE: usize = 4096;
const ECALL: u32 = 0x0000_0073;
const EBREAK: u32 = 0x0010_0073;
const MRET: u32 = 0x3020_0073;
const COMPRESSED_EBREAK: u16 = 0x9002;
const MEPC: u32 = 0x341;

/// The program of this seed.
pub fn program(seed: u64) -> Plain {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let has_floats = rng.r#gen();
    let maker = Maker { rng, has_floats };
    if seed % 4 == 0 { scattered(maker) } else { woven(maker) }
}

fn woven(mut maker: Maker) -> Plain {
    let mut code = vec![];
    let least = 150 + maker.below(350) as usize;
    while code.len() < least {
        code.extend(maker.item(0));
    }
    code.extend(halves(j_type(back_over(&code), 0)));
    let at = PAGE - 2 * maker.below(600) as usize;
    let handler_at = (at + 2 * code.len()).next_multiple_of(4);
    let mut memory = vec![0u8; RAM_BYTES];
    maker.rng.fill(&mut memory[..]);
    maker.put_numbers(&mut memory[2 * PAGE..]);
    write(&mut memory, at, &code);
    write(&mut memory, handler_at, &handler());

    let mut plain = Plain::new(BASE + at as u64, memory);
    maker.switch_floats(&mut plain);
    plain.mtvec = BASE + handler_at as u64;
    plain.x = maker.registers();
    let data = |maker: &mut Maker| BASE + 9 * 1024 + 8 * u64::from(maker.below(6 * 1024 / 8));
    for pointer in POINTERS {
        plain.x[pointer as usize] = data(&mut maker);
    }
    let odd = &mut plain.x[POINTERS[3] as usize];
    match maker.below(8) {
        0 => *odd = BASE + at as u64 / 8 * 8 + 8 * u64::from(maker.below(64)),
        // The code's second page has room behind it.
        1 | 2 => *odd = BASE + 7 * 1024,
        3 => *odd += u64::from(1 + maker.below(7)),
        4 => *odd = BASE + RAM_BYTES as u64 - 8 * u64::from(maker.below(64)),
        _ => {}
    }
    plain
}

fn scattered(mut maker: Maker) -> Plain {
    let mut code = vec![];
    while code.len() < PAGE / 2 {
        code.extend(maker.anything());
    }
    let mut memory = vec![0u8; RAM_BYTES];
    for page in 0..RAM_BYTES / PAGE {
        write(&mut memory, page * PAGE, &code[..PAGE / 2]);
    }
    let ends = RAM_BYTES as u32;
    let mut plain = Plain::new(BASE + 2 * u64::from(maker.below(ends / 2)), memory);
    maker.switch_floats(&mut plain);
    plain.mtvec = BASE + 4 * u64::from(maker.below(ends / 4));
    plain.x = maker.registers();
    for pointer in POINTERS {
        plain.x[pointer as usize] = BASE + 2048 + 8 * u64::from(maker.below((ends - 4096) / 8));
    }
    plain
}

fn write(memory: &mut [u8], at: usize, code: &[u16]) {
    let bytes: Vec<u8> = code.iter().flat_map(|half| half.to_le_bytes()).collect();
    memory[at..at + bytes.len()].copy_from_slice(&bytes);
}

/// Goes on behind the instruction that could not be done, by its length.
fn handler() -> Vec<u16> {
    let [length, place] = HANDLERS;
    let code = [
        i_type(MEPC, 0, 0b010, place, SYSTEM),
        i_type(0, place, 0b101, length, LOAD),
        // All ones if its lowest two bits are; then 0, or of a compressed one 2.
        i_type(0xffc, length, 0b110, length, OP_IMM),
        i_type(0xfff, length, 0b011, length, OP_IMM),
        i_type(1, length, 0b001, length, OP_IMM),
        r_type(0x20, length, place, 0b000, place, OP),
        i_type(4, place, 0b000, place, OP_IMM),
        i_type(MEPC, place, 0b001, 0, SYSTEM),
        MRET,
    ];
    code.into_iter().flat_map(halves).collect()
}

/// The offset of a jump that follows `code` to where that begins.
fn back_over(code: &[u16]) -> u32 {
    (2 * code.len() as u32).wrapping_neg()
}

/// The bits `places` of an offset, as a compressed jump has them from bit `top` on downwards.
fn in_pieces(offset: u32, top: u32, places: &[u32]) -> u32 {
    let mut bits = 0;
    for (at, place) in (0..=top).rev().zip(places) {
        bits |= (offset >> place & 1) << at;
    }
    bits
}

/// c.beqz, or c.bnez, of x8 to x15 by three bits.
fn short_branch(if_zero: bool, short: u32, offset: u32) -> u16 {
    let funct3 = if if_zero { 0b110 } else { 0b111 };
    let places = in_pieces(offset, 12, &[8, 4, 3]) | in_pieces(offset, 6, &[7, 6, 2, 1, 5]);
    (funct3 << 13 | places | short << 7 | 0b01) as u16
}

/// c.j.
fn short_jump(offset: u32) -> u16 {
    (0b101 << 13 | in_pieces(offset, 12, &[11, 4, 9, 8, 10, 6, 7, 3, 2, 1, 5]) | 0b01) as u16
}

impl Maker {
    fn registers(&mut self) -> [u64; 32] {
        let mut x = [0; 32];
        for x in &mut x[1..] {
            let value: u64 = self.rng.r#gen();
            *x = match self.below(8) {
                0 | 1 => value,
                2 => value as i32 as u64,
                3 => self.one_of(&[0, 1, u64::MAX, 1 << 63, i64::MAX as u64, 0x8000_0000, 0xffff_ffff]),
                4 => value & 0xff,
                5 => value >> (value & 63),
                _ => BASE + value % RAM_BYTES as u64 / 8 * 8,
            };
        }
        x
    }

    /// Operands worth trying, here and there among the data.
    fn put_numbers(&mut self, data: &mut [u8]) {
        let count = if self.has_floats { 64 } else { 0 };
        for _ in 0..count {
            let (doubles, singles) = (DOUBLE.operands(&mut self.rng), SINGLE.operands(&mut self.rng));
            let mut put = |bytes: &[u8]| {
                let at = self.rng.gen_range(0..data.len() / 8) * 8;
                data[at..at + bytes.len()].copy_from_slice(bytes);
            };
            doubles.iter().for_each(|bits| put(&bits.to_le_bytes()));
            singles.iter().for_each(|bits| put(&(*bits as u32).to_le_bytes()));
        }
    }

    /// Half of the registers hold numbers of each format, if there is floating point at all.
    fn switch_floats(&mut self, plain: &mut Plain) {
        plain.has_floats = self.has_floats;
        if !self.has_floats {
            return;
        }
        let (doubles, singles) = plain.f.split_at_mut(16);
        for some in doubles.chunks_mut(3) {
            let operands = DOUBLE.operands(&mut self.rng);
            some.iter_mut().zip(operands).for_each(|(f, bits)| *f = bits);
        }
        for some in singles.chunks_mut(3) {
            let operands = SINGLE.operands(&mut self.rng);
            some.iter_mut().zip(operands).for_each(|(f, bits)| *f = bits | BOX);
        }
        let mode = if self.seldom(2) { 0 } else { self.below(5) };
        plain.fcsr = u64::from(mode << 5 | self.below(32));
    }

    fn items(&mut self, count: u32, depth: usize) -> Vec<u16> {
        (0..count).flat_map(|_| self.item(depth)).collect()
    }

    /// Loops and jumps have others in them, but no more than there are counters.
    fn item(&mut self, depth: usize) -> Vec<u16> {
        if depth == COUNTERS.len() {
            return self.straight();
        }
        match self.below(16) {
            0 | 1 => self.repeated(depth),
            2..=4 => self.skipped(depth),
            5 => self.called(depth),
            6 if self.seldom(4) => self.trap(),
            _ => self.straight(),
        }
    }

    /// A loop that counts down.
    fn repeated(&mut self, depth: usize) -> Vec<u16> {
        let counter = COUNTERS[depth];
        let (times, count) = (1 + self.below(10), 1 + self.below(6));
        let mut turn = self.items(count, depth + 1);
        if self.seldom(2) {
            // c.addi of minus one.
            turn.push((0x107d | counter << 7) as u16);
        } else {
            turn.extend(halves(i_type(0xfff, counter, 0, counter, OP_IMM)));
        }
        let back = back_over(&turn);
        match self.below(4) {
            0 => turn.extend(halves(b_type(back, counter, 0, 0b100))),
            1 => turn.extend(halves(b_type(back, counter, 0, 0b110))),
            2 if (8..16).contains(&counter) && turn.len() <= 128 => {
                turn.push(short_branch(false, counter - 8, back));
            }
            _ => turn.extend(halves(b_type(back, 0, counter, 0b001))),
        }
        let start = halves(i_type(times, 0, 0, counter, OP_IMM));
        [&start[..], &turn[..]].concat()
    }

    /// A jump ahead, or a branch; seldom into the middle of an instruction.
    fn skipped(&mut self, depth: usize) -> Vec<u16> {
        let count = 1 + self.below(3);
        let body = self.items(count, depth + 1);
        let over = 2 * (body.len() as u32 - u32::from(self.seldom(16)));
        let (rs1, rs2, link) = (self.register(), self.register(), self.target());
        let funct3 = self.one_of(&[0, 1, 4, 5, 6, 7]);
        let (short, if_zero) = (self.below(8), self.seldom(2));
        let jump = match self.below(6) {
            0 | 1 if over <= 252 => vec![short_branch(if_zero, short, over + 2)],
            2 if over < 2000 => vec![short_jump(over + 2)],
            3 => halves(j_type(over + 4, link)).to_vec(),
            _ => halves(b_type(over + 4, rs2, rs1, funct3)).to_vec(),
        };
        [jump, body].concat()
    }

    /// A jump ahead to a place in a register.
    fn called(&mut self, depth: usize) -> Vec<u16> {
        let count = 1 + self.below(3);
        let body = self.items(count, depth + 1);
        let over = 2 * body.len() as u32;
        let (place, link) = (self.target().max(1), self.target());
        let mut jump = halves(u_type(0, place, AUIPC)).to_vec();
        if self.seldom(2) {
            jump.extend(halves(i_type(8 + over, place, 0, link, JALR)));
        } else {
            // c.jr, or c.jalr.
            jump.extend(halves(i_type(10 + over, place, 0, place, OP_IMM)));
            jump.push((0x8002 | self.below(2) << 12 | place << 7) as u16);
        }
        [jump, body].concat()
    }

    /// What does nothing but trap.
    fn trap(&mut self) -> Vec<u16> {
        match self.below(4) {
            0 => halves(ECALL).to_vec(),
            1 => halves(EBREAK).to_vec(),
            2 => vec![COMPRESSED_EBREAK],
            _ => vec![0],
        }
    }

    /// One of all instructions.
    fn anything(&mut self) -> Vec<u16> {
        let offset = (2 * self.below(128)).wrapping_sub(128);
        let (rs1, rs2, link) = (self.register(), self.register(), self.target());
        let funct3 = self.one_of(&[0, 1, 4, 5, 6, 7]);
        match self.below(16) {
            0 | 1 => halves(b_type(offset, rs2, rs1, funct3)).to_vec(),
            2 => halves(j_type(offset, link)).to_vec(),
            3 => halves(i_type(offset, self.one_of(&POINTERS), 0, link, JALR)).to_vec(),
            4 => vec![self.rng.r#gen::<u16>() & self.one_of(&[!0b01u16, !0b10])],
            5 if self.seldom(4) => self.trap(),
            _ => self.straight(),
        }
    }
}
