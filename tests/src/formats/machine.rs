//! What the built-in machine is loaded and restored from.

use super::{Blocks, elf, join, split};
use heddle_proto::manifest::{Device, Image, MachineSpec};
use heddle_proto::{AsyncEvent, Hash, QemuEvent};
use heddle_replay_engine::checks::Checks;
use heddle_replay_engine::guest;
use heddle_replay_engine::machine::fdt;
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Disk, Exit, FRAME_BYTES_MAX, Machine, Nobody, RAM_BASE};
use heddle_replay_engine::state::{Rest, Snapshot, StateTree};
use heddle_replay_engine::warp::Warp;
use std::sync::Arc;

const DEVICES: [Device; 3] = [Device::Net, Device::Rng, Device::Console];

/// The bundled guest without its disk, with all other devices.
fn spec() -> MachineSpec {
    MachineSpec { drives: vec![], devices: DEVICES.to_vec(), ..guest::spec() }
}

/// Machines that a snapshot may be of.
const HARTS: [u32; 2] = [1, 3];

/// The bundled guest at power-on, on so many harts.
fn machine(harts: u32) -> Machine {
    let spec = MachineSpec { harts, ..spec() };
    loader::build(&spec, &images(guest::LOOM_ELF)).expect("the bundled guest fits")
}

fn images(kernel: &[u8]) -> Images {
    Images { kernel: Some(Arc::from(kernel)), ..Images::default() }
}

/// A file as a recording names it, with its blocks: the bytes, their list, the list of lists.
pub(super) fn image_of(name: &str, bytes: &[u8]) -> (Image, Vec<Vec<u8>>) {
    assert!(bytes.len() <= 64 << 10, "it is one block");
    let list = Hash::of(bytes).to_vec();
    let top = Hash::of(&list).to_vec();
    let index = Hash::of(&top);
    let image = Image { hash: Hash::of(bytes), bytes: bytes.len() as u64, index, name: name.into() };
    (image, vec![bytes.to_vec(), list, top])
}

/// Firmware to put a kernel behind: it goes nowhere.
const FIRMWARE: [u8; 4] = 0x0000_006f_u32.to_le_bytes();
/// More than the reset vector and the small example have.
const INSTRUCTIONS: u64 = 100;

pub(super) fn check_elf(bytes: &[u8]) -> bool {
    let file: Arc<[u8]> = Arc::from(bytes);
    // As firmware, a file that is no ELF is raw; behind it lies a kernel.
    let firmware = Images { bios: Some(file.clone()), ..images(guest::LOOM_ELF) };
    let _ = loader::build(&spec(), &firmware);
    // As a kernel behind firmware, its entry says where an initial RAM disk lies: any bytes are one.
    let kernel = Images { bios: Some(Arc::from(FIRMWARE)), initrd: Some(file), ..images(bytes) };
    let _ = loader::build(&spec(), &kernel);
    assert!(loader::signature(bytes).is_none_or(|results| results.start <= results.end));
    let Ok(mut machine) = loader::build(&spec(), &images(bytes)) else { return false };
    // Its symbols say what a store to `tohost` does.
    while machine.run(INSTRUCTIONS, &mut Nobody) == Exit::Work {}
    let _ = machine.instruction_at(machine.hart().pc);
    true
}

pub(super) fn elf_seeds() -> Vec<Vec<u8>> {
    // The last one leaves room for firmware.
    vec![guest::LOOM_ELF.to_vec(), elf::test_at(RAM_BASE), elf::test_at(RAM_BASE + (2 << 20))]
}

/// A guest gets the device tree as it is: the machine reads nothing but its head.
pub(super) fn check_device_tree(bytes: &[u8]) -> bool {
    let images = Images { dtb: Some(Arc::from(bytes)), ..images(guest::LOOM_ELF) };
    let built = loader::build(&spec(), &images);
    let Ok(tree) = loader::device_tree(&spec(), &images) else {
        assert!(built.is_err(), "there is one rule");
        return false;
    };
    // What follows it in the file is left out.
    assert!(bytes.starts_with(&tree));
    assert_eq!(fdt::check(&tree), Ok(&tree[..]));
    built.is_ok()
}

