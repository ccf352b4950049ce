//! Opening a journal: which segments there are, and what of them is true.

use super::frame::{BATCH_BYTES, BLOCK, BatchHead, Frame, FrameKind, segment_number};
use super::{Journal, JournalConfig, Location, Next, Opening, Segments, number_of, segment_name};
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, IoContext};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// A frame that was found.
#[derive(Debug)]
pub struct Scanned {
    /// It.
    pub frame: Frame,
    /// Where its data lies.
    pub at: Location,
    /// Whether the data is what was written.
    pub is_whole: bool,
}

/// A segment's content.
struct Content {
    number: u64,
    bytes: Bytes,
    file: Arc<dyn DiskFile>,
}

/// Where the true part of a segment ends, and whether it was cut there.
struct End {
    at: usize,
    next_lsn: u64,
    is_torn: bool,
    marked_lsn: u64,
}

pub(super) fn open(
    disk: Arc<dyn Disk>,
    config: JournalConfig,
    mut visit: impl FnMut(Scanned),
) -> Result<Journal, Error> {
    let mut names = disk.list()?;
    names.sort_unstable();
    for part in names.iter().filter(|name| name.ends_with(".part")) {
        disk.remove(part)?;
    }
    let numbers: Vec<u64> = names.iter().filter_map(|name| number_of(name)).collect();
    let segments = Segments {
        disk: disk.clone(),
        files: Arc::new(RwLock::new(BTreeMap::new())),
        pool: Arc::new(Mutex::new(vec![])),
        bytes: Arc::new(AtomicU64::new(0)),
        current: Arc::new(AtomicU64::new(0)),
        scan_from: Arc::new(AtomicU64::new(1)),
        segment_bytes: config.segment_bytes,
    };
    // From the newest back: those that were made ready and never written come first.
    let mut rest = numbers;
    let mut last = None;
    while let Some(number) = rest.pop() {
        let content = read(&*disk, number)?;
        if let Some(opening) = opening_of(&content) {
            last = Some((content, opening));
            break;
        }
        let heads: Vec<(usize, BatchHead)> = heads(&content, BLOCK).collect();
        if heads.is_empty() {
            segments.pool.lock().expect("not shared yet").push(segment_name(number));
            segments.bytes.fetch_add(content.bytes.len() as u64, Ordering::AcqRel);
        } else if heads.iter().any(|(at, head)| *at > BLOCK && head.synced_lsn + 1 >= head.first_lsn) {
            return Err(corrupt(&*disk, number, BLOCK, "the segment's first frame is damaged".into()));
        } else {
            // Begun, and never synced. What is left in it would be taken for its next life's.
            disk.remove(&segment_name(number))?;
        }
    }
    let Some((newest, opening)) = last else {
        return first(config, segments);
    };
    let begin = scan_from(&newest, opening.scan_from).min(newest.number);
    segments.set_scan_from(begin);
    let newest_number = newest.number;
    let mut contents: Vec<Content> = vec![];
    for number in rest {
        if number < begin {
            let file = disk.open(&segment_name(number))?;
            let bytes = file.len().at("look at", &disk.path(&segment_name(number)))?;
            segments.bytes.fetch_add(bytes, Ordering::AcqRel);
            segments.files.write().expect("not shared yet").insert(number, file);
        } else {
            contents.push(read(&*disk, number)?);
        }
    }
    contents.push(newest);
    if let Some(gap) = (begin..=newest_number).zip(&contents).find(|(number, c)| *number != c.number) {
        return Err(corrupt(&*disk, gap.0, 0, "the segment is missing".into()));
    }
    // Each says where the one before ends, and has all hard states: none is taken if damaged.
    let mut ends = vec![];
    for content in &contents {
        let opening = opening_of(content).ok_or_else(|| {
            corrupt(&*disk, content.number, BLOCK, "the segment's first frame is damaged".into())
        })?;
        ends.push(opening.previous_end as usize);
    }
    let mut hard_states = BTreeMap::new();
    let mut end = End { at: BLOCK, next_lsn: 0, is_torn: false, marked_lsn: 0 };
    for (i, content) in contents.iter().enumerate() {
        let limit = ends.get(i + 1).copied();
        let mut take = |scanned: Scanned| {
            let frame = &scanned.frame;
            match frame.kind {
                FrameKind::HardState => {
                    hard_states.insert(frame.group, frame.hard_state());
                }
                FrameKind::Opening => {
                    let opening: Opening = postcard::from_bytes(&frame.data).unwrap_or_default();
                    for (group, term, vote, commit) in opening.hard_states {
                        hard_states.insert(group, (term, vote, commit));
                    }
                }
                _ => {}
            }
            visit(scanned);
        };
        end = scan(&*disk, content, limit, end.next_lsn, &mut take)?;
        segments.files.write().expect("not shared yet").insert(content.number, content.file.clone());
        segments.bytes.fetch_add(content.bytes.len() as u64, Ordering::AcqRel);
    }
    let newest = contents.pop().expect("pushed above");
    // A kill can have come between the last write and its sync: what was read from
    // the page cache counts as durable only now.
    newest.file.sync().at("sync", &disk.path(&segment_name(newest.number)))?;
    for (group, hard_state) in &hard_states {
        let frame = Frame::of_hard_state(*group, *hard_state);
        visit(Scanned { frame, at: Location::NONE, is_whole: true });
    }
    segments.current.store(newest.number, Ordering::Release);
    Ok(Journal {
        segments,
        config,
        file: newest.file,
        number: newest.number,
        capacity: newest.bytes.len() as u64,
        end: end.at as u64,
        is_closed: end.is_torn,
        next: Next::None,
        next_lsn: end.next_lsn,
        synced_lsn: end.next_lsn - 1,
        marked_lsn: end.marked_lsn,
        hard_states,
        is_refused: false,
        is_dirty: false,
    })
}

