//! Loading: firmware, kernel, initrd and device tree, laid out as QEMU's `virt` does.
//!
//! ```text
//! RAM base          firmware, or the bare ELF at its own addresses
//! next 2 MiB        kernel
//! half of RAM on    initrd, from the kernel's entry
//! last 2 MiB down   device tree
//! 0x1000            the reset vector, and fw_dynamic's info
//! ```

use super::hart::{Hart, envcfg};
use super::ram::Ram;
use super::rom::{ROM, Rom};
use super::{Disk, Machine, RAM_BASE, fdt};
use elf::segment::ProgramHeader;
use elf::symbol::Symbol;
use elf::{ElfBytes, abi, endian::LittleEndian};
use heddle_proto::manifest::MachineSpec;
use std::ops::Range;
use std::sync::Arc;

const ALIGN: u64 = 2 << 20;

/// The bytes of the files that a manifest names.
#[derive(Clone, Default)]
#[allow(missing_docs)]
pub struct Images {
    pub bios: Option<Arc<[u8]>>,
    pub kernel: Option<Arc<[u8]>>,
    pub initrd: Option<Arc<[u8]>>,
    pub dtb: Option<Arc<[u8]>>,
    pub drives: Vec<Arc<[u8]>>,
}

/// Why a machine can't be built.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No firmware and no kernel.
    #[error("nothing to run: give a kernel, or firmware, or both")]
    Nothing,
    /// A file does not fit.
    #[error(
        "{what} does not fit: it needs {from:#x}..{to:#x}, RAM is {RAM_BASE:#x}..{end:#x}; give more memory"
    )]
    DoesNotFit {
        /// The file.
        what: &'static str,
        /// Where it would begin.
        from: u64,
        /// Where it would end.
        to: u64,
        /// RAM's end.
        end: u64,
    },
    /// Two files want the same place.
    #[error("{what} at {from:#x}..{to:#x} would overwrite the {other}; give more memory")]
    Overlap {
        /// The file.
        what: &'static str,
        /// What lies there.
        other: &'static str,
        /// Where it would begin.
        from: u64,
        /// Where it would end.
        to: u64,
    },
    /// A bad ELF.
    #[error("{what} is not a 64-bit little-endian RISC-V ELF: {why}")]
    Elf {
        /// The file.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The host has no room for the RAM.
    #[error("the host has no {0} bytes of memory for the guest's RAM")]
    Memory(u64),
    /// Without firmware, the kernel must be an ELF.
    #[error("without firmware the kernel must be an ELF; give --bios for a raw image")]
    RawWithoutFirmware,
    /// A device tree that is none.
    #[error("the file given as device tree is none: {0}")]
    BadFdt(String),
    /// The device tree could not be written.
    #[error("build the device tree: {0}")]
    Fdt(#[from] vm_fdt::Error),
}

fn ram_of(spec: &MachineSpec) -> Result<Ram, LoadError> {
    Ram::allocate(spec.memory_bytes as usize).ok_or(LoadError::Memory(spec.memory_bytes))
}

/// Builds the machine at power-on.
pub fn build(spec: &MachineSpec, images: &Images) -> Result<Machine, LoadError> {
    let mut layout = Layout { ram: ram_of(spec)?, taken: vec![] };
    let Placed { entry, kernel_entry, initrd } = layout.place_images(spec, images)?;
    let fdt = device_tree_of(spec, images, initrd)?;
    let end = RAM_BASE + spec.memory_bytes;
    let fdt_at = end.saturating_sub(fdt.len() as u64) / ALIGN * ALIGN;
    layout.put("device tree", fdt_at, &fdt)?;

    let disks = images.drives.iter().map(|base| Disk::new(base.clone())).collect();
    let mut machine = Machine::new(layout.ram, Hart::new(ROM), spec.shift, disks);
    (1..spec.harts).for_each(|_| machine.add_hart(Hart::new(ROM)));
    machine.rom = Rom::new(entry, fdt_at, kernel_entry);
    spec.devices.iter().for_each(|device| machine.plug(*device));
    if let (None, Some(kernel)) = (&images.bios, &images.kernel) {
        let tohost = symbol(kernel, "tohost");
        if tohost.is_some() || signature(kernel).is_some() {
            // Written for machines where A and D of page tables are software's at first.
            for number in 0..machine.hart_count() {
                machine.hart_at_mut(number).into_iter().for_each(|hart| hart.menvcfg &= !envcfg::ADUE);
            }
        }
        if let Some(tohost) = tohost {
            machine.watch_tohost(tohost, symbol(kernel, "fromhost"));
        }
    }
    Ok(machine)
}

/// The device tree that a machine's guest gets: the one given, as it is, or else the machine's own.
pub fn device_tree(spec: &MachineSpec, images: &Images) -> Result<Vec<u8>, LoadError> {
    let mut layout = Layout { ram: ram_of(spec)?, taken: vec![] };
    let placed = layout.place_images(spec, images)?;
    device_tree_of(spec, images, placed.initrd)
}

fn device_tree_of(
    spec: &MachineSpec,
    images: &Images,
    initrd: Option<(u64, u64)>,
) -> Result<Vec<u8>, LoadError> {
    match &images.dtb {
        Some(dtb) => Ok(fdt::check(dtb).map_err(LoadError::BadFdt)?.to_vec()),
        None => Ok(fdt::build(spec.harts, spec.memory_bytes, &spec.append, initrd, spec.seed)?),
    }
}

/// Where an architectural test leaves its results, physically: from its ELF's symbol
/// `begin_signature` to `end_signature`. None where it has not both, in this order.
pub fn signature(bytes: &[u8]) -> Option<Range<u64>> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).ok()?;
    // The end may be a segment's, and so in none.
    let length =
        symbol_value(&file, "end_signature")?.checked_sub(symbol_value(&file, "begin_signature")?)?;
    let begin = symbol(bytes, "begin_signature")?;
    Some(begin..begin.checked_add(length)?)
}

