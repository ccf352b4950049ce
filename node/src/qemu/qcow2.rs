//! qcow2, as far as snapshots need it: QEMU's are read, and files that hold just one
//! snapshot are written.
//!
//! ```text
//! header 104 bytes, big-endian: "QFI\xfb" | version 3 | backing file | cluster bits | guest bytes |
//!   L1 entries and offset | refcount table | snapshots: count and offset | features
//! L1 -> L2 -> cluster; an L1 goes on behind the guest's bytes with the VM state
//! snapshot: its own L1, name, VM state's length, icount
//! ```
//! Not here: compressed clusters, encryption, data files, refcounts other than 16 bits.

use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a cluster in files that are written here, and QEMU's default.
pub const CLUSTER: usize = 64 << 10;
const CLUSTER_BITS: u32 = 16;
const L2_ENTRIES: u64 = CLUSTER as u64 / 8;
const MAGIC: u32 = 0x5146_49fb;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES_END: u32 = 0;
/// Bounds what a header may make this allocate.
const L1_BYTES_MAX: u64 = 32 << 20;
const SNAPSHOTS_MAX: u32 = 65536;
const VM_STATE_BYTES_MAX: u64 = 64 << 30;

/// A qcow2 file that is read, possibly while QEMU writes to it: a snapshot's clusters
/// do not change any more.
pub struct Qcow2<'f> {
    file: &'f File,
    cluster: u64,
    /// Bytes the guest sees.
    pub guest_bytes: u64,
    /// Whether it is an overlay over another file.
    pub has_backing: bool,
    snapshots: (u32, u64),
}

/// A snapshot in a file.
#[derive(Clone, Debug)]
pub struct Snapshot {
    l1: Vec<u64>,
    /// Bytes of its VM state.
    pub vm_state_bytes: u64,
}

/// A cluster that a snapshot has of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Reads as zeros, whatever lies below.
    Zero,
    /// Lies at this offset of the file.
    At(u64),
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

