//! The whole state as a tree: RAM, overlays, and a named leaf for each device.
//! Its root is the digest. A snapshot's blocks are the same, but of RAM only what is not as it
//! was loaded.

mod leaves;

pub use leaves::leaf_values;

use crate::checks::Checks;
use crate::machine::Machine;
use crate::machine::ram::{PAGE, Ram};
use crate::page_hash::page_hashes;
use crate::page_tree::{BlockSource, PageTree};
use crate::warp::Warp;
use heddle_proto::{Hash, Position};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::sync::Arc;

/// Which state a digest covers: all that this machine has.
pub const COVERAGE: &str = "ram, disk overlays, harts (registers, floating point, csrs, tlb, reservation) and \
     their turn, clint, plic, uart, rtc, virtio queues and requests in flight, timers, bottom halves, clock, warp";
/// Version of [`SnapshotRoot`] and of all that its leaves hold; another one is refused by its
/// number.
const SNAPSHOT_VERSION: u32 = 6;
/// The version before, which has no [`SnapshotRoot::loaded`] and is read as well: all of RAM is
/// in it.
const WITH_ALL_OF_RAM: u32 = 5;

/// Page trees kept up to date from digest to digest.
#[derive(Clone, Debug)]
pub struct StateTree {
    ram: PageTree,
    /// RAM as it was loaded.
    loaded: Arc<PageTree>,
    /// The tree that snapshots store, as of the last one: see [`SnapshotRoot::ram`].
    stored: PageTree,
    disks: Vec<PageTree>,
}

/// Bounds what a root may make its reader do: 4 GiB, the most RAM or disk that there can be.
const PAGES_MAX: u64 = 1 << 20;
/// Most disks, as in a manifest.
const DISKS_MAX: usize = 8;

/// A snapshot: its root block's hash, and the blocks that are new since the last one.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Where it stands.
    pub position: Position,
    /// Digest of the state.
    pub digest: Hash,
    /// Hash of the root block.
    pub root: Hash,
    /// New blocks, the root block last.
    pub blocks: Vec<(Hash, Vec<u8>)>,
}

/// The root block: where, the page trees' roots, and the leaves themselves.
#[derive(Serialize, Deserialize)]
struct SnapshotRoot {
    version: u32,
    position: Position,
    checks: Checks,
    digest: Hash,
    ram_pages: u64,
    /// A tree over those pages that are not as they were loaded; in place of the others it has
    /// [`Hash::ZERO`]. A page that was loaded and is zeros now has the hash of its bytes, and a
    /// block. As with a disk, the recording's files are what all this lies over.
    ram: Hash,
    disks: Vec<(u64, Hash)>,
    leaves: Vec<(String, Vec<u8>)>,
    /// What was loaded: a tree over all of its pages, which is not stored.
    loaded: Hash,
}

fn read_root(root: Hash, source: &mut dyn BlockSource) -> Result<SnapshotRoot, String> {
    let mut bytes = source.blocks(&[root])?.pop().ok_or("the block source gave nothing")?;
    let version: u32 = postcard::take_from_bytes(&bytes).map_err(|e| e.to_string())?.0;
    if version == SNAPSHOT_VERSION {
        return decode("snapshot root", &bytes);
    }
    if version != WITH_ALL_OF_RAM {
        let known = format!("{WITH_ALL_OF_RAM} and {SNAPSHOT_VERSION}");
        return Err(format!("snapshot has version {version}; this build reads {known}"));
    }
    // The one field that it lacks is the last.
    bytes.extend(Hash::ZERO.0);
    Ok(SnapshotRoot { loaded: Hash::ZERO, ..decode("snapshot root", &bytes)? })
}

