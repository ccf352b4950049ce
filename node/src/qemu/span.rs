//! A span of a QEMU recording: everything that its replay needs, from the store.

use crate::blocks::BlockCache;
use crate::qemu::builds::QemuBuild;
use crate::qemu::difference::difference;
use crate::qemu::process::{Launch, Process, VM_STATE};
use crate::qemu::ring::Mode;
use crate::qemu::scratch::{Contents, Scratch};
use crate::qemu::snapshot::{Captured, Root, read_root};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use heddle_proto::qemu::QemuSpec;
use heddle_proto::{Body, Event, Hash, Manifest, Position, QemuEvent, RecordingId, v1};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::qemu::feed::{Feed, FeedBounds, feed, header, saving_reads};
use heddle_replay_engine::qemu::log::{self, HEADER_BYTES};
use heddle_replay_engine::qemu::recorded;
use heddle_storage::StoreClient;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// What QEMU reads before it loads a snapshot: the machine's start, and one event ahead.
const PROLOGUE_BYTES: usize = 4096;
/// More events than that has.
const PROLOGUE_EVENTS: u64 = 256;
/// More clock reads than any machine's devices make when their state is saved.
const SAVING_READS_MAX: u64 = 32;
/// How many differences a divergence names.
const DIFFERENCES_SHOWN: usize = 8;

/// All that a span's replay needs, fetched.
#[derive(Clone)]
pub struct QemuSpan {
    /// The recording's manifest.
    pub manifest: Manifest,
    /// Files and disks.
    pub contents: Contents,
    /// The events from the span's beginning to its end.
    pub events: Vec<Event>,
    prologue: Vec<u8>,
    /// Events that only a saving of the state caused, inside the span.
    skipped: BTreeSet<u64>,
    /// Those at its end.
    reads: Vec<Event>,
    /// The snapshot at its beginning.
    pub start: Option<Root>,
    /// Where it begins.
    pub from: Position,
    /// Where it ends.
    pub to: Position,
    /// The digest there.
    pub digest: Option<Hash>,
    /// The snapshot there.
    pub end: Option<Hash>,
    /// Whether it reaches the recording's end.
    pub is_last: bool,
    blocks: BlockCache,
}

