//! What is in a snapshot, and what a restore takes from the files that were loaded.
#![allow(clippy::unwrap_used, missing_docs)]

use heddle_proto::Hash;
use heddle_replay_engine::Snapshot;
use heddle_replay_engine::checks::Checks;
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::ram::{PAGE, Ram};
use heddle_replay_engine::machine::{Exit, Machine, Nobody, RAM_BASE};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::snapshot_blocks;
use heddle_replay_engine::state::{Rest, Restored, StateTree};
use heddle_replay_engine::warp::Warp;
use std::collections::HashMap;

const RAM_BYTES: usize = 2 << 20;
/// Pages with a file's bytes, behind the code's own.
const FILE: std::ops::Range<u64> = 1..300;
/// The guest changes this page of the file, makes zeros of the next, and writes to one where
/// nothing was.
const CHANGED: u64 = 200;
const ZEROED: u64 = CHANGED + 1;
const NEW: u64 = 400;

#[derive(Clone, Default)]
struct Blocks(HashMap<Hash, Vec<u8>>);

impl BlockSource for Blocks {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        hashes.iter().map(|hash| self.0.get(hash).cloned().ok_or(format!("no block {hash}"))).collect()
    }
}

fn ram(fill: u8) -> Ram {
    // sd x3, 0(x1); sd x0, 0(x2); sd x3, 0(x4); sd x5, 0(x4)
    let code = [0x0030_b023_u32, 0x0001_3023, 0x0032_3023, 0x0052_3023];
    let mut ram = Ram::new(RAM_BYTES);
    let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &bytes).unwrap();
    for page in FILE {
        // Each page is another one; of the one to be zeroed only the first word is not zeros.
        let mut bytes = [fill; PAGE];
        bytes[8..10].copy_from_slice(&(page as u16).to_le_bytes());
        if page == ZEROED {
            bytes[8..].fill(0);
        }
        ram.write(page * PAGE as u64, &bytes).unwrap();
    }
    ram
}

/// A machine whose file is full of one byte.
fn machine(fill: u8) -> Machine {
    let mut hart = Hart::new(RAM_BASE);
    hart.pmp.set_address(15, u64::MAX);
    hart.pmp.set_configs(8, 0x1f << 56);
    hart.x[3] = 77;
    hart.x[5] = 78;
    for (register, page) in [(1, CHANGED), (2, ZEROED), (4, NEW)] {
        hart.x[register] = RAM_BASE + page * PAGE as u64;
    }
    Machine::new(ram(fill), hart, 0, vec![])
}

fn run_to(machine: &mut Machine, icount: u64) {
    while machine.run(icount, &mut Nobody) == Exit::Work {}
    assert_eq!(machine.icount(), icount);
}

fn rest() -> Rest {
    Rest { warp: Warp::default(), is_started: true }
}

fn snapshot(tree: &mut StateTree, machine: &mut Machine, blocks: &mut Blocks) -> Snapshot {
    let snapshot = tree.snapshot(machine, &rest(), Checks::default(), 0);
    blocks.0.extend(snapshot.blocks.iter().cloned());
    snapshot
}

fn restore(machine: &mut Machine, root: Hash, blocks: &mut Blocks) -> Result<(StateTree, Restored), String> {
    let mut tree = StateTree::new(machine);
    let restored = tree.restore(machine, root, blocks)?;
    Ok((tree, restored))
}

#[test]
fn a_snapshot_has_what_is_not_as_it_was_loaded() {
    let mut blocks = Blocks::default();
    let mut guest = machine(9);
    let mut tree = StateTree::new(&mut guest);
    let at_power_on = snapshot(&mut tree, &mut guest, &mut blocks);
    assert_eq!(at_power_on.blocks.len(), 1, "all is as it was loaded");
    run_to(&mut guest, 2);
    let first = snapshot(&mut tree, &mut guest, &mut blocks);
    let page = |page: u64| guest.ram().slice(page * PAGE as u64, PAGE).unwrap();
    assert!(page(ZEROED).iter().all(|byte| *byte == 0));
    assert_eq!(first.blocks.iter().filter(|(_, bytes)| bytes == page(CHANGED)).count(), 1);
    assert_eq!(first.blocks.iter().filter(|(_, bytes)| bytes == page(ZEROED)).count(), 1);
    assert!(!first.blocks.iter().any(|(_, bytes)| bytes == page(CHANGED - 1)));
    // Two pages, the node over them and the one above it, the root.
    assert_eq!(first.blocks.len(), 5);
    let named = snapshot_blocks(first.root, &mut blocks).unwrap();
    assert!(first.blocks.iter().all(|(hash, _)| named.contains(hash)));
    assert_eq!(named.len(), first.blocks.len());

    // Put into one that was just loaded, it is the same state, and goes on to the same states.
    let mut other = machine(9);
    let (mut other_tree, restored) = restore(&mut other, first.root, &mut blocks).unwrap();
    assert_eq!(restored.digest, first.digest);
    assert!(other.ram().slice(0, RAM_BYTES) == guest.ram().slice(0, RAM_BYTES));
    for icount in [3, 4] {
        run_to(&mut guest, icount);
        run_to(&mut other, icount);
        let recorded = snapshot(&mut tree, &mut guest, &mut blocks);
        let replayed = other_tree.snapshot(&mut other, &rest(), Checks::default(), 0);
        assert_eq!((recorded.digest, recorded.root), (replayed.digest, replayed.root));
        assert_eq!(recorded.blocks, replayed.blocks);
        // The page, the nodes above it, the root.
        assert_eq!(recorded.blocks.len(), 4);
    }
    // Back to power-on: that snapshot names no page at all.
    let mut other = machine(9);
    restore(&mut other, at_power_on.root, &mut blocks).unwrap();
    assert!(other.ram().slice(0, RAM_BYTES) == ram(9).slice(0, RAM_BYTES));
}

