//! Memory accesses: Sv39 translation and PMP through the TLB, then RAM or a device.
//!
//! The TLB has what translation and PMP together allow S and U in a whole page, also while
//! nothing is translated. A page that a PMP border cuts is not in it: each access is checked.

use super::fast::Rights;
use super::hart::{Hart, Mode, TLB_ENTRIES, TlbEntry, Trap, envcfg, status};
use super::pmp::Regions;
use super::ram::PAGE;
use super::run::NO_PAGE;
use super::view::Leaf;
use super::{Machine, Outside, RAM_BASE};

/// PTE bits.
pub(super) mod pte {
    pub const V: u64 = 1;
    pub const R: u64 = 2;
    pub const W: u64 = 4;
    pub const X: u64 = 8;
    pub const U: u64 = 16;
    pub const A: u64 = 64;
    pub const D: u64 = 128;
    /// Reserved without Svnapot and Svpbmt.
    pub const RESERVED: u64 = 0x3ff << 54;
}

/// What an access is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Fetch,
    Load,
    Store,
}

impl Access {
    pub(super) fn page_fault(self, va: u64) -> Trap {
        Trap { cause: [12, 13, 15][self as usize], tval: va }
    }
    /// Its right in a PTE or a PMP entry.
    #[inline(always)]
    pub(super) fn right(self) -> u64 {
        match self {
            Access::Fetch => pte::X,
            Access::Load => pte::R,
            Access::Store => pte::W,
        }
    }
    pub(super) fn access_fault(self, va: u64) -> Trap {
        Trap { cause: [1, 5, 7][self as usize], tval: va }
    }
    pub(super) fn misaligned(self, va: u64) -> Trap {
        Trap { cause: [0, 4, 6][self as usize], tval: va }
    }
}

impl Machine {
    /// Follows `mstatus`, `satp` and the mode: under whose rights data is accessed.
    pub(super) fn update_paging(&mut self) {
        let mode = self.hart.data_mode();
        let is_free = mode == Mode::Machine && !self.regions.deny_machine();
        self.data_paging = (!is_free).then_some(mode);
        let has = |bit| self.hart.mstatus & bit != 0;
        self.fast.set_rights(Rights::of(self.data_paging, has(status::SUM), has(status::MXR)));
        if self.hart.fetch_page.is_none() {
            self.here = NO_PAGE;
        }
        self.attention = true;
    }

    /// Follows the PMP entries, which the TLB's rights are made from.
    pub(super) fn follow_pmp(&mut self) {
        self.regions = Regions::of(&self.hart.pmp);
        self.flush_translations();
        self.update_paging();
    }

    /// Where an access of `len` bytes, which lie in one page, goes.
    #[inline(always)]
    pub(super) fn translate(&mut self, va: u64, access: Access, len: u64) -> Result<u64, Trap> {
        match self.data_paging {
            None => Ok(va),
            Some(Mode::Machine) => self.walk(va, access, len, Mode::Machine),
            Some(mode) => self.translate_paged(va, access, len, mode),
        }
    }

    /// Where the two bytes of an instruction at `va` are.
    fn translate_fetch(&mut self, va: u64) -> Result<u64, Trap> {
        match self.hart.mode {
            Mode::Machine if !self.regions.deny_machine() => Ok(va),
            Mode::Machine => self.walk(va, Access::Fetch, 2, Mode::Machine),
            mode => self.translate_paged(va, Access::Fetch, 2, mode),
        }
    }

    #[inline]
    fn translate_paged(&mut self, va: u64, access: Access, len: u64, mode: Mode) -> Result<u64, Trap> {
        let vpn = va >> 12;
        let entry = self.hart.tlb[vpn as usize % TLB_ENTRIES];
        if entry.vpn == vpn && self.hart.allows(u64::from(entry.permissions), access, mode) {
            return Ok(entry.ppn << 12 | va & 0xfff);
        }
        self.walk(va, access, len, mode)
    }

    /// Notes where an access was found to go, if it holds for the page: it then has no
    /// translation, or one that the TLB has.
    fn learn(&mut self, va: u64, at: u64, access: Access) {
        let vpn = va >> 12;
        let entry = self.hart.tlb[vpn as usize % TLB_ENTRIES];
        let holds = self.data_paging.is_none_or(|mode| {
            entry.vpn == vpn && self.hart.allows(u64::from(entry.permissions), access, mode)
        });
        let (page, is_store) = (at as usize / PAGE, access == Access::Store);
        if holds && (!is_store || self.ram.takes_any_store(page)) {
            self.fast.learn(va, page, is_store);
        }
    }

    /// Empties the TLB.
    pub(super) fn flush_translations(&mut self) {
        self.hart.flush_tlb();
        self.fast.forget();
    }

