//! Memory as a hart sees it, for whoever only looks: a walk to begin with, and a debugger.
//!
//! Nothing here leaves a trace in TLB, page table or device.

use super::hart::{Hart, Mode, Trap};
use super::memory::{Access, pte};
use super::pmp::Regions;
use super::{Machine, RAM_BASE, decode, disasm};

/// The bits of a physical page number.
const PPN: u64 = 0xfff_ffff_ffff;

/// A leaf entry: where it lies, what it is, and the page-number bits below its level.
pub(super) struct Leaf {
    pub(super) at: u64,
    pub(super) entry: u64,
    low: u64,
    pub(super) level: u8,
}

impl Leaf {
    /// Where it maps `va` to.
    pub(super) fn address(&self, va: u64) -> u64 {
        (self.entry >> 10 & PPN | va >> 12 & self.low) << 12 | va & 0xfff
    }
}

/// What a hart sees: through its page table, with its rights.
#[derive(Clone, Copy)]
pub struct View<'a> {
    machine: &'a Machine,
    hart: &'a Hart,
    regions: &'a Regions,
}

impl Machine {
    /// What the hart sees whose turn it is.
    pub fn view(&self) -> View<'_> {
        View { machine: self, hart: &self.hart, regions: &self.regions }
    }

    /// What a hart sees, by its number.
    pub fn view_of(&self, number: usize) -> Option<View<'_>> {
        let (hart, regions) = self.hart_and_regions(number)?;
        Some(View { machine: self, hart, regions })
    }

    /// The instruction at `pc`, if its page is mapped. Looking changes nothing.
    pub fn instruction_at(&self, pc: u64) -> String {
        self.view().instruction(pc)
    }

    /// See [`View::read`], of the hart whose turn it is.
    pub fn peek(&self, va: u64, out: &mut [u8]) -> usize {
        self.view().read(va, out)
    }
}