/// The hashes of all blocks of a snapshot, its root among them.
pub fn snapshot_blocks(root: Hash, source: &mut dyn BlockSource) -> Result<Vec<Hash>, String> {
    let snapshot = read_root(root, source)?;
    if snapshot.disks.len() > DISKS_MAX {
        return Err(format!("the snapshot claims {} disks", snapshot.disks.len()));
    }
    let mut blocks = vec![root];
    let trees = [(snapshot.ram_pages, snapshot.ram)].into_iter().chain(snapshot.disks);
    for (pages, tree) in trees {
        if pages > PAGES_MAX {
            return Err(format!("the snapshot claims {pages} pages"));
        }
        blocks.extend(PageTree::blocks(pages as usize, tree, source)?);
    }
    Ok(blocks)
}

/// What an emulator has beside its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    /// The warp's state.
    pub warp: Warp,
    /// The machine has passed its first checkpoint.
    pub is_started: bool,
}

impl StateTree {
    /// The tree of `machine` as it was loaded: snapshots have only what is not so any more. All
    /// its pages that were ever written are looked at, and none of them is dirty then.
    pub fn new(machine: &mut Machine) -> StateTree {
        let pages = machine.ram.len() / PAGE;
        let mut ram = PageTree::new(pages);
        ram.update(page_hashes(machine.ram.used().map(|page| (page, machine.ram.page(page)))));
        machine.take_dirty();
        ram.forget_changed();
        let disks = machine.drives.iter().map(|d| PageTree::new(d.disk.blocks())).collect();
        StateTree { loaded: Arc::new(ram.clone()), stored: PageTree::new(pages), ram, disks }
    }

    /// The digest of the state now. Only what was written since the last call is rehashed.
    pub fn digest(&mut self, machine: &mut Machine, rest: &Rest) -> Hash {
        self.update(machine);
        self.root(&leaves::encoded(machine, rest))
    }

    fn update(&mut self, machine: &mut Machine) {
        let dirty = machine.take_dirty();
        self.ram.update(page_hashes(dirty.into_iter().map(|page| (page, machine.ram.page(page)))));
        for (tree, drive) in self.disks.iter_mut().zip(&mut machine.drives) {
            let dirty = drive.disk.take_dirty();
            let hash = |block| drive.disk.overlay_block(block).map_or(Hash::ZERO, Hash::of);
            tree.update(dirty.into_iter().map(|block| (block, hash(block))));
        }
    }

