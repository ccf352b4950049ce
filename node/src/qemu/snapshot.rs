//! QEMU's snapshots as deduplicated blocks, and their digests.
//!
//! A VM state is one stream, in which a page that did not change moves when another
//! one does. So RAM is cut out page by page into a page tree, as the built-in
//! machine's is: a page that did not change is the same block, and costs nothing. What
//! is not RAM, about half a megabyte, is stored in blocks of 64 KiB; a disk is its
//! overlay's clusters. A restore puts the stream together again, in a qcow2 file that
//! holds just this snapshot.

use crate::live;
use crate::qemu::process::VM_STATE;
use crate::qemu::qcow2::{self, CLUSTER, Cluster, Contents, NewSnapshot, Qcow2};
use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use heddle_proto::qemu::QemuSpec;
use heddle_proto::{Hash, Position, v1};
use heddle_replay_engine::page_hash::{page_hash, page_hashes};
use heddle_replay_engine::page_tree::{BlockSource, PageTree};
use heddle_replay_engine::qemu::vmstate::{self, PAGE, VmState, WithoutRam};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const BLOB_BLOCK: usize = 64 << 10;
/// Pages whose hashes are held before the tree has them: those under a node of its second level.
const HASHED_TOGETHER: usize = 1 << 14;
/// Bounds what a root may make a restore allocate.
const RAM_BYTES_MAX: u64 = 64 << 30;
const BLOB_BYTES_MAX: u64 = 256 << 20;

/// Bytes in blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Blob {
    bytes: u64,
    blocks: Vec<Hash>,
}

/// The root block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    version: u32,
    /// Where it stands.
    pub position: Position,
    /// Offset in the log where a replay from here reads on.
    pub log_offset: u64,
    /// Instructions that the log has already told of: more than were executed when the
    /// state was saved by a replay between two events.
    pub log_icount: u64,
    /// Digest of the state.
    pub digest: Hash,
    /// RAM blocks: name, bytes, root of the page tree.
    pub ram: Vec<(String, u64, Hash)>,
    /// A hash for each device, vCPU and disk.
    pub leaves: BTreeMap<String, Hash>,
    pub(crate) head: Vec<u8>,
    pub(crate) ram_header: Vec<u8>,
    pub(crate) rest: Blob,
    pub(crate) description: Blob,
    disks: Vec<Blob>,
}

/// A state, taken apart; all but its event index, which the log's reader knows.
pub struct Captured {
    /// The root, with an event index of zero.
    pub root: Root,
    /// Blocks that are new since the last state that the same [`Tracker`] saw.
    pub blocks: Vec<(Hash, Bytes)>,
}

impl Captured {
    /// Its digest.
    pub fn digest(&self) -> Hash {
        self.root.digest
    }

    /// What goes into the store, once the event index is known.
    pub fn finish(mut self, event: u64) -> live::NewSnapshot {
        self.root.position.event = event;
        let root = Bytes::from(serde_json::to_vec(&self.root).expect("a root has string keys only"));
        let hash = Hash::of(&root);
        self.blocks.push((hash, root));
        let row = v1::SnapshotRow {
            icount: self.root.position.icount,
            event,
            root: hash.to_vec().into(),
            digest: self.root.digest.to_vec().into(),
        };
        live::NewSnapshot { blocks: self.blocks, row }
    }
}

/// Keeps page trees from state to state, so that only what changed is new.
#[derive(Default)]
pub struct Tracker {
    trees: BTreeMap<String, (u64, PageTree)>,
}

fn put_blob(blocks: &mut Vec<(Hash, Bytes)>, bytes: &[u8]) -> Blob {
    let hashes = bytes.chunks(BLOB_BLOCK).map(|part| {
        let hash = Hash::of(part);
        blocks.push((hash, Bytes::copy_from_slice(part)));
        hash
    });
    Blob { bytes: bytes.len() as u64, blocks: hashes.collect() }
}

