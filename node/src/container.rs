//! A recording in one file.
//!
//! ```text
//! "HDLX" | version u32                       numbers are little-endian
//! record: kind u8 | 0 x3 | bytes u32 | payload
//!   1 manifest   JSON, as the store has it
//!   2 summary    JSON: state, events, icount, the chain's anchor, snapshots
//!   3 block      hash 32, then the block, zstd
//!   4 chunk      header and payload
//!   5 end        BLAKE3 of every byte before this record
//! ```
//! In this order, each kind of record but blocks and chunks once. Blocks are those of the
//! files and of the snapshots, each once; chunks are the whole chain. A reader verifies
//! every hash, the chain, the totals and that every block that anything names is there,
//! before it takes anything.

use anyhow::{Context, Result, anyhow, bail, ensure};
use heddle_proto::compress::{compress, decompress};
use heddle_proto::manifest::Image;
use heddle_proto::{Chunk, ChunkHeader, EmulatorSpec, Hash, Manifest, RecordingId};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_storage::service::BLOCK_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::FileExt;

const MAGIC: &[u8; 4] = b"HDLX";
const VERSION: u32 = 1;
const HEAD: usize = 8;
/// Largest record: a chunk, with room.
const RECORD_BYTES_MAX: usize = 8 << 20;
const LEVEL: i32 = 3;

const MANIFEST: u8 = 1;
const SUMMARY: u8 = 2;
const BLOCK: u8 = 3;
const CHUNK: u8 = 4;
const END: u8 = 5;

/// A snapshot's row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SnapshotEntry {
    pub icount: u64,
    pub event: u64,
    pub root: Hash,
    pub digest: Hash,
}

/// What the file holds, as the store said of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Summary {
    /// The recorder was lost: the durable prefix is all.
    pub is_cut: bool,
    pub events: u64,
    pub icount: u64,
    /// What the first chunk names as the one before.
    pub anchor: Hash,
    pub snapshots: Vec<SnapshotEntry>,
}

/// Writes a container.
pub struct Writer<W> {
    out: W,
    hasher: blake3::Hasher,
}

impl<W: Write> Writer<W> {
    /// Begins a file.
    pub fn new(out: W, manifest: &[u8], summary: &Summary) -> Result<Writer<W>> {
        let mut writer = Writer { out, hasher: blake3::Hasher::new() };
        writer.write(&[&MAGIC[..], &VERSION.to_le_bytes()].concat())?;
        writer.record(MANIFEST, &[manifest])?;
        writer.record(SUMMARY, &[&serde_json::to_vec(summary).context("encode the summary")?])?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes).context("write the file")
    }

    fn record(&mut self, kind: u8, parts: &[&[u8]]) -> Result<()> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        ensure!(bytes <= RECORD_BYTES_MAX, "a record of {bytes} bytes");
        let mut head = [0; HEAD];
        head[0] = kind;
        head[4..].copy_from_slice(&(bytes as u32).to_le_bytes());
        self.write(&head)?;
        parts.iter().try_for_each(|part| self.write(part))
    }

    /// Adds a block.
    pub fn block(&mut self, hash: Hash, bytes: &[u8]) -> Result<()> {
        self.record(BLOCK, &[&hash.0, &compress(bytes, LEVEL)])
    }

    /// Adds a chunk.
    pub fn chunk(&mut self, chunk: &Chunk) -> Result<()> {
        self.record(CHUNK, &[&chunk.bytes])
    }

    /// Ends the file.
    pub fn finish(mut self) -> Result<W> {
        let hash = *self.hasher.finalize().as_bytes();
        self.record(END, &[&hash])?;
        self.out.flush().context("write the file")?;
        Ok(self.out)
    }
}

/// A container that was verified as a whole.
pub struct Container {
    file: File,
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// The recording.
    pub id: RecordingId,
    /// What it holds.
    pub summary: Summary,
    /// Hash of all of it.
    pub hash: Hash,
    /// Where each block's compressed bytes lie, and how many there are.
    blocks: HashMap<Hash, (u64, u32)>,
    /// Where each chunk lies.
    chunks: Vec<(u64, u32)>,
}

