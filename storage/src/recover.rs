//! Opening a replica: the journal, the rows that fit it, and the groups' logs.
//!
//! The newest checkpoint whose end is whole, and the entries behind it, are the truth. Rows
//! on disk are used only if they name that checkpoint and are not ahead of the logs;
//! otherwise they are thrown away and made anew.

use crate::apply::Planted;
use crate::catalog::{Catalog, Changes};
use crate::core::{Core, CoreConfig};
use crate::disk::Disk;
use crate::error::Error;
use crate::found_log::FoundLog;
use crate::group::Group;
use crate::install::{CheckpointEnd, checkpoint_frames, decode_rows};
use crate::journal::{Frame, FrameKind, Journal, JournalConfig, Location, Scanned, Segments};
use crate::keeper;
use crate::raft_log::hard_state_of;
use crate::rows::Rows;
use crate::schema::{GroupRow, Key, VERSION, encode};
use protobuf::Message as _;
use raft::eraftpb::ConfState;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Index and term that every group of a new cluster begins behind, so that a replica that
/// comes later gets the first members by a snapshot.
const FIRST: (u64, u64) = (1, 1);
/// No log gets so far: a higher index is garbage, and nothing that is added overflows.
const INDEX_MAX: u64 = u64::MAX >> 1;

/// A group as the scan finds it.
struct Found {
    /// Frames of rows since the last end: a checkpoint in the making.
    rows: Vec<(Location, bool)>,
    /// The newest state: its end, and its rows.
    base: Option<(CheckpointEnd, Vec<Location>)>,
    log: FoundLog,
    /// Entries whose data is damaged.
    damaged: Vec<(u64, Location)>,
}

/// Opens a replica. `voters` are the first members, if the journal is new; none for a
/// replica that joins.
pub fn open(
    disk: Arc<dyn Disk>,
    journal_config: JournalConfig,
    rows: Arc<dyn Rows>,
    config: CoreConfig,
    groups: u32,
    voters: &[u64],
) -> Result<(Core, Journal), Error> {
    let mut scanned: Vec<Scanned> = vec![];
    let mut since_checkpoint = 0;
    let mut journal = Journal::open(disk, journal_config, |mut found| {
        since_checkpoint += found.frame.bytes() as u64;
        // Entries are read again when they are applied; held, they would keep whole segments.
        if matches!(found.frame.kind, FrameKind::Entry | FrameKind::Bulk | FrameKind::Rows) {
            found.frame.data = bytes::Bytes::new();
        }
        scanned.push(found);
    })?;
    let segments = journal.segments();
    let cache = config.cache_bytes / groups as usize;
    let new =
        |_| Found { rows: vec![], base: None, log: FoundLog::new(segments.clone(), cache), damaged: vec![] };
    let mut found: Vec<Found> = (0..groups).map(new).collect();
    let mut numbers = BTreeMap::new();
    for scanned in scanned {
        // The planted fault: the log ends before a damaged entry, as if it had never been synced.
        let is_entry = matches!(scanned.frame.kind, FrameKind::Entry | FrameKind::ConfChange);
        if config.planted == Planted::DamageTakenForTail && is_entry && !scanned.is_whole {
            continue;
        }
        take(&mut found, &mut numbers, scanned, groups)?;
    }
    if found.iter().all(|group| group.base.is_none()) && !voters.is_empty() {
        begin(&mut journal, &mut found, &mut numbers, voters)?;
    }
    // A checkpoint counts once all its groups' ends are there.
    let number = numbers.iter().rev().find(|(_, count)| **count == groups).map_or(0, |(number, _)| *number);
    let catalog = Catalog::new(rows);
    if !fits(&catalog, &found, number)? {
        rebuild(&catalog, &found, &segments, number)?;
    }
    for (id, group) in found.iter().enumerate() {
        let applied = catalog.group(id as u32)?.applied;
        // One that was written anew since, or cut off, is not needed.
        let is_needed =
            |(index, at): &&(u64, Location)| *index > applied && group.log.kept.location(*index) == Some(*at);
        if let Some((index, at)) = group.damaged.iter().find(is_needed) {
            return Err(Error::Corrupt {
                path: format!("segment {:016x}", at.segment).into(),
                offset: u64::from(at.offset),
                what: format!("entry {index} of group {id} is damaged and was not applied yet"),
            });
        }
    }
    catalog.count_live()?;
    let groups: Result<Vec<Group>, Error> = found
        .into_iter()
        .enumerate()
        .map(|(id, found)| {
            let row = catalog.group(id as u32)?;
            Group::new(id as u32, &config, found.log.kept, &row)
        })
        .collect();
    let core = Core::new(config, groups?, catalog, segments, number, since_checkpoint);
    Ok((core, journal))
}