/// A journal without a batch: a new one, or one whose first was never durable.
fn first(config: JournalConfig, segments: Segments) -> Result<Journal, Error> {
    let file = segments.prepare(1, config.reserve_bytes)?;
    segments.files.write().expect("not shared yet").insert(1, file.clone());
    segments.current.store(1, Ordering::Release);
    let capacity = file.len().at("look at", &segments.disk.path(&segment_name(1)))?;
    let mut journal = Journal {
        segments,
        config,
        file,
        number: 1,
        capacity,
        end: BLOCK as u64,
        is_closed: false,
        next: Next::None,
        next_lsn: 1,
        synced_lsn: 0,
        marked_lsn: 0,
        hard_states: BTreeMap::new(),
        is_refused: false,
        is_dirty: false,
    };
    journal.append(&[Opening { previous_end: 0, scan_from: 1, hard_states: vec![] }.frame()])?;
    Ok(journal)
}

fn read(disk: &dyn Disk, number: u64) -> Result<Content, Error> {
    let name = segment_name(number);
    let path = disk.path(&name);
    let file = disk.open(&name)?;
    let len = file.len().at("look at", &path)?;
    if len > u64::from(u32::MAX) {
        return Err(corrupt(disk, number, 0, format!("the segment has {len} bytes")));
    }
    let mut bytes = vec![0; len as usize];
    file.read(&mut bytes, 0).at("read", &path)?;
    segment_number(&bytes[..bytes.len().min(BLOCK)], &path)?;
    Ok(Content { number, bytes: Bytes::from(bytes), file })
}

fn corrupt(disk: &dyn Disk, number: u64, offset: usize, what: String) -> Error {
    Error::Corrupt { path: disk.path(&segment_name(number)), offset: offset as u64, what }
}

/// What the segment's first frame says.
fn opening_of(content: &Content) -> Option<Opening> {
    let bytes = content.bytes.get(BLOCK..)?;
    BatchHead::decode(bytes, content.number)?;
    let (frame, _, is_whole) = Frame::decode(&content.bytes.slice(BLOCK + BATCH_BYTES..))?;
    (is_whole && frame.kind == FrameKind::Opening).then(|| postcard::from_bytes(&frame.data).ok()).flatten()
}

/// All valid heads of batches of this segment, from block `at` on.
fn heads(content: &Content, at: usize) -> impl Iterator<Item = (usize, BatchHead)> {
    let blocks = (at..content.bytes.len()).step_by(BLOCK);
    blocks.filter_map(|at| Some((at, BatchHead::decode(&content.bytes[at..], content.number)?)))
}

