//! Physical memory protection: 16 entries with a grain of 4 bytes, as QEMU has them.
//!
//! The first entry that an access touches decides about it, and one that it touches
//! only in part denies it, in M-mode, too, and unlocked. An access is what lies in one page: a
//! misaligned one across two is one for each byte. What no entry decides about, M-mode may
//! access, S and U may not.
//! There is no `mseccfg`.

use super::hart::Mode;
use serde::{Deserialize, Serialize};

/// Entries.
pub const ENTRIES: usize = 16;
/// Bits of an address register: bits 55..2 of a physical address.
const ADDRESS: u64 = (1 << 54) - 1;

/// Bits of an entry's configuration.
mod config {
    pub(super) const R: u8 = 1;
    pub(super) const W: u8 = 2;
    pub(super) const RWX: u8 = 7;
    pub(super) const MATCH: u8 = 3 << 3;
    pub(super) const TOR: u8 = 1 << 3;
    pub(super) const NA4: u8 = 2 << 3;
    pub(super) const NAPOT: u8 = 3 << 3;
    pub(super) const LOCKED: u8 = 1 << 7;
    pub(super) const ALL: u8 = RWX | MATCH | LOCKED;
}

/// The entries, as the guest wrote them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pmp {
    configs: [u8; ENTRIES],
    addresses: [u64; ENTRIES],
}

impl Pmp {
    /// The configurations of eight entries from `first` on: `pmpcfg0` or `pmpcfg2`.
    pub fn configs(&self, first: usize) -> u64 {
        (0..8).fold(0, |all, n| all | u64::from(self.configs[first + n]) << (8 * n))
    }

    /// Writes them; an entry stays as it is if it is locked or would be writable and not readable.
    pub fn set_configs(&mut self, first: usize, value: u64) {
        for (old, new) in self.configs[first..first + 8].iter_mut().zip(value.to_le_bytes()) {
            let is_reserved = new & (config::R | config::W) == config::W;
            if *old & config::LOCKED == 0 && !is_reserved {
                *old = new & config::ALL;
            }
        }
    }

    /// `pmpaddr` of an entry.
    pub fn address(&self, entry: usize) -> u64 {
        self.addresses[entry]
    }

    /// Writes it, unless it belongs to a locked entry: its own, or as the next one's base.
    pub fn set_address(&mut self, entry: usize, value: u64) {
        let locked_top = config::LOCKED | config::TOR;
        let is_base = self
            .configs
            .get(entry + 1)
            .is_some_and(|next| next & (config::LOCKED | config::MATCH) == locked_top);
        if self.configs[entry] & config::LOCKED == 0 && !is_base {
            self.addresses[entry] = value & ADDRESS;
        }
    }

    fn region(&self, entry: usize) -> Option<Region> {
        let (config, address) = (self.configs[entry], self.addresses[entry] & ADDRESS);
        let (first, last) = match config & config::MATCH {
            config::TOR => {
                let base = if entry == 0 { 0 } else { self.addresses[entry - 1] & ADDRESS };
                (base << 2, (address << 2).checked_sub(1)?)
            }
            config::NA4 => (address << 2, address << 2 | 3),
            config::NAPOT => {
                // So many ones at the end double the smallest size, 8 bytes.
                let ones = address.trailing_ones();
                let first = (address & !((1u64 << ones) - 1)) << 2;
                (first, first + ((8u64 << ones) - 1))
            }
            _ => return None,
        };
        // R, W and X are those of a page-table entry, one bit lower.
        let rights = (config & config::RWX) << 1;
        (first <= last).then_some(Region { first, last, rights, is_locked: config & config::LOCKED != 0 })
    }
}

/// What an entry matches: `first..=last`.
#[derive(Clone, Copy, Debug)]
struct Region {
    first: u64,
    last: u64,
    rights: u8,
    is_locked: bool,
}

impl Region {
    fn has_grain(&self, bytes: u64) -> bool {
        self.first % bytes == 0 && (self.last + 1) % bytes == 0
    }
}

/// R 2, W 4 and X 8, as in a page-table entry.
const RIGHTS: u8 = 0b1110;

/// The regions that the entries make, in their order; derived, and so no state.
#[derive(Debug)]
pub(super) struct Regions {
    list: Vec<Region>,
    cut_pages: bool,
    deny_machine: bool,
}

impl Regions {
    pub(super) fn of(pmp: &Pmp) -> Regions {
        let list: Vec<Region> = (0..ENTRIES).filter_map(|entry| pmp.region(entry)).collect();
        let cut_pages = list.iter().any(|region| !region.has_grain(4096));
        let denies = |region: &Region| region.is_locked && region.rights != RIGHTS;
        Regions { cut_pages, deny_machine: cut_pages || list.iter().any(denies), list }
    }

    /// Whether M-mode can be denied anything: by a locked entry, or an access across a border
    /// in a page by any. If not, it need not ask.
    pub(super) fn deny_machine(&self) -> bool {
        self.deny_machine
    }

