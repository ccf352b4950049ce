//! The outbox: chunks on their way to the store, in a file of bounded size.
//!
//! ```text
//! "HDLO" | version u32 | recording 16 | token 16, then per chunk:
//! bytes u32 | crc32c u32 | chunk
//! ```
//! It survives the loss of the store for as long as it has room, and the node's
//! own death. What is acknowledged is punched out, so the file's blocks are those
//! in flight. With no room left, or a full disk, a chunk waits in memory and the
//! outbox says so: the guest pauses, and nothing is lost.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use heddle_proto::{Chunk, RecordingId};
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 4] = b"HDLO";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 40;
const FRAME_BYTES: u64 = 8;
/// The file's first block, which the header keeps from being punched out.
const FIRST_BLOCK: u64 = 4096;
/// Acknowledged bytes are given back in steps of this size.
const PUNCH_BYTES: u64 = 4 << 20;

/// A chunk's place in the file.
#[derive(Clone, Copy, Debug)]
struct Place {
    at: u64,
    bytes: u32,
    end_event: u64,
}

/// The outbox of one recording.
#[derive(Debug)]
pub struct Outbox {
    path: PathBuf,
    file: File,
    end: u64,
    punched: u64,
    /// Chunks not acknowledged, oldest first.
    pending: VecDeque<Place>,
    pending_bytes: u64,
    written_events: u64,
    bytes_max: u64,
    /// Chunks for which there was no room.
    waiting: VecDeque<Chunk>,
    is_draining: bool,
}

/// What an outbox left behind says of itself.
pub struct LeftBehind {
    /// Whose.
    pub recording: RecordingId,
    /// The writer's token.
    pub token: [u8; 16],
    /// Its chunks, up to the first that is not whole.
    pub chunks: Vec<Chunk>,
}

impl Outbox {
    /// Creates the outbox of `recording` in `dir`, for at most `bytes_max` bytes.
    pub fn create(dir: &Path, recording: RecordingId, token: [u8; 16], bytes_max: u64) -> Result<Outbox> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let path = dir.join(format!("{recording}.outbox"));
        // Locked before it has the name that others look for: they recover what nobody holds.
        let new = path.with_extension("new");
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&new);
        let file = file.with_context(|| format!("create {}", new.display()))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).context("lock the outbox")?;
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&recording.0);
        header.extend_from_slice(&token);
        file.write_all_at(&header, 0).with_context(|| format!("write to {}", new.display()))?;
        std::fs::rename(&new, &path).with_context(|| format!("put {} in place", path.display()))?;
        Ok(Outbox {
            path,
            file,
            end: HEADER_BYTES,
            punched: HEADER_BYTES,
            pending: VecDeque::new(),
            pending_bytes: 0,
            written_events: 0,
            bytes_max,
            waiting: VecDeque::new(),
            is_draining: false,
        })
    }

    /// Takes a chunk; it is in the file, or waits until there is room.
    pub fn push(&mut self, chunk: Chunk) {
        self.waiting.push_back(chunk);
        self.write_waiting();
    }

    fn write_waiting(&mut self) {
        while let Some(chunk) = self.waiting.front() {
            let bytes = chunk.bytes.len() as u64;
            // One chunk always fits, or a small bound would stop everything.
            if self.pending_bytes > 0 && self.pending_bytes + bytes > self.bytes_max {
                return;
            }
            let mut frame = Vec::with_capacity(chunk.bytes.len() + FRAME_BYTES as usize);
            frame.extend_from_slice(&(chunk.bytes.len() as u32).to_le_bytes());
            frame.extend_from_slice(&checksum(&chunk.bytes).to_le_bytes());
            frame.extend_from_slice(&chunk.bytes);
            if let Err(error) = self.file.write_all_at(&frame, self.end) {
                tracing::warn!(%error, path = %self.path.display(), "the outbox can't be written: waiting");
                return;
            }
            let end_event = chunk.header.end_event();
            let at = self.end + FRAME_BYTES;
            self.pending.push_back(Place { at, bytes: bytes as u32, end_event });
            self.pending_bytes += bytes;
            self.written_events = end_event;
            self.end += frame.len() as u64;
            self.waiting.pop_front();
        }
    }

    /// Whether the guest must pause: from no room left until half of it is free again.
    pub fn is_full(&mut self) -> bool {
        self.write_waiting();
        if !self.waiting.is_empty() || self.pending_bytes >= self.bytes_max {
            self.is_draining = true;
        } else if self.pending_bytes <= self.bytes_max / 2 {
            self.is_draining = false;
        }
        self.is_draining
    }

    /// Whether all is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.waiting.is_empty()
    }

    /// Events that are in the file, or were: the rest waits for room.
    pub fn written_events(&self) -> u64 {
        self.written_events
    }

    /// Bytes not acknowledged.
    pub fn pending_bytes(&self) -> u64 {
        self.pending_bytes
    }

    /// The `n`th chunk that is not acknowledged.
    pub fn pending(&mut self, n: usize) -> Result<Option<Chunk>> {
        self.write_waiting();
        let Some(place) = self.pending.get(n) else { return Ok(None) };
        let mut bytes = vec![0; place.bytes as usize];
        self.file
            .read_exact_at(&mut bytes, place.at)
            .with_context(|| format!("read {}", self.path.display()))?;
        Ok(Some(Chunk::parse(Bytes::from(bytes)).context("the outbox holds a damaged chunk")?))
    }

    /// All chunks up to event `committed` are on a majority's disks; how many and
    /// how many bytes that were.
    pub fn acknowledge(&mut self, committed: u64) -> (usize, u64) {
        let (mut count, mut bytes) = (0, 0);
        let mut free_to = self.punched;
        while let Some(place) = self.pending.front().filter(|place| place.end_event <= committed) {
            bytes += u64::from(place.bytes);
            self.pending_bytes -= u64::from(place.bytes);
            free_to = place.at + u64::from(place.bytes);
            self.pending.pop_front();
            count += 1;
        }
        let len = (free_to - self.punched) / PUNCH_BYTES * PUNCH_BYTES;
        if len > 0 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A file system without holes only costs disk.
            let _ = fallocate(&self.file, flags, self.punched, len);
            self.punched += len;
        }
        self.write_waiting();
        (count, bytes)
    }

    /// Removes the file: everything in it is committed and sealed.
    pub fn remove(self) -> Result<()> {
        ensure!(self.is_empty(), "the outbox still has chunks");
        std::fs::remove_file(&self.path).with_context(|| format!("remove {}", self.path.display()))
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The low half of BLAKE3: a torn frame must only be noticed, the chunk has its own hash.
fn checksum(bytes: &[u8]) -> u32 {
    let hash = blake3::hash(bytes);
    u32::from_le_bytes(hash.as_bytes()[..4].try_into().expect("4 bytes"))
}

/// Outboxes in `dir` that no living process holds, locked for who recovers them.
pub fn left_behind(dir: &Path) -> Vec<(PathBuf, File)> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let outboxes = paths.filter(|path| path.extension().is_some_and(|e| e == "outbox"));
    outboxes
        .filter_map(|path| {
            let file = File::open(&path).ok()?;
            flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
            Some((path, file))
        })
        .collect()
}

