//! The journal: every Raft entry and hard state of this replica, in fsynced files.
//!
//! ```text
//! 0000000000000001.seg   "HDLJ" | version u32 | first lsn u64, then frames:
//! frame                  magic u32 | crc32c u32 | data bytes u32 | kind u8 | 0 x3
//!                        lsn u64 | synced lsn u64 | group u64 | term u64 | index u64 | data
//! ```
//! The checksum covers all that follows it. An entry frame's data *is* the home of
//! the chunks and blocks in it; others point there.
//!
//! States after a crash, and the way out of each:
//! - a frame cut or garbled at the end of the last segment, with no later frame that
//!   says it was synced: a torn tail, never acknowledged; cut, and the cut is fsynced;
//! - the same anywhere else: corruption; the replica refuses to start;
//! - a last segment shorter than its header: its creation was torn; removed.

use crate::error::{Error, IoContext};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// A new segment is begun once one is this long.
const SEGMENT_BYTES: u64 = 64 << 20;
/// Bytes of a frame before its data.
pub const FRAME_BYTES: usize = 16 + 40;
/// Largest data of a frame; a longer one is garbage.
pub const DATA_BYTES_MAX: usize = 16 << 20;
const HEADER_BYTES: u64 = 16;
const SEGMENT_MAGIC: &[u8; 4] = b"HDLJ";
const FRAME_MAGIC: u32 = 0x4844_4652;
const VERSION: u32 = 1;

/// Where bytes lie in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// The segment's number.
    pub segment: u64,
    /// The first byte.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
}

impl Location {
    /// A part of these bytes.
    pub fn part(&self, from: usize, bytes: usize) -> Location {
        Location { segment: self.segment, offset: self.offset + from as u64, bytes: bytes as u32 }
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A Raft entry.
    Entry,
    /// Another type of Raft entry: a membership change.
    ConfChange,
    /// Term, vote (in `index`) and commit (8 bytes of data).
    HardState,
}

impl FrameKind {
    fn from_code(code: u8) -> Option<FrameKind> {
        [FrameKind::Entry, FrameKind::ConfChange, FrameKind::HardState].into_iter().find(|k| *k as u8 == code)
    }
}

/// A frame to be written, or read back at open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// The Raft group.
    pub group: u64,
    /// Raft term.
    pub term: u64,
    /// Raft index, or the vote.
    pub index: u64,
    /// The entry's data.
    pub data: Bytes,
}

/// Reads bytes by location, from any thread.
#[derive(Clone, Debug)]
pub struct JournalReader {
    dir: PathBuf,
    files: Arc<RwLock<BTreeMap<u64, Arc<File>>>>,
}

impl JournalReader {
    /// The bytes at `location`.
    pub fn read(&self, location: Location) -> Result<Bytes, Error> {
        let path = segment_path(&self.dir, location.segment);
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let file = files.get(&location.segment).cloned();
        drop(files);
        let file = file.ok_or_else(|| Error::Corrupt {
            path: path.clone(),
            offset: location.offset,
            what: "the segment is not there".into(),
        })?;
        let mut bytes = vec![0; location.bytes as usize];
        file.read_exact_at(&mut bytes, location.offset).at("read", &path)?;
        Ok(Bytes::from(bytes))
    }
}

/// The writer; one a replica.
#[derive(Debug)]
pub struct Journal {
    reader: JournalReader,
    segment: u64,
    file: File,
    end: u64,
    next_lsn: u64,
    synced_lsn: u64,
    total_bytes: u64,
    buffer: Vec<u8>,
}