    /// What the TLB does not know: walks the page table, asks PMP, and fills the TLB with what
    /// holds for the whole page.
    #[cold]
    fn walk(&mut self, va: u64, access: Access, len: u64, mode: Mode) -> Result<u64, Trap> {
        let mut found =
            if self.hart.is_bare(mode) { bare_page(va, mode) } else { self.walk_table(va, access, mode)? };
        let pa = found.ppn << 12 | va & 0xfff;
        let in_page = self.regions.rights(found.ppn << 12, found.ppn << 12 | 0xfff, mode);
        let here = in_page.or_else(|| self.regions.rights(pa, pa + (len - 1), mode)).unwrap_or(0);
        if u64::from(here) & access.right() == 0 {
            return Err(access.access_fault(va));
        }
        // Under MXR the TLB takes X for R, which PMP does not.
        let is_unreadable = u64::from(here) & (pte::R | pte::X) == pte::X;
        if in_page.is_some() && mode != Mode::Machine && !is_unreadable {
            found.permissions &= here | pte::U as u8;
            self.hart.tlb[found.vpn as usize % TLB_ENTRIES] = found;
            self.fast.forget_entry(found.vpn);
        }
        Ok(pa)
    }

    /// Walks the page table, and sets A and D if that is the hardware's.
    fn walk_table(&mut self, va: u64, access: Access, mode: Mode) -> Result<TlbEntry, Trap> {
        let leaf = self.view().find_leaf(va, access, mode)?;
        let Leaf { at, entry, level, .. } = leaf;
        let mut updated = entry | pte::A;
        if access == Access::Store {
            updated |= pte::D;
        }
        if updated != entry {
            if self.hart.menvcfg & envcfg::ADUE == 0 {
                return Err(access.page_fault(va));
            }
            self.view().check_table(at, Access::Store).ok_or(access.access_fault(va))?;
            self.ram.store::<8>(at, updated).ok_or(access.access_fault(va))?;
            self.attention |= self.ram.has_stale_code();
        }
        let (vpn, ppn) = (va >> 12, leaf.address(va) >> 12);
        let mut permissions = (updated & (pte::R | pte::X | pte::U)) as u8;
        if updated & pte::D != 0 {
            permissions |= (updated & pte::W) as u8;
        }
        Ok(TlbEntry { vpn, ppn, permissions, level })
    }

    /// Loads `N` aligned bytes, zero-extended, if it is known where from.
    #[inline(always)]
    pub(super) fn load_known<const N: usize>(&self, va: u64) -> Option<u64> {
        self.ram.load_in::<N>(self.fast.find::<N>(va, false)?, va)
    }

    /// Stores `N` aligned bytes, if it is known where to, and that nobody is to be told.
    #[inline(always)]
    pub(super) fn store_known<const N: usize>(&mut self, va: u64, value: u64) -> bool {
        match self.fast.find::<N>(va, true) {
            Some(page) => self.ram.store_in::<N>(page, va, value),
            None => false,
        }
    }

    /// Loads `N` bytes, zero-extended.
    pub(super) fn load<const N: usize>(&mut self, va: u64, outside: &mut dyn Outside) -> Result<u64, Trap> {
        if let Some(value) = self.load_known::<N>(va) {
            return Ok(value);
        }
        self.load_slow::<N>(va, outside)
    }

    #[inline(never)]
    fn load_slow<const N: usize>(&mut self, va: u64, outside: &mut dyn Outside) -> Result<u64, Trap> {
        if va as usize & (N - 1) != 0 && (va as usize & 0xfff) + N > 4096 {
            return self.load_across(va, N);
        }
        let pa = self.translate(va, Access::Load, N as u64)?;
        let at = pa.wrapping_sub(RAM_BASE);
        match self.ram.load::<N>(at) {
            Some(value) => {
                self.learn(va, at, Access::Load);
                Ok(value)
            }
            None => self.load_device(va, pa, N, outside),
        }
    }

    /// Stores `N` bytes.
    pub(super) fn store<const N: usize>(
        &mut self,
        va: u64,
        value: u64,
        outside: &mut dyn Outside,
    ) -> Result<(), Trap> {
        if self.store_known::<N>(va, value) {
            return Ok(());
        }
        self.store_slow::<N>(va, value, outside)
    }

    #[inline(never)]
    fn store_slow<const N: usize>(
        &mut self,
        va: u64,
        value: u64,
        outside: &mut dyn Outside,
    ) -> Result<(), Trap> {
        if va as usize & (N - 1) != 0 && (va as usize & 0xfff) + N > 4096 {
            return self.store_across(va, value, N);
        }
        let pa = self.translate(va, Access::Store, N as u64)?;
        let at = pa.wrapping_sub(RAM_BASE);
        match self.ram.store::<N>(at, value) {
            Some(()) => {
                self.learn(va, at, Access::Store);
                if self.ram.has_stale_code() {
                    self.store_is_told(pa, N);
                }
                Ok(())
            }
            None => self.store_device(va, pa, N, value, outside),
        }
    }

