//! The bundled guest: an embedded default that does what makes replay hard.

use crate::machine::loader::Images;
use heddle_proto::Hash;
use heddle_proto::manifest::{Image, MachineSpec, Sleep};
use std::sync::Arc;

/// The guest's ELF; `guest/build` rebuilds it.
pub const LOOM_ELF: &[u8] = include_bytes!("../guest/loom.elf");
/// The self-test guest for QEMU on x86, a multiboot program; `guest/build-tick` rebuilds it.
pub const TICK_ELF: &[u8] = include_bytes!("../guest/tick.elf");
/// The same for QEMU's riscv64 virt machine.
pub const TICK_RISCV_ELF: &[u8] = include_bytes!("../guest/tick-riscv.elf");
/// The guest of `heddle bench machine`, a flat image for the start of RAM, with its parameters
/// where `guest/bench-start.S` says; `guest/build-bench` rebuilds it.
pub const BENCH_BIN: &[u8] = include_bytes!("../guest/bench.bin");
/// Bytes of the bundled guest's disk, which it reads and writes.
const DISK_BYTES: usize = 1 << 20;

/// The guest's disk: the same bytes every time.
pub fn disk() -> Vec<u8> {
    let mut rng = crate::schedule::Seeded::new(7);
    (0..DISK_BYTES / 8).flat_map(|_| rng.draw().to_le_bytes()).collect()
}

/// The guest's files.
pub fn images() -> Images {
    Images { kernel: Some(Arc::from(LOOM_ELF)), drives: vec![Arc::from(disk())], ..Images::default() }
}

/// The machine it runs on; images are named, with hashes, but without block indexes.
pub fn spec() -> MachineSpec {
    let image = |name: &str, bytes: &[u8]| Image {
        hash: Hash::of(bytes),
        bytes: bytes.len() as u64,
        index: Hash::ZERO,
        name: name.into(),
    };
    MachineSpec {
        harts: 1,
        memory_bytes: 16 << 20,
        shift: 3,
        sleep: Sleep::On,
        bios: None,
        kernel: Some(image("loom.elf", LOOM_ELF)),
        initrd: None,
        dtb: None,
        seed: None,
        append: String::new(),
        drives: vec![image("loom.disk", &disk())],
        devices: vec![],
    }
}

/// The machine at power-on with the guest cut short, for tests: so many rounds, each
/// of so many compute passes (each about 150,000 instructions).
pub fn short(rounds: u64, passes: u64) -> Result<crate::machine::Machine, crate::machine::loader::LoadError> {
    let mut machine = crate::machine::loader::build(&spec(), &images())?;
    machine.hart_mut().x[13] = rounds << 8 | passes;
    Ok(machine)
}