    fn root(&self, leaves: &[(String, Vec<u8>)]) -> Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.ram.root().0);
        self.disks.iter().for_each(|disk| {
            hasher.update(&disk.root().0);
        });
        for (name, bytes) in leaves {
            hasher.update(&(name.len() as u32).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(&Hash::of(bytes).0);
        }
        Hash(*hasher.finalize().as_bytes())
    }

    /// What the root is made of, by name: RAM, the disks' overlays, the leaves. As of the last
    /// update.
    pub fn leaf_hashes(&self, machine: &Machine, rest: &Rest) -> Vec<(String, Hash)> {
        let disks = self.disks.iter().enumerate().map(|(i, disk)| (format!("disk-{i}"), disk.root()));
        let named = leaves::encoded(machine, rest).into_iter().map(|(name, bytes)| (name, Hash::of(&bytes)));
        std::iter::once(("ram".to_string(), self.ram.root())).chain(disks).chain(named).collect()
    }

    /// A snapshot of the state now. Changes nothing that the guest can see.
    pub fn snapshot(&mut self, machine: &mut Machine, rest: &Rest, checks: Checks, event: u64) -> Snapshot {
        self.update(machine);
        let leaves = leaves::encoded(machine, rest);
        let digest = self.root(&leaves);
        let position = Position { icount: machine.icount, event };
        let mut blocks = vec![];
        let pages = self.ram.take_changed_pages();
        let zeros = Hash::of(&[0; PAGE]);
        self.stored.update(pages.into_iter().map(|page| {
            let hash = match self.ram.page(page) {
                hash if hash == self.loaded.page(page) => Hash::ZERO,
                Hash::ZERO => zeros,
                hash => hash,
            };
            (page, hash)
        }));
        let (pages, nodes) = self.stored.take_changed();
        let mut has_zeros = false;
        for page in pages {
            let hash = self.stored.page(page);
            // A file's pages that are all zeros now are one block.
            let is_again = hash == zeros && std::mem::replace(&mut has_zeros, true);
            if hash != Hash::ZERO && !is_again {
                blocks.push((hash, machine.ram.page(page).to_vec()));
            }
        }
        blocks.extend(nodes);
        for (tree, drive) in self.disks.iter_mut().zip(&machine.drives) {
            let (pages, nodes) = tree.take_changed();
            for page in pages {
                let bytes = drive.disk.overlay_block(page).expect("a changed block is there");
                blocks.push((tree.page(page), bytes.to_vec()));
            }
            blocks.extend(nodes);
        }
        let root = SnapshotRoot {
            version: SNAPSHOT_VERSION,
            position,
            checks,
            digest,
            ram_pages: (machine.ram.len() / PAGE) as u64,
            ram: self.stored.root(),
            disks: machine
                .drives
                .iter()
                .zip(&self.disks)
                .map(|(drive, tree)| (drive.disk.blocks() as u64, tree.root()))
                .collect(),
            leaves,
            loaded: self.loaded.root(),
        };
        let bytes = encode(&root);
        let root = Hash::of(&bytes);
        blocks.push((root, bytes));
        Snapshot { position, digest, root, blocks }
    }

    /// Puts a snapshot's state into `machine`, whose tree this is, and which must be of the same
    /// manifest and as it was loaded. After an error neither is of any use.
    pub fn restore(
        &mut self,
        machine: &mut Machine,
        root: Hash,
        source: &mut dyn BlockSource,
    ) -> Result<Restored, String> {
        let snapshot = read_root(root, source)?;
        let disks_agree = snapshot.disks.len() == machine.drives.len()
            && snapshot.disks.iter().zip(&machine.drives).all(|((n, _), d)| *n == d.disk.blocks() as u64);
        if snapshot.ram_pages != (machine.ram.len() / PAGE) as u64 || !disks_agree {
            return Err("snapshot is of a machine with other RAM or disks than the manifest's".into());
        }
        let (bytes, pages) = (machine.ram.len(), machine.ram.len() / PAGE);
        if snapshot.loaded == Hash::ZERO {
            // Not both at a time: it may be all that the host has.
            machine.ram = Ram::new(0);
            machine.ram = Ram::allocate(bytes)
                .ok_or_else(|| format!("no {bytes} bytes of memory for the guest's RAM"))?;
            self.ram = PageTree::new(pages);
            self.loaded = Arc::new(self.ram.clone());
        } else if snapshot.loaded != self.loaded.root() {
            let why = "other files or another device tree, or by a build that lays them out otherwise";
            return Err(format!("the snapshot lies over what was not loaded here: {why}"));
        } else if !machine.ram.dirty().is_empty() || self.ram.root() != snapshot.loaded {
            return Err("the machine has run since it was loaded: a snapshot goes into a new one".into());
        }
        self.stored = PageTree::restore(pages, snapshot.ram, source, |page, bytes| {
            let at = u64::from(page) * PAGE as u64;
            let whole = bytes.len() == PAGE;
            whole.then(|| machine.ram.write(at, bytes)).flatten().ok_or("a page has another size".into())
        })?;
        let zeros = Hash::of(&[0; PAGE]);
        self.ram.update((0..pages as u32).filter_map(|page| match self.stored.page(page) {
            Hash::ZERO => None,
            hash => Some((page, if hash == zeros { Hash::ZERO } else { hash })),
        }));
        self.ram.forget_changed();
        machine.take_dirty();
        // What was written from outside is no guest's store.
        machine.ram.take_stale_code();
        let mut disks = vec![];
        for ((blocks, root), drive) in snapshot.disks.iter().zip(&mut machine.drives) {
            disks.push(PageTree::restore(*blocks as usize, *root, source, |block, bytes| {
                let bytes = bytes.try_into().map_err(|_| "an overlay block has another size")?;
                drive.disk.restore_block(block, bytes);
                Ok(())
            })?);
        }
        let (shift, count) = (machine.clock.shift, machine.hart_count());
        let is_hart = |name: &str| name == "hart" || name.starts_with("hart-");
        let harts = snapshot.leaves.iter().filter(|(name, _)| is_hart(name)).count();
        if harts != count {
            return Err(format!("harts of the snapshot: {harts}; of the manifest's machine: {count}"));
        }
        let rest = leaves::put(machine, &snapshot.leaves)?;
        let halves_agree = machine.bottom_halves.iter().all(|half| machine.has_queue(half));
        // A kick is of the hart whose turn it is: no other would ever take it.
        let parked_kicks = machine.all_harts().filter(|hart| hart.kick_pending).count();
        let fits = machine.clock.shift == shift
            && machine.icount == snapshot.position.icount
            && machine.clint.is_whole(count)
            && machine.plic.is_whole(count)
            && parked_kicks == usize::from(machine.hart.kick_pending)
            && halves_agree;
        if !fits {
            return Err("the snapshot's leaves do not fit the manifest's machine".into());
        }
        machine.refresh();
        self.disks = disks;
        if self.root(&leaves::encoded(machine, &rest)) != snapshot.digest {
            return Err("the restored state does not have the snapshot's digest".into());
        }
        Ok(Restored { rest, checks: snapshot.checks, position: snapshot.position, digest: snapshot.digest })
    }

    /// Names the parts that differ between two states: pages and leaves.
    pub fn differences(&self, other: &StateTree, machines: [&Machine; 2], rests: [&Rest; 2]) -> Vec<String> {
        let mut out = vec![];
        let pages = |a: &PageTree, b: &PageTree, count: usize| -> Vec<u32> {
            (0..count as u32).filter(|page| a.page(*page) != b.page(*page)).collect()
        };
        for page in pages(&self.ram, &other.ram, machines[0].ram.len() / PAGE) {
            out.push(format!("page {:#x}", crate::machine::RAM_BASE + u64::from(page) * PAGE as u64));
        }
        for (i, (a, b)) in self.disks.iter().zip(&other.disks).enumerate() {
            for block in pages(a, b, machines[0].drives[i].disk.blocks()) {
                out.push(format!("disk {i} block {block}"));
            }
        }
        let (a, b) = (leaves::encoded(machines[0], rests[0]), leaves::encoded(machines[1], rests[1]));
        let [hart, other] = machines.map(|machine| &machine.hart);
        let registers_equal = hart.x == other.x && hart.pc == other.pc && hart.f == other.f;
        let is_same_turn = machines[0].current_hart() == machines[1].current_hart();
        let current = leaves::of_hart(machines[0].hart_count(), machines[0].current_hart());
        for ((name, _), _) in a.iter().zip(&b).filter(|(a, b)| a.1 != b.1) {
            if is_same_turn && *name == current {
                // Registers are named one by one, by who has both values; of a hart this is the rest.
                if registers_equal {
                    out.push(format!("{name} (csrs, tlb or reservation)"));
                }
            } else if name.starts_with("hart") {
                out.push(format!("{name} (registers, csrs, tlb or reservation)"));
            } else if name == "turn" {
                out.push(name.clone());
            } else {
                out.push(format!("device {name}"));
            }
        }
        out
    }
}

/// What [`StateTree::restore`] gives beside the machine.
pub struct Restored {
    /// The emulator's own state.
    pub rest: Rest,
    /// The chain of checks.
    pub checks: Checks,
    /// Where.
    pub position: Position,
    /// The state's digest.
    pub digest: Hash,
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("plain data encodes to memory")
}

fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, String> {
    postcard::from_bytes(bytes).map_err(|error| format!("{what} does not decode: {error}"))
}