    /// A load that crosses a page: both pages are translated before a byte moves. The trap
    /// value is the address of the first byte that can't be had.
    #[cold]
    fn load_across(&mut self, va: u64, len: usize) -> Result<u64, Trap> {
        let pieces = self.across(va, len, Access::Load)?;
        let mut value = 0;
        for (i, pa) in pieces.into_iter().take(len).enumerate() {
            let byte = self.ram.load::<1>(pa.wrapping_sub(RAM_BASE));
            value |= byte.ok_or(Access::Load.access_fault(va.wrapping_add(i as u64)))? << (8 * i);
        }
        Ok(value)
    }

    #[cold]
    fn store_across(&mut self, va: u64, value: u64, len: usize) -> Result<(), Trap> {
        let pieces = self.across(va, len, Access::Store)?;
        let end = self.ram.len() as u64;
        let outside = pieces.iter().take(len).position(|pa| pa.wrapping_sub(RAM_BASE) >= end);
        if let Some(i) = outside {
            return Err(Access::Store.access_fault(va.wrapping_add(i as u64)));
        }
        for (i, pa) in pieces.into_iter().take(len).enumerate() {
            let stored = self.ram.store::<1>(pa.wrapping_sub(RAM_BASE), value >> (8 * i));
            stored.expect("it was seen to be in RAM");
        }
        self.attention |= self.ram.has_stale_code();
        Ok(())
    }

    fn across(&mut self, va: u64, len: usize, access: Access) -> Result<[u64; 8], Trap> {
        let mut pieces = [0; 8];
        for (i, piece) in pieces.iter_mut().enumerate().take(len) {
            *piece = self.translate(va.wrapping_add(i as u64), access, 1)?;
        }
        Ok(pieces)
    }

    /// The physical page that `pc` is fetched from. The last one is state, since
    /// it holds even where the TLB has since forgotten it. There is none behind an instruction
    /// in a page that a PMP border cuts.
    pub(super) fn fetch_ppn(&mut self, pc: u64) -> Result<u64, Trap> {
        let vpn = pc >> 12;
        if let Some((page, ppn)) = self.hart.fetch_page
            && page == vpn
        {
            return Ok(ppn);
        }
        let ppn = self.translate_fetch(pc)? >> 12;
        self.hart.fetch_page = self.regions.is_whole(ppn, self.hart.mode).then_some((vpn, ppn));
        Ok(ppn)
    }

    /// Two bytes of an instruction, of RAM or ROM.
    pub(super) fn half(&self, pa: u64) -> Option<u32> {
        let bits = self.ram.load::<2>(pa.wrapping_sub(RAM_BASE)).or_else(|| self.rom.load(pa, 2));
        bits.map(|bits| bits as u32)
    }

    /// The instruction bits at `pc`; the upper half may lie on the next page.
    pub(super) fn fetch_bits(&mut self, pc: u64) -> Result<u32, Trap> {
        let fault = Access::Fetch.access_fault(pc);
        let pa = self.fetch_ppn(pc)? << 12 | pc & 0xfff;
        let low = self.half(pa).ok_or(fault)?;
        if low & 3 != 3 {
            return Ok(low);
        }
        let upper = pc.wrapping_add(2);
        let is_known = upper & 0xfff != 0 && self.hart.fetch_page.is_some();
        let pa = if is_known { pa + 2 } else { self.translate_fetch(upper)? };
        let fault = Access::Fetch.access_fault(upper);
        let high = self.half(pa).ok_or(fault)?;
        Ok(low | high << 16)
    }
}

impl Hart {
    /// Under whose rights data is accessed.
    pub(super) fn data_mode(&self) -> Mode {
        if self.mstatus & status::MPRV != 0 {
            Mode::from_bits(self.mstatus >> status::MPP_SHIFT)
        } else {
            self.mode
        }
    }

    /// Whether a mode's addresses are physical ones.
    pub(super) fn is_bare(&self, mode: Mode) -> bool {
        mode == Mode::Machine || self.satp >> 60 == 0
    }

    /// Whether a page-table entry's bits allow an access.
    #[inline(always)]
    pub(super) fn allows(&self, bits: u64, access: Access, mode: Mode) -> bool {
        let readable = if self.mstatus & status::MXR != 0 { pte::R | pte::X } else { pte::R };
        let right = if access == Access::Load { readable } else { access.right() };
        let user_page = bits & pte::U != 0;
        let owner = match mode {
            Mode::User => user_page,
            _ if access == Access::Fetch => !user_page,
            _ => !user_page || self.mstatus & status::SUM != 0,
        };
        bits & right != 0 && owner
    }
}

/// The page of `va` where nothing is translated, before PMP is asked.
fn bare_page(va: u64, mode: Mode) -> TlbEntry {
    let owner = if mode == Mode::User { pte::U } else { 0 };
    let permissions = (pte::R | pte::W | pte::X | owner) as u8;
    TlbEntry { vpn: va >> 12, ppn: va >> 12, permissions, level: 0 }
}
