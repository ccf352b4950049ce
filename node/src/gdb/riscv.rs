//! What gdb is told of the hart: RV64 with F and D, and what a `g` packet has in it.

use gdbstub::arch::{Arch, Registers};
use heddle_replay_engine::machine::hart::Hart;

/// The architecture, as gdb describes targets.
pub(super) enum Riscv64 {}

impl Arch for Riscv64 {
    type Usize = u64;
    type Registers = HartRegisters;
    type BreakpointKind = usize;
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        Some(include_str!("riscv64.xml"))
    }
}

/// Registers in the order of the description: x0..x31, pc, f0..f31, fflags, frm, fcsr.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct HartRegisters {
    x: [u64; 32],
    pc: u64,
    f: [u64; 32],
    fcsr: u32,
}

impl HartRegisters {
    /// The hart's.
    pub(super) fn of(hart: &Hart) -> HartRegisters {
        let mut registers =
            HartRegisters { pc: hart.pc, f: hart.f, fcsr: u32::from(hart.fcsr), ..HartRegisters::default() };
        registers.x.copy_from_slice(&hart.x[..32]);
        registers
    }
}

impl Registers for HartRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.pc
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        let wide = self.x.iter().chain([&self.pc]).chain(&self.f);
        let narrow = [self.fcsr & 0x1f, self.fcsr >> 5, self.fcsr];
        let bytes = wide.flat_map(|value| value.to_le_bytes());
        bytes.chain(narrow.into_iter().flat_map(u32::to_le_bytes)).for_each(|byte| write_byte(Some(byte)));
    }

    fn gdb_deserialize(&mut self, _: &[u8]) -> Result<(), ()> {
        // What gdb wants to write is refused, whatever it is.
        Ok(())
    }
}