impl Journal {
    /// Opens the journal in `dir`, and gives every frame in it, in order, to `frame`.
    pub fn open(dir: &Path, mut frame: impl FnMut(Frame, Location)) -> Result<Journal, Error> {
        fs::create_dir_all(dir).at("create", dir)?;
        let mut numbers = segment_numbers(dir)?;
        if let Some(last) = numbers.last().copied() {
            let path = segment_path(dir, last);
            if fs::metadata(&path).at("look at", &path)?.len() < HEADER_BYTES {
                fs::remove_file(&path).at("remove torn segment", &path)?;
                numbers.pop();
            }
        }
        let reader = JournalReader { dir: dir.to_path_buf(), files: Arc::default() };
        let mut next_lsn = 1;
        let mut total_bytes = 0;
        let mut end = HEADER_BYTES;
        for (i, number) in numbers.iter().enumerate() {
            let path = segment_path(dir, *number);
            let bytes = Bytes::from(fs::read(&path).at("read", &path)?);
            let is_last = i + 1 == numbers.len();
            end = scan(&path, *number, &bytes, is_last, &mut next_lsn, &mut frame)?;
            if end < bytes.len() as u64 {
                let file = OpenOptions::new().write(true).open(&path).at("open", &path)?;
                file.set_len(end).at("cut the torn tail of", &path)?;
                file.sync_all().at("sync", &path)?;
            }
            total_bytes += end;
            let file = File::open(&path).at("open", &path)?;
            reader.files.write().unwrap_or_else(PoisonError::into_inner).insert(*number, Arc::new(file));
        }
        let (segment, file) = match numbers.last() {
            Some(number) => {
                let path = segment_path(dir, *number);
                (*number, OpenOptions::new().write(true).open(&path).at("open", &path)?)
            }
            None => (1, create_segment(&reader, 1, next_lsn)?),
        };
        // A kill can have come between the last write and its sync: what was read from
        // the page cache counts as durable only now.
        file.sync_all().at("sync", &segment_path(dir, segment))?;
        File::open(dir).and_then(|dir| dir.sync_all()).at("sync", dir)?;
        let synced_lsn = next_lsn - 1;
        Ok(Journal { reader, segment, file, end, next_lsn, synced_lsn, total_bytes, buffer: vec![] })
    }

    /// A handle for reading.
    pub fn reader(&self) -> JournalReader {
        self.reader.clone()
    }

    /// Bytes in all segments.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Writes `frames` with one write and one `fdatasync`; where each one's data lies.
    ///
    /// After an error the journal must not be written again: what the failed sync
    /// left behind is unknown.
    pub fn append(&mut self, frames: &[Frame]) -> Result<Vec<Location>, Error> {
        if self.end >= SEGMENT_BYTES {
            self.segment += 1;
            self.file = create_segment(&self.reader, self.segment, self.next_lsn)?;
            self.end = HEADER_BYTES;
        }
        let mut locations = Vec::with_capacity(frames.len());
        self.buffer.clear();
        for frame in frames {
            assert!(frame.data.len() <= DATA_BYTES_MAX, "proposals are bounded far below");
            let at = self.end + self.buffer.len() as u64 + FRAME_BYTES as u64;
            locations.push(Location { segment: self.segment, offset: at, bytes: frame.data.len() as u32 });
            encode_frame(&mut self.buffer, frame, self.next_lsn, self.synced_lsn);
            self.next_lsn += 1;
        }
        let path = segment_path(&self.reader.dir, self.segment);
        self.file.write_all_at(&self.buffer, self.end).at("write to", &path)?;
        self.file.sync_data().at("sync", &path)?;
        self.end += self.buffer.len() as u64;
        self.total_bytes += self.buffer.len() as u64;
        self.synced_lsn = self.next_lsn - 1;
        Ok(locations)
    }
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.seg"))
}

fn segment_numbers(dir: &Path) -> Result<Vec<u64>, Error> {
    let mut numbers = vec![];
    for entry in fs::read_dir(dir).at("list", dir)? {
        let name = entry.at("list", dir)?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        if let Some(number) = stem.and_then(|stem| u64::from_str_radix(stem, 16).ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    if let Some(gap) = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1) {
        return Err(Error::Corrupt {
            path: segment_path(dir, gap[0] + 1),
            offset: 0,
            what: "the segment is missing".into(),
        });
    }
    Ok(numbers)
}

fn create_segment(reader: &JournalReader, number: u64, first_lsn: u64) -> Result<File, Error> {
    let path = segment_path(&reader.dir, number);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .at("create", &path)?;
    let mut header = SEGMENT_MAGIC.to_vec();
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&first_lsn.to_le_bytes());
    file.write_all(&header).at("write to", &path)?;
    file.sync_all().at("sync", &path)?;
    File::open(&reader.dir).and_then(|dir| dir.sync_all()).at("sync", &reader.dir)?;
    let read_handle = file.try_clone().at("open", &path)?;
    reader.files.write().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::new(read_handle));
    Ok(file)
}

