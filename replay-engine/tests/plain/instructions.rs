//! Single random instructions: legal ones, most of them, which leave alone what a program keeps
//! for itself.

use crate::compressed::expand;
use crate::encoding::opcode::*;
use crate::encoding::{i_type, r_type, s_type, u_type};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// They point into memory, and are most accesses' bases. Two of them, and the stack pointer,
/// serve compressed code.
pub const POINTERS: [u32; 4] = [2, 8, 9, 26];
/// What loops count in, by how deep they are; the inner one's is there for compressed branches.
pub const COUNTERS: [u32; 2] = [31, 15];
/// The trap handler's.
pub const HANDLERS: [u32; 2] = [28, 29];

/// What `OP` has: funct7 and funct3.
const OPERATIONS: [(u32, u32); 36] = [
    (0, 0),
    (0, 1),
    (0, 2),
    (0, 3),
    (0, 4),
    (0, 5),
    (0, 6),
    (0, 7),
    (0x20, 0),
    (0x20, 5),
    (1, 0),
    (1, 1),
    (1, 2),
    (1, 3),
    (1, 4),
    (1, 5),
    (1, 6),
    (1, 7),
    (0x10, 2),
    (0x10, 4),
    (0x10, 6),
    (0x20, 4),
    (0x20, 6),
    (0x20, 7),
    (5, 4),
    (5, 5),
    (5, 6),
    (5, 7),
    (0x30, 1),
    (0x30, 5),
    (0x14, 1),
    (0x24, 1),
    (0x24, 5),
    (0x34, 1),
    // The most frequent ones again.
    (0, 0),
    (0, 4),
];
/// What `OP-32` has.
const WORD_OPERATIONS: [(u32, u32); 17] = [
    (0, 0),
    (0, 1),
    (0, 5),
    (0x20, 0),
    (0x20, 5),
    (1, 0),
    (1, 4),
    (1, 5),
    (1, 6),
    (1, 7),
    (4, 0),
    ZEXT_H,
    (0x10, 2),
    (0x10, 4),
    (0x10, 6),
    (0x30, 1),
    (0x30, 5),
];
/// Its second register is x0.
const ZEXT_H: (u32, u32) = (4, 4);
/// What `OP-IMM` has beside whole immediates: those of twelve bits, which of them are free, funct3.
const SHIFTS: [(u32, u32, u32); 15] = [
    (0x000, 63, 1),
    (0x000, 63, 5),
    (0x400, 63, 5),
    (0x600, 0, 1),
    (0x601, 0, 1),
    (0x602, 0, 1),
    (0x604, 0, 1),
    (0x605, 0, 1),
    (0x280, 63, 1),
    (0x480, 63, 1),
    (0x680, 63, 1),
    (0x480, 63, 5),
    (0x600, 63, 5),
    (0x287, 0, 5),
    (0x6b8, 0, 5),
];
/// The same of `OP-IMM-32`.
const WORD_SHIFTS: [(u32, u32, u32); 8] = [
    (0x000, 31, 1),
    (0x000, 31, 5),
    (0x400, 31, 5),
    (0x600, 31, 5),
    (0x600, 0, 1),
    (0x601, 0, 1),
    (0x602, 0, 1),
    (0x080, 63, 1),
];
const AMOS: [u32; 9] = [0, 1, 4, 8, 12, 16, 20, 24, 28];
const LOAD_RESERVED: u32 = 2;
const STORE_CONDITIONAL: u32 = 3;
/// Opcodes of which any bits are tried.
const WILD: [u32; 16] = [
    LOAD, LOAD_FP, MISC_MEM, OP_IMM, OP_IMM_32, STORE, STORE_FP, AMO, OP, OP_32, MADD, NMADD, OP_FP, OP_FP,
    OP_FP, RESERVED,
];
/// Of no instruction.
const RESERVED: u32 = 0b110_1011;

/// Makes instructions.
pub struct Maker {
    pub rng: ChaCha8Rng,
    /// Floating point is switched on.
    pub has_floats: bool,
}

impl Maker {
    pub fn below(&mut self, bound: u32) -> u32 {
        self.rng.gen_range(0..bound)
    }

    /// Once in so many times.
    pub fn seldom(&mut self, times: u32) -> bool {
        self.below(times) == 0
    }

