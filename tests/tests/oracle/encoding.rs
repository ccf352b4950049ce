//! How instructions are put together, and jumps patched once it is known where they go.

/// How an item's jump is patched once it is known where its target lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Jump {
    Branch,
    Jal,
    /// `auipc`, then `jalr`.
    Jalr,
    Skip,
    CompressedBranch,
    /// An instruction, then a branch: the only jump that goes back.
    Back,
}

/// One or a few instructions that belong together.
#[derive(Clone)]
pub struct Item {
    pub halves: Vec<u16>,
    /// Jumps over so many items, or so many back.
    pub jump: Option<(Jump, usize)>,
}

pub fn register(f7: u32, rs2: u32, rs1: u32, f3: u32, rd: u32, opcode: u32) -> u32 {
    f7 << 25 | rs2 << 20 | rs1 << 15 | f3 << 12 | rd << 7 | opcode
}

pub fn immediate(imm: u32, rs1: u32, f3: u32, rd: u32, opcode: u32) -> u32 {
    (imm & 0xfff) << 20 | rs1 << 15 | f3 << 12 | rd << 7 | opcode
}

/// A store of an integer register, or of opcode `0x27` a floating-point one.
pub fn store(offset: u32, rs2: u32, rs1: u32, f3: u32, opcode: u32) -> u32 {
    (offset >> 5 & 0x7f) << 25 | rs2 << 20 | rs1 << 15 | f3 << 12 | (offset & 31) << 7 | opcode
}

pub fn csr(f3: u32, number: u32, operand: u32, rd: u32) -> u32 {
    immediate(number, operand, f3, rd, 0x73)
}

pub fn words(words: &[u32]) -> Item {
    Item { halves: words.iter().flat_map(|word| [*word as u16, (*word >> 16) as u16]).collect(), jump: None }
}

pub fn halves(halves: &[u16]) -> Item {
    Item { halves: halves.to_vec(), jump: None }
}

/// The item with its jump going `o` bytes ahead of its own start, modulo 2^32.
pub fn patched(item: &[u16], jump: Jump, o: u32) -> Vec<u16> {
    // The branch back is its item's second instruction.
    let o = if jump == Jump::Back { o.wrapping_sub(4) } else { o };
    let bit = |from: u32, to: u32| (o >> from & 1) << to;
    let bits = |from: u32, count: u32, to: u32| (o >> from & ((1 << count) - 1)) << to;
    let wide = bit(12, 31) | bits(5, 6, 25) | bits(1, 4, 8) | bit(11, 7);
    let far = bit(20, 31) | bits(1, 10, 21) | bit(11, 20) | bits(12, 8, 12);
    let short = bit(11, 12)
        | bit(4, 11)
        | bits(8, 2, 9)
        | bit(10, 8)
        | bit(6, 7)
        | bit(7, 6)
        | bits(1, 3, 3)
        | bit(5, 2);
    let near = bit(8, 12) | bits(3, 2, 10) | bits(6, 2, 5) | bits(1, 2, 3) | bit(5, 2);
    let added = match jump {
        Jump::Branch => vec![wide as u16, (wide >> 16) as u16],
        Jump::Jal => vec![far as u16, (far >> 16) as u16],
        Jump::Jalr => vec![0, 0, 0, (o << 4) as u16],
        Jump::Skip => vec![short as u16],
        Jump::CompressedBranch => vec![near as u16],
        Jump::Back => vec![0, 0, wide as u16, (wide >> 16) as u16],
    };
    item.iter().zip(added).map(|(half, added)| half | added).collect()
}
