//! Random programs of legal instructions that come to their end.
//!
//! ```text
//! CODE      the program: jumps stay inside, and go back only while there is fuel
//! SCRATCH   a page: all that is loaded and stored, then the flags that operations raised
//! x2 x9 x26 x27   point into what is loaded and stored, and nothing else is done to them
//! x24       points behind the last flags, a byte for each operation of floating point
//! x25       the fuel: each chance to go back takes one
//! f0..f15   hold binary64, f16..f31 binary32
//! ```
//!
//! What unicorn's QEMU (5.0) does differently is not generated or, below, not compared:
//! - It leaves binary32 results unboxed and does not look at boxes: hence two banks of
//!   registers, the upper halves of the second not compared with it.
//! - `fmin` and `fmax` of a signalling NaN give a NaN, as before version 2.2 of F: operands
//!   are made quiet first.
//! - A fused infinity times zero plus a quiet NaN does not raise NV: what is added comes
//!   from an integer.
//! - It has no Zba, Zbb and Zbs: `replay-engine/tests/machine/bits.rs` has those.

use super::encoding::{Item, Jump, csr, halves, immediate, patched, register, store, words};
use heddle_replay_engine::machine::decode::decode;
use heddle_replay_engine::machine::disasm::disassemble;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Where the code is.
pub const CODE: u64 = 0x8000_0000;
/// Room for it.
pub const CODE_BYTES: u64 = 0x1_0000;
/// The page that is loaded and stored.
pub const SCRATCH: u64 = CODE + CODE_BYTES;
/// Its size.
pub const PAGE: usize = 4096;

/// Registers that point into the page. The first two serve compressed code.
const POINTERS: [u32; 4] = [2, 9, 26, 27];
const FLAGS: u32 = 24;
const FUEL: u32 = 25;
const ITEMS_MAX: usize = 48;
const FUEL_MAX: u64 = 16;
/// The page's part that is loaded and stored. Behind it each item has room for its flags as often
/// as it can be executed.
const DATA_BYTES: usize = 3072;
const _: () = assert!(DATA_BYTES + ITEMS_MAX * (1 + FUEL_MAX as usize) <= PAGE);
/// Binary64 values at the edges.
const DOUBLES: [u64; 16] = [
    0,
    1 << 63,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x7ff0_0000_0000_0001,
    0xfff8_0000_dead_beef,
    1,
    0x800f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x41e0_0000_0000_0000,
    0x43e0_0000_0000_0000,
    0x3fdf_ffff_ffff_ffff,
];
/// Binary32 values at the edges.
const SINGLES: [u32; 14] = [
    0,
    1 << 31,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    0xffc0_beef,
    1,
    0x807f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x4f00_0000,
];

/// What a program begins and ends with.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    /// x0 to x31.
    pub x: [u64; 32],
    /// f0 to f31.
    pub f: [u64; 32],
    /// `frm` and `fflags`.
    pub fcsr: u64,
    /// The page.
    pub memory: Vec<u8>,
}

/// A program and what it begins with.
pub struct Program {
    items: Vec<Item>,
    /// Registers and memory at its start.
    pub state: State,
}

impl Program {
    /// The program of this seed.
    pub fn new(seed: u64) -> Program {
        let mut maker = Maker { rng: ChaCha8Rng::seed_from_u64(seed), pointers: [0; 4] };
        let ends = DATA_BYTES as u64 / 8;
        maker.pointers = [1024, 2048, 8 * maker.below(ends), 8 * maker.below(ends)];
        let state = maker.state();
        // What is left of another program in `mscratch` is overwritten.
        let mut items = vec![words(&[csr(1, 0x340, 5, 0)])];
        let count = 1 + maker.below(ITEMS_MAX as u64) as usize;
        items.extend((0..count).map(|_| maker.item()));
        Program { items, state }
    }