/// Reads the snapshot `name` out of the files that a QEMU saved it to, and takes it apart.
pub fn capture(tracker: &mut Tracker, name: &str, vm_state: &Path, disks: &[PathBuf]) -> Result<Captured> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let file = open(vm_state)?;
    let container = Qcow2::open(&file)?;
    let bytes = container.vm_state(&container.snapshot(name)?)?;
    let state = VmState::parse(&bytes)?;
    let mut blocks = vec![];
    let mut ram = vec![];
    for (index, block) in state.ram.iter().enumerate() {
        let fresh = || (block.bytes, PageTree::new(block.pages.len()));
        let (bytes, tree) = tracker.trees.entry(block.name.clone()).or_insert_with(fresh);
        if *bytes != block.bytes {
            (*bytes, *tree) = fresh();
        }
        let pages: Vec<usize> = (0..block.pages.len()).collect();
        for part in pages.chunks(HASHED_TOGETHER) {
            let bytes = |page: &usize| (*page as u32, state.page(index, *page).unwrap_or_default());
            tree.update(page_hashes(part.iter().map(bytes)));
        }
        let (changed, nodes) = tree.take_changed();
        for page in changed {
            if let Some(bytes) = state.page(index, page as usize).filter(|_| tree.page(page) != Hash::ZERO) {
                blocks.push((tree.page(page), Bytes::copy_from_slice(bytes)));
            }
        }
        blocks.extend(nodes.into_iter().map(|(hash, bytes)| (hash, Bytes::from(bytes))));
        ram.push((block.name.clone(), block.bytes, tree.root()));
    }
    let mut leaves = state.leaves();
    let mut disk_blobs = vec![];
    for (index, path) in disks.iter().enumerate() {
        let file = open(path)?;
        let clusters = disk_clusters(&file, name, &mut blocks)?;
        leaves.insert(format!("disk{index}"), Hash::of(&clusters));
        disk_blobs.push(put_blob(&mut blocks, &clusters));
    }
    let parts = state.without_ram();
    let digest =
        vmstate::digest(ram.iter().map(|(name, bytes, root)| (name.as_str(), *bytes, *root)), &leaves);
    let icount = state.icount().context("the VM state has no icount")?;
    let ahead = state.instructions_ahead().context("the VM state stands in the middle of an event")?;
    let root = Root {
        version: VERSION,
        position: Position { icount, event: 0 },
        log_icount: icount.checked_add(ahead).context("the VM state's icount is beyond any")?,
        log_offset: state.log_offset().context("the VM state has no log offset")?,
        digest,
        ram,
        leaves,
        head: parts.head,
        ram_header: parts.ram_header,
        rest: put_blob(&mut blocks, &parts.rest),
        description: put_blob(&mut blocks, &parts.description),
        disks: disk_blobs,
    };
    Ok(Captured { root, blocks })
}

/// Gives back the disk space of a state that was captured.
pub fn discard(name: &str, vm_state: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(vm_state);
    let file = file.with_context(|| format!("open {}", vm_state.display()))?;
    let container = Qcow2::open(&file)?;
    container.punch_vm_state(&container.snapshot(name)?)
}

/// A disk's own clusters: index and hash of each, the data as blocks.
fn disk_clusters(file: &File, name: &str, blocks: &mut Vec<(Hash, Bytes)>) -> Result<Vec<u8>> {
    let image = Qcow2::open(file)?;
    let mut list = vec![];
    for (index, cluster) in image.clusters(&image.snapshot(name)?)? {
        let hash = match cluster {
            Cluster::Zero => Hash::ZERO,
            Cluster::At(offset) => {
                let bytes = image.cluster(offset)?;
                let hash = page_hash(&bytes);
                if hash != Hash::ZERO {
                    blocks.push((hash, Bytes::from(bytes)));
                }
                hash
            }
        };
        list.extend_from_slice(&index.to_le_bytes());
        list.extend_from_slice(&hash.0);
    }
    Ok(list)
}

/// Reads a root block.
pub fn read_root(hash: Hash, source: &mut dyn BlockSource) -> Result<Root> {
    let block =
        source.blocks(&[hash]).map_err(|error| anyhow!(error)).context("fetch the snapshot's root")?;
    let root: Root = serde_json::from_slice(&block[0]).context("the snapshot's root does not parse")?;
    ensure!(root.version == VERSION, "snapshot version {} is not known; {VERSION} is", root.version);
    let ram = root.ram.iter().map(|(_, bytes, _)| bytes).fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
    ensure!(ram <= RAM_BYTES_MAX, "the snapshot claims {ram} bytes of RAM");
    Ok(root)
}

pub(crate) fn get_blob(blob: &Blob, source: &mut dyn BlockSource) -> Result<Vec<u8>> {
    ensure!(blob.bytes <= BLOB_BYTES_MAX, "a part of the snapshot claims {} bytes", blob.bytes);
    // How many there must be is known before they are read: a list may name one block often.
    let expected = blob.bytes.div_ceil(BLOB_BLOCK as u64);
    ensure!(blob.blocks.len() as u64 == expected, "a part of the snapshot has another number of blocks");
    let mut bytes = Vec::with_capacity(blob.bytes as usize);
    for part in blob.blocks.chunks(64) {
        for block in source.blocks(part).map_err(|e| anyhow!(e))? {
            ensure!(block.len() <= BLOB_BLOCK, "a block of a part of the snapshot is too long");
            bytes.extend_from_slice(&block);
        }
    }
    ensure!(bytes.len() as u64 == blob.bytes, "a part of the snapshot has another length");
    Ok(bytes)
}

