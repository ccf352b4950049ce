//! The code cache: of each page of RAM that was executed, its basic blocks, decoded once.
//!
//! Invisible to the guest: a store to such a page outdates it at once.

use super::decode::{Code, Op, decode};
use super::hart::{Hart, status};
use super::pairs::pair_up;
use super::ram::PAGE;

/// Places in a page that an instruction can begin at.
const SLOTS: usize = PAGE / 2;
/// Pages kept (32 MB of places); beyond it all are forgotten.
const PAGES_MAX: usize = 4096;
/// Operations kept (48 MB), with those that were outdated since; beyond it all are forgotten.
const OPS_MAX: usize = 1 << 22;
/// Operations in a block. Where a run ends in the middle of one it is cut, so this is no bound
/// on how exact a run is.
const BLOCK_MAX: usize = (1 << Block::COUNT_BITS) - 1;
const NONE: u32 = u32::MAX;

/// Where a block lies among the operations, and how many it has: none, if it was not decoded yet.
#[derive(Clone, Copy, Debug, Default)]
struct Block(u32);

impl Block {
    const COUNT_BITS: u32 = 6;

    fn new(from: usize, count: usize) -> Block {
        Block((from << Block::COUNT_BITS | count) as u32)
    }

    #[inline(always)]
    fn from(self) -> usize {
        (self.0 >> Block::COUNT_BITS) as usize
    }

    #[inline(always)]
    fn count(self) -> usize {
        self.0 as usize % (1 << Block::COUNT_BITS)
    }
}

/// The first `count` operations of a block. The last of them goes without the second of its pair.
#[cold]
pub(super) fn cut(ops: &[Op], count: usize) -> Vec<Op> {
    let mut ops = ops[..count].to_vec();
    if let Some(last) = ops.last_mut() {
        last.run = last.code;
    }
    ops
}

/// Pages of blocks. Those that overlap have what they share twice.
#[derive(Debug, Default)]
pub(super) struct CodeCache {
    ops: Vec<Op>,
    /// By place in a page, page after page.
    blocks: Vec<Block>,
    /// By RAM page: where its blocks begin, in pages.
    places: Vec<u32>,
    free: Vec<u32>,
    /// The page being executed: its first block.
    current: usize,
}

impl CodeCache {
    pub(super) fn new(ram_pages: usize) -> CodeCache {
        CodeCache { places: vec![NONE; ram_pages], ..CodeCache::default() }
    }

    /// The block at `pc`, which lies in the current page; empty, if it was not decoded yet.
    #[inline(always)]
    pub(super) fn block(&self, pc: u64) -> &[Op] {
        let block = self.blocks.get(self.current + (pc as usize % PAGE) / 2).copied().unwrap_or_default();
        self.ops.get(block.from()..block.from() + block.count()).unwrap_or(&[])
    }

    /// Makes RAM page `ram_page` the current one.
    pub(super) fn enter(&mut self, ram_page: u32) {
        if self.places[ram_page as usize] == NONE {
            self.add_page(ram_page);
        }
        self.current = self.places[ram_page as usize] as usize * SLOTS;
    }

    #[cold]
    fn add_page(&mut self, ram_page: u32) {
        let pages = self.blocks.len() / SLOTS;
        if self.free.is_empty() && pages >= PAGES_MAX {
            self.forget_all();
        }
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.blocks.resize((pages + 1) * SLOTS, Block::default());
                pages as u32
            }
        };
        self.places[ram_page as usize] = place;
    }

    fn forget_all(&mut self) {
        self.places.fill(NONE);
        self.blocks.fill(Block::default());
        self.ops.clear();
        self.free = (0..(self.blocks.len() / SLOTS) as u32).collect();
    }

    /// Decodes the block at byte `at` of RAM page `ram_page`, the current one, which has these
    /// bytes. `false`: its first instruction ends in the next page, so that it depends on more
    /// than this one.
    pub(super) fn decode_block(&mut self, ram_page: u32, bytes: &[u8], at: usize) -> bool {
        if self.ops.len() + BLOCK_MAX > OPS_MAX {
            self.forget_all();
            self.enter(ram_page);
        }
        let from = self.ops.len();
        let mut next = at;
        while self.ops.len() - from < BLOCK_MAX && next < PAGE {
            let half = |at: usize| bytes.get(at..at + 2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
            let low = half(next).unwrap_or(0);
            let bits = match half(next + 2) {
                _ if low & 3 != 3 => low,
                Some(high) => low | high << 16,
                None => break,
            };
            let op = decode(bits).placed(next);
            next = op.next as usize;
            self.ops.push(op);
            if op.code.ends_block() {
                break;
            }
        }
        pair_up(&mut self.ops[from..]);
        let count = self.ops.len() - from;
        self.blocks[self.current + at / 2] = Block::new(from, count);
        count > 0
    }

    /// Forgets pages that were written.
    pub(super) fn forget(&mut self, ram_pages: Vec<u32>) {
        for ram_page in ram_pages {
            let place = std::mem::replace(&mut self.places[ram_page as usize], NONE);
            if place != NONE {
                self.blocks[place as usize * SLOTS..][..SLOTS].fill(Block::default());
                self.free.push(place);
            }
        }
    }
}

impl Op {
    /// The operation at byte `at` of its page: what it says of pc is relative to the page.
    pub(super) fn placed(self, at: usize) -> Op {
        use Code::*;
        let imm = match self.code {
            // At most 21 bits, or a multiple of a page: the sum fits.
            Auipc | Jal | Beq | Bne | Blt | Bge | Bltu | Bgeu => self.imm.wrapping_add(at as i32),
            _ => self.imm,
        };
        Op { imm, next: (at + self.len as usize) as u16, ..self }
    }
}

impl Code {
    /// Whether it does nothing but trap on this hart: known when it is decoded, and so done when
    /// it traps.
    pub(super) fn traps_by_itself(self, hart: &Hart) -> bool {
        matches!(self, Code::Illegal | Code::Ecall | Code::Ebreak)
            || (self.is_float() && hart.mstatus & status::FS == 0)
    }

    /// Whether what follows is another block: pc goes elsewhere, or what pc means may change.
    fn ends_block(self) -> bool {
        use Code::*;
        let moves = (Jal as u8..=Bgeu as u8).contains(&(self as u8));
        let is_system = (Illegal as u8..=Csrrci as u8).contains(&(self as u8));
        moves || is_system
    }
}