/// The file's header and what is left of its chunks: the hole before them, as long
/// as all that was ever acknowledged, is not read.
fn read_past_hole(path: &Path, file: &File) -> Result<Bytes> {
    let read = || format!("read {}", path.display());
    let end = file.metadata().with_context(read)?.len();
    let mut bytes = vec![0; end.min(FIRST_BLOCK) as usize];
    file.read_exact_at(&mut bytes, 0).with_context(read)?;
    let first = HEADER_BYTES as usize;
    let is_punched = bytes.get(first..first + 4).is_none_or(|len| len == [0; 4]);
    let from = match rustix::fs::seek(file, SeekFrom::Data(FIRST_BLOCK)) {
        Ok(data) if is_punched => data,
        Ok(_) => FIRST_BLOCK,
        Err(_) => return Ok(Bytes::from(bytes)),
    };
    let mut rest = vec![0; end.saturating_sub(from) as usize];
    file.read_exact_at(&mut rest, from).with_context(read)?;
    bytes.extend(rest);
    Ok(Bytes::from(bytes))
}

/// Reads an outbox that was left behind, as far as it is whole.
pub fn read_left_behind(path: &Path, file: &File) -> Result<LeftBehind> {
    let bytes = read_past_hole(path, file)?;
    let header = bytes.get(..HEADER_BYTES as usize).context("the outbox has no whole header")?;
    let version = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes"));
    ensure!(
        &header[..4] == MAGIC && version == VERSION,
        "{} is not an outbox of version {VERSION}",
        path.display()
    );
    let recording = RecordingId::from_slice(&header[8..24])?;
    let token = header[24..40].try_into().expect("16 bytes");
    let mut chunks = vec![];
    let mut at = HEADER_BYTES as usize;
    while let Some(head) = bytes.get(at..at + FRAME_BYTES as usize) {
        let len = u32::from_le_bytes(head[..4].try_into().expect("4 bytes")) as usize;
        let sum = u32::from_le_bytes(head[4..].try_into().expect("4 bytes"));
        if len == 0 {
            // Punched out: acknowledged. Frames go on behind the hole.
            let Some(next) = bytes[at..].iter().position(|byte| *byte != 0) else { break };
            let Some(resume) = resume_at(&bytes, at + next) else { break };
            at = resume;
            continue;
        }
        let from = at + FRAME_BYTES as usize;
        let Some(chunk) = bytes.get(from..from.saturating_add(len)) else { break };
        if checksum(chunk) != sum {
            match resume_at(&bytes, at + 1) {
                Some(resume) => at = resume,
                None => break,
            }
            continue;
        }
        if let Ok(chunk) = Chunk::parse(bytes.slice(from..from + len)) {
            chunks.push(chunk);
        }
        at = from + len;
    }
    Ok(LeftBehind { recording, token, chunks })
}

/// The next whole frame behind a hole, found by its chunk's magic and checksum.
fn resume_at(bytes: &Bytes, from: usize) -> Option<usize> {
    let start = from.max(FRAME_BYTES as usize);
    (start..bytes.len().saturating_sub(4)).filter(|at| &bytes[*at..*at + 4] == b"HDLC").find_map(|at| {
        let frame = at - FRAME_BYTES as usize;
        let len = u32::from_le_bytes(bytes[frame..frame + 4].try_into().ok()?) as usize;
        let sum = u32::from_le_bytes(bytes[frame + 4..frame + 8].try_into().ok()?);
        let chunk = bytes.get(at..at.checked_add(len)?)?;
        // An empty one would be found again and again.
        (len > 0 && checksum(chunk) == sum).then_some(frame)
    })
}

#[cfg(test)]
#[path = "outbox/tests.rs"]
mod tests;