/// The hashes of all blocks of a snapshot, its root among them.
pub fn blocks_of(hash: Hash, source: &mut dyn BlockSource) -> Result<Vec<Hash>> {
    let root = read_root(hash, source)?;
    let mut blocks = vec![hash];
    for (_, bytes, tree) in &root.ram {
        let pages = bytes.div_ceil(PAGE as u64) as usize;
        blocks.extend(PageTree::blocks(pages, *tree, source).map_err(|error| anyhow!(error))?);
    }
    for blob in [&root.rest, &root.description].into_iter().chain(&root.disks) {
        blocks.extend(&blob.blocks);
    }
    for disk in &root.disks {
        blocks.extend(clusters(&get_blob(disk, source)?).map(|(_, hash)| hash));
    }
    blocks.retain(|hash| *hash != Hash::ZERO);
    Ok(blocks)
}

/// A disk's list of clusters: number and hash of each.
fn clusters(list: &[u8]) -> impl Iterator<Item = (u64, Hash)> {
    list.chunks_exact(40).map(|entry| {
        let (number, hash) = entry.split_at(8);
        (u64::from_le_bytes(number.try_into().expect("8 bytes")), Hash(hash.try_into().expect("32 bytes")))
    })
}

/// The pages of a snapshot's RAM block that are not zeros.
pub fn pages(root: &Root, block: usize, source: &mut dyn BlockSource) -> Result<Vec<Option<Vec<u8>>>> {
    let (_, bytes, tree) = &root.ram[block];
    let count = bytes.div_ceil(PAGE as u64) as usize;
    let mut found: Vec<Option<Vec<u8>>> = vec![None; count];
    PageTree::restore(count, *tree, source, |page, bytes| {
        if bytes.len() != PAGE {
            return Err(format!("a page has {} bytes", bytes.len()));
        }
        found[page as usize] = Some(bytes.to_vec());
        Ok(())
    })
    .map_err(|error| anyhow!(error))?;
    Ok(found)
}

/// Writes what a QEMU needs to begin at a snapshot: the VM state's file, and an overlay
/// for each disk over the files in `bases`.
pub fn restore(
    root: &Root,
    source: &mut dyn BlockSource,
    spec: &QemuSpec,
    bases: &[PathBuf],
    vm_state: &Path,
    overlays: &[PathBuf],
) -> Result<()> {
    ensure!(root.disks.len() == spec.disks.len(), "the snapshot has other disks than the recording");
    let parts = WithoutRam {
        head: root.head.clone(),
        ram_header: root.ram_header.clone(),
        rest: get_blob(&root.rest, source)?,
        description: get_blob(&root.description, source)?,
    };
    let ram = (0..root.ram.len()).map(|block| pages(root, block, source)).collect::<Result<Vec<_>>>()?;
    let names: Vec<(String, u64)> = root.ram.iter().map(|(name, bytes, _)| (name.clone(), *bytes)).collect();
    let mut stream = vec![];
    vmstate::assemble(&mut stream, &parts, &names, |block, page| ram[block][page].as_deref())?;
    let icount = root.position.icount;
    let snapshot = NewSnapshot { name: VM_STATE, icount, clusters: vec![], vm_state: &stream };
    let contents = Contents { guest_bytes: 1 << 20, backing: None, snapshot: Some(snapshot) };
    qcow2::write(vm_state, &contents)?;
    for (index, disk) in spec.disks.iter().enumerate() {
        let list = get_blob(&root.disks[index], source)?;
        let entries: Vec<(u64, Hash)> = clusters(&list).collect();
        let mut data: BTreeMap<Hash, Vec<u8>> = BTreeMap::new();
        let wanted: Vec<Hash> =
            entries.iter().map(|(_, hash)| *hash).filter(|hash| *hash != Hash::ZERO).collect();
        for part in wanted.chunks(64) {
            data.extend(part.iter().copied().zip(source.blocks(part).map_err(|e| anyhow!(e))?));
        }
        let most = disk.guest_bytes.div_ceil(CLUSTER as u64);
        ensure!(
            entries.iter().all(|(number, _)| *number < most),
            "a disk's snapshot reaches beyond the disk"
        );
        let clusters =
            entries.iter().map(|(number, hash)| (*number, data.get(hash).map(Vec::as_slice))).collect();
        let snapshot = NewSnapshot { name: VM_STATE, icount, clusters, vm_state: &[] };
        write_overlay(&overlays[index], disk.guest_bytes, &bases[index], &disk.format, Some(snapshot))?;
    }
    Ok(())
}

/// An overlay over `base`.
pub fn write_overlay(
    path: &Path,
    guest_bytes: u64,
    base: &Path,
    format: &str,
    snapshot: Option<NewSnapshot>,
) -> Result<()> {
    let base = base.to_str().context("a path that is not UTF-8")?;
    qcow2::write(path, &Contents { guest_bytes, backing: Some((base, format)), snapshot })
}

/// An empty file for VM states.
pub fn write_empty(path: &Path) -> Result<()> {
    qcow2::write(path, &Contents { guest_bytes: 1 << 20, ..Contents::default() })
}