    pub fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(&mut self.rng).unwrap()
    }

    pub fn register(&mut self) -> u32 {
        self.below(32)
    }

    /// A register to write.
    pub fn target(&mut self) -> u32 {
        loop {
            let register = self.register();
            if !is_kept(register) {
                return register;
            }
        }
    }

    fn base(&mut self) -> u32 {
        if self.seldom(40) { self.register() } else { self.one_of(&POINTERS) }
    }

    /// An offset of twelve bits, mostly a multiple of `size`.
    fn offset(&mut self, size: u32) -> u32 {
        let offset = self.below(1 << 12);
        if self.seldom(4) { offset } else { offset & !(size - 1) }
    }

    pub fn integer(&mut self) -> u32 {
        let (rd, rs1, rs2) = (self.target(), self.register(), self.register());
        let imm = self.below(1 << 12);
        match self.below(8) {
            0 | 1 => {
                let (funct7, funct3) = self.one_of(&OPERATIONS);
                r_type(funct7, rs2, rs1, funct3, rd, OP)
            }
            2 => {
                let (funct7, funct3) = self.one_of(&WORD_OPERATIONS);
                let rs2 = if (funct7, funct3) == ZEXT_H { 0 } else { rs2 };
                r_type(funct7, rs2, rs1, funct3, rd, OP_32)
            }
            3 => i_type(imm, rs1, self.one_of(&[0, 2, 3, 4, 6, 7]), rd, OP_IMM),
            4 => {
                let (fixed, free, funct3) = self.one_of(&SHIFTS);
                i_type(fixed | imm & free, rs1, funct3, rd, OP_IMM)
            }
            5 => i_type(imm, rs1, 0, rd, OP_IMM_32),
            6 => {
                let (fixed, free, funct3) = self.one_of(&WORD_SHIFTS);
                i_type(fixed | imm & free, rs1, funct3, rd, OP_IMM_32)
            }
            _ => u_type(self.below(1 << 20), rd, self.one_of(&[LUI, AUIPC])),
        }
    }

    /// A load or a store.
    pub fn access(&mut self) -> u32 {
        let base = self.base();
        if self.seldom(2) {
            let funct3 = self.below(4);
            s_type(self.offset(1 << funct3), self.register(), base, funct3, STORE)
        } else {
            let funct3 = self.below(7);
            i_type(self.offset(1 << (funct3 & 3)), base, funct3, self.target(), LOAD)
        }
    }

    pub fn atomic(&mut self) -> u32 {
        let (rs2, base) = (self.register(), self.base());
        let (function, funct3) = (self.one_of(&AMOS), 2 + self.below(2));
        self.atomic_of(function, rs2, base, funct3)
    }

    /// A reservation is made, and used after what `between` gives: the two of them and that.
    pub fn reserving(&mut self, between: &[u16]) -> Vec<u16> {
        let (rs2, base) = (self.register(), self.base());
        // Seldom of words here and of doublewords there.
        let funct3 = 2 + self.below(2);
        let other = if self.seldom(8) { 5 - funct3 } else { funct3 };
        let load = self.atomic_of(LOAD_RESERVED, 0, base, funct3);
        let store = self.atomic_of(STORE_CONDITIONAL, rs2, base, other);
        [&halves(load)[..], between, &halves(store)[..]].concat()
    }

    fn atomic_of(&mut self, function: u32, rs2: u32, rs1: u32, funct3: u32) -> u32 {
        let order = self.below(4);
        r_type(function << 2 | order, rs2, rs1, funct3, self.target(), AMO)
    }

    /// An instruction on a CSR, or a fence.
    pub fn system(&mut self) -> u32 {
        let (rd, operand) = (self.target(), self.register());
        let change = self.one_of(&[1, 2, 3, 5, 6, 7]);
        match self.below(8) {
            // Counters, which count traps and time in their own ways.
            0..=2 => i_type(self.one_of(&[0xb00, 0xb02, 0xc00, 0xc01, 0xc02]), 0, 2, rd, SYSTEM),
            3..=5 => i_type(self.one_of(&[0x340, 0x341, 0x342, 0x343]), operand, change, rd, SYSTEM),
            6 => self.one_of(&[0x0ff0_000f, 0x0100_000f, 0x0000_100f]),
            // What can only be read is often written here.
            _ => i_type(self.one_of(&[0xc00, 0xc01, 0xc02]), operand, change, rd, SYSTEM),
        }
    }

    /// An instruction of F or D, or on `fcsr`.
    pub fn float(&mut self) -> u32 {
        let is_double = self.seldom(2);
        let format = u32::from(is_double);
        let [fd, fs1, fs2, fs3] = [(); 4].map(|()| self.float_register(is_double));
        let other = self.float_register(!is_double);
        let (rd, rs1, base) = (self.target(), self.register(), self.base());
        let offset = self.offset(4 << format);
        let (which, three) = (self.below(4), self.below(3));
        let mode = self.one_of(&[0, 1, 2, 3, 4, 7, 7, 7, 7, 7]);
        let operation = |function: u32, rs2: u32, rs1: u32, funct3: u32, rd: u32| {
            r_type(function << 2 | format, rs2, rs1, funct3, rd, OP_FP)
        };
        match self.below(20) {
            0..=4 => operation(which, fs2, fs1, mode, fd),
            5 => operation(0b01011, 0, fs1, mode, fd),
            6 => operation(0b00100, fs2, fs1, three, fd),
            7 => operation(0b00101, fs2, fs1, which & 1, fd),
            8 => operation(0b10100, fs2, fs1, three, rd),
            9 | 10 => operation(0b11000, which, fs1, mode, rd),
            11 | 12 => operation(0b11010, which, rs1, mode, fd),
            13 => match which {
                0 => operation(0b11100, 0, fs1, 0, rd),
                1 => operation(0b11100, 0, fs1, 1, rd),
                _ => operation(0b11110, 0, rs1, 0, fd),
            },
            14 => operation(0b01000, 1 - format, other, mode, fd),
            15 | 16 => {
                let opcode = self.one_of(&[MADD, MSUB, NMSUB, NMADD]);
                r_type(fs3 << 2 | format, fs2, fs1, mode, fd, opcode)
            }
            17 => i_type(offset, base, 2 + format, fd, LOAD_FP),
            18 => s_type(offset, fs2, base, 2 + format, STORE_FP),
            _ => self.float_csr(rd, which),
        }
    }

    /// Half of them for each format; seldom any.
    fn float_register(&mut self, is_double: bool) -> u32 {
        match self.below(16) {
            0 => self.register(),
            _ => self.below(16) + if is_double { 0 } else { 16 },
        }
    }

    fn float_csr(&mut self, rd: u32, which: u32) -> u32 {
        let flags = self.below(32);
        // The reserved ones, too, make much illegal until the next is set.
        let mode = if self.seldom(16) { self.below(8) } else { self.below(5) };
        match which {
            0 => i_type(self.one_of(&[1, 2, 3]), 0, 0b010, rd, SYSTEM),
            1 => i_type(1, flags, self.one_of(&[5, 6, 7]), rd, SYSTEM),
            2 => i_type(2, mode, 0b101, rd, SYSTEM),
            // All flags, and to the nearest.
            _ => i_type(3, flags, 0b101, rd, SYSTEM),
        }
    }

    /// A compressed instruction that does not go anywhere.
    pub fn compressed(&mut self) -> u16 {
        loop {
            let half: u16 = self.rng.r#gen();
            if expand(half).is_some_and(|w| is_tame(w) && (self.has_floats || !is_float_access(w))) {
                return half;
            }
        }
    }

    /// Any bits of opcodes that do not go anywhere: seldom a legal instruction.
    pub fn wild(&mut self) -> u32 {
        loop {
            let w = self.rng.r#gen::<u32>() & !0b111_1111 | self.one_of(&WILD);
            if is_tame(w) {
                return w;
            }
        }
    }

    /// One instruction, or two that belong together, after which comes what follows.
    pub fn straight(&mut self) -> Vec<u16> {
        let w = match self.below(32) {
            0..=8 => self.integer(),
            9..=15 => self.access(),
            16 => self.atomic(),
            17 => {
                let between = if self.seldom(2) { self.straight() } else { vec![] };
                return self.reserving(&between);
            }
            18 => self.system(),
            19 => self.wild(),
            20..=24 if self.has_floats || self.seldom(16) => self.float(),
            _ => return vec![self.compressed()],
        };
        halves(w).to_vec()
    }
}

/// The two halves of an instruction, in their order.
pub fn halves(w: u32) -> [u16; 2] {
    [w as u16, (w >> 16) as u16]
}

fn is_kept(register: u32) -> bool {
    [&POINTERS[..], &COUNTERS[..], &HANDLERS[..]].iter().any(|kept| kept.contains(&register))
}

/// Whether an instruction goes on to the next one, writes nothing that is kept, and accesses
/// memory where a pointer points.
fn is_tame(w: u32) -> bool {
    let (rd, rs1) = (w >> 7 & 31, w >> 15 & 31);
    match w & 0b111_1111 {
        BRANCH | JAL | JALR | SYSTEM => false,
        STORE | LOAD_FP | STORE_FP => POINTERS.contains(&rs1),
        LOAD | AMO => POINTERS.contains(&rs1) && !is_kept(rd),
        MADD | MSUB | NMSUB | NMADD => true,
        // Some have an integer register's number there, some one of floating point.
        _ => !is_kept(rd),
    }
}

fn is_float_access(w: u32) -> bool {
    [LOAD_FP, STORE_FP].contains(&(w & 0b111_1111))
}