#[test]
fn a_snapshot_over_other_files_is_refused() {
    let mut blocks = Blocks::default();
    let mut guest = machine(9);
    let mut tree = StateTree::new(&mut guest);
    run_to(&mut guest, 2);
    let snapshot = snapshot(&mut tree, &mut guest, &mut blocks);
    let error = restore(&mut machine(8), snapshot.root, &mut blocks).err().unwrap();
    assert!(error.starts_with("the snapshot lies over what was not loaded here: "), "{error}");
}

#[test]
fn a_snapshot_goes_only_into_a_machine_that_has_not_run() {
    let mut blocks = Blocks::default();
    let mut guest = machine(9);
    let mut tree = StateTree::new(&mut guest);
    let at_power_on = snapshot(&mut tree, &mut guest, &mut blocks);
    for is_known in [false, true] {
        let mut other = machine(9);
        let mut tree = StateTree::new(&mut other);
        run_to(&mut other, 1);
        if is_known {
            tree.digest(&mut other, &rest());
        }
        let error = tree.restore(&mut other, at_power_on.root, &mut blocks).err().unwrap();
        assert_eq!(error, "the machine has run since it was loaded: a snapshot goes into a new one");
    }
}

#[test]
fn a_files_pages_that_are_zeros_now_are_one_block() {
    let mut blocks = Blocks::default();
    let mut loaded = machine(9);
    // As if the guest had made zeros of all that was loaded.
    let mut ram = Ram::new(RAM_BYTES);
    for page in 0..FILE.end {
        ram.write(page * PAGE as u64, &[0; PAGE]).unwrap();
    }
    let mut zeroed = Machine::new(ram, Hart::new(RAM_BASE), 0, vec![]);
    let snapshot = snapshot(&mut StateTree::new(&mut loaded), &mut zeroed, &mut blocks);
    let zeros = Hash::of(&[0; PAGE]);
    assert_eq!(snapshot.blocks.iter().filter(|(hash, _)| *hash == zeros).count(), 1);
}

/// Until version 5 all of RAM was in a snapshot.
#[test]
fn one_of_the_version_before_is_read() {
    let mut blocks = Blocks::default();
    let mut guest = machine(9);
    run_to(&mut guest, 3);
    let mut empty = Machine::new(Ram::new(RAM_BYTES), Hart::new(RAM_BASE), 0, vec![]);
    let now = snapshot(&mut StateTree::new(&mut empty), &mut guest, &mut blocks);
    assert!(now.blocks.len() > FILE.end as usize, "all of RAM is in it");
    let (_, root) = now.blocks.last().unwrap();
    let (old, loaded) = root.split_at(root.len() - 32);
    assert!(loaded.iter().all(|byte| *byte == 0), "it lies over nothing");
    let with_version = |version: u8| [&[version], &old[1..]].concat();
    for (version, says) in [(5, None), (4, Some("snapshot has version 4; this build reads 5 and 6"))] {
        let root = with_version(version);
        let hash = Hash::of(&root);
        blocks.0.insert(hash, root);
        // Whatever was loaded: nothing of it stays.
        for fill in [9, 8] {
            let mut other = machine(fill);
            match restore(&mut other, hash, &mut blocks) {
                Ok((mut tree, restored)) => {
                    assert_eq!((says, restored.digest), (None, now.digest));
                    assert!(other.ram().slice(0, RAM_BYTES) == guest.ram().slice(0, RAM_BYTES));
                    // And snapshots of it go on as they began.
                    run_to(&mut other, 4);
                    let next = snapshot(&mut tree, &mut other, &mut blocks);
                    let (_, again) = restore(&mut machine(7), next.root, &mut blocks).unwrap();
                    assert_eq!(again.digest, next.digest);
                }
                Err(error) => assert_eq!(says, Some(&error[..])),
            }
        }
    }
}
