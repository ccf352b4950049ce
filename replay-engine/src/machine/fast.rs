//! Translations that loads and stores find with one compare: a cache of the TLB, or of the
//! identity where nothing is translated.
//!
//! Nothing here is state. An entry is only ever what the slow path has allowed under the same
//! rights, and goes as soon as the TLB's own entry does, so the guest can't tell.

use super::hart::{Mode, TLB_ENTRIES};

/// A page of RAM as it is seen.
#[derive(Clone, Copy)]
struct Entry {
    /// The virtual address of its first byte; one that no access has, if empty.
    tag: u64,
    /// What to add to a virtual address for the offset in RAM.
    to_ram: u64,
}

/// What is compared has at most three of the low twelve bits.
const EMPTY: Entry = Entry { tag: u64::MAX, to_ram: 0 };

/// Under whose rights data is accessed: a set of entries for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Rights {
    /// No translation.
    Bare = 0,
    User = TLB_ENTRIES,
    Supervisor = 2 * TLB_ENTRIES,
    /// Supervisor that may access user pages.
    SupervisorSum = 3 * TLB_ENTRIES,
    /// Anything that is rare: never cached.
    Other = 4 * TLB_ENTRIES,
}

const SETS: usize = 8;

impl Rights {
    /// Of this mode of translated accesses, or of none.
    pub(super) fn of(paging: Option<Mode>, sum: bool, mxr: bool) -> Rights {
        match paging {
            None => Rights::Bare,
            Some(_) if mxr => Rights::Other,
            // Checked at each access: the TLB has none of it.
            Some(Mode::Machine) => Rights::Other,
            Some(Mode::User) => Rights::User,
            Some(_) if sum => Rights::SupervisorSum,
            Some(_) => Rights::Supervisor,
        }
    }
}

/// The entries, of loads and of stores apart.
pub(super) struct FastTlb {
    sets: [Box<[Entry; SETS * TLB_ENTRIES]>; 2],
    rights: Rights,
}

impl FastTlb {
    pub(super) fn new() -> FastTlb {
        let set = || Box::new([EMPTY; SETS * TLB_ENTRIES]);
        FastTlb { sets: [set(), set()], rights: Rights::Other }
    }

    /// From now on accesses have these rights.
    pub(super) fn set_rights(&mut self, rights: Rights) {
        self.rights = rights;
    }

    fn slot(&self, va: u64) -> usize {
        // The mask is there for the compiler alone: it spares a check.
        (self.rights as usize + (va >> 12) as usize % TLB_ENTRIES) % (SETS * TLB_ENTRIES)
    }

    /// The offset in RAM of `N` aligned bytes at `va`, if that is known.
    #[inline(always)]
    pub(super) fn find<const N: usize>(&self, va: u64, is_store: bool) -> Option<u64> {
        let entry = self.sets[usize::from(is_store)][self.slot(va)];
        let page_and_low_bits = va & (!0xfff | (N as u64 - 1));
        (page_and_low_bits == entry.tag).then(|| va.wrapping_add(entry.to_ram))
    }

    /// `va` was allowed, and lies at `offset` in RAM.
    pub(super) fn learn(&mut self, va: u64, offset: u64, is_store: bool) {
        if self.rights != Rights::Other {
            let slot = self.slot(va);
            self.sets[usize::from(is_store)][slot] =
                Entry { tag: va & !0xfff, to_ram: offset.wrapping_sub(va) };
        }
    }

    /// The TLB's entry of `vpn` is another one now.
    pub(super) fn forget_entry(&mut self, vpn: u64) {
        for set in &mut self.sets {
            for rights in [Rights::User, Rights::Supervisor, Rights::SupervisorSum] {
                set[rights as usize + vpn as usize % TLB_ENTRIES] = EMPTY;
            }
        }
    }

    /// Nothing is known any more.
    pub(super) fn forget(&mut self) {
        for set in &mut self.sets {
            set[..Rights::Other as usize].fill(EMPTY);
        }
    }
}
