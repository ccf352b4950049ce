//! The code cache: of each page of RAM that was executed, its basic blocks, decoded once.
//!
//! Invisible to the guest: a store to such a page outdates it at once.

use super::decode::{Code, Op, decode};
use super::pairs::pair_up;
use super::ram::PAGE;

/// Places in a page that an instruction can begin at.
const SLOTS: usize = PAGE / 2;
/// Pages kept (some 100 MB); beyond it all are forgotten.
const PAGES_MAX: usize = 4096;
/// Operations in a block. Where a run ends in the middle of one it is cut, so this is no bound
/// on how exact a run is.
const BLOCK_MAX: usize = 64;
/// Operations kept of a page, so that places fit 16 bits; beyond it the page's are forgotten.
const OPS_MAX: usize = u16::MAX as usize - BLOCK_MAX;
const NONE: u32 = u32::MAX;

/// Where a block lies among its page's operations; `count` 0 is one not decoded yet.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    from: u16,
    count: u16,
}

/// A page's blocks. Those that overlap have what they share twice.
#[derive(Debug)]
struct Page {
    /// By place in the page.
    blocks: Box<[Block; SLOTS]>,
    ops: Vec<Op>,
}

impl Page {
    fn new() -> Page {
        Page { blocks: Box::new([Block::default(); SLOTS]), ops: vec![] }
    }

    fn clear(&mut self) {
        self.blocks.fill(Block::default());
        self.ops.clear();
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

/// Pages of blocks.
#[derive(Debug, Default)]
pub(super) struct CodeCache {
    pages: Vec<Page>,
    /// By RAM page: its place in `pages`.
    places: Vec<u32>,
    free: Vec<u32>,
    /// The page being executed: its place.
    current: usize,
}

impl CodeCache {
    pub(super) fn new(ram_pages: usize) -> CodeCache {
        CodeCache { places: vec![NONE; ram_pages], ..CodeCache::default() }
    }

    /// The block at `pc`, which lies in the current page; empty, if it was not decoded yet.
    #[inline(always)]
    pub(super) fn block(&self, pc: u64) -> &[Op] {
        let Some(page) = self.pages.get(self.current) else { return &[] };
        let Block { from, count } = page.blocks[(pc as usize % PAGE) / 2];
        page.ops.get(from as usize..from as usize + count as usize).unwrap_or(&[])
    }

    /// Makes RAM page `ram_page` the current one.
    pub(super) fn enter(&mut self, ram_page: u32) {
        if self.places[ram_page as usize] == NONE {
            self.add_page(ram_page);
        }
        self.current = self.places[ram_page as usize] as usize;
    }

    #[cold]
    fn add_page(&mut self, ram_page: u32) {
        if self.free.is_empty() && self.pages.len() >= PAGES_MAX {
            self.places.fill(NONE);
            self.free.extend(0..self.pages.len() as u32);
        }
        let place = self.free.pop().unwrap_or(self.pages.len() as u32);
        match self.pages.get_mut(place as usize) {
            Some(page) => page.clear(),
            None => self.pages.push(Page::new()),
        }
        self.places[ram_page as usize] = place;
    }

    /// Decodes the block at byte `at` of the current page, which has these bytes. `false`: its
    /// first instruction ends in the next page, so that it depends on more than this one.
    pub(super) fn decode_block(&mut self, bytes: &[u8], at: usize) -> bool {
        let page = &mut self.pages[self.current];
        if page.ops.len() > OPS_MAX {
            page.clear();
        }
        let from = page.ops.len();
        let mut next = at;
        while page.ops.len() - from < BLOCK_MAX && next < PAGE {
            let half = |at: usize| bytes.get(at..at + 2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
            let low = half(next).unwrap_or(0);
            let bits = match half(next + 2) {
                _ if low & 3 != 3 => low,
                Some(high) => low | high << 16,
                None => break,
            };
            let op = decode(bits).placed(next);
            next = op.next as usize;
            page.ops.push(op);
            if op.code.ends_block() {
                break;
            }
        }
        pair_up(&mut page.ops[from..]);
        let count = page.ops.len() - from;
        page.blocks[at / 2] = Block { from: from as u16, count: count as u16 };
        count > 0
    }

    /// Forgets pages that were written.
    pub(super) fn forget(&mut self, ram_pages: Vec<u32>) {
        for ram_page in ram_pages {
            let place = std::mem::replace(&mut self.places[ram_page as usize], NONE);
            if place != NONE {
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
    /// Whether what follows is another block: pc goes elsewhere, or what pc means may change.
    fn ends_block(self) -> bool {
        use Code::*;
        let moves = (Jal as u8..=Bgeu as u8).contains(&(self as u8));
        let is_system = (Illegal as u8..=Csrrci as u8).contains(&(self as u8));
        moves || is_system
    }
}