impl QemuSpan {
    /// Fetches what `bounds` names.
    pub async fn fetch(
        store: &StoreClient,
        blocks: &BlockCache,
        id: RecordingId,
        bounds: v1::SpanBounds,
    ) -> Result<QemuSpan> {
        let row = store.get(id).await.context("look up the recording")?;
        let manifest = Manifest::decode(&row.manifest)?;
        let spec = manifest.qemu().context("the recording is not QEMU's")?;
        recorded::check(&spec.arguments)?;
        recorded::check_icount(&spec.icount)?;
        let mut contents = Contents::default();
        for file in &spec.files {
            contents.files.push(blocks.image(file).await?);
        }
        for disk in &spec.disks {
            contents.disks.push(blocks.image(&disk.image).await?);
        }
        // The end is the last snapshot, if nothing but the end's bookkeeping follows it.
        let last = row.snapshots.iter().max_by_key(|snapshot| (snapshot.icount, snapshot.event));
        let last =
            last.filter(|last| last.icount == row.committed_icount && last.event <= row.committed_events);
        let is_last = bounds.to_event == 0;
        let (to, digest) = match (is_last, last) {
            (false, _) => {
                let digest = (!bounds.to_digest.is_empty()).then(|| Hash::from_slice(&bounds.to_digest));
                (Position { icount: bounds.to_icount, event: bounds.to_event }, digest.transpose()?)
            }
            (true, Some(last)) => {
                (Position { icount: last.icount, event: last.event }, Some(Hash::from_slice(&last.digest)?))
            }
            (true, None) => (end_without_snapshot(store, id, &row).await?, None),
        };
        let end = row.snapshots.iter().find(|at| at.icount == to.icount && at.event == to.event);
        let end = end.map(|at| Hash::from_slice(&at.root)).transpose()?;
        let beyond = (to.event + SAVING_READS_MAX).min(row.committed_events);
        let mut events = read_events(store, id, bounds.from_event, beyond).await?;
        let mut skipped = BTreeSet::new();
        for snapshot in &row.snapshots {
            // At the span's beginning, whoever loads the state reads as often as it was read.
            if snapshot.event > bounds.from_event && snapshot.event < to.event {
                let at = (snapshot.event - bounds.from_event) as usize;
                let count = saving_reads(&events, at, snapshot.icount) as u64;
                skipped.extend(snapshot.event..snapshot.event + count);
            }
        }
        let span_events = (to.event - bounds.from_event) as usize;
        let count = if end.is_some() { saving_reads(&events, span_events, to.icount) } else { 0 };
        let reads = events[span_events..span_events + count].to_vec();
        events.truncate(span_events);
        let start = if bounds.snapshot_root.is_empty() {
            None
        } else {
            let hash = Hash::from_slice(&bounds.snapshot_root)?;
            let mut source = blocks.clone();
            Some(tokio::task::spawn_blocking(move || read_root(hash, &mut source)).await??)
        };
        let from = Position { icount: bounds.from_icount, event: bounds.from_event };
        ensure!(
            start.as_ref().is_none_or(|root| root.position == from),
            "the snapshot stands elsewhere than the span begins"
        );
        let first = if start.is_some() { bounds.from_event.min(PROLOGUE_EVENTS) } else { 0 };
        let prologue = prologue(&read_events(store, id, 0, first).await?)?;
        Ok(QemuSpan {
            manifest: manifest.clone(),
            contents,
            events,
            prologue,
            skipped,
            reads,
            start,
            from,
            to,
            digest,
            end,
            is_last,
            blocks: blocks.clone(),
        })
    }

    /// A span of a recording that is all in memory: from `start`, or power-on, to `end`.
    pub fn of_parts(
        manifest: Manifest,
        contents: Contents,
        log: &[Event],
        start: Option<Root>,
        end: &Root,
        blocks: BlockCache,
    ) -> Result<QemuSpan> {
        let from = start.as_ref().map_or_else(Position::default, |root| root.position);
        let to = end.position;
        let all = to.event as usize..(to.event as usize + saving_reads(log, to.event as usize, to.icount));
        let prologue = prologue(&log[..from.event.min(PROLOGUE_EVENTS) as usize])?;
        Ok(QemuSpan {
            manifest,
            contents,
            events: log[from.event as usize..to.event as usize].to_vec(),
            prologue,
            skipped: BTreeSet::new(),
            reads: log[all].to_vec(),
            start,
            from,
            to,
            digest: Some(end.digest),
            end: None,
            is_last: true,
            blocks,
        })
    }

    /// Events that a passing replay does not have: the saving of a state at `position`
    /// caused them.
    pub fn skip_saving(&mut self, position: Position) {
        let at = position.event.saturating_sub(self.from.event) as usize;
        let count = saving_reads(&self.events, at, position.icount) as u64;
        self.skipped.extend(position.event..position.event + count);
    }

    /// The recording's emulator.
    pub fn spec(&self) -> Result<&QemuSpec> {
        self.manifest.qemu().context("the recording is not QEMU's")
    }

    /// Takes another recording's log instead. Up to their first difference both have the
    /// same events; behind it, the other's are shifted by what it has more or less.
    pub async fn take_log(&mut self, store: &StoreClient, other: RecordingId) -> Result<()> {
        let (a, b) = (store.get(self.manifest.id).await?, store.get(other).await?);
        let shift = b.committed_events as i64 - a.committed_events as i64;
        let to = self.to.event;
        let far = to.saturating_add_signed(shift).max(to).min(b.committed_events);
        let mine = read_events(store, self.manifest.id, 0, to).await?;
        let theirs = read_events(store, other, 0, far).await?;
        let same = mine.iter().zip(&theirs).take_while(|(x, y)| x == y).count() as u64;
        let at = |event: u64| if same >= event { event } else { event.saturating_add_signed(shift) };
        let (from, to) = (at(self.from.event), at(to).min(theirs.len() as u64));
        self.skipped = self.skipped.iter().map(|event| at(*event)).collect();
        self.events = theirs.get(from as usize..to as usize).unwrap_or_default().to_vec();
        Ok(())
    }