pub(super) fn device_tree_seeds() -> Vec<Vec<u8>> {
    let tree = |harts: u32, append: &str, seed: Option<u64>| {
        let spec = MachineSpec { harts, append: append.into(), seed, ..spec() };
        let images = Images { initrd: Some(Arc::from([7; 100])), ..images(guest::LOOM_ELF) };
        loader::device_tree(&spec, &images).expect("the bundled guest fits")
    };
    vec![tree(1, "", None), [tree(3, "console=ttyS0", Some(7)), vec![0; 64]].concat()]
}

/// What a snapshot lies over.
#[derive(Clone, Copy)]
pub(super) enum Over {
    /// All of RAM is in it.
    Nothing,
    /// Only what has been written since is in it.
    Loaded,
}

/// A snapshot of so many harts that have hardly begun, and its blocks, the root first.
pub(super) fn snapshot_of(harts: u32, over: Over) -> (Snapshot, Vec<Vec<u8>>) {
    let mut machine = machine(harts);
    let rest = Rest { warp: Warp::default(), is_started: false };
    let mut tree = match over {
        Over::Loaded => StateTree::new(&mut machine),
        Over::Nothing => {
            let ram = Ram::new(machine.ram().len());
            StateTree::new(&mut Machine::new(ram, Hart::new(RAM_BASE), 0, vec![]))
        }
    };
    while machine.run(INSTRUCTIONS, &mut Nobody) == Exit::Work {}
    let snapshot = tree.snapshot(&mut machine, &rest, Checks::default(), 0);
    let blocks = snapshot.blocks.iter().rev().map(|(_, block)| block.clone()).collect();
    (snapshot, blocks)
}

/// An input is a snapshot's blocks, the root first.
pub(super) fn check_snapshot(bytes: &[u8]) -> bool {
    let parts = split(bytes);
    let Some(root) = parts.first().map(|root| Hash::of(root)) else { return false };
    let mut source = Blocks::of(&parts);
    let named = heddle_replay_engine::snapshot_blocks(root, &mut source);
    let taken = HARTS.into_iter().find_map(|harts| {
        let mut machine = machine(harts);
        let mut tree = StateTree::new(&mut machine);
        let restored = tree.restore(&mut machine, root, &mut source).ok()?;
        Some((machine, restored))
    });
    let Some((mut machine, restored)) = taken else { return false };
    assert!(named.is_ok(), "all blocks were there");
    // By the bytes that are in RAM now.
    assert_eq!(StateTree::new(&mut machine).digest(&mut machine, &restored.rest), restored.digest);
    true
}

pub(super) fn snapshot_seeds() -> Vec<Vec<u8>> {
    let over = |over| HARTS.map(|harts| snapshot_of(harts, over).1);
    let blocks = [over(Over::Nothing), over(Over::Loaded)].concat();
    blocks.iter().map(|blocks| join(blocks.iter().map(Vec::as_slice))).collect()
}

/// RAM of a machine that is driven by an input, and where the input's memory lies in it.
const RAM_BYTES: usize = 2 << 20;
const MEMORY: usize = 0x1_0000;
/// A device's number, then for each of two queues its size (u16) and where its descriptors,
/// available and used ring lie behind [`MEMORY`] (u32 each).
const HEAD_BYTES: usize = 1 + 2 * 14;
/// The registers of disk, network card, entropy device and console.
const REGISTERS: [u64; 4] = [0x1000_1000, 0x1000_8000, 0x1000_7000, 0x1000_6000];
const DRIVER_OK: u64 = 15;

/// An input is what a driver writes: a device's queues, and the memory where they lie.
pub(super) fn check_virtio(bytes: &[u8]) -> bool {
    let Some((head, memory)) = bytes.split_first_chunk() else { return false };
    let (mut machine, status) = drive(head, memory);
    let (mut again, status_again) = drive(head, memory);
    let same_ram = machine.ram().slice(0, RAM_BYTES) == again.ram().slice(0, RAM_BYTES);
    assert!(same_ram && status == status_again, "devices have no will of their own");
    let frames = machine.take_frames();
    assert!(frames.iter().all(|frame| frame.len() <= FRAME_BYTES_MAX));
    assert_eq!((frames, machine.take_console()), (again.take_frames(), again.take_console()));
    status == DRIVER_OK
}

/// Executes the store or the load that the machine's code consists of.
fn execute(machine: &mut Machine, at: u64, register: u64, value: u64) -> u64 {
    machine.hart_mut().pc = RAM_BASE + at;
    machine.hart_mut().x[1] = register;
    machine.hart_mut().x[2] = value;
    let until = machine.icount() + 1;
    while machine.run(until, &mut Nobody) == Exit::Work {}
    machine.hart().x[3]
}