/// Reads records one by one, hashing what it reads.
struct Records<'a> {
    input: BufReader<&'a File>,
    hasher: blake3::Hasher,
    at: u64,
}

impl Records<'_> {
    fn take(&mut self, bytes: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0; bytes];
        let what = || {
            format!("the file ends at byte {} or before, in the middle of a record", self.at + bytes as u64)
        };
        self.input.read_exact(&mut buffer).with_context(what)?;
        self.at += bytes as u64;
        Ok(buffer)
    }

    /// Kind, place and payload of the next record.
    fn next(&mut self) -> Result<(u8, u64, Vec<u8>)> {
        let began = self.at;
        let head = self.take(HEAD)?;
        let bytes = u32::from_le_bytes(head[4..].try_into().expect("4 bytes")) as usize;
        ensure!(
            (MANIFEST..=END).contains(&head[0]) && head[1..4] == [0; 3] && bytes <= RECORD_BYTES_MAX,
            "byte {began} is not the beginning of a record"
        );
        let at = self.at;
        let payload = self.take(bytes)?;
        if head[0] != END {
            self.hasher.update(&head);
            self.hasher.update(&payload);
        }
        Ok((head[0], at, payload))
    }
}

impl Container {
    /// Reads and verifies a file; nothing of it is trusted before all of it is.
    pub fn open(file: File) -> Result<Container> {
        let reading = file.try_clone().context("read the file")?;
        let mut records = Records { input: BufReader::new(&reading), hasher: blake3::Hasher::new(), at: 0 };
        let start = records.take(8).context("it is not an exported recording")?;
        ensure!(&start[..4] == MAGIC, "it is not an exported recording: it does not begin with HDLX");
        let version = u32::from_le_bytes(start[4..].try_into().expect("4 bytes"));
        ensure!(version == VERSION, "it has version {version}; this build reads {VERSION}");
        records.hasher.update(&start);
        let (kind, _, manifest) = records.next()?;
        ensure!(kind == MANIFEST, "it does not begin with a manifest");
        let decoded = Manifest::decode(&manifest)?;
        let (kind, _, summary) = records.next()?;
        ensure!(kind == SUMMARY, "there is no summary behind the manifest");
        let summary: Summary = serde_json::from_slice(&summary).context("the summary does not parse")?;
        let (mut blocks, mut chunks) = (HashMap::new(), vec![]);
        let mut before: Option<ChunkHeader> = None;
        let hash = loop {
            let (kind, at, payload) = records.next()?;
            match kind {
                BLOCK => {
                    ensure!(chunks.is_empty(), "a block behind the chunks, at byte {at}");
                    ensure!(payload.len() > 32, "a block without bytes, at byte {at}");
                    let hash = Hash::from_slice(&payload[..32])?;
                    let raw = decompress(&payload[32..], BLOCK_BYTES_MAX);
                    ensure!(
                        raw.is_some_and(|raw| Hash::of(&raw) == hash),
                        "the block at byte {at} was changed"
                    );
                    blocks.insert(hash, (at + 32, payload.len() as u32 - 32));
                }
                CHUNK => {
                    let bytes = payload.len() as u32;
                    let chunk =
                        Chunk::parse(payload.into()).with_context(|| format!("the chunk at byte {at}"))?;
                    ensure!(
                        chunk.header.recording == decoded.id,
                        "the chunk at byte {at} is another recording's"
                    );
                    let follows = chunk.check_follows(before.as_ref(), summary.anchor);
                    follows.with_context(|| format!("the chunk at byte {at}"))?;
                    chunk.events().with_context(|| format!("the chunk at byte {at}"))?;
                    before = Some(chunk.header);
                    chunks.push((at, bytes));
                }
                END => break Hash::from_slice(&payload)?,
                _ => bail!("a second manifest or summary at byte {at}"),
            }
        };
        ensure!(
            hash.0 == *records.hasher.finalize().as_bytes(),
            "its bytes do not have the hash at its end: it was changed or cut"
        );
        let mut one = [0];
        ensure!(
            records.input.read(&mut one).context("read the file")? == 0,
            "there are bytes behind its end"
        );
        let (events, icount) = before.map_or((0, 0), |last| (last.end_event(), last.last_icount));
        ensure!(
            (events, icount) == (summary.events, summary.icount),
            "it has {events} events up to icount {icount}; its summary says {} and {}",
            summary.events,
            summary.icount
        );
        let mut container = Container { file, manifest, id: decoded.id, summary, hash, blocks, chunks };
        let named = blocks_of(&decoded, &container.summary.snapshots.clone(), &mut container)?;
        let missing = named.iter().find(|hash| !container.blocks.contains_key(hash));
        ensure!(missing.is_none(), "a block that it names is not in it");
        ensure!(named.len() == container.blocks.len(), "it has blocks that nothing in it names");
        Ok(container)
    }