    /// Where blocks come from.
    pub fn blocks(&self) -> &BlockCache {
        &self.blocks
    }

    /// What a state differs in from the snapshot at the span's end, for people.
    pub(crate) fn differs_from_end(&self, captured: &Captured) -> Result<Vec<String>> {
        let mut source =
            Overlay { blocks: captured.blocks.iter().cloned().collect(), below: self.blocks.clone() };
        let end = read_root(self.end.context("the snapshot at the end is not known")?, &mut source)?;
        Ok(difference(&end, &captured.root, &mut source)?.lines(DIFFERENCES_SHOWN))
    }

    /// What QEMU is fed.
    pub fn feed(&self) -> Result<Feed> {
        let undecoded = self.events.iter().position(|e| matches!(e.body, Body::Qemu(QemuEvent::Raw { .. })));
        if let Some(at) = undecoded {
            bail!(
                "event {} could not be decoded when it was recorded: nothing behind it replays",
                self.from.event + at as u64
            );
        }
        let bounds = FeedBounds {
            offset: self.start.as_ref().map_or(HEADER_BYTES, |root| root.log_offset),
            icount: self.start.as_ref().map_or(self.from.icount, |root| root.log_icount),
            first_event: self.from.event,
            to_icount: self.to.icount,
        };
        Ok(feed(&self.events, bounds, &|event| self.skipped.contains(&event), &self.reads)?)
    }

    fn write_log(&self, path: &Path, feed: &Feed) -> Result<()> {
        let what = || format!("write {}", path.display());
        let file = File::create(path).with_context(what)?;
        file.write_all_at(&header(), 0).with_context(what)?;
        let before = feed.offset.saturating_sub(HEADER_BYTES).min(self.prologue.len() as u64);
        file.write_all_at(&self.prologue[..before as usize], HEADER_BYTES).with_context(what)?;
        file.write_all_at(&feed.bytes, feed.offset).with_context(what)
    }

    /// Puts everything in a scratch directory and starts QEMU there. Called from a thread of its own.
    pub fn start(&self, build: &QemuBuild, run: Run) -> Result<Started> {
        let spec = self.spec()?;
        let feed = self.feed()?;
        let mut source = self.blocks.clone();
        let root = self.start.as_ref().map(|root| (root, &mut source as &mut dyn BlockSource));
        let scratch = Scratch::of_store(spec, &self.contents, root)?;
        let log = scratch.path().join("log");
        self.write_log(&log, &feed)?;
        let holds = Some(write_holds(&scratch, &feed, !run.is_stopped)?);
        let console = scratch.path().join("console");
        let process = Process::start(Launch {
            program: &build.program,
            arguments: scratch.arguments(spec)?,
            icount: &spec.icount,
            mode: Mode::Replay,
            log,
            snapshot: self.start.as_ref().map(|_| VM_STATE),
            vm_state: &scratch.vm_state(),
            scratch: scratch.path(),
            ring: scratch.path().join("ring"),
            dialect: build.dialect()?,
            memory_bytes: spec.memory_bytes,
            stdin: Stdio::piped(),
            stdout: Stdio::from(File::create(&console).context("create the console's file")?),
            is_pinned: run.is_pinned,
            is_stopped: run.is_stopped,
            holds,
            is_tapped: build.is_tapped,
        })?;
        Ok(Started { process, scratch, feed })
    }
}