/// A machine with all devices, of which one was brought up, notified, and given input;
/// and that device's status.
fn drive(head: &[u8; HEAD_BYTES], memory: &[u8]) -> (Machine, u64) {
    let mut ram = Ram::new(RAM_BYTES);
    // sw x2, 0(x1); lw x3, 0(x1)
    ram.write(0, &[0x23, 0xa0, 0x20, 0x00, 0x83, 0xa1, 0x00, 0x00]).expect("RAM is larger");
    let memory = &memory[..memory.len().min(RAM_BYTES - MEMORY)];
    ram.write(MEMORY as u64, memory).expect("it was cut");
    let mut machine = Machine::new(ram, Hart::new(RAM_BASE), 0, vec![Disk::new(Arc::from(vec![5; 4096]))]);
    DEVICES.into_iter().for_each(|device| machine.plug(device));
    let device = REGISTERS[usize::from(head[0]) % REGISTERS.len()];
    let mut writes = vec![(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)];
    for (number, queue) in head[1..].chunks(14).enumerate() {
        let size = u64::from(u16::from_le_bytes([queue[0], queue[1]]));
        writes.extend([(0x30, number as u64), (0x38, size), (0x44, 1)]);
        for (register, at) in [0x80, 0x90, 0xa0].into_iter().zip(queue[2..].chunks(4)) {
            let at = u32::from_le_bytes(at.try_into().expect("chunks of four"));
            let at = RAM_BASE + MEMORY as u64 + u64::from(at);
            writes.extend([(register, at & 0xffff_ffff), (register + 4, at >> 32)]);
        }
    }
    writes.extend([(0x70, DRIVER_OK), (0x50, 0), (0x50, 1)]);
    for (register, value) in writes {
        execute(&mut machine, 0, device + register, value);
    }
    run_async(&mut machine);
    machine.receive(&QemuEvent::Net { filter: 0, flags: 0, data: vec![7; 60] });
    machine.receive(&QemuEvent::CharRead { device: 1, data: vec![7; 20] });
    let status = execute(&mut machine, 4, device + 0x70, 0);
    (machine, status)
}

/// All bottom halves with what they ask for, then all completions.
fn run_async(machine: &mut Machine) {
    for id in 0..machine.next_async() {
        machine.run_async(&AsyncEvent::BottomHalf { id });
        while let Some(bytes) = machine.entropy_wanted() {
            machine.give_entropy(&vec![7; bytes]);
        }
    }
    for id in 0..machine.next_async() {
        machine.run_async(&AsyncEvent::Block { id });
    }
}

/// Rings of eight entries with one chain in each queue; each buffer by its length and
/// whether the device writes it.
fn virtio_seed(device: u8, chains: [&[(u32, bool)]; 2]) -> Vec<u8> {
    const BUFFERS: usize = 0x400;
    let (mut head, mut memory) = (vec![device], vec![0; BUFFERS]);
    for (number, chain) in chains.into_iter().enumerate() {
        let at = number * 0x200;
        head.extend(8u16.to_le_bytes());
        for ring in [at, at + 0x80, at + 0xc0] {
            head.extend((ring as u32).to_le_bytes());
        }
        memory[at + 0x82] = u8::from(!chain.is_empty());
        for (i, (len, is_writable)) in chain.iter().enumerate() {
            let address = RAM_BASE + (MEMORY + memory.len()) as u64;
            let flags = u64::from(i + 1 < chain.len()) | u64::from(*is_writable) << 1;
            let word = u64::from(*len) | flags << 32 | (i as u64 + 1) << 48;
            memory[at + i * 16..][..8].copy_from_slice(&address.to_le_bytes());
            memory[at + i * 16 + 8..][..8].copy_from_slice(&word.to_le_bytes());
            memory.resize(memory.len() + *len as usize, 0);
        }
    }
    [head, memory].concat()
}

pub(super) fn virtio_seeds() -> Vec<Vec<u8>> {
    vec![
        virtio_seed(0, [&[(16, false), (512, true), (1, true)], &[]]),
        virtio_seed(1, [&[(12, true), (1518, true)], &[(12, false), (60, false)]]),
        virtio_seed(2, [&[(64, true), (8, true)], &[]]),
        virtio_seed(3, [&[(16, true)], &[(10, false)]]),
    ]
}