impl<'f> Qcow2<'f> {
    /// Reads the header.
    pub fn open(file: &'f File) -> Result<Qcow2<'f>> {
        let mut header = [0; 104];
        file.read_exact_at(&mut header, 0).context("read the qcow2 header")?;
        ensure!(be32(&header, 0) == MAGIC, "not a qcow2 file");
        let (version, bits) = (be32(&header, 4), be32(&header, 20));
        ensure!((2..=3).contains(&version), "qcow2 version {version} is not known; 2 and 3 are");
        ensure!((9..=21).contains(&bits), "qcow2 clusters of 2^{bits} bytes");
        ensure!(be32(&header, 32) == 0, "the qcow2 file is encrypted");
        let incompatible = if version == 3 { be64(&header, 72) } else { 0 };
        // Bit 0: not closed cleanly, which a running QEMU's file is not.
        ensure!(incompatible & !1 == 0, "qcow2 features {incompatible:#x} are not known");
        Ok(Qcow2 {
            file,
            cluster: 1 << bits,
            guest_bytes: be64(&header, 24),
            has_backing: be64(&header, 8) != 0,
            snapshots: (be32(&header, 60), be64(&header, 64)),
        })
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len)?];
        self.file.read_exact_at(&mut bytes, offset).with_context(|| format!("read qcow2 at {offset}"))?;
        Ok(bytes)
    }

    /// The snapshot of this name.
    pub fn snapshot(&self, name: &str) -> Result<Snapshot> {
        let (count, mut at) = self.snapshots;
        ensure!(count <= SNAPSHOTS_MAX, "the qcow2 file claims {count} snapshots");
        for _ in 0..count {
            let head = self.read(at, 40)?;
            let (l1_offset, l1_entries) = (be64(&head, 0), u64::from(be32(&head, 8)));
            let id_bytes = u64::from(u16::from_be_bytes([head[12], head[13]]));
            let name_bytes = u64::from(u16::from_be_bytes([head[14], head[15]]));
            let extra_bytes = u64::from(be32(&head, 36));
            ensure!(extra_bytes <= 1024, "a qcow2 snapshot with {extra_bytes} bytes of extra data");
            let rest = self.read(at + 40, extra_bytes + id_bytes + name_bytes)?;
            let found = &rest[(extra_bytes + id_bytes) as usize..];
            if found == name.as_bytes() {
                let large = if extra_bytes >= 8 { be64(&rest, 0) } else { 0 };
                let vm_state_bytes = if large > 0 { large } else { u64::from(be32(&head, 32)) };
                ensure!(l1_entries * 8 <= L1_BYTES_MAX, "a qcow2 snapshot with {l1_entries} L1 entries");
                let most = self.file.metadata().context("look at the qcow2 file")?.len();
                ensure!(
                    vm_state_bytes <= VM_STATE_BYTES_MAX.min(most) && l1_entries * 8 <= most,
                    "a VM state of {vm_state_bytes} bytes and {l1_entries} L1 entries in a file of {most}"
                );
                let l1 = self.read(l1_offset, l1_entries * 8)?;
                let l1 = l1.chunks_exact(8).map(|entry| be64(entry, 0)).collect();
                return Ok(Snapshot { l1, vm_state_bytes });
            }
            at = (at + 40 + extra_bytes + id_bytes + name_bytes).next_multiple_of(8);
        }
        bail!("the qcow2 file has no snapshot named {name}")
    }

    /// The clusters from `first` on that a snapshot has of its own, with their indexes.
    fn clusters_from(&self, snapshot: &Snapshot, first: u64, end: u64) -> Result<Vec<(u64, Cluster)>> {
        let entries = self.cluster / 8;
        let mut found = vec![];
        // Tables are each there once: what they take is bounded by the file's length.
        let mut tables_left = self.file.metadata().context("look at the qcow2 file")?.len() / self.cluster;
        for (table, l1) in snapshot.l1.iter().enumerate().skip((first / entries) as usize) {
            let base = table as u64 * entries;
            if l1 & OFFSET == 0 || base >= end {
                continue;
            }
            ensure!(tables_left > 0, "the qcow2 file names more tables than it has room for");
            tables_left -= 1;
            let l2 = self.read(l1 & OFFSET, self.cluster)?;
            for (slot, entry) in l2.chunks_exact(8).enumerate() {
                let (index, entry) = (base + slot as u64, be64(entry, 0));
                if index < first || index >= end {
                    continue;
                }
                ensure!(entry & COMPRESSED == 0, "compressed qcow2 clusters are not known here");
                if entry & ZERO != 0 {
                    found.push((index, Cluster::Zero));
                } else if entry & OFFSET != 0 {
                    found.push((index, Cluster::At(entry & OFFSET)));
                }
            }
        }
        Ok(found)
    }

    /// The guest's clusters that a snapshot has of its own.
    pub fn clusters(&self, snapshot: &Snapshot) -> Result<Vec<(u64, Cluster)>> {
        ensure!(self.cluster == CLUSTER as u64, "qcow2 clusters of {} bytes", self.cluster);
        self.clusters_from(snapshot, 0, self.guest_bytes.div_ceil(self.cluster))
    }

    /// A cluster's bytes.
    pub fn cluster(&self, offset: u64) -> Result<Vec<u8>> {
        // The last one may reach over the file's end.
        let mut bytes = vec![0; CLUSTER];
        let mut at = 0;
        while at < CLUSTER {
            match self.file.read_at(&mut bytes[at..], offset + at as u64).context("read a qcow2 cluster")? {
                0 => break,
                read => at += read,
            }
        }
        Ok(bytes)
    }

    /// A snapshot's VM state.
    pub fn vm_state(&self, snapshot: &Snapshot) -> Result<Vec<u8>> {
        let first = vm_state_table(self.guest_bytes, self.cluster) * (self.cluster / 8);
        let count = snapshot.vm_state_bytes.div_ceil(self.cluster);
        let mut bytes = vec![0; usize::try_from(snapshot.vm_state_bytes)?];
        let clusters = self.clusters_from(snapshot, first, first + count)?;
        // Neighbours in the file are read at once.
        let mut run: Option<(usize, u64, u64)> = None;
        let mut flush = |run: Option<(usize, u64, u64)>| -> Result<()> {
            let Some((at, offset, len)) = run else { return Ok(()) };
            let end = bytes.len().min(at + len as usize);
            self.file.read_exact_at(&mut bytes[at..end], offset).context("read the VM state")
        };
        for (index, cluster) in clusters {
            let Cluster::At(offset) = cluster else { continue };
            let at = ((index - first) * self.cluster) as usize;
            run = match run {
                Some((from, start, len)) if start + len == offset && from + len as usize == at => {
                    Some((from, start, len + self.cluster))
                }
                other => {
                    flush(other)?;
                    Some((at, offset, self.cluster))
                }
            };
        }
        flush(run)?;
        Ok(bytes)
    }

    /// Gives the disk space of a snapshot's VM state back. The snapshot stays, with
    /// holes: deleting it would wait for the guest's requests, which can be for ever
    /// while they are recorded. QEMU shares a VM state's clusters with nothing.
    pub fn punch_vm_state(&self, snapshot: &Snapshot) -> Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let first = vm_state_table(self.guest_bytes, self.cluster) * (self.cluster / 8);
        let count = snapshot.vm_state_bytes.div_ceil(self.cluster);
        for (_, cluster) in self.clusters_from(snapshot, first, first + count)? {
            if let Cluster::At(offset) = cluster {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(self.file, flags, offset, self.cluster).context("give disk space back")?;
            }
        }
        Ok(())
    }
}