    /// How many items it has.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// The code of its first `count` items.
    pub fn code(&self, count: usize) -> Vec<u8> {
        let items = &self.items[..count];
        let mut starts = vec![0u32];
        for item in items {
            starts.push(starts[starts.len() - 1] + 2 * item.halves.len() as u32);
        }
        let halves = items.iter().enumerate().flat_map(|(n, item)| match item.jump {
            None => item.halves.clone(),
            Some((jump, distance)) => {
                let is_back = jump == Jump::Back;
                let target = if is_back { n.saturating_sub(distance) } else { (n + 1 + distance).min(count) };
                patched(&item.halves, jump, starts[target].wrapping_sub(starts[n]))
            }
        });
        halves.flat_map(u16::to_le_bytes).collect()
    }

    /// The program as an assembler would have it.
    pub fn listing(&self) -> String {
        let code = self.code(self.items.len());
        let half =
            |at: usize| code.get(at..at + 2).map_or(0, |b| u32::from(u16::from_le_bytes([b[0], b[1]])));
        let (mut at, mut out) = (0, String::new());
        while at < code.len() {
            let bits = if half(at) & 3 == 3 { half(at) | half(at + 2) << 16 } else { half(at) };
            let (op, pc) = (decode(bits), CODE + at as u64);
            out.push_str(&format!("  {pc:#x}: {bits:08x}  {}\n", disassemble(&op, pc)));
            at += usize::from(op.len);
        }
        out
    }
}

struct Maker {
    rng: ChaCha8Rng,
    /// Where the pointers point, as offsets.
    pointers: [u64; 4],
}

impl Maker {
    fn below(&mut self, bound: u64) -> u64 {
        self.rng.gen_range(0..bound)
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(&mut self.rng).expect("no list here is empty")
    }

    fn state(&mut self) -> State {
        let mut x = [0; 32];
        x.iter_mut().skip(1).for_each(|x| *x = self.integer());
        for (register, offset) in POINTERS.iter().zip(self.pointers) {
            x[*register as usize] = SCRATCH + offset;
        }
        x[FLAGS as usize] = SCRATCH + DATA_BYTES as u64;
        x[FUEL as usize] = self.below(FUEL_MAX + 1);
        let mut f = [0; 32];
        for (n, f) in f.iter_mut().enumerate() {
            *f = if n < 16 { self.double() } else { u64::from(self.single()) | 0xffff_ffff << 32 };
        }
        let fcsr = self.below(5) << 5 | self.below(32);
        let mut memory = vec![];
        while memory.len() < PAGE {
            let value = match self.below(3) {
                0 => self.integer(),
                1 => self.double(),
                _ => u64::from(self.single()) | u64::from(self.single()) << 32,
            };
            memory.extend(value.to_le_bytes());
        }
        State { x, f, fcsr, memory }
    }

    fn integer(&mut self) -> u64 {
        let value: u64 = self.rng.r#gen();
        match self.below(6) {
            0 => self.one_of(&[0, 1, u64::MAX, 1 << 63, i64::MAX as u64, 1 << 31, 0xffff_ffff, 0x7fff_ffff]),
            1 => value as i32 as u64,
            2 => value & 0xff,
            3 => value >> (value & 63),
            _ => value,
        }
    }

    fn double(&mut self) -> u64 {
        let value: u64 = self.rng.r#gen();
        match self.below(4) {
            0 => self.one_of(&DOUBLES),
            // Near one, so that sums cancel and products do not overflow.
            1 => value & 0x800f_ffff_ffff_ffff | (1023 - 32 + (value >> 52 & 63)) << 52,
            2 => (value as i32 as f64).to_bits(),
            _ => value,
        }
    }

    fn single(&mut self) -> u32 {
        let value: u32 = self.rng.r#gen();
        match self.below(4) {
            0 => self.one_of(&SINGLES),
            1 => value & 0x807f_ffff | (127 - 16 + (value >> 23 & 31)) << 23,
            2 => (value as i16 as f32).to_bits(),
            _ => value,
        }
    }

    /// A register to read: any.
    fn source(&mut self) -> u32 {
        self.below(32) as u32
    }

    /// A register to write: none that is kept for something.
    fn target(&mut self) -> u32 {
        loop {
            let register = self.source();
            if !POINTERS.contains(&register) && ![FLAGS, FUEL].contains(&register) {
                return register;
            }
        }
    }

