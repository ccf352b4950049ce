//! The journal: every Raft entry and hard state of this replica, for all its groups, in
//! pre-zeroed, recycled segment files. One write and one `fdatasync` a group commit.
//!
//! An entry frame's data *is* the home of the chunks and blocks in it; rows point there.
//! Writes go past the page cache (O_DIRECT) where the file system allows it: the two measure
//! alike in a loop of their own (571 and 551 MB/s at 64 KiB), but with three replicas on two
//! cores the copies into fresh pages were half of the CPU time. What followers and new readers
//! ask for is in Raft's cache.
//!
//! States after a crash, and the way out of each:
//! - a batch cut or garbled at the end of the last segment, and no later batch that says it
//!   was synced: a torn tail, never acknowledged. The journal goes on in a fresh segment,
//!   whose first frame says where this one ends, so what lies behind stays cut;
//! - the same anywhere else: corruption. A frame whose data alone is damaged is handed on as
//!   such, since an applied entry can be fetched from peers; anything worse stops the open;
//! - a segment without a batch: prepared and not used yet, or recycled; made ready again;
//! - a `.part` file: its making was cut short; removed.

mod frame;
mod scan;

pub use frame::{DATA_BYTES_MAX, FRAME_BYTES, Frame, FrameKind};
pub use scan::Scanned;

use crate::disk::{Disk, DiskFile};
use crate::error::{Error, IoContext};
use bytes::Bytes;
use frame::{BATCH_BYTES, BLOCK, BatchHead, segment_header};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

/// Length of a segment of a real store.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// Length of a store's first segment.
const FIRST_SEGMENT_BYTES: u64 = 16 << 20;
/// Recycled files that are kept for the next segments; the others go back to the file system.
const POOL_MAX: usize = 12;

/// Where bytes lie in the journal, and their CRC32C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Location {
    /// The segment's number.
    pub segment: u64,
    /// The first byte.
    pub offset: u32,
    /// How many.
    pub bytes: u32,
    /// Of the bytes, so that a read from a recycled or rotten segment is noticed.
    pub crc: u32,
}

impl Location {
    /// Of nothing.
    pub const NONE: Location = Location { segment: 0, offset: 0, bytes: 0, crc: 0 };

    /// A part of these bytes, which is `part`.
    pub fn part(&self, from: usize, part: &[u8]) -> Location {
        Location {
            segment: self.segment,
            offset: self.offset + from as u32,
            bytes: part.len() as u32,
            crc: crc32c::crc32c(part),
        }
    }
}

/// How a journal is laid out.
#[derive(Clone, Copy, Debug)]
pub struct JournalConfig {
    /// Length of a segment: a multiple of 4 KiB that holds the largest frame.
    pub segment_bytes: u64,
    /// Bytes of the file system that are left alone.
    pub reserve_bytes: u64,
    /// The next segment is made by a thread of its own, ahead of time.
    pub in_background: bool,
}

impl Default for JournalConfig {
    fn default() -> Self {
        JournalConfig { segment_bytes: SEGMENT_BYTES, reserve_bytes: 64 << 20, in_background: true }
    }
}

/// The first frame of a segment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Opening {
    /// Where the segment before ends: the end of its last batch.
    previous_end: u64,
    /// The segment in which a scan must begin to find all that is needed.
    scan_from: u64,
    /// Group, term, vote and commit of every hard state.
    hard_states: Vec<(u32, u64, u64, u64)>,
}

impl Opening {
    fn frame(&self) -> Frame {
        let data = postcard::to_stdvec(self).expect("plain data encodes to memory");
        Frame { kind: FrameKind::Opening, group: 0, term: 0, index: 0, data: data.into() }
    }
}

/// The segments, for readers and for whoever recycles; clones share them.
#[derive(Clone, Debug)]
pub struct Segments {
    disk: Arc<dyn Disk>,
    files: Arc<RwLock<BTreeMap<u64, Arc<dyn DiskFile>>>>,
    /// Names of files whose content nobody needs.
    pool: Arc<Mutex<Vec<String>>>,
    /// Lengths of all files, those of the pool included.
    bytes: Arc<AtomicU64>,
    /// The segment that is written.
    current: Arc<AtomicU64>,
    scan_from: Arc<AtomicU64>,
    segment_bytes: u64,
}