/// The physical address of an ELF's symbol; none where the file has none, or a damaged table.
fn symbol(bytes: &[u8], name: &str) -> Option<u64> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).ok()?;
    let at = symbol_value(&file, name)?;
    let holds = |s: &ProgramHeader| s.p_type == abi::PT_LOAD && at.wrapping_sub(s.p_vaddr) < s.p_memsz;
    let segment = file.segments()?.iter().find(holds)?;
    Some(segment.p_paddr.wrapping_add(at.wrapping_sub(segment.p_vaddr)))
}

/// A symbol's address as the program has it.
fn symbol_value(file: &ElfBytes<'_, LittleEndian>, name: &str) -> Option<u64> {
    let (symbols, names) = file.symbol_table().ok()??;
    let is_it = |symbol: &Symbol| {
        symbol.st_shndx != abi::SHN_UNDEF
            && names.get(symbol.st_name as usize).is_ok_and(|found| found == name)
    };
    Some(symbols.iter().find(is_it)?.st_value)
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Where the files lie.
struct Placed {
    entry: u64,
    /// What firmware goes on with; 0 where there is no kernel behind firmware.
    kernel_entry: u64,
    initrd: Option<(u64, u64)>,
}

struct Layout {
    ram: Ram,
    /// What lies where already.
    taken: Vec<(&'static str, u64, u64)>,
}

impl Layout {
    fn place_images(&mut self, spec: &MachineSpec, images: &Images) -> Result<Placed, LoadError> {
        let (entry, kernel_entry) = match (&images.bios, &images.kernel) {
            (None, None) => return Err(LoadError::Nothing),
            (None, Some(kernel)) if !is_elf(kernel) => return Err(LoadError::RawWithoutFirmware),
            (None, Some(kernel)) => (self.place_elf("kernel", kernel)?.0, 0),
            (Some(bios), None) => (self.place("firmware", bios, RAM_BASE)?.0, 0),
            (Some(bios), Some(kernel)) => {
                let (entry, top) = self.place("firmware", bios, RAM_BASE)?;
                (entry, self.place_kernel(kernel, top.next_multiple_of(ALIGN))?)
            }
        };
        let mut initrd = None;
        if let Some(bytes) = &images.initrd {
            // QEMU's rule: half of RAM behind the kernel's entry, but at most 512 MiB.
            let from = kernel_entry.max(RAM_BASE).saturating_add((spec.memory_bytes / 2).min(512 << 20));
            self.put("initrd", from, bytes)?;
            initrd = Some((from, from + bytes.len() as u64));
        }
        Ok(Placed { entry, kernel_entry, initrd })
    }

    /// Places an ELF at its own addresses or a raw image at `at`; entry and top.
    fn place(&mut self, what: &'static str, bytes: &[u8], at: u64) -> Result<(u64, u64), LoadError> {
        if is_elf(bytes) {
            return self.place_elf(what, bytes);
        }
        self.put(what, at, bytes)?;
        Ok((at, at + bytes.len() as u64))
    }

    /// Places a kernel behind firmware; what firmware goes on with. Of an ELF, that is its lowest
    /// address, as on QEMU, where it would be a raw image's first byte.
    fn place_kernel(&mut self, kernel: &[u8], at: u64) -> Result<u64, LoadError> {
        if !is_elf(kernel) {
            return Ok(self.place("kernel", kernel, at)?.0);
        }
        let before = self.taken.len();
        self.place_elf("kernel", kernel)?;
        Ok(self.taken[before..].iter().map(|(_, from, _)| *from).min().unwrap_or(at))
    }

    fn place_elf(&mut self, what: &'static str, bytes: &[u8]) -> Result<(u64, u64), LoadError> {
        let bad = |why: String| LoadError::Elf { what, why };
        let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).map_err(|e| bad(e.to_string()))?;
        if file.ehdr.class != elf::file::Class::ELF64 {
            return Err(bad("its class, at offset 4, is 32-bit".into()));
        }
        if file.ehdr.e_machine != abi::EM_RISCV {
            let (found, wanted) = (file.ehdr.e_machine, abi::EM_RISCV);
            return Err(bad(format!("its machine, at offset 18, is {found}; RISC-V is {wanted}")));
        }
        let segments = file.segments().ok_or_else(|| bad("no program headers".into()))?;
        let (mut top, mut entry) = (0, file.ehdr.e_entry);
        for segment in segments.iter().filter(|s| s.p_type == abi::PT_LOAD && s.p_memsz > 0) {
            let data = file.segment_data(&segment).map_err(|e| bad(e.to_string()))?;
            if data.len() as u64 > segment.p_memsz {
                return Err(bad("a segment is larger in the file than in memory".into()));
            }
            let to = segment.p_paddr.checked_add(segment.p_memsz);
            let to = to.ok_or_else(|| bad("a segment wraps around".into()))?;
            self.take(what, segment.p_paddr, to)?;
            self.fill(what, segment.p_paddr, data)?;
            top = top.max(to);
            let into = file.ehdr.e_entry.wrapping_sub(segment.p_vaddr);
            if into < segment.p_memsz {
                entry = segment.p_paddr + into;
            }
        }
        if top == 0 {
            return Err(bad("nothing to load".into()));
        }
        Ok((entry, top))
    }

    fn put(&mut self, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), LoadError> {
        self.take(what, at, at.saturating_add(bytes.len() as u64))?;
        self.fill(what, at, bytes)
    }

    fn fill(&mut self, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), LoadError> {
        let (to, end) = (at.saturating_add(bytes.len() as u64), RAM_BASE + self.ram.len() as u64);
        let placed = at.checked_sub(RAM_BASE).and_then(|offset| self.ram.write(offset, bytes));
        placed.ok_or(LoadError::DoesNotFit { what, from: at, to, end })
    }

    /// Claims a range: it must lie in RAM, and nothing else may lie there.
    fn take(&mut self, what: &'static str, from: u64, to: u64) -> Result<(), LoadError> {
        let end = RAM_BASE + self.ram.len() as u64;
        if from < RAM_BASE || to > end {
            return Err(LoadError::DoesNotFit { what, from, to, end });
        }
        if let Some((other, ..)) = self.taken.iter().find(|(_, a, b)| from < *b && *a < to) {
            return Err(LoadError::Overlap { what, other, from, to });
        }
        self.taken.push((what, from, to));
        Ok(())
    }
}
