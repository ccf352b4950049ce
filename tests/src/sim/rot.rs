//! Bit rot: what one replica has synced changes on its disk; and what mends it.
//!
//! Every fourth seed has it, in one replica, and only while all others are up and whole. It
//! strikes what some later batch says was synced: damage behind that is by design taken for
//! a torn write, since nothing tells the two apart.

use super::disk::SimDisk;
use super::replica::{Direct, SimReplica};
use super::world::World;
use bytes::Bytes;
use heddle_storage::error::Error;
use heddle_storage::journal::{FRAME_BYTES, FrameKind, Location};
use heddle_storage::mend;
use heddle_storage::schema::locations;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// Every so many seeds have it.
const SEEDS: u64 = 4;
/// It ends early enough for what follows from it to be over when peace comes.
const UNTIL: u64 = 14_000;
/// The journal's layout, as `storage/src/journal/frame.rs` draws it.
const BLOCK: usize = 4 << 10;
const BATCH_BYTES: usize = 40;
/// What is struck, besides the kinds of frames.
const BATCH: u8 = 0xfe;
const SEGMENT: u8 = 0xff;

/// The rot of a seed. It draws from numbers of its own.
pub(super) struct Rot {
    rng: ChaCha8Rng,
    victim: usize,
    /// It strikes the data of entries and of moved bytes alone, which can mostly be mended.
    is_gentle: bool,
    is_begun: bool,
    /// The id of the replica that has taken the victim's place.
    pub(super) replacement: Option<u64>,
}

impl Rot {
    /// That of a seed, if it has any.
    pub(super) fn of(seed: u64) -> Option<Rot> {
        let mut rng = ChaCha8Rng::seed_from_u64(!seed);
        let (victim, is_gentle) = (rng.gen_range(0..3), rng.gen_bool(0.5));
        (seed % SEEDS == SEEDS - 1).then_some(Rot {
            rng,
            victim,
            is_gentle,
            is_begun: false,
            replacement: None,
        })
    }
}

impl World {
    /// Whether this replica's disk has begun to rot.
    pub(super) fn is_struck(&self, index: usize) -> bool {
        self.rot.as_ref().is_some_and(|rot| rot.is_begun && rot.victim == index)
    }

    /// Strikes, scrubs, or has the victim replaced; when to go on.
    pub(super) fn rot(&mut self, rng: &mut ChaCha8Rng) -> u64 {
        let Some(rot) = &mut self.rot else { return UNTIL };
        let (delay, is_scrubbed) = (rot.rng.gen_range(100..1000), rot.rng.gen_bool(0.3));
        if let Some(lost) = self.removed.first().copied() {
            self.replace(lost, rng);
            return delay;
        }
        let is_whole = |replica: &SimReplica| {
            let running = replica.running.as_ref();
            running.is_some_and(|running| running.core.groups().iter().all(|group| group.fetch.is_none()))
        };
        if self.now < UNTIL && self.replicas.iter().all(is_whole) {
            self.strike();
        }
        if is_scrubbed || self.is_peace {
            self.scrub();
        }
        delay
    }

    fn strike(&mut self) {
        let Some(rot) = &mut self.rot else { return };
        let disk = &self.replicas[rot.victim].disk;
        let mut kinds: BTreeMap<(u8, bool), Vec<Part>> = BTreeMap::new();
        for part in synced_parts(disk) {
            kinds.entry((part.kind, part.is_data)).or_default().push(part);
        }
        if rot.is_gentle || rot.rng.gen_bool(0.5) {
            let is_bulk = |kind: u8| kind == FrameKind::Entry as u8 || kind == FrameKind::Bulk as u8;
            kinds.retain(|(kind, is_data), _| *is_data && is_bulk(*kind));
        }
        if kinds.is_empty() {
            return;
        }
        let nth = rot.rng.gen_range(0..kinds.len());
        let Some(parts) = kinds.into_values().nth(nth) else { return };
        let part = &parts[rot.rng.gen_range(0..parts.len())];
        let at = rot.rng.gen_range(part.from..part.to);
        disk.rot(&part.file, at, &mut rot.rng);
        rot.is_begun = true;
        self.see("strikes of rot");
    }

    /// Reads all that the victim's rows name, and mends it, as the shipped scrub does.
    pub(super) fn scrub(&mut self) {
        let Some(index) = self.rot.as_ref().map(|rot| rot.victim) else { return };
        let Some(running) = &self.replicas[index].running else { return };
        let segments = running.writer.journal.segments();
        let mut damaged = vec![];
        let visited = running.core.catalog().visit((vec![], vec![0xff; 8]), |key, value| {
            let rotten = locations(key, value)?.into_iter().filter(|at| segments.read(*at).is_err());
            damaged.extend(rotten.map(|at| (key.to_vec(), at)));
            Ok(())
        });
        if let Err(error) = visited {
            self.violation(format!("replica {} can't be scrubbed: {error}", index + 1));
        }
        for (key, at) in damaged {
            self.mend(index, &key, at);
        }
    }