/// Where the scan must begin: what the segment's first frame says, or a later one in it.
fn scan_from(content: &Content, first: u64) -> u64 {
    let (mut at, mut found) = (BLOCK, first);
    while let Some(head) = content.bytes.get(at..).and_then(|b| BatchHead::decode(b, content.number))
        && head.end(at) <= content.bytes.len()
        && let Some(frames) = frames_of(&head, &content.bytes, content.number, at)
    {
        let marks = frames.iter().filter(|f| f.is_whole && f.frame.kind == FrameKind::ScanFrom);
        found = marks.map(|mark| mark.frame.index).fold(found, u64::max);
        at = head.end(at);
    }
    found
}

/// Gives the frames of a segment up to `limit`, which the next one names, or its true end.
fn scan(
    disk: &dyn Disk,
    content: &Content,
    limit: Option<usize>,
    next_lsn: u64,
    take: &mut impl FnMut(Scanned),
) -> Result<End, Error> {
    let bytes = &content.bytes;
    let number = content.number;
    let mut end = End { at: BLOCK, next_lsn, is_torn: false, marked_lsn: 0 };
    while end.at < limit.unwrap_or(bytes.len()) {
        let at = end.at;
        let head = bytes.get(at..).and_then(|bytes| BatchHead::decode(bytes, number));
        let head = head.filter(|head| {
            let follows = end.next_lsn == 0 || head.first_lsn == end.next_lsn;
            follows && head.end(at) <= bytes.len()
        });
        let frames = head.and_then(|head| frames_of(&head, bytes, number, at));
        match (head, frames) {
            (Some(head), Some(frames)) if limit.is_some() || is_sound(&frames, &head, content, at) => {
                if end.next_lsn == 0 {
                    end.next_lsn = head.first_lsn;
                }
                end.next_lsn += frames.len() as u64;
                end.at = head.end(at);
                end.marked_lsn = head.synced_lsn;
                frames.into_iter().for_each(&mut *take);
            }
            _ if limit.is_some() => {
                let what = format!("batch {} is damaged in the middle of the journal", end.next_lsn);
                return Err(corrupt(disk, number, at, what));
            }
            (head, _) => {
                if let Some(later) = batch_that_saw_synced(content, at, end.next_lsn) {
                    let what = format!(
                        "batch {} was synced, as the one at {later} says, and is damaged",
                        end.next_lsn
                    );
                    return Err(corrupt(disk, number, at, what));
                }
                // Something is left behind the end that a later batch must not join up with.
                end.is_torn = head.is_some() || heads(content, at + BLOCK).next().is_some();
                break;
            }
        }
    }
    if end.next_lsn == 0 {
        return Err(corrupt(disk, number, BLOCK, "the segment has no batch".into()));
    }
    Ok(end)
}

/// Whether every frame is whole; one with damaged data counts as whole only if a later batch
/// proves that the batch was synced, and is then handed on as damaged.
fn is_sound(frames: &[Scanned], head: &BatchHead, content: &Content, at: usize) -> bool {
    frames.iter().all(|frame| frame.is_whole)
        || batch_that_saw_synced(content, at, head.first_lsn + u64::from(head.frames) - 1).is_some()
}

fn frames_of(head: &BatchHead, bytes: &Bytes, segment: u64, at: usize) -> Option<Vec<Scanned>> {
    let mut frames = vec![];
    let mut from = at + BATCH_BYTES;
    let end = from + head.bytes as usize;
    for i in 0..head.frames {
        let (frame, lsn, is_whole) = Frame::decode(&bytes.slice(from..end))?;
        if lsn != head.first_lsn + u64::from(i) {
            return None;
        }
        // The checksum that was written, not that of what was read.
        let crc = u32::from_le_bytes(bytes[from + 8..from + 12].try_into().expect("4 bytes"));
        let offset = (from + super::FRAME_BYTES) as u32;
        let at = Location { segment, offset, bytes: frame.data.len() as u32, crc };
        from += frame.bytes();
        frames.push(Scanned { frame, at, is_whole });
    }
    (from == end).then_some(frames)
}

/// A batch behind `from` that was written after `lsn` had been synced.
fn batch_that_saw_synced(content: &Content, from: usize, lsn: u64) -> Option<usize> {
    heads(content, from + BLOCK).find(|(_, head)| head.synced_lsn >= lsn).map(|(at, _)| at)
}
