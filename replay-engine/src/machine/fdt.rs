//! The device tree, made at start: what QEMU's `virt` says of the same devices.

use super::RAM_BASE;
use super::devices::map;
use vm_fdt::{Error, FdtWriter};

const PLIC_PHANDLE: u32 = 1;
const TEST_PHANDLE: u32 = 3;
const FDT_MAGIC: u32 = 0xd00d_feed;
/// Bytes of a blob's head.
const FDT_HEAD: u32 = 40;
/// Most bytes of a blob: what Linux maps for it.
const FDT_MAX: u32 = 2 << 20;
/// What sets the bytes of `rng-seed` apart from all else that is derived from a number.
const SEED_CONTEXT: &str = "heddle 2026-12-01 /chosen/rng-seed of the built-in machine";
/// CLINT ticks a second.
const TIMEBASE_HZ: u32 = 10_000_000;
/// The instruction set: its base, the extensions that have a letter, and the others in their
/// canonical order.
const BASE: &str = "rv64i";
const LETTERS: [&str; 5] = ["m", "a", "f", "d", "c"];
const EXTENSIONS: [&str; 8] = ["zicntr", "zicsr", "zifencei", PAUSE, "zba", "zbb", "zbs", "sstc"];
/// The hint that ends a turn: nothing to a hart that is alone.
const PAUSE: &str = "zihintpause";

/// The interrupt controller of a hart; the first one's number is the lowest that is free.
fn intc_phandle(hart: u32) -> u32 {
    if hart == 0 { 2 } else { 0x100 + hart }
}

/// A hart's, for the map of them.
fn cpu_phandle(hart: u32) -> u32 {
    0x200 + hart
}

/// Interrupts of all harts, as a controller names them that drives each hart's two.
fn extended(harts: u32, interrupts: [u32; 2]) -> Vec<u32> {
    (0..harts).flat_map(|hart| interrupts.map(|number| [intc_phandle(hart), number])).flatten().collect()
}

/// The blob for a machine of so many harts and `memory_bytes`, with an initrd at `initrd` (from,
/// to), and with [`rng_seed`] of `seed` for the kernel's random numbers, if there is one.
pub fn build(
    harts: u32,
    memory_bytes: u64,
    append: &str,
    initrd: Option<(u64, u64)>,
    seed: Option<u64>,
) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_string("compatible", "riscv-virtio")?;
    fdt.property_string("model", "riscv-virtio,qemu")?;

    let chosen = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", append)?;
    fdt.property_string("stdout-path", &format!("/soc/serial@{:x}", map::UART))?;
    if let Some((from, to)) = initrd {
        fdt.property_u64("linux,initrd-start", from)?;
        fdt.property_u64("linux,initrd-end", to)?;
    }
    if let Some(seed) = seed {
        fdt.property("rng-seed", &rng_seed(seed))?;
    }
    fdt.end_node(chosen)?;

    let memory = fdt.begin_node(&format!("memory@{RAM_BASE:x}"))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[RAM_BASE, memory_bytes])?;
    fdt.end_node(memory)?;

    cpus(&mut fdt, harts)?;
    power(&mut fdt)?;
    soc(&mut fdt, harts)?;
    fdt.end_node(root)?;
    fdt.finish()
}

/// The bytes of `/chosen/rng-seed`, as many as QEMU's `virt` has: BLAKE3's `derive_key` in the
/// context `SEED_CONTEXT`, of the seed's eight bytes, little-endian. A manifest has the number
/// alone, from which a replay makes them again, so that they never change.
pub fn rng_seed(seed: u64) -> [u8; 32] {
    blake3::derive_key(SEED_CONTEXT, &seed.to_le_bytes())
}

/// The blob that a file holds, without what follows it: by the head that the Devicetree
/// Specification 0.4, 5.2, gives it.
pub fn check(bytes: &[u8]) -> Result<&[u8], String> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
    match (word(0), word(4)) {
        (Some(FDT_MAGIC), Some(total)) if (FDT_HEAD..=FDT_MAX).contains(&total) => bytes
            .get(..total as usize)
            .ok_or_else(|| format!("it is {total} bytes by its head, the file has {}", bytes.len())),
        (Some(FDT_MAGIC), Some(total)) => {
            Err(format!("it is {total} bytes by its head; {FDT_HEAD} to {FDT_MAX} can be"))
        }
        (Some(magic), _) => {
            Err(format!("it begins with {magic:#010x}, a device tree with {FDT_MAGIC:#010x}"))
        }
        (None, _) => Err(format!("it has {} bytes", bytes.len())),
    }
}