impl Segments {
    /// The bytes at `location`, checked against its CRC.
    pub fn read(&self, location: Location) -> Result<Bytes, Error> {
        if location.bytes == 0 {
            return Ok(Bytes::new());
        }
        let path = || self.disk.path(&segment_name(location.segment));
        let corrupt = |what: &str| Error::Corrupt {
            path: path(),
            offset: u64::from(location.offset),
            what: what.into(),
        };
        if location.bytes as usize > DATA_BYTES_MAX {
            return Err(corrupt("more bytes are named than a frame can have"));
        }
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let file = files.get(&location.segment).cloned();
        drop(files);
        let file = file.ok_or_else(|| corrupt("the segment is not there"))?;
        let mut bytes = vec![0; location.bytes as usize];
        file.read(&mut bytes, u64::from(location.offset)).at("read", &path())?;
        if crc32c::crc32c(&bytes) != location.crc {
            return Err(corrupt("the bytes do not have the checksum that their row names"));
        }
        Ok(Bytes::from(bytes))
    }

    /// The number of the segment that is written now.
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::Acquire)
    }

    /// The numbers of all segments in use.
    pub fn numbers(&self) -> Vec<u64> {
        self.files.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// Bytes of all files, recycled ones included.
    pub fn total_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Length of each, but for a store's first ones.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// From now on a scan begins here: what is needed of older segments is in checkpoints.
    /// The next segment's first frame says so.
    pub fn set_scan_from(&self, segment: u64) {
        self.scan_from.fetch_max(segment, Ordering::AcqRel);
    }

    /// The first segment that the newest durable opening frame lets a scan begin with.
    pub fn scan_from(&self) -> u64 {
        self.scan_from.load(Ordering::Acquire)
    }

    /// Gives up segments that no row, no log and no reader needs.
    pub fn recycle(&self, numbers: &[u64]) -> Result<(), Error> {
        for number in numbers {
            let removed = self.files.write().unwrap_or_else(PoisonError::into_inner).remove(number);
            let Some(file) = removed else { continue };
            let bytes = file.len().unwrap_or(0);
            let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            if pool.len() < POOL_MAX && bytes == self.segment_bytes {
                pool.push(segment_name(*number));
            } else {
                self.disk.remove(&segment_name(*number))?;
                self.bytes.fetch_sub(bytes, Ordering::AcqRel);
            }
        }
        Ok(())
    }

    /// Makes segment `number` ready: of a recycled file, or of a new one.
    fn prepare(&self, number: u64, reserve_bytes: u64) -> Result<Arc<dyn DiskFile>, Error> {
        let name = segment_name(number);
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has the name already must not stay in the pool under it.
        let same = pool.iter().position(|old| *old == name).map(|at| pool.swap_remove(at));
        let recycled = same.or_else(|| pool.pop());
        drop(pool);
        let mut made_bytes = 0;
        match recycled {
            Some(old) if old == name => {}
            Some(old) => self.disk.rename(&old, &name)?,
            None => {
                // The first ones are shorter: a small store is quick to make.
                let doublings = number.saturating_sub(1).min(16);
                let bytes = (FIRST_SEGMENT_BYTES << doublings).min(self.segment_bytes);
                let needed = bytes + reserve_bytes;
                if self.disk.free_bytes()? < needed {
                    return Err(Error::Full { path: self.disk.path(&name), needed });
                }
                self.disk.create(&name, bytes).map_err(|error| match error {
                    error if error.is_no_space() => Error::Full { path: self.disk.path(&name), needed },
                    error => error,
                })?;
                made_bytes = bytes;
            }
        }
        let file = self.disk.open(&name)?;
        let path = self.disk.path(&name);
        file.write(&[IoSlice::new(&segment_header(number))], 0).at("write to", &path)?;
        file.sync().at("sync", &path)?;
        self.bytes.fetch_add(made_bytes, Ordering::AcqRel);
        Ok(file)
    }
}

/// The segment after the current one.
#[derive(Debug)]
enum Next {
    None,
    Coming(JoinHandle<Result<Arc<dyn DiskFile>, Error>>),
    Ready(Arc<dyn DiskFile>),
}

