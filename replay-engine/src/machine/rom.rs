//! The reset vector: what harts execute before firmware does.
//!
//! Word for word QEMU's (`hw/riscv/boot.c`, `riscv_setup_rom_reset_vec`), and at its place, so
//! that a guest's instructions count here as they do there. It says nothing that the loader
//! does not know, so it is no state.

/// Where it lies, and where harts begin.
pub const ROM: u64 = 0x1000;
/// Bytes that are the ROM's.
const ROM_BYTES: u64 = 0xf000;
/// Bytes from [`ROM`] to OpenSBI's `struct fw_dynamic_info`.
const INFO_AT: u32 = 40;
/// The `magic` of that: "OSBI"; its version is 2.
const FW_DYNAMIC_MAGIC: u64 = 0x4942_534f;
/// Its `next_mode`: supervisor.
const SUPERVISOR: u64 = 1;

/// Read-only memory; reads as zeros where nothing was put.
#[derive(Debug, Default)]
pub(super) struct Rom(Vec<u8>);

impl Rom {
    /// Goes to `entry` with the hart's number in `a0`, `fdt_at` in `a1`, and in `a2` where
    /// OpenSBI finds `kernel_entry`.
    pub(super) fn new(entry: u64, fdt_at: u64, kernel_entry: u64) -> Rom {
        let code: [u32; 6] = [
            0x0000_0297,                 // auipc t0, 0
            0x0002_8613 | INFO_AT << 20, // addi  a2, t0, INFO_AT
            0xf140_2573,                 // csrr  a0, mhartid
            0x0202_b583,                 // ld    a1, 32(t0)
            0x0182_b283,                 // ld    t0, 24(t0)
            0x0002_8067,                 // jr    t0
        ];
        let data = [entry, fdt_at, FW_DYNAMIC_MAGIC, 2, kernel_entry, SUPERVISOR, 0, 0];
        let words = code.iter().flat_map(|word| word.to_le_bytes());
        Rom(words.chain(data.iter().flat_map(|word| word.to_le_bytes())).collect())
    }

    /// Whether this physical address is in it. Nowhere, where there is no ROM.
    pub(super) fn has(&self, pa: u64) -> bool {
        !self.0.is_empty() && (ROM..ROM + ROM_BYTES).contains(&pa)
    }

    /// Reads bytes; whether they are all in it.
    pub(super) fn read(&self, pa: u64, out: &mut [u8]) -> bool {
        let byte = |i: u64| self.load(pa.checked_add(i)?, 1);
        out.iter_mut().zip(0..).all(|(out, i)| byte(i).map(|byte| *out = byte as u8).is_some())
    }

    /// Loads `len` bytes, at most 8, zero-extended; `None`, if they are not all in it.
    pub(super) fn load(&self, pa: u64, len: usize) -> Option<u64> {
        if !self.has(pa) || !self.has(pa.checked_add(len as u64 - 1)?) {
            return None;
        }
        let byte = |at: u64| u64::from(self.0.get((at - ROM) as usize).copied().unwrap_or(0));
        Some((0..len as u64).fold(0, |value, i| value | byte(pa + i) << (8 * i)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_ends_where_its_place_does_and_is_nowhere_if_there_is_none() {
        let rom = Rom::new(0x8000_0000, 1, 2);
        assert_eq!(rom.load(ROM + 24, 8), Some(0x8000_0000));
        assert_eq!(rom.load(ROM + 24, 4), Some(0x8000_0000));
        assert_eq!(rom.load(ROM + ROM_BYTES - 8, 8), Some(0));
        assert_eq!((rom.load(ROM + ROM_BYTES - 7, 8), rom.load(ROM - 1, 2)), (None, None));
        let mut word = [0; 4];
        assert!(rom.read(ROM, &mut word) && word == 0x297u32.to_le_bytes());
        assert!(!rom.read(ROM + ROM_BYTES - 3, &mut word));
        assert!(!rom.read(u64::MAX, &mut word) && !rom.read(u64::MAX, &mut [0]));
        assert_eq!((rom.load(u64::MAX, 8), Rom::default().load(ROM, 1)), (None, None));
    }
}