/// The first L1 entry of the VM state.
fn vm_state_table(guest_bytes: u64, cluster: u64) -> u64 {
    guest_bytes.div_ceil(cluster * (cluster / 8))
}

/// What a written file holds.
#[derive(Default)]
pub struct Contents<'a> {
    /// Bytes the guest sees.
    pub guest_bytes: u64,
    /// The file below, and its format.
    pub backing: Option<(&'a str, &'a str)>,
    /// Its one snapshot.
    pub snapshot: Option<NewSnapshot<'a>>,
}

/// A snapshot to be written.
pub struct NewSnapshot<'a> {
    /// Its name.
    pub name: &'a str,
    /// icount at which it was taken.
    pub icount: u64,
    /// The guest's clusters, by index; `None`: zeros.
    pub clusters: Vec<(u64, Option<&'a [u8]>)>,
    /// The VM state; empty for a disk beside it.
    pub vm_state: &'a [u8],
}

/// Hands out clusters of a file that is written front to back.
struct Layout {
    next: u64,
}

impl Layout {
    fn take(&mut self, clusters: u64) -> u64 {
        let at = self.next;
        self.next += clusters;
        at * CLUSTER as u64
    }
}

/// Writes a qcow2 file: header, tables, snapshot, data.
pub fn write(path: &Path, contents: &Contents) -> Result<()> {
    let file = File::create_new(path).with_context(|| format!("create {}", path.display()))?;
    let mut layout = Layout { next: 1 };
    let guest_tables = vm_state_table(contents.guest_bytes, CLUSTER as u64);
    let l1_bytes = guest_tables.max(1) * 8;
    let l1_at = layout.take(l1_bytes.div_ceil(CLUSTER as u64));
    let mut tables: Vec<(u64, Vec<u8>)> = vec![];
    let mut data: Vec<&[u8]> = vec![];
    let mut snapshot_at = 0;
    if let Some(snapshot) = &contents.snapshot {
        let vm_clusters = snapshot.vm_state.chunks(CLUSTER).enumerate();
        let first = guest_tables * L2_ENTRIES;
        let all = snapshot
            .clusters
            .iter()
            .copied()
            .chain(vm_clusters.map(|(index, bytes)| (first + index as u64, Some(bytes))));
        let last = all.clone().map(|(index, _)| index).max();
        let l1_entries = last.map_or(0, |last| last / L2_ENTRIES + 1).max(guest_tables).max(1);
        let own_l1_at = layout.take((l1_entries * 8).div_ceil(CLUSTER as u64));
        snapshot_at = layout.take(1);
        let used: std::collections::BTreeSet<u64> =
            all.clone().map(|(index, _)| index / L2_ENTRIES).collect();
        let l2_at: std::collections::BTreeMap<u64, u64> =
            used.into_iter().map(|table| (table, layout.take(1))).collect();
        let mut l1 = vec![0; l1_entries as usize * 8];
        let mut l2s: std::collections::BTreeMap<u64, Vec<u8>> = std::collections::BTreeMap::new();
        for (table, at) in &l2_at {
            l1[*table as usize * 8..][..8].copy_from_slice(&(at | COPIED).to_be_bytes());
            l2s.insert(*table, vec![0; CLUSTER]);
        }
        for (index, bytes) in all {
            let entry = match bytes {
                Some(bytes) => {
                    ensure!(bytes.len() <= CLUSTER, "a cluster of {} bytes", bytes.len());
                    data.push(bytes);
                    layout.take(1) | COPIED
                }
                None => ZERO,
            };
            let l2 = l2s.get_mut(&(index / L2_ENTRIES)).expect("made for every index");
            l2[(index % L2_ENTRIES) as usize * 8..][..8].copy_from_slice(&entry.to_be_bytes());
        }
        tables.push((own_l1_at, l1));
        tables.push((snapshot_at, snapshot_entry(snapshot, own_l1_at, l1_entries, contents.guest_bytes)));
        tables.extend(l2s.into_iter().map(|(table, bytes)| (l2_at[&table], bytes)));
    }
    // Refcount blocks count themselves and their table, too.
    let per_block = CLUSTER as u64 / 2;
    let mut blocks = 1;
    while (layout.next + 1 + blocks).div_ceil(per_block) > blocks {
        blocks += 1;
    }
    ensure!(blocks <= L2_ENTRIES, "the file would be too large");
    let data_end = layout.next;
    let refcount_table_at = layout.take(1);
    let refcount_blocks_at = layout.take(blocks);
    let header = header(contents, l1_at, guest_tables.max(1), refcount_table_at, snapshot_at);
    let fail = || format!("write {}", path.display());
    file.write_all_at(&header, 0).with_context(fail)?;
    file.write_all_at(&vec![0; l1_bytes as usize], l1_at).with_context(fail)?;
    for (at, bytes) in &tables {
        file.write_all_at(bytes, *at).with_context(fail)?;
    }
    write_data(&file, &data, data_end).with_context(fail)?;
    let mut table = vec![0; CLUSTER];
    for block in 0..blocks {
        let at = refcount_blocks_at + block * CLUSTER as u64;
        table[block as usize * 8..][..8].copy_from_slice(&at.to_be_bytes());
    }
    file.write_all_at(&table, refcount_table_at).with_context(fail)?;
    let total = layout.next;
    let mut counts = vec![0u8; (blocks * CLUSTER as u64) as usize];
    counts[..total as usize * 2].chunks_exact_mut(2).for_each(|count| count[1] = 1);
    file.write_all_at(&counts, refcount_blocks_at).with_context(fail)?;
    Ok(())
}