/// The writer; one a replica.
#[derive(Debug)]
pub struct Journal {
    segments: Segments,
    config: JournalConfig,
    file: Arc<dyn DiskFile>,
    number: u64,
    /// Length of the current segment, and how much of it is written.
    capacity: u64,
    end: u64,
    /// The current segment takes no more.
    is_closed: bool,
    next: Next,
    next_lsn: u64,
    synced_lsn: u64,
    /// The highest lsn that some batch says was synced.
    marked_lsn: u64,
    hard_states: BTreeMap<u32, (u64, u64, u64)>,
    /// The next segment could not be made.
    is_refused: bool,
    /// Something was written since the last sync.
    is_dirty: bool,
}

impl Journal {
    /// Opens the journal on `disk`, and gives every frame that is needed, in order, to `visit`.
    pub fn open(
        disk: Arc<dyn Disk>,
        config: JournalConfig,
        visit: impl FnMut(Scanned),
    ) -> Result<Journal, Error> {
        scan::open(disk, config, visit)
    }

    /// A handle for reading and recycling.
    pub fn segments(&self) -> Segments {
        self.segments.clone()
    }

    /// Writes `frames` with one `fdatasync`; where each one's data lies.
    ///
    /// [`Error::Full`] means that nothing was written and the same can be tried again.
    /// After any other error the journal must not be written: what a failed sync left
    /// behind is unknown.
    pub fn append(&mut self, frames: &[Frame]) -> Result<Vec<Location>, Error> {
        if frames.iter().any(|frame| frame.data.len() > DATA_BYTES_MAX) {
            return Err(Error::Row(format!("a frame of more than {DATA_BYTES_MAX} bytes was to be written")));
        }
        let mut locations = Vec::with_capacity(frames.len());
        let mut from = 0;
        self.check_room(frames)?;
        while from < frames.len() {
            let to = from + self.count_that_fit(&frames[from..]);
            if to == from {
                self.roll()?;
                continue;
            }
            self.write_batch(&frames[from..to], &mut locations)?;
            from = to;
        }
        self.sync()?;
        Ok(locations)
    }

    /// Says durably, in a batch of its own, that the last one was synced; without it an idle
    /// journal's last batch could not be told from a torn tail. Lazy: it is not synced itself.
    pub fn mark(&mut self) -> Result<(), Error> {
        if self.marked_lsn >= self.synced_lsn || self.is_closed || self.room() < BLOCK as u64 {
            return Ok(());
        }
        self.write_batch(&[], &mut vec![])
    }

    /// Whether the disk has no room for the next segment; appends go on to the end of this
    /// one. Tries again to make it.
    pub fn is_full(&mut self) -> bool {
        if let Next::Coming(thread) = &self.next
            && thread.is_finished()
        {
            self.is_refused = self.join_next().is_err();
        }
        match &self.next {
            Next::Ready(_) => self.is_refused = false,
            Next::Coming(_) => {}
            // A store that holds little does not fill another segment with zeros.
            Next::None if self.room() > self.capacity / 2 && !self.is_refused => {}
            Next::None if self.config.in_background => self.begin_next(),
            Next::None => {
                let made = self.segments.prepare(self.number + 1, self.config.reserve_bytes);
                self.is_refused = made.is_err();
                self.next = made.map_or(Next::None, Next::Ready);
            }
        }
        self.is_refused
    }

    /// Bytes that the current segment still takes.
    pub fn room(&self) -> u64 {
        if self.is_closed { 0 } else { self.capacity - self.end }
    }

    /// Whether the current segment takes frames of so many bytes.
    pub fn fits(&self, bytes: usize) -> bool {
        (BATCH_BYTES + bytes) as u64 <= self.room()
    }

    fn begin_next(&mut self) {
        let (segments, number, reserve) = (self.segments.clone(), self.number + 1, self.config.reserve_bytes);
        let thread = std::thread::Builder::new().name("segment".into());
        if let Ok(thread) = thread.spawn(move || segments.prepare(number, reserve)) {
            self.next = Next::Coming(thread);
        }
    }

    fn join_next(&mut self) -> Result<(), Error> {
        self.next = match std::mem::replace(&mut self.next, Next::None) {
            Next::Coming(thread) => {
                let died = || Error::Full { path: self.segments.disk.path("next"), needed: 0 };
                Next::Ready(thread.join().map_err(|_| died())??)
            }
            other => other,
        };
        Ok(())
    }