    /// Which rights a mode has in all of `first..=last`; none if a border cuts it.
    pub(super) fn rights(&self, first: u64, last: u64, mode: Mode) -> Option<u8> {
        let is_machine = mode == Mode::Machine;
        let touched = self.list.iter().find(|region| region.first <= last && first <= region.last);
        match touched {
            None => Some(if is_machine { RIGHTS } else { 0 }),
            Some(region) if first < region.first || region.last < last => None,
            Some(region) if is_machine && !region.is_locked => Some(RIGHTS),
            Some(region) => Some(region.rights),
        }
    }

    /// Whether what holds for one instruction in a page holds for all.
    pub(super) fn is_whole(&self, page: u64, mode: Mode) -> bool {
        !self.cut_pages || self.rights(page << 12, page << 12 | 0xfff, mode).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pmp(entries: &[(u8, u64)]) -> Pmp {
        let mut pmp = Pmp::default();
        for (n, (config, address)) in entries.iter().enumerate() {
            pmp.set_address(n, *address);
            pmp.set_configs(0, pmp.configs(0) | u64::from(*config) << (8 * n));
        }
        pmp
    }

    #[test]
    fn regions_are_where_their_entries_say() {
        let ones = u64::MAX;
        let cases: [(&[(u8, u64)], Option<(u64, u64)>); 9] = [
            (&[(0x00, 5)], None),
            (&[(0x10, 5)], Some((20, 23))),
            (&[(0x18, 0b100)], Some((16, 23))),
            (&[(0x18, 0b101)], Some((16, 31))),
            (&[(0x18, ones)], Some((0, (1 << 57) - 1))),
            (&[(0x08, 4)], Some((0, 15))),
            (&[(0x08, 0)], None),
            (&[(0x00, 4), (0x08, 6)], Some((16, 23))),
            (&[(0x00, 6), (0x08, 4)], None),
        ];
        for (entries, expected) in cases {
            let regions = Regions::of(&pmp(entries));
            let found = regions.list.first().map(|region| (region.first, region.last));
            assert_eq!(found, expected, "{entries:x?}");
        }
    }

    #[test]
    fn the_first_entry_touched_decides() {
        // 0x1000..0x1fff of nobody, 0x1000..0x2fff to read, all to execute, locked.
        let napot = |from: u64, bytes: u64| from >> 2 | (bytes / 8 - 1);
        let regions =
            Regions::of(&pmp(&[(0x18, napot(0x1000, 0x1000)), (0, 0x400), (0x09, 0xc00), (0x9c, u64::MAX)]));
        let cases = [
            (0x1000, 8, Some(0), Some(RIGHTS)),
            (0x2000, 8, Some(2), Some(RIGHTS)),
            (0x2fff, 1, Some(2), Some(RIGHTS)),
            (0x3000, 8, Some(8), Some(8)),
            (0x0fff, 1, Some(8), Some(8)),
            (0x0ffc, 8, None, None),
            (0x2ffc, 8, None, None),
        ];
        for (at, bytes, supervisor, machine) in cases {
            assert_eq!(regions.rights(at, at + bytes - 1, Mode::Supervisor), supervisor, "S at {at:#x}");
            assert_eq!(regions.rights(at, at + bytes - 1, Mode::Machine), machine, "M at {at:#x}");
        }
        assert!(regions.deny_machine() && regions.is_whole(1, Mode::User));
    }

    #[test]
    fn only_what_can_deny_machine_mode_makes_it_ask() {
        let page = 0x1ff;
        let cases = [
            (0x18, page, false),
            (0x9f, page, false),
            (0x98, page, true),
            (0x18, 0, true),
            (0x1f, page >> 1, true),
            (0x17, page, true),
        ];
        for (config, address, denies) in cases {
            let regions = Regions::of(&pmp(&[(config, address)]));
            assert_eq!(regions.deny_machine(), denies, "{config:#x} at {address:#x}");
        }
        assert!(!Regions::of(&Pmp::default()).deny_machine());
    }

    #[test]
    fn a_locked_entry_stays_with_its_base_and_reserved_ones_are_not_taken() {
        let mut pmp = pmp(&[(0, 1), (0x8f, 2), (0x1f, 3)]);
        for entry in 0..3 {
            pmp.set_address(entry, u64::MAX);
        }
        pmp.set_configs(0, 0xff_ff_7f);
        assert_eq!([0, 1, 2].map(|entry| pmp.address(entry)), [1, 2, (1 << 54) - 1]);
        assert_eq!(pmp.configs(0), 0x9f_8f_1f);
        let mut pmp = Pmp::default();
        pmp.set_configs(8, 0x1a_1b << 48);
        assert_eq!(pmp.configs(8), 0x1b << 48);
        assert_eq!(pmp.configs(0), 0);
    }
}