fn take(
    found: &mut [Found],
    numbers: &mut BTreeMap<u64, u32>,
    scanned: Scanned,
    groups: u32,
) -> Result<(), Error> {
    let Scanned { frame, at, is_whole } = scanned;
    let Some(group) = found.get_mut(frame.group as usize) else {
        return Err(Error::Row(format!("group {} of a cluster of {groups}", frame.group)));
    };
    let damaged = |what: &str| Error::Corrupt {
        path: format!("segment {:016x}", at.segment).into(),
        offset: u64::from(at.offset),
        what: format!("{what} of group {} is damaged", frame.group),
    };
    match frame.kind {
        FrameKind::Entry | FrameKind::ConfChange => {
            if !(1..=INDEX_MAX).contains(&frame.index) {
                return Err(damaged("an entry's index"));
            }
            if !is_whole {
                group.damaged.push((frame.index, at));
            }
            group.log.found(frame.index, frame.term, frame.kind, at);
        }
        FrameKind::HardState => {
            if !is_whole {
                return Err(damaged("a hard state"));
            }
            group.log.kept.set_hard_state(hard_state_of(&frame));
        }
        FrameKind::Rows => group.rows.push((at, is_whole)),
        FrameKind::Checkpoint => {
            if !is_whole {
                return Err(damaged("a checkpoint"));
            }
            let end: CheckpointEnd =
                postcard::from_bytes(&frame.data).map_err(|_| damaged("the end of a checkpoint"))?;
            if end.group.applied > INDEX_MAX {
                return Err(damaged("the end of a checkpoint"));
            }
            let mut rows = std::mem::take(&mut group.rows);
            // What a checkpoint that was cut short has left stands before.
            let extra = rows.len().saturating_sub(end.frames as usize);
            rows.drain(..extra);
            if rows.len() != end.frames as usize {
                return Ok(());
            }
            if rows.iter().any(|(_, is_whole)| !is_whole) {
                return Err(damaged("a checkpoint"));
            }
            let rows = rows.into_iter().map(|(at, _)| at).collect();
            if end.number > 0 {
                *numbers.entry(end.number).or_default() += 1;
            }
            let is_newer =
                group.base.as_ref().is_none_or(|(base, _)| base.group.applied <= end.group.applied);
            if is_newer {
                // A fetched snapshot replaces the log that does not lead to it.
                group.log.begin_behind(end.group.applied, end.group.term);
                group.base = Some((end, rows));
            }
        }
        FrameKind::Opening | FrameKind::Bulk | FrameKind::ScanFrom => {}
    }
    Ok(())
}

/// The first checkpoint of a new cluster: no rows, and the first members.
fn begin(
    journal: &mut Journal,
    found: &mut [Found],
    numbers: &mut BTreeMap<u64, u32>,
    voters: &[u64],
) -> Result<(), Error> {
    let conf = ConfState::from((voters.to_vec(), vec![]));
    let conf = conf.write_to_bytes().map_err(|error| Error::Row(error.to_string()))?;
    let row = GroupRow { applied: FIRST.0, term: FIRST.1, conf };
    let ids = 0..found.len() as u32;
    let frames: Vec<Frame> =
        ids.clone().flat_map(|id| checkpoint_frames(id, 1, &row, std::iter::empty())).collect();
    let places = journal.append(&frames)?;
    for (frame, at) in frames.into_iter().zip(places) {
        take(found, numbers, Scanned { frame, at, is_whole: true }, ids.end)?;
    }
    Ok(())
}

