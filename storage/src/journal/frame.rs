//! The bytes of the journal: segment headers, batches and frames.
//!
//! ```text
//! segment   block of 4 KiB: "HDLJ" | version u32 | number u64 | crc32c u32; then batches
//! batch     at a block of its own: "HDLB" | crc32c u32 | segment u64 | first lsn u64
//!           | synced lsn u64 | frames' bytes u32 | frames u32; then frames; zeros up to the block's end
//! frame     "HDLF" | head's crc32c u32 | data's crc32c u32 | data bytes u32 | kind u8 | 0 x3 | group u32
//!           | lsn u64 | term u64 | index u64; then data
//! ```
//! A checksum of a head covers what follows it there. The segment's number is its
//! generation: a recycled file gets a new one, so what is left of its former life is no batch.

use crate::error::Error;
use bytes::Bytes;
use std::path::Path;

/// Batches begin at multiples of it: a torn write never touches what was synced before.
pub const BLOCK: usize = 4 << 10;
/// Bytes of a frame before its data.
pub const FRAME_BYTES: usize = 48;
/// Bytes of a batch before its frames.
pub const BATCH_BYTES: usize = 40;
/// Largest data of a frame; a longer one is garbage.
pub const DATA_BYTES_MAX: usize = 16 << 20;
/// No journal gets so far; a number beyond it is garbage, and nothing that is added overflows.
const LSN_MAX: u64 = u64::MAX >> 1;
const VERSION: u32 = 2;
const SEGMENT_MAGIC: u32 = u32::from_le_bytes(*b"HDLJ");
const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"HDLB");
const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"HDLF");

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A Raft entry.
    Entry,
    /// Another type of Raft entry: a membership change.
    ConfChange,
    /// Term, vote (in `index`) and commit (8 bytes of data).
    HardState,
    /// The first of every segment: how the one before ends, where a scan must begin, all hard states.
    Opening,
    /// Bytes that were moved here, or fetched from a peer; rows point at them.
    Bulk,
    /// Rows of a group's checkpoint.
    Rows,
    /// The end of a group's checkpoint, which makes its rows count: the state at (term, index).
    Checkpoint,
    /// From now on a scan begins at the segment of this number (in `index`).
    ScanFrom,
}

impl FrameKind {
    const ALL: [FrameKind; 8] = [
        FrameKind::Entry,
        FrameKind::ConfChange,
        FrameKind::HardState,
        FrameKind::Opening,
        FrameKind::Bulk,
        FrameKind::Rows,
        FrameKind::Checkpoint,
        FrameKind::ScanFrom,
    ];

    fn from_code(code: u8) -> Option<FrameKind> {
        FrameKind::ALL.into_iter().find(|kind| *kind as u8 == code)
    }
}

/// A frame to be written, or read back at open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// The Raft group.
    pub group: u32,
    /// Raft term.
    pub term: u64,
    /// Raft index, or the vote.
    pub index: u64,
    /// The entry's data.
    pub data: Bytes,
}

impl Frame {
    /// A hard state.
    pub fn of_hard_state(group: u32, (term, vote, commit): (u64, u64, u64)) -> Frame {
        let data = Bytes::copy_from_slice(&commit.to_le_bytes());
        Frame { kind: FrameKind::HardState, group, term, index: vote, data }
    }

    /// Term, vote and commit of a hard state.
    pub fn hard_state(&self) -> (u64, u64, u64) {
        let commit = self.data.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        (self.term, self.index, commit)
    }

    /// Bytes it takes in the journal.
    pub fn bytes(&self) -> usize {
        FRAME_BYTES + self.data.len()
    }

