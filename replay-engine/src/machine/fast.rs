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
    /// Its number in RAM.
    page: usize,
}

/// What is compared has at most three of the low twelve bits.
const EMPTY: Entry = Entry { tag: u64::MAX, page: 0 };

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

const SETS: usize = 5;
const ENTRIES: usize = SETS * TLB_ENTRIES;
const _: () = assert!(ENTRIES <= 1 << 16, "a place is a u16");

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

/// Entries, and which of them are not empty: most flushes come when the guest has touched few
/// pages since the last.
struct Entries {
    all: Vec<Entry>,
    /// Places that were filled since all were empty; a place that was emptied alone may be here
    /// twice. With [`ENTRIES`] of them it says nothing any more.
    used: Vec<u16>,
}

impl Entries {
    fn new() -> Entries {
        Entries { all: vec![EMPTY; ENTRIES], used: Vec::with_capacity(ENTRIES) }
    }

    fn put(&mut self, slot: usize, entry: Entry) {
        if self.all[slot].tag == EMPTY.tag && self.used.len() < ENTRIES {
            self.used.push(slot as u16);
        }
        self.all[slot] = entry;
    }

    fn clear(&mut self) {
        if self.used.len() < ENTRIES / 2 {
            self.used.iter().for_each(|slot| self.all[usize::from(*slot)] = EMPTY);
        } else {
            self.all.fill(EMPTY);
        }
        self.used.clear();
    }
}

/// The entries, of loads and of stores apart.
pub(super) struct FastTlb {
    loads: Entries,
    /// Only of pages that take any store without telling anybody.
    stores: Entries,
    rights: Rights,
}

impl FastTlb {
    pub(super) fn new() -> FastTlb {
        FastTlb { loads: Entries::new(), stores: Entries::new(), rights: Rights::Other }
    }

    /// From now on accesses have these rights.
    pub(super) fn set_rights(&mut self, rights: Rights) {
        self.rights = rights;
    }

    fn slot(&self, va: u64) -> usize {
        self.rights as usize + (va >> 12) as usize % TLB_ENTRIES
    }

    /// The page of RAM that `N` aligned bytes at `va` lie in, if that is known.
    #[inline(always)]
    pub(super) fn find<const N: usize>(&self, va: u64, is_store: bool) -> Option<usize> {
        let entries = if is_store { &self.stores } else { &self.loads };
        let entry = entries.all.get(self.slot(va))?;
        let page_and_low_bits = va & (!0xfff | (N as u64 - 1));
        (page_and_low_bits == entry.tag).then_some(entry.page)
    }

    /// `va` was allowed, and lies in this page of RAM.
    pub(super) fn learn(&mut self, va: u64, page: usize, is_store: bool) {
        let slot = self.slot(va);
        let entries = if is_store { &mut self.stores } else { &mut self.loads };
        if self.rights != Rights::Other {
            entries.put(slot, Entry { tag: va & !0xfff, page });
        }
    }

    /// The TLB's entry of `vpn` is another one now.
    pub(super) fn forget_entry(&mut self, vpn: u64) {
        for entries in [&mut self.loads, &mut self.stores] {
            for rights in [Rights::User, Rights::Supervisor, Rights::SupervisorSum] {
                entries.all[rights as usize + vpn as usize % TLB_ENTRIES] = EMPTY;
            }
        }
    }

    /// Nothing is known any more.
    pub(super) fn forget(&mut self) {
        self.loads.clear();
        self.stores.clear();
    }

    /// Which pages take any store is not known any more.
    pub(super) fn forget_stores(&mut self) {
        self.stores.clear();
    }

    /// This page does not take any store any more.
    pub(super) fn forget_stores_to(&mut self, page: usize) {
        for entry in self.stores.all.iter_mut().filter(|entry| entry.page == page) {
            *entry = EMPTY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Seeded;

    /// Those whose entries go with the TLB's.
    const TRANSLATED: [Rights; 3] = [Rights::User, Rights::Supervisor, Rights::SupervisorSum];

    /// What a page is found under, by loads and by stores.
    fn found(fast: &mut FastTlb, rights: Rights, va: u64) -> [Option<usize>; 2] {
        fast.set_rights(rights);
        [false, true].map(|is_store| fast.find::<8>(va, is_store))
    }

    /// Fills so often, and forgets; `forgets`: each place is emptied before it is filled.
    fn fill_and_forget(fast: &mut FastTlb, random: &mut Seeded, puts: usize, forgets: bool) {
        let mut learnt = vec![];
        for put in 0..puts {
            let rights = TRANSLATED[random.below(3) as usize];
            let va = random.below(2 * TLB_ENTRIES as u64) << 12;
            if forgets {
                fast.forget_entry(va >> 12);
                for rights in TRANSLATED {
                    assert_eq!(found(fast, rights, va), [None; 2], "put {put} of {puts}");
                }
            }
            fast.set_rights(rights);
            fast.learn(va, put, false);
            fast.learn(va, put, true);
            assert_eq!(found(fast, rights, va), [Some(put); 2], "put {put} of {puts}");
            learnt.push((rights, va));
        }
        if forgets {
            assert_eq!(
                (fast.loads.used.len(), fast.stores.used.len()),
                (puts.min(ENTRIES), puts.min(ENTRIES))
            );
        }
        fast.forget();
        for (rights, va) in learnt {
            assert_eq!(found(fast, rights, va), [None; 2], "{rights:?} {va:#x}, {puts} puts");
        }
        let all = fast.loads.all.iter().chain(&fast.stores.all);
        assert_eq!(all.filter(|entry| entry.tag != EMPTY.tag).count(), 0, "{puts} puts");
    }

    /// However many places are known to be filled, and where they are too many to be known.
    #[test]
    fn what_is_forgotten_is_not_found() {
        let mut random = Seeded::new(1);
        let mut fast = FastTlb::new();
        let half = ENTRIES / 2;
        for puts in [0, 1, 100, half - 1, half, half + 1, ENTRIES - 1, ENTRIES, ENTRIES + 1, 3 * ENTRIES] {
            for forgets in [false, true] {
                fill_and_forget(&mut fast, &mut random, puts, forgets);
            }
        }
    }

    #[test]
    fn a_page_is_forgotten_with_all_its_stores_and_nothing_else() {
        let rights = [Rights::Bare, Rights::User, Rights::Supervisor, Rights::SupervisorSum];
        let mut fast = FastTlb::new();
        let page_of = |number: u64| number as usize % 5;
        for rights in rights {
            fast.set_rights(rights);
            for number in 0..100u64 {
                fast.learn(number << 12, page_of(number), false);
                fast.learn(number << 12, page_of(number), true);
            }
        }
        fast.forget_stores_to(3);
        for rights in rights {
            for number in 0..100u64 {
                let page = page_of(number);
                let expected = [Some(page), (page != 3).then_some(page)];
                assert_eq!(found(&mut fast, rights, number << 12), expected, "{rights:?} {number}");
            }
        }
        fast.forget_stores();
        assert_eq!(found(&mut fast, Rights::User, 1 << 12), [Some(1), None]);
    }
}
