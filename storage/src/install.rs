//! Catching up by a logical snapshot: a group's rows, and every byte they name.
//!
//! The leader keeps the rows as of one applied index; the follower pulls them page by page
//! with their bytes, writes those to its own journal, and only when all is durable does it
//! let Raft see the snapshot: it counts in no majority for bytes that it does not have.

use crate::core::Envelope;
use crate::error::Error;
use crate::journal::{Frame, FrameKind, Location};
use crate::rows::Row;
use crate::schema::{GroupRow, locations, relocated};
use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Message};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Bytes of a page, about.
const PAGE_BYTES: usize = 1 << 20;
/// A page that does not come is asked for again after so many ticks.
const PULL_TICKS: u64 = 20;
/// A snapshot that nobody has pulled from for so many ticks is given up.
pub const VIEW_TICKS: u64 = 200;
/// Bytes of rows in a frame, about.
const ROWS_BYTES: usize = 256 << 10;

/// The rows of a group at one applied index.
#[derive(Clone, Debug)]
pub struct View {
    /// The index.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// The members then.
    pub conf: ConfState,
    /// Its rows, but the one that says how far it is.
    pub rows: Arc<Vec<Row>>,
    /// When rows were last pulled that had not been before, and the first that were not.
    pub used: u64,
    /// See `used`.
    pub pulled: u64,
}

/// A row on its way, with the bytes it names, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRow {
    /// Its key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
    /// The bytes.
    pub parts: Vec<Bytes>,
}

/// Rows from one on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The group.
    pub group: u32,
    /// The snapshot's index.
    pub index: u64,
    /// The number of the first row.
    pub from: u64,
    /// The rows.
    pub rows: Vec<PageRow>,
    /// How many the snapshot has.
    pub total: u64,
}

/// What a serving replica reads for a page; done off its main loop.
#[derive(Debug)]
pub struct ServePage {
    /// Who asked.
    pub to: u64,
    /// The group.
    pub group: u32,
    /// The snapshot.
    pub view: View,
    /// The first row.
    pub from: u64,
}

impl ServePage {
    /// Reads the page. `part` reads bytes that the row of a key names.
    pub fn read(&self, mut part: impl FnMut(&[u8], Location) -> Result<Bytes, Error>) -> Result<Page, Error> {
        let mut page = Page {
            group: self.group,
            index: self.view.index,
            from: self.from,
            rows: vec![],
            total: self.view.rows.len() as u64,
        };
        let mut bytes = 0;
        for (key, value) in self.view.rows.iter().skip(self.from as usize) {
            let parts: Result<Vec<Bytes>, Error> =
                locations(key, value)?.into_iter().map(|at| part(key, at)).collect();
            let parts = parts?;
            bytes += key.len() + value.len() + parts.iter().map(Bytes::len).sum::<usize>();
            page.rows.push(PageRow { key: key.clone(), value: value.clone(), parts });
            if bytes >= PAGE_BYTES {
                break;
            }
        }
        Ok(page)
    }
}

/// A snapshot that is being fetched.
#[derive(Debug)]
pub struct Fetch {
    /// Raft's message, which it sees when all is here.
    pub message: Message,
    /// Rows that are here, with our own places.
    pub rows: Vec<Row>,
    /// Rows whose bytes are being written.
    pub writing: Vec<PageRow>,
    /// When the last page was asked for.
    asked: u64,
    total: Option<u64>,
    is_installing: bool,
    /// Its number among this replica's.
    pub serial: u64,
}

impl Fetch {
    /// Begins one.
    pub fn new(message: Message, serial: u64) -> Fetch {
        let (rows, writing) = (vec![], vec![]);
        Fetch { message, rows, writing, asked: 0, total: None, is_installing: false, serial }
    }

    /// All is here, and on its way to the journal and to Raft.
    pub fn is_installing(&self) -> bool {
        self.is_installing
    }

    /// Index and term of the snapshot.
    pub fn at(&self) -> (u64, u64) {
        let metadata = self.message.get_snapshot().get_metadata();
        (metadata.index, metadata.term)
    }

    /// Asks for the next page, if it is time.
    pub fn pull(&mut self, group: u32, now: u64, is_due: bool) -> Option<Envelope> {
        let is_busy = !self.writing.is_empty() || self.is_installing;
        if is_busy || !(is_due || now.saturating_sub(self.asked) >= PULL_TICKS) {
            return None;
        }
        self.asked = now;
        Some(Envelope::Pull { group, index: self.at().0, from: self.rows.len() as u64 })
    }