    /// What stands before its data.
    pub fn head(&self, lsn: u64) -> [u8; FRAME_BYTES] {
        let mut head = [0; FRAME_BYTES];
        head[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        head[8..12].copy_from_slice(&crc32c::crc32c(&self.data).to_le_bytes());
        head[12..16].copy_from_slice(&(self.data.len() as u32).to_le_bytes());
        head[16] = self.kind as u8;
        head[20..24].copy_from_slice(&self.group.to_le_bytes());
        for (i, word) in [lsn, self.term, self.index].into_iter().enumerate() {
            head[24 + 8 * i..32 + 8 * i].copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&head[8..]);
        head[4..8].copy_from_slice(&crc.to_le_bytes());
        head
    }

    /// The frame at the beginning of `bytes`, its lsn, and whether its data is whole;
    /// `None` if there is no valid head.
    pub fn decode(bytes: &Bytes) -> Option<(Frame, u64, bool)> {
        let head = bytes.get(..FRAME_BYTES)?;
        if u32_at(head, 0) != FRAME_MAGIC || u32_at(head, 4) != crc32c::crc32c(&head[8..]) {
            return None;
        }
        let len = u32_at(head, 12) as usize;
        if len > DATA_BYTES_MAX {
            return None;
        }
        let kind = FrameKind::from_code(head[16])?;
        let data = bytes.get(FRAME_BYTES..FRAME_BYTES + len)?;
        let is_whole = crc32c::crc32c(data) == u32_at(head, 8);
        let frame = Frame {
            kind,
            group: u32_at(head, 20),
            term: u64_at(head, 32),
            index: u64_at(head, 40),
            data: bytes.slice(FRAME_BYTES..FRAME_BYTES + len),
        };
        Some((frame, u64_at(head, 24), is_whole))
    }
}

/// The head of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHead {
    /// The segment it was written to.
    pub segment: u64,
    /// Its first frame's number.
    pub first_lsn: u64,
    /// All frames up to this one were durable when it was written.
    pub synced_lsn: u64,
    /// Bytes of its frames.
    pub bytes: u32,
    /// How many.
    pub frames: u32,
}

impl BatchHead {
    /// As bytes.
    pub fn encode(&self) -> [u8; BATCH_BYTES] {
        let mut head = [0; BATCH_BYTES];
        head[0..4].copy_from_slice(&BATCH_MAGIC.to_le_bytes());
        for (i, word) in [self.segment, self.first_lsn, self.synced_lsn].into_iter().enumerate() {
            head[8 + 8 * i..16 + 8 * i].copy_from_slice(&word.to_le_bytes());
        }
        head[32..36].copy_from_slice(&self.bytes.to_le_bytes());
        head[36..40].copy_from_slice(&self.frames.to_le_bytes());
        let crc = crc32c::crc32c(&head[8..]);
        head[4..8].copy_from_slice(&crc.to_le_bytes());
        head
    }

    /// The batch at the beginning of `bytes`, if it was written to this segment.
    pub fn decode(bytes: &[u8], segment: u64) -> Option<BatchHead> {
        let head = bytes.get(..BATCH_BYTES)?;
        let is_one = u32_at(head, 0) == BATCH_MAGIC && u32_at(head, 4) == crc32c::crc32c(&head[8..]);
        let batch = BatchHead {
            segment: u64_at(head, 8),
            first_lsn: u64_at(head, 16),
            synced_lsn: u64_at(head, 24),
            bytes: u32_at(head, 32),
            frames: u32_at(head, 36),
        };
        let is_sane = batch.first_lsn.max(batch.synced_lsn) <= LSN_MAX;
        (is_one && is_sane && batch.segment == segment).then_some(batch)
    }

    /// Where the next batch begins, if this one begins at `at`.
    pub fn end(&self, at: usize) -> usize {
        (at + BATCH_BYTES + self.bytes as usize).next_multiple_of(BLOCK)
    }
}

/// The first block of a segment.
pub fn segment_header(number: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    header[0..4].copy_from_slice(&SEGMENT_MAGIC.to_le_bytes());
    header[4..8].copy_from_slice(&VERSION.to_le_bytes());
    header[8..16].copy_from_slice(&number.to_le_bytes());
    let crc = crc32c::crc32c(&header[..16]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    header
}

/// The number in a segment's header; `None` if it has none. Another version is an error.
pub fn segment_number(header: &[u8], path: &Path) -> Result<Option<u64>, Error> {
    if header.len() < 20 || u32_at(header, 0) != SEGMENT_MAGIC {
        return Ok(None);
    }
    let version = u32_at(header, 4);
    if version != VERSION {
        return Err(Error::Version { path: path.to_path_buf(), found: version, known: VERSION });
    }
    Ok((u32_at(header, 16) == crc32c::crc32c(&header[..16])).then(|| u64_at(header, 8)))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