    fn read(&self, (at, bytes): (u64, u32)) -> Result<Vec<u8>> {
        let mut buffer = vec![0; bytes as usize];
        self.file.read_exact_at(&mut buffer, at).context("read the file")?;
        Ok(buffer)
    }

    /// All blocks' hashes.
    pub fn block_hashes(&self) -> Vec<Hash> {
        self.blocks.keys().copied().collect()
    }

    /// The chunks, linked anew from the beginning of a chain.
    pub fn chunks(&self) -> impl Iterator<Item = Result<Chunk>> {
        let mut previous = Hash::ZERO;
        self.chunks.iter().map(move |place| {
            let chunk = Chunk::parse(self.read(*place)?.into())?;
            let header = ChunkHeader { previous, ..chunk.header };
            let payload = &chunk.bytes[heddle_proto::chunk::HEADER_BYTES..];
            let chunk = Chunk::parse([&header.encode()[..], payload].concat().into())?;
            previous = chunk.id();
            Ok(chunk)
        })
    }
}

impl BlockSource for Container {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        let one = |hash: &Hash| {
            let place = self.blocks.get(hash).ok_or_else(|| format!("block {hash} is not in the file"))?;
            let bytes = self.read(*place).map_err(|error| format!("{error:#}"))?;
            // The file may have been changed since it was verified.
            let raw = decompress(&bytes, BLOCK_BYTES_MAX).filter(|raw| Hash::of(raw) == *hash);
            raw.ok_or_else(|| format!("block {hash} was changed"))
        };
        hashes.iter().map(one).collect()
    }
}

fn images(manifest: &Manifest) -> Vec<&Image> {
    match &manifest.emulator {
        EmulatorSpec::Builtin { machine, .. } => {
            let files = [&machine.bios, &machine.kernel, &machine.initrd, &machine.dtb];
            files.into_iter().flatten().chain(&machine.drives).collect()
        }
        EmulatorSpec::Qemu(spec) => {
            spec.files.iter().chain(spec.disks.iter().map(|disk| &disk.image)).collect()
        }
    }
}

/// The hashes of all blocks that a recording names, each once, and each there.
pub fn blocks_of(
    manifest: &Manifest,
    snapshots: &[SnapshotEntry],
    source: &mut dyn BlockSource,
) -> Result<Vec<Hash>> {
    let mut seen = HashSet::new();
    let mut all = vec![];
    let mut add = |hashes: Vec<Hash>| all.extend(hashes.into_iter().filter(|hash| seen.insert(*hash)));
    for image in images(manifest) {
        add(crate::blocks::image_blocks(image, source)?);
    }
    for snapshot in snapshots {
        add(match manifest.qemu() {
            Some(_) => crate::qemu::snapshot::blocks_of(snapshot.root, source)?,
            None => heddle_replay_engine::snapshot_blocks(snapshot.root, source).map_err(|e| anyhow!(e))?,
        });
    }
    Ok(all)
}
