//! The keeper: what is done with rows off the path of acknowledgements. It writes them to
//! disk in large batches, writes checkpoints to the journal, moves what lives in mostly
//! dead segments, and recycles those that nobody needs.

use crate::catalog::{Catalog, Changes};
use crate::error::Error;
use crate::install::{bulk_frame, checkpoint_frames};
use crate::journal::{Frame, FrameKind, Location, Segments};
use crate::rows::{Row, Rows};
use crate::schema::{GroupRow, Key, VERSION, encode, locations};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Rows that are read at a time.
const STEP: usize = 512;
/// Bytes that are moved with one write.
const MOVE_BYTES: usize = 4 << 20;
/// Small parts that are moved share a frame of about this size.
const MOVE_FRAME_BYTES: usize = 256 << 10;
/// Frames of a checkpoint that are written together.
const DUMP_FRAMES: usize = 16;

/// Writes frames to the journal and returns once they are durable.
pub trait Sink {
    /// Where the frames' data lies.
    fn write(&mut self, frames: Vec<Frame>) -> Result<Vec<Location>, Error>;
}

/// A checkpoint to be written.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its number, higher than all before.
    pub number: u64,
    /// How far each group is.
    pub groups: Vec<(u32, GroupRow)>,
    /// After it a scan may begin at this segment.
    pub scan_from: u64,
    /// Segments below it have no entry that a log needs.
    pub below: u64,
    /// No snapshot names bytes by place.
    pub may_recycle: bool,
    /// Bytes that rows pointed at, by segment, when the rows were frozen.
    pub live: BTreeMap<u64, u64>,
}

/// What is to be done. The frozen rows are written first.
#[derive(Debug)]
pub struct Job {
    /// Rows.
    pub changes: Arc<Changes>,
    /// Groups of which a copy of all rows is wanted, each with how far it is.
    pub views: Vec<(u32, GroupRow)>,
    /// Segments whose live bytes are to be moved.
    pub victims: BTreeSet<u64>,
    /// A checkpoint to write.
    pub checkpoint: Option<Checkpoint>,
}

/// What has been done.
#[derive(Debug, Default)]
pub struct Kept {
    /// Copies of the rows of groups.
    pub views: Vec<(u32, GroupRow, Vec<Row>)>,
    /// Rows of which bytes have been moved.
    pub moved_rows: Vec<Vec<u8>>,
    /// Where they were (segment, offset), and are.
    pub moved: BTreeMap<(u64, u32), Location>,
    /// How far each group was at the checkpoint that is durable now.
    pub checkpoint: Option<Vec<(u32, GroupRow)>>,
    /// Bytes that were written to the journal.
    pub bytes: u64,
}

/// Does a job.
pub fn run(job: &Job, catalog: &Catalog, segments: &Segments, sink: &mut dyn Sink) -> Result<Kept, Error> {
    let rows = catalog.rows();
    let mut kept = Kept::default();
    if !job.changes.is_empty() {
        rows.apply(&job.changes)?;
    }
    for (group, row) in &job.views {
        let mut copy = vec![];
        visit(&**rows, Key::span_of_group(*group), |key, value| {
            if key != Key::group(*group).0 {
                copy.push((key, value));
            }
            Ok(())
        })?;
        kept.views.push((*group, row.clone(), copy));
    }
    if !job.victims.is_empty() {
        let mut mover = Mover { segments, sink, kept: &mut kept, parts: vec![], bytes: 0 };
        visit(&**rows, (vec![], vec![0xff; 8]), |key, value| {
            let places = locations(&key, &value)?;
            if places.iter().any(|at| job.victims.contains(&at.segment)) {
                for at in places.into_iter().filter(|at| job.victims.contains(&at.segment)) {
                    mover.take(at)?;
                }
                mover.kept.moved_rows.push(key);
            }
            Ok(())
        })?;
        mover.flush()?;
    }
    if let Some(checkpoint) = &job.checkpoint {
        write_checkpoint(checkpoint, &**rows, segments, sink, &mut kept)?;
    }
    catalog.thaw();
    Ok(kept)
}