impl<'a> View<'a> {
    /// Who sees it.
    pub fn hart(&self) -> &'a Hart {
        self.hart
    }

    /// Where a virtual address is in physical memory: as the hart would access it now, or
    /// would with other rights, since a debugger is nobody. By the page table, also where the
    /// TLB still has an older translation.
    pub fn address(&self, va: u64) -> Option<u64> {
        if self.hart.is_bare(self.hart.data_mode().min(self.hart.mode)) {
            return Some(va);
        }
        let ways = [
            (Access::Load, Mode::Supervisor),
            (Access::Load, Mode::User),
            (Access::Fetch, Mode::Supervisor),
            (Access::Fetch, Mode::User),
        ];
        let leaf = ways.into_iter().find_map(|(access, mode)| self.find_leaf(va, access, mode).ok())?;
        Some(leaf.address(va))
    }

    /// Reads RAM or ROM at a virtual address; how many bytes could be read. Devices are not read,
    /// since they could tell.
    pub fn read(&self, va: u64, out: &mut [u8]) -> usize {
        let ram = &self.machine.ram;
        let mut done = 0;
        while done < out.len() {
            let at = va.wrapping_add(done as u64);
            let len = (out.len() - done).min(4096 - (at as usize & 0xfff));
            let Some(pa) = self.address(at) else { break };
            let out = &mut out[done..done + len];
            match ram.slice(pa.wrapping_sub(RAM_BASE), len) {
                Some(bytes) => out.copy_from_slice(bytes),
                None if self.machine.rom.read(pa, out) => {}
                None => break,
            }
            done += len;
        }
        done
    }

    /// The instruction at `pc`, if its page is mapped.
    pub fn instruction(&self, pc: u64) -> String {
        match self.bits(pc) {
            Some(bits) => disasm::disassemble(&decode::decode(bits), pc),
            None => "(not mapped)".into(),
        }
    }

    /// The instruction bits at `pc`.
    pub(super) fn bits(&self, pc: u64) -> Option<u32> {
        let mode = self.hart.mode;
        let half = |va: u64| {
            let pa = if self.hart.is_bare(mode) {
                va
            } else {
                self.find_leaf(va, Access::Fetch, mode).ok()?.address(va)
            };
            self.machine.half(pa)
        };
        let low = half(pc)?;
        if low & 3 != 3 {
            return Some(low);
        }
        Some(low | half(pc.wrapping_add(2))? << 16)
    }

    /// The leaf entry that maps `va`.
    pub(super) fn find_leaf(&self, va: u64, access: Access, mode: Mode) -> Result<Leaf, Trap> {
        let fault = access.page_fault(va);
        if (va as i64) << 25 >> 25 != va as i64 {
            return Err(fault);
        }
        let mut table = (self.hart.satp & PPN) << 12;
        for level in (0..3u32).rev() {
            let index = va >> (12 + 9 * level) & 511;
            let at = table.wrapping_add(index * 8).wrapping_sub(RAM_BASE);
            let entry = self.check_table(at, Access::Load).and_then(|()| self.machine.ram.load::<8>(at));
            let entry = entry.ok_or(access.access_fault(va))?;
            let is_pointer = entry & (pte::R | pte::W | pte::X) == 0;
            let bad =
                entry & pte::V == 0 || entry & (pte::R | pte::W) == pte::W || entry & pte::RESERVED != 0;
            if bad || (is_pointer && entry & (pte::U | pte::A | pte::D) != 0) {
                return Err(fault);
            }
            if is_pointer {
                table = (entry >> 10 & PPN) << 12;
                continue;
            }
            let low = (1u64 << (9 * level)) - 1;
            if entry >> 10 & low != 0 || !self.hart.allows(entry, access, mode) {
                return Err(fault);
            }
            return Ok(Leaf { at, entry, low, level: level as u8 });
        }
        Err(fault)
    }

    /// Whether PMP lets a walk, which is S-mode's, access the page-table entry at `at` in RAM.
    pub(super) fn check_table(&self, at: u64, access: Access) -> Option<()> {
        let from = at.wrapping_add(RAM_BASE);
        let rights = self.regions.rights(from, from.saturating_add(7), Mode::Supervisor)?;
        (u64::from(rights) & access.right() != 0).then_some(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::ram::Ram;
    use super::*;

    const ROOT: u64 = 0x4000;
    /// A page of 1 GiB, which has all of RAM at its beginning.
    const VA: u64 = 0x4000_0000;
    const ENTRY: u64 = RAM_BASE >> 12 << 10 | 0xcf;
    /// ebreak
    const EBREAK: u32 = 0x0010_0073;

    fn hart(satp: u64, may_walk: bool) -> Hart {
        let mut hart = Hart::new(RAM_BASE);
        if may_walk {
            hart.pmp.set_address(15, u64::MAX);
            hart.pmp.set_configs(8, 0x1f << 56);
        }
        (hart.mode, hart.satp) = (Mode::Supervisor, satp);
        hart
    }

    #[test]
    fn each_hart_sees_by_its_own_page_table_and_its_own_pmp() {
        let mut ram = Ram::new(1 << 20);
        ram.write(ROOT + 8, &ENTRY.to_le_bytes()).unwrap();
        ram.write(0x124, &EBREAK.to_le_bytes()).unwrap();
        let satp: u64 = 8 << 60 | (RAM_BASE + ROOT) >> 12;
        let mut machine = Machine::new(ram, hart(0, true), 0, vec![]);
        machine.add_hart(hart(satp, true));
        machine.add_hart(hart(satp, false));
        let addresses = |va: u64| [0, 1, 2].map(|number| machine.view_of(number).unwrap().address(va));
        assert_eq!(addresses(VA + 0x124), [Some(VA + 0x124), Some(RAM_BASE + 0x124), None]);
        assert_eq!(addresses(RAM_BASE), [Some(RAM_BASE), None, None]);
        let read = |number: usize, va: u64| {
            let mut bytes = [0; 4];
            let done = machine.view_of(number).unwrap().read(va, &mut bytes);
            (done, u32::from_le_bytes(bytes))
        };
        assert_eq!(read(1, VA + 0x124), (4, EBREAK));
        assert_eq!((read(0, VA + 0x124), read(0, RAM_BASE + 0x124)), ((0, 0), (4, EBREAK)));
        let mut bytes = [0; 4];
        assert_eq!((machine.peek(VA, &mut bytes), machine.peek(RAM_BASE, &mut bytes)), (0, 4));
        let is_seen = |number: usize| {
            let text = machine.view_of(number).unwrap().instruction(VA + 0x124);
            text != "(not mapped)"
        };
        assert_eq!([0, 1, 2].map(is_seen), [false, true, false]);
        assert_eq!(machine.view_of(1).unwrap().hart().satp, satp);
        assert!(machine.view_of(3).is_none());
    }
}