    /// Before anything is written: that the next segment is there, if it will be needed.
    fn check_room(&mut self, frames: &[Frame]) -> Result<(), Error> {
        if self.count_that_fit(frames) == frames.len() {
            return Ok(());
        }
        self.join_next()?;
        if matches!(self.next, Next::None) {
            self.next = Next::Ready(self.segments.prepare(self.number + 1, self.config.reserve_bytes)?);
        }
        Ok(())
    }

    fn count_that_fit(&self, frames: &[Frame]) -> usize {
        let room = self.room() as usize;
        let mut bytes = BATCH_BYTES;
        let fits = |frame: &&Frame| {
            bytes += frame.bytes();
            bytes <= room
        };
        frames.iter().take_while(fits).count()
    }

    /// Goes on in the next segment.
    fn roll(&mut self) -> Result<(), Error> {
        self.sync()?;
        self.join_next()?;
        let file = match std::mem::replace(&mut self.next, Next::None) {
            Next::Ready(file) => file,
            _ => self.segments.prepare(self.number + 1, self.config.reserve_bytes)?,
        };
        let opening = Opening {
            previous_end: self.end,
            scan_from: self.segments.scan_from(),
            hard_states: self.hard_states.iter().map(|(group, (t, v, c))| (*group, *t, *v, *c)).collect(),
        };
        self.number += 1;
        self.segments.files.write().unwrap_or_else(PoisonError::into_inner).insert(self.number, file.clone());
        self.capacity = file.len().at("look at", &self.segments.disk.path(&segment_name(self.number)))?;
        (self.file, self.end, self.is_closed) = (file, BLOCK as u64, false);
        self.segments.current.store(self.number, Ordering::Release);
        self.write_batch(&[opening.frame()], &mut vec![])
    }

    fn write_batch(&mut self, frames: &[Frame], locations: &mut Vec<Location>) -> Result<(), Error> {
        let bytes: usize = frames.iter().map(Frame::bytes).sum();
        let head = BatchHead {
            segment: self.number,
            first_lsn: self.next_lsn,
            synced_lsn: self.synced_lsn,
            bytes: bytes as u32,
            frames: frames.len() as u32,
        };
        let batch_head = head.encode();
        let lsns = self.next_lsn..;
        let heads: Vec<_> = frames.iter().zip(lsns).map(|(frame, lsn)| frame.head(lsn)).collect();
        let mut parts = Vec::with_capacity(2 * frames.len() + 2);
        parts.push(IoSlice::new(&batch_head));
        let mut at = self.end as usize + BATCH_BYTES;
        for (frame, head) in frames.iter().zip(&heads) {
            parts.push(IoSlice::new(head));
            parts.push(IoSlice::new(&frame.data));
            at += FRAME_BYTES;
            let crc = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
            let bytes = frame.data.len() as u32;
            locations.push(Location { segment: self.number, offset: at as u32, bytes, crc });
            at += frame.data.len();
            // The next segment's first frame must not say less than what is durable by then.
            if frame.kind == FrameKind::ScanFrom {
                self.segments.set_scan_from(frame.index);
            }
            if frame.kind == FrameKind::HardState {
                self.hard_states.insert(frame.group, frame.hard_state());
            }
        }
        let end = head.end(self.end as usize);
        let padding = [0; BLOCK];
        parts.push(IoSlice::new(&padding[..end - at]));
        let path = self.segments.disk.path(&segment_name(self.number));
        self.file.write(&parts, self.end).at("write to", &path)?;
        self.end = end as u64;
        self.is_dirty = true;
        self.next_lsn += frames.len() as u64;
        self.marked_lsn = head.synced_lsn;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Error> {
        // A mark counts, too: the next segment will say where this one ends.
        if self.is_dirty {
            self.file.sync().at("sync", &self.segments.disk.path(&segment_name(self.number)))?;
            self.synced_lsn = self.next_lsn - 1;
            self.is_dirty = false;
        }
        Ok(())
    }
}

fn segment_name(number: u64) -> String {
    format!("{number:016x}.seg")
}

fn number_of(name: &str) -> Option<u64> {
    name.strip_suffix(".seg").and_then(|stem| u64::from_str_radix(stem, 16).ok())
}

#[cfg(test)]
mod tests;