    /// The bytes that a row of this replica names, or why there are none; what has rotted
    /// comes from a peer. The order is that of the shipped reader.
    pub(super) fn read(&mut self, index: usize, key: &[u8], at: Location) -> Result<Bytes, Error> {
        let running = self.replicas[index].running.as_ref().ok_or(Error::Stopped)?;
        let read = running.writer.journal.segments().read(at);
        match read {
            Err(error @ Error::Corrupt { .. }) => self.mend(index, key, at).ok_or(error),
            read => read,
        }
    }

    fn mend(&mut self, index: usize, key: &[u8], at: Location) -> Option<Bytes> {
        let is_cut = |from, to| self.cut.contains(&(from, to));
        let is_reached = |peer: &usize| *peer != index && !is_cut(index, *peer) && !is_cut(*peer, index);
        let found = (0..self.replicas.len()).filter(is_reached).find_map(|peer| {
            let running = self.replicas[peer].running.as_ref()?;
            let segments = running.writer.journal.segments();
            mend::part_at(mend::parts(running.core.catalog(), &segments, key).ok()??, at)
        });
        let bytes = found?;
        if self.replicas[index].disk.is_failing() {
            return None;
        }
        let running = self.replicas[index].running.as_mut()?;
        let sink = &mut Direct(&mut running.writer.journal);
        match mend::store(sink, key.to_vec(), at, bytes.clone()) {
            Ok(input) => self.input(index, input),
            Err(Error::Full { .. }) => return None,
            Err(error) => {
                self.violation(format!("replica {} can't mend: {error}", index + 1));
                return None;
            }
        }
        self.see("bytes mended");
        Some(bytes)
    }
}

/// A part of the journal.
struct Part {
    file: String,
    /// Of the frame, or what else it is.
    kind: u8,
    is_data: bool,
    from: usize,
    to: usize,
}

/// The head of a batch.
struct Head {
    first_lsn: u64,
    synced_lsn: u64,
    frames: u32,
}

/// All parts of the journal whose damage can be told from a torn write.
fn synced_parts(disk: &SimDisk) -> Vec<Part> {
    let number = |name: &str| u64::from_str_radix(name.strip_suffix(".seg")?, 16).ok();
    let files = disk.files().into_iter().filter_map(|(name, bytes)| Some((number(&name)?, (name, bytes))));
    let files: BTreeMap<u64, (String, Vec<u8>)> = files.collect();
    let mut found = vec![];
    for (number, (file, bytes)) in &files {
        let heads = (BLOCK..bytes.len()).step_by(BLOCK);
        let heads: Vec<(usize, Head)> =
            heads.filter_map(|at| Some((at, head_at(bytes, at, *number)?))).collect();
        if heads.is_empty() {
            continue;
        }
        let mut part = |kind, is_data, from, to| {
            found.push(Part { file: file.clone(), kind, is_data, from, to });
        };
        part(SEGMENT, false, 0, 20);
        // The next segment's first frame says where this one ends.
        let next = files.get(&(number + 1)).map(|(_, bytes)| (number + 1, bytes));
        let is_ended = next.is_some_and(|(number, bytes)| {
            let frame = frame_at(bytes, BLOCK + BATCH_BYTES);
            let is_opening = |(kind, from, to): (u8, usize, usize)| {
                let crc = u32_at(bytes, BLOCK + BATCH_BYTES + 8);
                kind == FrameKind::Opening as u8 && crc == crc32c::crc32c(&bytes[from..to])
            };
            head_at(bytes, BLOCK, number).is_some() && frame.is_some_and(is_opening)
        });
        for (i, (at, head)) in heads.iter().enumerate() {
            // A mark has no frames; a scan asks for the one that would follow it.
            let last = head.first_lsn + u64::from(head.frames).saturating_sub(1);
            if !is_ended && !heads[i + 1..].iter().any(|(_, later)| later.synced_lsn >= last) {
                continue;
            }
            part(BATCH, false, *at, at + BATCH_BYTES);
            let mut next = at + BATCH_BYTES;
            for _ in 0..head.frames {
                let Some((kind, from, to)) = frame_at(bytes, next) else { break };
                part(kind, false, next, from);
                if from < to {
                    part(kind, true, from, to);
                }
                next = to;
            }
        }
    }
    found
}

fn head_at(bytes: &[u8], at: usize, segment: u64) -> Option<Head> {
    let head = bytes.get(at..at + BATCH_BYTES)?;
    let is_one = head.starts_with(b"HDLB") && u32_at(head, 4) == crc32c::crc32c(&head[8..]);
    (is_one && u64_at(head, 8) == segment).then(|| Head {
        first_lsn: u64_at(head, 16),
        synced_lsn: u64_at(head, 24),
        frames: u32_at(head, 36),
    })
}

/// The kind of the frame here, and where its data lies.
fn frame_at(bytes: &[u8], at: usize) -> Option<(u8, usize, usize)> {
    let head = bytes.get(at..at + FRAME_BYTES)?;
    let is_one = head.starts_with(b"HDLF") && u32_at(head, 4) == crc32c::crc32c(&head[8..]);
    let from = at + FRAME_BYTES;
    let to = from + u32_at(head, 12) as usize;
    (is_one && to <= bytes.len()).then_some((head[16], from, to))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