    /// Takes a page; the frames that hold its bytes. `None` if it is not the one to come.
    pub fn take(&mut self, page: Page) -> Option<Vec<Frame>> {
        let is_next = page.index == self.at().0 && page.from == self.rows.len() as u64;
        if !is_next
            || !self.writing.is_empty()
            || self.is_installing
            || self.total.is_some_and(|t| t != page.total)
        {
            return None;
        }
        // Bytes that are not what the row names are refused, and asked for again.
        let is_sound = page.rows.iter().all(|row| {
            locations(&row.key, &row.value).is_ok_and(|named| {
                named.len() == row.parts.len()
                    && named
                        .iter()
                        .zip(&row.parts)
                        .all(|(at, part)| at.bytes as usize == part.len() && crc32c::crc32c(part) == at.crc)
            })
        });
        if !is_sound {
            tracing::error!("a page of a snapshot has other bytes than its rows name");
            return None;
        }
        self.total = Some(page.total);
        self.writing = page.rows;
        let parts = self.writing.iter().flat_map(|row| &row.parts);
        Some(parts.map(|part| bulk_frame(page.group, part.clone())).collect())
    }

    /// The bytes of the page are durable, at these places.
    pub fn placed(&mut self, places: &[Location]) -> Result<(), Error> {
        let parts: usize = self.writing.iter().map(|row| row.parts.len()).sum();
        if places.len() != parts {
            return Err(Error::Row("a page's bytes were written to another number of places".into()));
        }
        let mut places = places.iter();
        for row in std::mem::take(&mut self.writing) {
            let value = relocated(&row.key, &row.value, |at| places.next().copied().unwrap_or(at))?;
            self.rows.push((row.key, value));
        }
        Ok(())
    }

    /// Once all rows are here: the frames that say so, once.
    pub fn finish(&mut self, group: u32) -> Option<Vec<Frame>> {
        let is_whole = self.total == Some(self.rows.len() as u64) && self.writing.is_empty();
        if !is_whole || self.is_installing {
            return None;
        }
        self.is_installing = true;
        let (index, term) = self.at();
        let conf = self.message.get_snapshot().get_metadata().get_conf_state();
        let conf = conf.write_to_bytes().unwrap_or_default();
        let row = GroupRow { applied: index, term, conf };
        Some(checkpoint_frames(group, 0, &row, self.rows.iter().cloned()))
    }
}

/// Bytes that rows will point at.
pub fn bulk_frame(group: u32, data: Bytes) -> Frame {
    Frame { kind: FrameKind::Bulk, group, term: 0, index: 0, data }
}

/// What the last frame of a group's checkpoint holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEnd {
    /// Number of the checkpoint of the whole replica, zero for a snapshot that was fetched.
    pub number: u64,
    /// Frames of rows before it.
    pub frames: u32,
    /// How far the group was.
    pub group: GroupRow,
}

/// Rows as a frame has them: of each, the lengths of key and value (u32), then both.
fn encode_rows(rows: &[Row]) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.iter().map(|(key, value)| 8 + key.len() + value.len()).sum());
    for (key, value) in rows {
        out.extend_from_slice(&(key.len() as u32).to_le_bytes());
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
        out.extend_from_slice(key);
        out.extend_from_slice(value);
    }
    out
}

/// The rows of a frame.
pub fn decode_rows(bytes: &[u8]) -> Result<Vec<Row>, Error> {
    let short = || Error::Row("a checkpoint's rows are cut short".into());
    let mut rest = bytes;
    let mut rows = vec![];
    while !rest.is_empty() {
        let (lengths, behind) = rest.split_first_chunk::<8>().ok_or_else(short)?;
        let length =
            |at: usize| u32::from_le_bytes(lengths[at..at + 4].try_into().expect("4 bytes")) as usize;
        let (key, value) = (length(0), length(4));
        let bytes = behind.get(..key + value).ok_or_else(short)?;
        rows.push((bytes[..key].to_vec(), bytes[key..].to_vec()));
        rest = &behind[key + value..];
    }
    Ok(rows)
}

/// The frames of a group's rows, and the one that makes them count.
pub fn checkpoint_frames(
    group: u32,
    number: u64,
    row: &GroupRow,
    rows: impl Iterator<Item = Row>,
) -> Vec<Frame> {
    let mut frames = vec![];
    let mut part: Vec<Row> = vec![];
    let mut bytes = 0;
    let frame =
        |kind, data: Vec<u8>| Frame { kind, group, term: row.term, index: row.applied, data: data.into() };
    for (key, value) in rows {
        bytes += key.len() + value.len();
        part.push((key, value));
        if bytes >= ROWS_BYTES {
            frames.push(frame(FrameKind::Rows, encode_rows(&part)));
            part.clear();
            bytes = 0;
        }
    }
    if !part.is_empty() {
        frames.push(frame(FrameKind::Rows, encode_rows(&part)));
    }
    let end = CheckpointEnd { number, frames: frames.len() as u32, group: row.clone() };
    let end = postcard::to_stdvec(&end).expect("plain data encodes to memory");
    frames.push(frame(FrameKind::Checkpoint, end));
    frames
}