fn encode_frame(out: &mut Vec<u8>, frame: &Frame, lsn: u64, synced_lsn: u64) {
    let start = out.len();
    out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&(frame.data.len() as u32).to_le_bytes());
    out.extend_from_slice(&[frame.kind as u8, 0, 0, 0]);
    for word in [lsn, synced_lsn, frame.group, frame.term, frame.index] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&frame.data);
    let crc = crc32c::crc32c(&out[start + 8..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// A frame at `at`, with its lsn and synced lsn; `None` if there is no whole, valid one.
fn decode_frame(bytes: &Bytes, at: usize) -> Option<(Frame, u64, u64)> {
    let head = bytes.get(at..at.checked_add(FRAME_BYTES)?)?;
    let u32_at = |i: usize| u32::from_le_bytes(head[i..i + 4].try_into().expect("4 bytes"));
    let u64_at = |i: usize| u64::from_le_bytes(head[i..i + 8].try_into().expect("8 bytes"));
    let len = u32_at(8) as usize;
    if u32_at(0) != FRAME_MAGIC || len > DATA_BYTES_MAX {
        return None;
    }
    let end = at + FRAME_BYTES + len;
    let covered = bytes.get(at + 8..end)?;
    if crc32c::crc32c(covered) != u32_at(4) {
        return None;
    }
    let kind = FrameKind::from_code(head[12])?;
    let frame = Frame {
        kind,
        group: u64_at(32),
        term: u64_at(40),
        index: u64_at(48),
        data: bytes.slice(at + FRAME_BYTES..end),
    };
    Some((frame, u64_at(16), u64_at(24)))
}

/// Reads a segment; where its valid frames end.
fn scan(
    path: &Path,
    segment: u64,
    bytes: &Bytes,
    is_last: bool,
    next_lsn: &mut u64,
    frame: &mut impl FnMut(Frame, Location),
) -> Result<u64, Error> {
    let corrupt =
        |offset: usize, what: String| Error::Corrupt { path: path.into(), offset: offset as u64, what };
    let header = bytes.get(..HEADER_BYTES as usize);
    let header = header.ok_or_else(|| corrupt(0, "the segment has no header".into()))?;
    let version = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes"));
    if &header[..4] != SEGMENT_MAGIC || version != VERSION {
        return Err(corrupt(0, format!("not a journal segment of version {VERSION}, but {version}")));
    }
    let mut at = HEADER_BYTES as usize;
    while at < bytes.len() {
        match decode_frame(bytes, at) {
            Some((decoded, lsn, _)) if lsn == *next_lsn => {
                let len = decoded.data.len();
                let location = Location { segment, offset: (at + FRAME_BYTES) as u64, bytes: len as u32 };
                frame(decoded, location);
                *next_lsn += 1;
                at += FRAME_BYTES + len;
            }
            _ => {
                if !is_last {
                    return Err(corrupt(at, "a frame is damaged in the middle of the journal".into()));
                }
                if let Some(later) = frame_that_saw_synced(bytes, at, *next_lsn) {
                    let what =
                        format!("frame {next_lsn} was synced, as the frame at {later} says, and is damaged");
                    return Err(corrupt(at, what));
                }
                break;
            }
        }
    }
    Ok(at as u64)
}

/// A valid frame behind `from` that was written after `lsn` had been synced.
fn frame_that_saw_synced(bytes: &Bytes, from: usize, lsn: u64) -> Option<usize> {
    let magic = FRAME_MAGIC.to_le_bytes();
    let mut at = from + 1;
    while at + FRAME_BYTES <= bytes.len() {
        if bytes[at..at + 4] == magic
            && let Some((_, _, synced)) = decode_frame(bytes, at)
            && synced >= lsn
        {
            return Some(at);
        }
        at += 1;
    }
    None
}

#[cfg(test)]
#[path = "journal/tests.rs"]
mod tests;