    /// The same, and not x0.
    fn target_not_zero(&mut self) -> u32 {
        loop {
            let register = self.target();
            if register != 0 {
                return register;
            }
        }
    }

    /// x8 to x15 as compressed code names them, without x9.
    fn short_target(&mut self) -> u32 {
        self.one_of(&[0, 2, 3, 4, 5, 6, 7])
    }

    fn item(&mut self) -> Item {
        match self.below(21) {
            0..=4 => self.integer_item(),
            5..=6 => self.memory_item(),
            7 => self.atomic_item(),
            8 => self.jump_item(),
            9..=11 => self.compressed_item(),
            12 => self.csr_item(),
            13 => self.loop_item(),
            _ => self.float_item(),
        }
    }

    fn integer_item(&mut self) -> Item {
        let (rd, rs1, rs2) = (self.target(), self.source(), self.source());
        let imm = self.below(4096) as u32;
        let word = match self.below(6) {
            0 | 1 => {
                let (f7, f3) = self.one_of(&[
                    (0, 0),
                    (0x20, 0),
                    (0, 1),
                    (0, 2),
                    (0, 3),
                    (0, 4),
                    (0, 5),
                    (0x20, 5),
                    (0, 6),
                    (0, 7),
                    (1, 0),
                    (1, 1),
                    (1, 2),
                    (1, 3),
                    (1, 4),
                    (1, 5),
                    (1, 6),
                    (1, 7),
                ]);
                register(f7, rs2, rs1, f3, rd, 0x33)
            }
            2 => {
                let (f7, f3) = self.one_of(&[
                    (0, 0),
                    (0x20, 0),
                    (0, 1),
                    (0, 5),
                    (0x20, 5),
                    (1, 0),
                    (1, 4),
                    (1, 5),
                    (1, 6),
                    (1, 7),
                ]);
                register(f7, rs2, rs1, f3, rd, 0x3b)
            }
            3 => immediate(imm, rs1, self.one_of(&[0, 2, 3, 4, 6, 7]), rd, 0x13),
            4 => {
                // Shifts, and addiw.
                let (imm, f3, opcode) = self.one_of(&[
                    (imm & 63, 1, 0x13),
                    (imm & 63, 5, 0x13),
                    (imm & 63 | 0x400, 5, 0x13),
                    (imm & 31, 1, 0x1b),
                    (imm & 31, 5, 0x1b),
                    (imm & 31 | 0x400, 5, 0x1b),
                    (imm, 0, 0x1b),
                ]);
                immediate(imm, rs1, f3, rd, opcode)
            }
            _ => (self.below(1 << 20) as u32) << 12 | rd << 7 | self.one_of(&[0x37, 0x17]),
        };
        words(&[word])
    }

    /// A pointer, and an offset from it that keeps `size` bytes in the page.
    fn place(&mut self, size: u64) -> (u32, u32) {
        let n = self.below(4) as usize;
        let at = self.pointers[n] as i64;
        let (low, high) = ((-at).max(-2048), (DATA_BYTES as i64 - size as i64 - at).min(2047));
        let mut offset = self.rng.gen_range(low..=high);
        if self.below(4) != 0 {
            // Pointers are aligned, and so is the end.
            offset = offset / size as i64 * size as i64;
        }
        (POINTERS[n], offset as u32 & 0xfff)
    }

    fn memory_item(&mut self) -> Item {
        let is_float = self.below(3) == 0;
        let is_store = self.below(2) == 0;
        let f3 =
            if is_float { 2 + self.below(2) as u32 } else { self.below(if is_store { 4 } else { 7 }) as u32 };
        let (base, offset) = self.place(1 << (f3 & 3));
        let own = match (is_float, is_store) {
            (true, _) => self.float_register(f3 == 3),
            (false, true) => self.source(),
            (false, false) => self.target(),
        };
        let float = if is_float { 4 } else { 0 };
        words(&[if is_store {
            store(offset, own, base, f3, 0x23 | float)
        } else {
            immediate(offset, base, f3, own, 0x03 | float)
        }])
    }

