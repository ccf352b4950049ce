//! Replaying a span, or comparing two builds over it: what a task asks for.

use crate::blocks::BlockCache;
use anyhow::{Context, Result, anyhow, ensure};
use heddle_proto::verdict::TaskResult;
use heddle_proto::{Chunk, Event, Hash, Manifest, Position, RecordingId, v1};
use heddle_replay_engine::io::{self, ReplayOptions};
use heddle_replay_engine::lockstep::{self, Pair};
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::{Build, Emulator, EventSource, LogEnd, Replayer};
use heddle_storage::StoreClient;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Chunks of a span, decoded one at a time as the replay goes.
struct ChunkSource {
    chunks: VecDeque<Chunk>,
    next_event: u64,
}

impl EventSource for ChunkSource {
    fn next_events(&mut self) -> Result<Option<Vec<Event>>, String> {
        let Some(chunk) = self.chunks.pop_front() else { return Ok(None) };
        let first = chunk.header.first_event;
        let skip = self
            .next_event
            .checked_sub(first)
            .ok_or_else(|| format!("the log has a gap: event {} is followed by {first}", self.next_event))?;
        let mut events = chunk.events().map_err(|e| format!("chunk at event {first}: {e}"))?;
        events.drain(..(skip as usize).min(events.len()));
        self.next_event = chunk.header.end_event();
        Ok(Some(events))
    }
}

/// All that a span's replay needs, fetched.
#[derive(Clone)]
pub struct Span {
    manifest: Manifest,
    images: Images,
    chunks: Vec<Chunk>,
    bounds: v1::SpanBounds,
    end: LogEnd,
    blocks: BlockCache,
}

impl Span {
    /// Fetches what `bounds` names.
    pub async fn fetch(
        store: &StoreClient,
        blocks: &BlockCache,
        id: RecordingId,
        bounds: v1::SpanBounds,
    ) -> Result<Span> {
        let row = store.get(id).await.context("look up the recording")?;
        let manifest = Manifest::decode(&row.manifest)?;
        let (machine, _) = manifest.builtin().context("the recording is QEMU's")?;
        let images = blocks.images(machine).await?;
        let chunks = store.read(id, bounds.from_event, bounds.to_event).await.context("read the log")?;
        let end = match bounds.to_event {
            0 if row.state == "sealed" => LogEnd::Complete,
            0 => LogEnd::Cut,
            event => LogEnd::Before(event),
        };
        Ok(Span { manifest, images, chunks, bounds, end, blocks: blocks.clone() })
    }

    /// What was recorded.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The recorded build.
    pub fn build(&self) -> &str {
        &self.manifest.build
    }

    /// Where the blocks of its snapshots are.
    pub(crate) fn blocks(&self) -> BlockCache {
        self.blocks.clone()
    }

    /// The machine at power-on, about to replay the log from `from` on, which the span must
    /// have, once a snapshot of there has been put in.
    pub(crate) fn emulator_from(&self, build: Build, from: Position) -> Result<Emulator, String> {
        let (spec, positions) = self.manifest.builtin().ok_or("the recording is QEMU's")?;
        let machine = loader::build(spec, &self.images).map_err(|e| e.to_string())?;
        let is_needed = |chunk: &&Chunk| chunk.header.end_event() > from.event;
        let chunks = self.chunks.iter().filter(is_needed).cloned().collect();
        let source = ChunkSource { chunks, next_event: from.event };
        let replayer = Replayer::new(Box::new(source), from, self.end);
        Ok(Emulator::replay(machine, replayer, positions.clone(), spec.sleep, build))
    }

    /// An emulator at the span's beginning. Called from a thread of its own.
    pub fn emulator(&self, build: Build) -> Result<Emulator, String> {
        let from = Position { icount: self.bounds.from_icount, event: self.bounds.from_event };
        let mut emulator = self.emulator_from(build, from)?;
        if !self.bounds.snapshot_root.is_empty() {
            let root = Hash::from_slice(&self.bounds.snapshot_root).map_err(|e| e.to_string())?;
            let found = emulator.restore(root, &mut self.blocks.clone())?;
            if found != from {
                return Err(format!("the snapshot stands at {found}, not at {from}"));
            }
        }
        Ok(emulator)
    }
}

/// How a task may be stopped and watched.
#[derive(Clone, Default)]
pub struct Control {
    /// Give up: the lease is gone.
    pub cancel: Arc<AtomicBool>,
    /// Position reached.
    pub progress: Arc<AtomicU64>,
    /// No progress for so long is a stall.
    pub stall_after: Option<Duration>,
}

impl Control {
    /// As the engine takes it.
    pub(crate) fn options(self) -> ReplayOptions {
        let defaults = ReplayOptions::default();
        ReplayOptions {
            stall_after: self.stall_after.unwrap_or(defaults.stall_after),
            cancel: self.cancel,
            progress: self.progress,
        }
    }
}

/// A finished replay: the verdict, and what the console printed.
pub struct Replayed {
    /// The verdict.
    pub result: TaskResult,
    /// Console bytes.
    pub console: Vec<u8>,
}

/// Replays a span with `build`, on two threads.
pub async fn replay(span: Span, build: Build, control: Control) -> Result<Replayed> {
    let to_digest = span.bounds.to_digest.clone();
    let done = tokio::task::spawn_blocking(move || io::replay(span.emulator(build)?, &control.options()));
    let replay = done.await?.map_err(|error| anyhow!(error))?;
    if replay.verdict.is_match() && !to_digest.is_empty() {
        let expected = Hash::from_slice(&to_digest)?;
        ensure!(
            replay.verdict.digest == Some(expected),
            "the log's digest at the span's end and its snapshot's differ: the recording contradicts itself"
        );
    }
    Ok(Replayed { result: TaskResult::Replay(replay.verdict), console: replay.console })
}

/// Compares the recorded build with `against` over a span, in lockstep.
pub async fn lockstep(
    span: Span,
    against: Build,
    every_instruction: bool,
    control: Control,
) -> Result<TaskResult> {
    let done = tokio::task::spawn_blocking(move || {
        let recorded: Build =
            span.build().parse().map_err(|e: heddle_replay_engine::builds::UnknownBuild| e.to_string())?;
        let make = || Ok(Pair { a: span.emulator(recorded)?, b: span.emulator(against)? });
        let to = if span.bounds.to_icount == 0 { u64::MAX } else { span.bounds.to_icount };
        let is_cancelled = || control.cancel.load(Ordering::Relaxed);
        lockstep::first_difference(make, span.bounds.from_icount, to, every_instruction, &is_cancelled)
    });
    let (finding, replayed_instructions) = done.await?.map_err(|error| anyhow!(error))?;
    Ok(TaskResult::Lockstep { finding, replayed_instructions })
}