/// Gives every stored row of a span.
pub fn visit(
    rows: &dyn Rows,
    (from, to): (Vec<u8>, Vec<u8>),
    mut visit: impl FnMut(Vec<u8>, Vec<u8>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut from = from;
    loop {
        let found = rows.range(&from, &to, STEP)?;
        let is_last = found.len() < STEP;
        if let Some((key, _)) = found.last() {
            from = [&key[..], &[0]].concat();
        }
        for (key, value) in found {
            visit(key, value)?;
        }
        if is_last {
            return Ok(());
        }
    }
}

/// Says in the rows that they follow this checkpoint.
pub fn name_checkpoint(rows: &dyn Rows, number: u64) -> Result<(), Error> {
    rows.apply(&Changes::from([
        (Key::checkpoint().0, Some(encode(&number))),
        (Key::version().0, Some(encode(&VERSION))),
    ]))
}

fn write_checkpoint(
    checkpoint: &Checkpoint,
    rows: &dyn Rows,
    segments: &Segments,
    sink: &mut dyn Sink,
    kept: &mut Kept,
) -> Result<(), Error> {
    for (group, row) in &checkpoint.groups {
        let mut copy = vec![];
        visit(rows, Key::span_of_group(*group), |key, value| {
            copy.push((key, value));
            Ok(())
        })?;
        let mut frames = checkpoint_frames(*group, checkpoint.number, row, copy.into_iter());
        while !frames.is_empty() {
            let rest = frames.split_off(frames.len().min(DUMP_FRAMES));
            kept.bytes += frames.iter().map(|frame| frame.bytes() as u64).sum::<u64>();
            sink.write(frames)?;
            frames = rest;
        }
    }
    // The catalog names the checkpoint that it follows: an older copy of it is not used again.
    name_checkpoint(rows, checkpoint.number)?;
    rows.sync()?;
    let frame = Frame {
        kind: FrameKind::ScanFrom,
        group: 0,
        term: 0,
        index: checkpoint.scan_from,
        data: Bytes::new(),
    };
    sink.write(vec![frame])?;
    if checkpoint.may_recycle {
        let below = checkpoint.below.min(checkpoint.scan_from);
        let is_dead = |number: &u64| checkpoint.live.get(number).copied().unwrap_or(0) == 0;
        let dead: Vec<u64> =
            segments.numbers().into_iter().filter(|number| *number < below && is_dead(number)).collect();
        segments.recycle(&dead)?;
    }
    kept.checkpoint = Some(checkpoint.groups.clone());
    Ok(())
}

/// Copies bytes to the journal's end.
struct Mover<'a> {
    segments: &'a Segments,
    sink: &'a mut dyn Sink,
    kept: &'a mut Kept,
    parts: Vec<(Location, Bytes)>,
    bytes: usize,
}

impl Mover<'_> {
    fn take(&mut self, at: Location) -> Result<(), Error> {
        if at.bytes == 0 {
            return Ok(());
        }
        match self.segments.read(at) {
            Ok(bytes) => {
                self.bytes += bytes.len();
                self.parts.push((at, bytes));
            }
            // It stays where it is, and its segment with it, until a scrub has mended it.
            Err(Error::Corrupt { path, offset, .. }) => {
                tracing::error!(path = %path.display(), offset, "damaged bytes can't be moved");
            }
            Err(error) => return Err(error),
        }
        if self.bytes >= MOVE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Error> {
        let parts = std::mem::take(&mut self.parts);
        self.bytes = 0;
        let mut frames: Vec<Vec<u8>> = vec![];
        let mut places = vec![];
        for (_, bytes) in &parts {
            if frames.last().is_none_or(|frame| frame.len() + bytes.len() > MOVE_FRAME_BYTES) {
                frames.push(vec![]);
            }
            let frame = frames.last_mut().expect("pushed above");
            let from = frame.len();
            frame.extend_from_slice(bytes);
            places.push((frames.len() - 1, from));
        }
        let frames: Vec<Frame> = frames.into_iter().map(|data| bulk_frame(0, data.into())).collect();
        if frames.is_empty() {
            return Ok(());
        }
        self.kept.bytes += frames.iter().map(|frame| frame.bytes() as u64).sum::<u64>();
        let at = self.sink.write(frames)?;
        for ((old, bytes), (frame, from)) in parts.iter().zip(places) {
            self.kept.moved.insert((old.segment, old.offset), at[frame].part(from, bytes));
        }
        Ok(())
    }
}