fn cpus(fdt: &mut FdtWriter, harts: u32) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    fdt.property_u32("timebase-frequency", TIMEBASE_HZ)?;
    for hart in 0..harts {
        cpu(fdt, hart, harts)?;
    }
    // One that is alone needs no place among others.
    if harts > 1 {
        cpu_map(fdt, harts)?;
    }
    fdt.end_node(cpus)
}

fn cpu(fdt: &mut FdtWriter, hart: u32, harts: u32) -> Result<(), Error> {
    let cpu = fdt.begin_node(&format!("cpu@{hart:x}"))?;
    if harts > 1 {
        fdt.property_u32("phandle", cpu_phandle(hart))?;
    }
    fdt.property_string("device_type", "cpu")?;
    fdt.property_u32("reg", hart)?;
    fdt.property_string("status", "okay")?;
    fdt.property_string("compatible", "riscv")?;
    let named: Vec<&str> = EXTENSIONS.into_iter().filter(|name| harts > 1 || *name != PAUSE).collect();
    fdt.property_string("riscv,isa", &format!("{BASE}{}_{}", LETTERS.concat(), named.join("_")))?;
    // The same once more, as newer kernels read it.
    fdt.property_string("riscv,isa-base", BASE)?;
    let extensions = ["i"].iter().chain(&LETTERS).chain(&named).map(|name| String::from(*name)).collect();
    fdt.property_string_list("riscv,isa-extensions", extensions)?;
    fdt.property_string("mmu-type", "riscv,sv39")?;
    let intc = fdt.begin_node("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_string("compatible", "riscv,cpu-intc")?;
    fdt.property_u32("phandle", intc_phandle(hart))?;
    fdt.end_node(intc)?;
    fdt.end_node(cpu)
}

/// All harts are cores of one cluster.
fn cpu_map(fdt: &mut FdtWriter, harts: u32) -> Result<(), Error> {
    let map = fdt.begin_node("cpu-map")?;
    let cluster = fdt.begin_node("cluster0")?;
    for hart in 0..harts {
        let core = fdt.begin_node(&format!("core{hart}"))?;
        fdt.property_u32("cpu", cpu_phandle(hart))?;
        fdt.end_node(core)?;
    }
    fdt.end_node(cluster)?;
    fdt.end_node(map)
}

fn power(fdt: &mut FdtWriter) -> Result<(), Error> {
    for (name, value) in [("poweroff", 0x5555), ("reboot", 0x7777)] {
        let node = fdt.begin_node(name)?;
        fdt.property_string("compatible", &format!("syscon-{name}"))?;
        fdt.property_u32("regmap", TEST_PHANDLE)?;
        fdt.property_u32("offset", 0)?;
        fdt.property_u32("value", value)?;
        fdt.end_node(node)?;
    }
    Ok(())
}

fn soc(fdt: &mut FdtWriter, harts: u32) -> Result<(), Error> {
    let soc = fdt.begin_node("soc")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_string("compatible", "simple-bus")?;
    fdt.property_null("ranges")?;

    let test = fdt.begin_node(&format!("test@{:x}", map::TEST))?;
    fdt.property_u32("phandle", TEST_PHANDLE)?;
    fdt.property_array_u64("reg", &[map::TEST, 0x1000])?;
    let compatible = ["sifive,test1", "sifive,test0", "syscon"].map(String::from).to_vec();
    fdt.property_string_list("compatible", compatible)?;
    fdt.end_node(test)?;

    let clint = fdt.begin_node(&format!("clint@{:x}", map::CLINT))?;
    let compatible = ["sifive,clint0", "riscv,clint0"].map(String::from).to_vec();
    fdt.property_string_list("compatible", compatible)?;
    fdt.property_array_u64("reg", &[map::CLINT, map::CLINT_BYTES])?;
    fdt.property_array_u32("interrupts-extended", &extended(harts, [3, 7]))?;
    fdt.end_node(clint)?;

    let plic = fdt.begin_node(&format!("plic@{:x}", map::PLIC))?;
    let compatible = ["sifive,plic-1.0.0", "riscv,plic0"].map(String::from).to_vec();
    fdt.property_string_list("compatible", compatible)?;
    fdt.property_array_u64("reg", &[map::PLIC, map::PLIC_BYTES])?;
    fdt.property_array_u32("interrupts-extended", &extended(harts, [11, 9]))?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_u32("riscv,ndev", super::plic::SOURCES as u32 - 1)?;
    fdt.property_u32("phandle", PLIC_PHANDLE)?;
    fdt.end_node(plic)?;

    device(fdt, "serial", map::UART, 0x100, "ns16550a", map::UART_IRQ, Some(3_686_400))?;
    device(fdt, "rtc", map::RTC, 0x1000, "google,goldfish-rtc", map::RTC_IRQ, None)?;
    for slot in 0..map::VIRTIO_SLOTS {
        let at = map::VIRTIO + slot * map::VIRTIO_BYTES;
        let irq = map::VIRTIO_IRQ + slot as u32;
        device(fdt, "virtio_mmio", at, map::VIRTIO_BYTES, "virtio,mmio", irq, None)?;
    }
    fdt.end_node(soc)
}

fn device(
    fdt: &mut FdtWriter,
    name: &str,
    at: u64,
    bytes: u64,
    compatible: &str,
    irq: u32,
    clock_hz: Option<u32>,
) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("{name}@{at:x}"))?;
    fdt.property_string("compatible", compatible)?;
    fdt.property_array_u64("reg", &[at, bytes])?;
    fdt.property_u32("interrupts", irq)?;
    fdt.property_u32("interrupt-parent", PLIC_PHANDLE)?;
    if let Some(hz) = clock_hz {
        fdt.property_u32("clock-frequency", hz)?;
    }
    fdt.end_node(node)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BEGIN_NODE: usize = 1;
    const END_NODE: usize = 2;
    const PROPERTY: usize = 3;

    fn tree(seed: Option<u64>) -> Vec<u8> {
        build(2, 128 << 20, "console=ttyS0", Some((RAM_BASE, RAM_BASE + 4096)), seed).unwrap()
    }

    fn word(blob: &[u8], at: usize) -> usize {
        u32::from_be_bytes(blob[at..at + 4].try_into().unwrap()) as usize
    }

    fn text(blob: &[u8], at: usize) -> &str {
        let bytes = blob[at..].split(|byte| *byte == 0).next().unwrap();
        std::str::from_utf8(bytes).unwrap()
    }

    /// All properties of a blob: the path, and the value.
    fn properties(blob: &[u8]) -> Vec<(String, &[u8])> {
        let (mut at, strings) = (word(blob, 8), word(blob, 12));
        let (mut path, mut found) = (vec![], vec![]);
        loop {
            let token = word(blob, at);
            at += 4;
            match token {
                BEGIN_NODE => {
                    let name = text(blob, at);
                    path.push(name);
                    at = (at + name.len() + 1).next_multiple_of(4);
                }
                END_NODE => _ = path.pop(),
                PROPERTY => {
                    let (bytes, name) = (word(blob, at), text(blob, strings + word(blob, at + 4)));
                    at += 8;
                    found.push((format!("{}/{name}", path.join("/")), &blob[at..at + bytes]));
                    at = (at + bytes).next_multiple_of(4);
                }
                _ => return found,
            }
        }
    }

    #[test]
    fn a_seed_adds_its_bytes_to_chosen_and_changes_nothing_else() {
        let (without, with) = (tree(None), tree(Some(7)));
        let (without, mut with) = (properties(&without), properties(&with));
        let is_seed = |(path, _): &(String, &[u8])| path == "/chosen/rng-seed";
        assert!(!without.is_empty() && !without.iter().any(is_seed));
        let at = with.iter().position(is_seed).unwrap();
        assert_eq!(with.remove(at).1, &rng_seed(7)[..]);
        assert_eq!(with, without);
        assert_ne!(tree(Some(7)), tree(Some(8)));
    }

    /// As another implementation of BLAKE3 has them. With other bytes, what is recorded would no
    /// longer replay.
    #[test]
    fn the_bytes_of_a_seed_stay_what_they_are() {
        let hex = |seed| -> String { rng_seed(seed).iter().map(|byte| format!("{byte:02x}")).collect() };
        assert_eq!(hex(0), "efb53a66d5436985dcdac23ca69e5bc8a2c6c382adc0e53ad9f24c511313cccd");
        assert_eq!(hex(7), "b5cd87cf61d19243413c2e0d815edc30567d9b28c32cea9ca1c6b9dbb1a182dd");
        assert_eq!(hex(u64::MAX), "e2c553420d8f7e272658730f595bed4311a531581e73d82ec12ccd1522ab9461");
    }
}
