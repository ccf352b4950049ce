//! The decode cache: for each page of RAM that was executed, its instructions,
//! decoded once. Invisible to the guest: a store to such a page outdates it at once.

use super::decode::Op;

/// Slots an instruction can begin at in a page.
const SLOTS: usize = super::ram::PAGE / 2;
/// Decoded pages kept (about 100 MB); beyond it all are forgotten.
const PAGES_MAX: usize = 4096;
const NONE: u32 = u32::MAX;
/// Page numbers have 52 bits.
const NO_PAGE: u64 = u64::MAX;

/// Decoded pages.
pub(super) struct CodeCache {
    ops: Vec<Op>,
    /// By RAM page: where its slots begin, in pages.
    place: Vec<u32>,
    free: Vec<u32>,
    /// The page being executed: its virtual number, none that exists if it is not known, and
    /// its first slot.
    page: u64,
    first: usize,
}

impl CodeCache {
    pub(super) fn new(pages: usize) -> CodeCache {
        CodeCache { ops: vec![], place: vec![NONE; pages], free: vec![], page: NO_PAGE, first: 0 }
    }

    /// The cached operation at `pc`, if its page is the current one.
    #[inline(always)]
    pub(super) fn at(&self, pc: u64) -> Option<(usize, Op)> {
        if pc >> 12 != self.page {
            return None;
        }
        let slot = self.first + (pc as usize & 0xffe) / 2;
        Some((slot, *self.ops.get(slot)?))
    }

    /// Makes RAM page `ram_page`, mapped at virtual page `page`, the current one.
    pub(super) fn enter(&mut self, page: u64, ram_page: u32) {
        let place = &mut self.place[ram_page as usize];
        if *place == NONE {
            *place = match self.free.pop() {
                Some(free) => {
                    self.ops[free as usize * SLOTS..][..SLOTS].fill(Op::UNDECODED);
                    free
                }
                None if self.ops.len() / SLOTS >= PAGES_MAX => {
                    self.place.fill(NONE);
                    self.ops.clear();
                    self.page = NO_PAGE;
                    return self.enter(page, ram_page);
                }
                None => {
                    self.ops.resize(self.ops.len() + SLOTS, Op::UNDECODED);
                    (self.ops.len() / SLOTS - 1) as u32
                }
            };
        }
        (self.page, self.first) = (page, *place as usize * SLOTS);
    }

    /// The current page is no longer known: pc, mode or mapping changed.
    #[inline(always)]
    pub(super) fn leave(&mut self) {
        self.page = NO_PAGE;
    }

    pub(super) fn set(&mut self, slot: usize, op: Op) {
        self.ops[slot] = op;
    }

    /// Forgets pages that were written.
    pub(super) fn forget(&mut self, pages: Vec<u32>) {
        for page in pages {
            let place = std::mem::replace(&mut self.place[page as usize], NONE);
            if place != NONE {
                self.free.push(place);
            }
        }
        self.page = NO_PAGE;
    }
}