/// The data clusters are the last taken, in order: one sequential write.
fn write_data(file: &File, data: &[&[u8]], data_end: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let first = data_end - data.len() as u64;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.seek(SeekFrom::Start(first * CLUSTER as u64))?;
    for bytes in data {
        out.write_all(bytes)?;
        if bytes.len() < CLUSTER {
            out.write_all(&vec![0; CLUSTER - bytes.len()])?;
        }
    }
    out.flush()
}

fn header(contents: &Contents, l1_at: u64, l1_entries: u64, refcounts_at: u64, snapshot_at: u64) -> Vec<u8> {
    let mut out = vec![];
    let mut extensions = vec![];
    if let Some((_, format)) = contents.backing {
        extensions.extend_from_slice(&BACKING_FORMAT.to_be_bytes());
        extensions.extend_from_slice(&(format.len() as u32).to_be_bytes());
        extensions.extend_from_slice(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend_from_slice(&FEATURE_NAMES_END.to_be_bytes());
    extensions.extend_from_slice(&[0; 4]);
    let name = contents.backing.map_or("", |(path, _)| path);
    let name_at = if name.is_empty() { 0 } else { 104 + extensions.len() as u64 };
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&3u32.to_be_bytes());
    out.extend_from_slice(&name_at.to_be_bytes());
    out.extend_from_slice(&(name.len() as u32).to_be_bytes());
    out.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    out.extend_from_slice(&contents.guest_bytes.to_be_bytes());
    out.extend_from_slice(&0u32.to_be_bytes());
    out.extend_from_slice(&(l1_entries as u32).to_be_bytes());
    out.extend_from_slice(&l1_at.to_be_bytes());
    out.extend_from_slice(&refcounts_at.to_be_bytes());
    out.extend_from_slice(&1u32.to_be_bytes());
    out.extend_from_slice(&u32::from(contents.snapshot.is_some()).to_be_bytes());
    out.extend_from_slice(&snapshot_at.to_be_bytes());
    out.extend_from_slice(&[0; 24]);
    // Refcounts of 2^4 bits; a header of 104 bytes.
    out.extend_from_slice(&4u32.to_be_bytes());
    out.extend_from_slice(&104u32.to_be_bytes());
    out.extend(extensions);
    out.extend_from_slice(name.as_bytes());
    out
}

fn snapshot_entry(snapshot: &NewSnapshot, l1_at: u64, l1_entries: u64, guest_bytes: u64) -> Vec<u8> {
    let mut out = vec![];
    out.extend_from_slice(&l1_at.to_be_bytes());
    out.extend_from_slice(&(l1_entries as u32).to_be_bytes());
    out.extend_from_slice(&1u16.to_be_bytes());
    out.extend_from_slice(&(snapshot.name.len() as u16).to_be_bytes());
    // Date and clocks are for people.
    out.extend_from_slice(&[0; 16]);
    let vm_state = snapshot.vm_state.len() as u64;
    out.extend_from_slice(&u32::try_from(vm_state).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(&24u32.to_be_bytes());
    out.extend_from_slice(&vm_state.to_be_bytes());
    out.extend_from_slice(&guest_bytes.to_be_bytes());
    out.extend_from_slice(&snapshot.icount.to_be_bytes());
    out.push(b'1');
    out.extend_from_slice(snapshot.name.as_bytes());
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.qcow2");
        let vm_state: Vec<u8> = (0..300_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let ones = vec![1u8; CLUSTER];
        let snapshot = NewSnapshot {
            name: "s",
            icount: 77,
            clusters: vec![(3, Some(&ones)), (9000, None), (9001, Some(&ones))],
            vm_state: &vm_state,
        };
        let contents =
            Contents { guest_bytes: 600 << 20, backing: Some(("/b", "raw")), snapshot: Some(snapshot) };
        write(&path, &contents).unwrap();
        let file = File::open(&path).unwrap();
        let image = Qcow2::open(&file).unwrap();
        assert!(image.has_backing && image.guest_bytes == 600 << 20);
        let snapshot = image.snapshot("s").unwrap();
        assert_eq!(image.vm_state(&snapshot).unwrap(), vm_state);
        let clusters = image.clusters(&snapshot).unwrap();
        assert_eq!(clusters.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [3, 9000, 9001]);
        assert_eq!(clusters[1].1, Cluster::Zero);
        let Cluster::At(at) = clusters[2].1 else { panic!("data") };
        assert_eq!(image.cluster(at).unwrap(), ones);
        assert!(image.snapshot("t").is_err());
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for bytes in [vec![], vec![0; 200], [b"QFI\xfb\0\0\0\x09".to_vec(), vec![0; 200]].concat()] {
            std::fs::write(&path, bytes).unwrap();
            assert!(Qcow2::open(&File::open(&path).unwrap()).is_err());
        }
    }
}