    /// The pointers are aligned, so an atomic takes one as it is.
    fn atomic_item(&mut self) -> Item {
        let (base, f3, order) = (self.one_of(&POINTERS), 2 + self.below(2) as u32, self.below(4) as u32);
        let mut atomic = |f5: u32, rs2: u32| {
            let rd = self.target();
            f5 << 27 | order << 25 | rs2 << 20 | base << 15 | f3 << 12 | rd << 7 | 0x2f
        };
        if order == 0 {
            // A reservation is always used up: none is left to the next program.
            return words(&[atomic(2, 0), atomic(3, 7)]);
        }
        let f5 = self.one_of(&[0, 1, 4, 0xc, 8, 0x10, 0x14, 0x18, 0x1c]);
        let (rd, rs2) = (self.target(), self.source());
        words(&[f5 << 27 | order << 25 | rs2 << 20 | base << 15 | f3 << 12 | rd << 7 | 0x2f])
    }

    fn jump_item(&mut self) -> Item {
        let over = self.below(4) as usize;
        let (rd, rs1, rs2) = (self.target(), self.source(), self.source());
        let link = self.target_not_zero();
        let short = self.below(8) as u16;
        let (item, jump) = match self.below(5) {
            0 | 1 => {
                let f3 = self.one_of(&[0, 1, 4, 5, 6, 7]);
                (words(&[rs2 << 20 | rs1 << 15 | f3 << 12 | 0x63]), Jump::Branch)
            }
            2 => (words(&[rd << 7 | 0x6f]), Jump::Jal),
            3 => (words(&[link << 7 | 0x17, immediate(0, link, 0, rd, 0x67)]), Jump::Jalr),
            _ if short == 0 => (halves(&[0xa001]), Jump::Skip),
            _ => (halves(&[self.one_of(&[0xc001, 0xe001]) | short << 7]), Jump::CompressedBranch),
        };
        Item { jump: Some((jump, over)), ..item }
    }

    /// Goes back while there is fuel: however loops overlap, the program comes to its end.
    fn loop_item(&mut self) -> Item {
        let burn = immediate(0xfff, FUEL, 0, FUEL, 0x13);
        let back_if_positive = FUEL << 20 | 4 << 12 | 0x63;
        let distance = 1 + self.below(8) as usize;
        Item { jump: Some((Jump::Back, distance)), ..words(&[burn, back_if_positive]) }
    }

    fn csr_item(&mut self) -> Item {
        let (rd, rs1, value) = (self.target(), self.source(), self.below(32) as u32);
        let mode = self.below(5) as u32;
        words(&[match self.below(5) {
            0 => csr(2, 3, 0, rd),
            1 => csr(5, 2, mode, rd),
            2 => csr(self.one_of(&[5, 6, 7]), 1, value, rd),
            3 => csr(self.one_of(&[1, 2, 3]), 0x340, rs1, rd),
            // The flags alone: `frm` becomes zero.
            _ => csr(5, 3, value, rd),
        }])
    }

