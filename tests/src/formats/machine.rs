//! What the built-in machine is loaded and restored from.

use super::{Blocks, join, split};
use heddle_proto::Hash;
use heddle_proto::manifest::{Image, MachineSpec};
use heddle_replay_engine::checks::Checks;
use heddle_replay_engine::guest;
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::state::{Rest, Snapshot, StateTree};
use heddle_replay_engine::warp::Warp;
use std::sync::Arc;

/// The bundled guest without its disk.
fn spec() -> MachineSpec {
    MachineSpec { drives: vec![], ..guest::spec() }
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

pub(super) fn check_elf(bytes: &[u8]) -> bool {
    // As firmware, a file that is no ELF is raw; behind it lies a kernel.
    let firmware = Images { bios: Some(Arc::from(bytes)), ..images(guest::LOOM_ELF) };
    let _ = loader::build(&spec(), &firmware);
    let Ok(machine) = loader::build(&spec(), &images(bytes)) else { return false };
    let _ = machine.instruction_at(machine.hart().pc);
    true
}

pub(super) fn elf_seeds() -> Vec<Vec<u8>> {
    vec![guest::LOOM_ELF.to_vec()]
}

/// A snapshot at power-on, and its blocks, the root first.
pub(super) fn snapshot_of() -> (Snapshot, Vec<Vec<u8>>) {
    let mut machine = loader::build(&spec(), &images(guest::LOOM_ELF)).expect("the bundled guest fits");
    let rest = Rest { warp: Warp::default(), is_started: false };
    let mut tree = StateTree::new(&machine);
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
    let mut machine = loader::build(&spec(), &images(guest::LOOM_ELF)).expect("the bundled guest fits");
    let Ok(restored) = StateTree::restore(&mut machine, root, &mut source) else { return false };
    assert!(named.is_ok(), "all blocks were there");
    let mut tree = restored.tree;
    assert_eq!(tree.digest(&mut machine, &restored.rest), restored.digest);
    true
}

pub(super) fn snapshot_seeds() -> Vec<Vec<u8>> {
    let (_, blocks) = snapshot_of();
    vec![join(blocks.iter().map(Vec::as_slice))]
}
