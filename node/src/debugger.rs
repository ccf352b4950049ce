//! What a debugger needs of a stored recording, and a replay of a part of it.

use crate::blocks::BlockCache;
use crate::replay::{Control, Span};
use anyhow::{Context, Result, anyhow, ensure};
use heddle_proto::verdict::Proof;
use heddle_proto::{Hash, Position, RecordingId, Verdict, v1};
use heddle_replay_engine::debugger::Origin;
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::{Build, Emulator, schedule};
use heddle_storage::StoreClient;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// Instructions between two looks at whether a replay is still wanted.
const RUN: u64 = 1 << 20;

/// Checkpoints run, by kind and role.
type Checkpoints = BTreeMap<String, BTreeMap<String, u64>>;

/// A whole recording of the built-in machine, to be gone through in any order.
pub struct Recorded {
    span: Span,
    blocks: BlockCache,
    build: Build,
    snapshots: Vec<(Position, Hash)>,
}

impl Recorded {
    /// Fetches the log; snapshots come as they are wanted.
    pub async fn fetch(store: &StoreClient, blocks: &BlockCache, id: RecordingId) -> Result<Recorded> {
        let span = Span::fetch(store, blocks, id, v1::SpanBounds::default()).await?;
        let build: Build = span.build().parse()?;
        let row = store.get(id).await.context("look up the recording's snapshots")?;
        let snapshots = usable(&row).map(place).collect::<Result<Vec<_>>>()?;
        Ok(Recorded { blocks: span.blocks(), span, build, snapshots })
    }
}

impl BlockSource for Recorded {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        self.blocks.blocks(hashes)
    }
}

impl Origin for Recorded {
    fn emulator(&mut self, from: Position) -> Result<Emulator, String> {
        self.span.emulator_from(self.build, from)
    }

    fn snapshots(&self) -> Vec<(Position, Hash)> {
        self.snapshots.clone()
    }
}

/// Only what is committed may be used: a snapshot can be ahead of its chunks.
fn usable(row: &v1::RecordingRow) -> impl Iterator<Item = &v1::SnapshotRow> {
    let (events, end) = (row.committed_events, row.committed_icount);
    row.snapshots
        .iter()
        .filter(move |snapshot| snapshot.event < events && (1..end).contains(&snapshot.icount))
}

fn place(snapshot: &v1::SnapshotRow) -> Result<(Position, Hash)> {
    let position = Position { icount: snapshot.icount, event: snapshot.event };
    Ok((position, Hash::from_slice(&snapshot.root)?))
}

/// Where a replay that is wanted from icount `from` on begins: the last snapshot before it.
pub fn bounds_before(row: &v1::RecordingRow, from: u64) -> v1::SpanBounds {
    let before = usable(row).filter(|snapshot| snapshot.icount <= from);
    bounds_from(before.max_by_key(|snapshot| snapshot.icount))
}

/// From a snapshot to the recording's end; without one, from its beginning.
pub fn bounds_from(snapshot: Option<&v1::SnapshotRow>) -> v1::SpanBounds {
    snapshot.map_or_else(v1::SpanBounds::default, |snapshot| v1::SpanBounds {
        snapshot_root: snapshot.root.clone(),
        from_icount: snapshot.icount,
        from_event: snapshot.event,
        ..Default::default()
    })
}

/// What a replay has counted so far.
struct Counts {
    position: Position,
    role_checked: u64,
    role_mismatches: u64,
    checkpoints: Checkpoints,
}

impl Counts {
    fn of(emulator: &mut Emulator) -> Counts {
        let position = emulator.position();
        let replayer = emulator.replayer();
        let (role_checked, role_mismatches) =
            replayer.as_ref().map_or((0, 0), |replayer| (replayer.role_checked, replayer.role_mismatches));
        let checkpoints = replayer.map_or_else(Checkpoints::new, |replayer| replayer.checkpoints());
        Counts { position, role_checked, role_mismatches, checkpoints }
    }
}

/// Replays a span from its snapshot to icount `to`, or to the log's end if that comes first,
/// and judges `from..=to`: the verdict counts what lies in there. A divergence on the way to
/// `from` is a divergence, too.
pub async fn replay_range(span: Span, build: Build, from: u64, to: u64, control: Control) -> Result<Verdict> {
    ensure!(from <= to, "the range {from}..{to} is none");
    let done = tokio::task::spawn_blocking(move || {
        let mut emulator = span.emulator(build)?;
        run_to(&mut emulator, from, &control)?;
        let before = Counts::of(&mut emulator);
        run_to(&mut emulator, to, &control)?;
        let is_at_end = emulator.has_ended();
        // Short of the log's end nothing else ends a replay.
        if !is_at_end {
            emulator.conclude();
        }
        let verdict = emulator.verdict()?;
        let is_whole = is_at_end && before.position == Position::default();
        Ok::<Verdict, String>(Verdict {
            proof: if is_whole { verdict.proof } else { Proof::Spans },
            ..since(before, verdict)
        })
    });
    done.await?.map_err(|error| anyhow!(error))
}

/// Runs in one thread, roles taking turns: what happens is the same as on two.
fn run_to(emulator: &mut Emulator, icount: u64, control: &Control) -> Result<(), String> {
    while !emulator.has_ended() && emulator.machine().icount() < icount {
        if control.cancel.load(Ordering::Relaxed) {
            return Err("cancelled".into());
        }
        let next = icount.min(emulator.machine().icount().saturating_add(RUN));
        schedule::advance(emulator, next);
        emulator.machine_mut().take_console();
        emulator.machine_mut().take_frames();
        control.progress.store(emulator.machine().icount(), Ordering::Relaxed);
    }
    Ok(())
}

/// The verdict without what was counted before.
fn since(before: Counts, mut verdict: Verdict) -> Verdict {
    let (from, to) = (before.position, verdict.to);
    verdict.from = from;
    verdict.instructions = to.icount - from.icount;
    verdict.events = to.event - from.event;
    verdict.role_checked -= before.role_checked;
    verdict.role_mismatches -= before.role_mismatches;
    for (kind, roles) in before.checkpoints {
        let counted = verdict.checkpoints.entry(kind).or_default();
        for (role, count) in roles {
            let left = counted.get(&role).copied().unwrap_or(0).saturating_sub(count);
            counted.insert(role, left);
        }
        counted.retain(|_, count| *count > 0);
    }
    verdict.checkpoints.retain(|_, roles| !roles.is_empty());
    verdict
}