    fn compressed_item(&mut self) -> Item {
        let (rd, rs2) = (self.target_not_zero(), self.rng.gen_range(1..32));
        let (short, other) = (self.short_target(), self.below(8) as u32);
        let imm = self.rng.gen_range(1..64u32);
        let double = self.below(16) as u32;
        // An immediate of six bits, in its two places.
        let six = |imm: u32| (imm & 32) << 7 | (imm & 31) << 2;
        // A load or store with base x9, whose number is 1 here.
        let near = |f3: u32, own: u32| f3 << 13 | (imm & 7) << 10 | 1 << 7 | (imm >> 3 & 3) << 5 | own << 2;
        let from_stack = |f3: u32, own: u32| f3 << 13 | six(imm) | own << 7 | 2;
        let to_stack = |f3: u32, own: u32| f3 << 13 | imm << 7 | own << 2 | 2;
        let half = match self.below(28) {
            0 => imm << 5 | short << 2,
            1 => near(1, other),
            2 => near(2, short),
            3 => near(3, short),
            4 => near(5, other),
            5 => near(6, other),
            6 => near(7, other),
            7 => six(imm) | rd << 7 | 1,
            8 => 1 << 13 | six(imm) | rd << 7 | 1,
            9 => 2 << 13 | six(imm) | rd << 7 | 1,
            10 => 3 << 13 | six(imm) | rd << 7 | 1,
            11 => 0x8001 | six(imm) | short << 7,
            12 => 0x8401 | six(imm) | short << 7,
            13 => 0x8801 | six(imm) | short << 7,
            14..=17 => 0x8c01 | short << 7 | (imm & 3) << 5 | other << 2,
            18..=19 => 0x9c01 | short << 7 | (imm & 1) << 5 | other << 2,
            20 => six(imm) | rd << 7 | 2,
            21 => 0x8002 | rd << 7 | rs2 << 2,
            22 => 0x9002 | rd << 7 | rs2 << 2,
            23 => from_stack(1, double),
            24 => from_stack(2, rd),
            25 => from_stack(3, rd),
            26 => to_stack(5, double),
            _ => to_stack(6 + (imm & 1), rs2),
        };
        halves(&[half as u16])
    }

    fn float_register(&mut self, is_double: bool) -> u32 {
        self.below(16) as u32 + if is_double { 0 } else { 16 }
    }

    fn rounding(&mut self) -> u32 {
        self.one_of(&[0, 1, 2, 3, 4, 7, 7, 7])
    }

    fn float_item(&mut self) -> Item {
        let is_double = self.below(2) == 0;
        let format = u32::from(is_double);
        let (rd, rs1, rs2) =
            (self.float_register(is_double), self.float_register(is_double), self.float_register(is_double));
        let (to, from, which) = (self.target(), self.source(), self.below(4) as u32);
        let (mode, three) = (self.rounding(), self.below(3) as u32);
        let op = |f5: u32, rs2: u32, rs1: u32, f3: u32, rd: u32| {
            register(f5 << 2 | format, rs2, rs1, f3, rd, 0x53)
        };
        // The bank's last registers serve these items.
        let spare = if is_double { 13 } else { 29 };
        let mut code = match self.below(13) {
            0..=3 => vec![op(which, rs2, rs1, mode, rd)],
            4 => vec![op(0x0b, 0, rs1, mode, rd)],
            5 => vec![op(4, rs2, rs1, three, rd)],
            6 => vec![op(0x14, rs2, rs1, three, to)],
            7 => vec![op(0x18, which, rs1, mode, to)],
            8 => vec![op(0x1a, which, from, mode, rd)],
            9 => vec![match which {
                0 => op(0x1c, 0, rs1, 0, to),
                1 => op(0x1c, 0, rs1, 1, to),
                _ => op(0x1e, 0, from, 0, rd),
            }],
            10 => {
                let other = self.float_register(!is_double);
                vec![op(8, 1 - format, other, mode, rd)]
            }
            11 => vec![
                op(0x1a, 2, from, mode, spare),
                spare << 27
                    | format << 25
                    | rs2 << 20
                    | rs1 << 15
                    | mode << 12
                    | rd << 7
                    | (0x43 + 4 * which),
            ],
            // Times one, which makes a NaN quiet; then the smaller, or the larger.
            _ => vec![
                immediate(1, 0, 0, 28, 0x13),
                op(0x1a, 0, 28, 0, spare + 2),
                op(2, spare + 2, rs1, 0, spare),
                op(2, spare + 2, rs2, 0, spare + 1),
                op(5, spare + 1, spare, which & 1, rd),
            ],
        };
        // What the operation itself raises, before which nothing is raised, or NX alone: the
        // machine then asks its host.
        let before = self.one_of(&[0, 0, 1]);
        code.insert(code.len() - 1, csr(5, 1, before, 0));
        code.extend([csr(2, 1, 0, 28), store(0, 28, FLAGS, 0, 0x23), immediate(1, FLAGS, 0, FLAGS, 0x13)]);
        words(&code)
    }
}