/// Blocks of a state that was just captured, before those of the store.
pub struct Overlay {
    /// The captured ones.
    pub blocks: HashMap<Hash, Bytes>,
    /// The store's.
    pub below: BlockCache,
}

impl BlockSource for Overlay {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        let missing: Vec<Hash> =
            hashes.iter().filter(|hash| !self.blocks.contains_key(hash)).copied().collect();
        let below: HashMap<Hash, Vec<u8>> = if missing.is_empty() {
            HashMap::new()
        } else {
            missing.iter().copied().zip(self.below.blocks(&missing)?).collect()
        };
        let one =
            |hash: &Hash| self.blocks.get(hash).map(|b| b.to_vec()).or_else(|| below.get(hash).cloned());
        hashes.iter().map(|hash| one(hash).ok_or_else(|| format!("block {hash} is missing"))).collect()
    }
}

/// How a run is started.
#[derive(Clone, Copy, Default)]
pub struct Run {
    /// On one core.
    pub is_pinned: bool,
    /// With the guest stopped.
    pub is_stopped: bool,
}

/// A replay that runs.
pub struct Started {
    /// QEMU.
    pub process: Process,
    /// Its directory.
    pub scratch: Scratch,
    /// What it is fed.
    pub feed: Feed,
}

/// What a log begins with, from its first events.
fn prologue(first: &[Event]) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    log::encode(&mut bytes, &mut 0, first)?;
    bytes.truncate(PROLOGUE_BYTES);
    Ok(bytes)
}

/// Where a recording without a last snapshot is replayed to. One that QEMU closed itself
/// ends with the guest's instruction that made it exit, which a replay would do again:
/// it is parked before that.
async fn end_without_snapshot(
    store: &StoreClient,
    id: RecordingId,
    row: &v1::RecordingRow,
) -> Result<Position> {
    let whole = Position { icount: row.committed_icount, event: row.committed_events };
    let tail = read_events(store, id, whole.event.saturating_sub(64), whole.event).await?;
    if tail.last().is_none_or(|last| last.body != Body::End) {
        return Ok(whole);
    }
    let is_closing = |event: &&Event| {
        matches!(event.body, Body::End | Body::Qemu(QemuEvent::Shutdown { .. } | QemuEvent::Instruction))
    };
    let closing = tail.iter().rev().take_while(is_closing).count();
    let before = tail.len().checked_sub(closing + 1).map_or(0, |last| tail[last].icount);
    let icount = whole.icount.saturating_sub(1).max(before);
    Ok(Position { icount, event: whole.event - closing as u64 })
}

/// In a range's end: the main loop must not wake there, whatever the host is busy with.
const STRICT: u64 = 1 << 63;

/// Where the main loop may sleep. `is_strict`: nobody stops this replay in the middle.
fn write_holds(scratch: &Scratch, feed: &Feed, is_strict: bool) -> Result<PathBuf> {
    let path = scratch.path().join("holds");
    let bytes: Vec<u8> = feed
        .vcpu_only
        .iter()
        .flat_map(|range| {
            let flag = if range.has_shutdown && is_strict { STRICT } else { 0 };
            [range.from.to_ne_bytes(), (range.to | flag).to_ne_bytes()].concat()
        })
        .collect();
    std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

async fn read_events(store: &StoreClient, id: RecordingId, from: u64, to: u64) -> Result<Vec<Event>> {
    if from >= to {
        return Ok(vec![]);
    }
    let chunks = store.read(id, from, to).await.context("read the log")?;
    let mut events = vec![];
    for chunk in &chunks {
        let first = chunk.header.first_event;
        let found = chunk.events().with_context(|| format!("chunk at event {first}"))?;
        let wanted = (from.saturating_sub(first) as usize).min(found.len())
            ..(to.saturating_sub(first) as usize).min(found.len());
        events.extend_from_slice(&found[wanted]);
    }
    ensure!(events.len() as u64 == to - from, "the log has {} of {} events", events.len(), to - from);
    Ok(events)
}