/// Whether the rows on disk follow this checkpoint and lie within the logs.
fn fits(catalog: &Catalog, found: &[Found], number: u64) -> Result<bool, Error> {
    let is_right = catalog.get::<u32>(&Key::version()).is_ok_and(|version| version == Some(VERSION))
        && catalog.get::<u64>(&Key::checkpoint()).is_ok_and(|found| found.unwrap_or(0) == number);
    if !is_right {
        return Ok(false);
    }
    for (id, group) in found.iter().enumerate() {
        let Ok(row) = catalog.group(id as u32) else { return Ok(false) };
        let base = group.base.as_ref().map_or(0, |(end, _)| end.group.applied);
        if row.applied > group.log.kept.last() || row.applied < base {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Throws the rows away and makes those of the newest states.
fn rebuild(catalog: &Catalog, found: &[Found], segments: &Segments, number: u64) -> Result<(), Error> {
    if catalog.raw(&Key::version().0)?.is_some() {
        tracing::warn!(number, "the catalog does not follow the journal: rebuilding it from a checkpoint");
    }
    let rows = catalog.rows();
    let mut gone = Changes::new();
    keeper::visit(&**rows, (vec![], vec![0xff; 8]), |key, _| {
        gone.insert(key, None);
        if gone.len() >= 8192 {
            rows.apply(&std::mem::take(&mut gone))?;
        }
        Ok(())
    })?;
    rows.apply(&gone)?;
    for (id, group) in found.iter().enumerate() {
        let Some((end, places)) = &group.base else { continue };
        for at in places {
            let bytes = segments.read(*at)?;
            rows.apply(&decode_rows(&bytes)?.into_iter().map(|(key, value)| (key, Some(value))).collect())?;
        }
        let row = Changes::from([(Key::group(id as u32).0, Some(encode(&end.group)))]);
        rows.apply(&row)?;
    }
    keeper::name_checkpoint(&**rows, number)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::disk::Directory;
    use crate::raft_log::hard_state_frame;
    use crate::rows::MemRows;
    use bytes::Bytes;
    use raft::eraftpb::HardState;
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    const CONFIG: JournalConfig =
        JournalConfig { segment_bytes: 256 << 10, reserve_bytes: 0, in_background: false };

    fn open(dir: &Path) -> Result<(Core, Journal), Error> {
        let disk = Arc::new(Directory::open(dir)?);
        super::open(disk, CONFIG, Arc::new(MemRows::default()), CoreConfig::new(1, 1), 1, &[1, 2, 3])
    }

    fn entry(term: u64, index: u64) -> Frame {
        let data = Bytes::from(vec![term as u8; 300]);
        Frame { kind: FrameKind::Entry, group: 0, term, index, data }
    }

    /// Changes a byte of what lies there.
    fn flip(dir: &Path, at: Location) {
        let path = dir.join(format!("{:016x}.seg", at.segment));
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let (mut byte, at) = ([0], u64::from(at.offset));
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }

    #[test]
    fn a_damaged_entry_stops_the_open_only_if_the_log_has_it() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()).unwrap());
        let mut journal =
            Journal::open(Arc::new(Directory::open(dir.path()).unwrap()), CONFIG, |_| {}).unwrap();
        let hard_state = HardState { term: 2, commit: 1, ..HardState::default() };
        let frames = [entry(1, 2), entry(1, 3), entry(2, 2), hard_state_frame(0, &hard_state)];
        let places: Vec<Location> =
            frames.iter().flat_map(|frame| journal.append(std::slice::from_ref(frame)).unwrap()).collect();
        drop(journal);
        // The new leader's entry took the first one's place, and cut off the second.
        flip(dir.path(), places[0]);
        flip(dir.path(), places[1]);
        let (core, journal) = open(dir.path()).unwrap();
        assert_eq!(core.groups()[0].node.store().location(2), Some(places[2]));
        assert_eq!(core.groups()[0].node.store().last(), 2);
        drop((core, journal));
        flip(dir.path(), places[2]);
        let error = open(dir.path()).err().unwrap();
        assert!(error.to_string().contains("entry 2 of group 0 is damaged"), "{error}");
    }
}
