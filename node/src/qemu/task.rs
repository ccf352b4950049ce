//! A task of a QEMU recording's: what a lease asks of a node.

use crate::blocks::BlockCache;
use crate::qemu::builds::QemuBuild;
use crate::qemu::doctor::ensure_able;
use crate::qemu::hunt::{self, Side};
use crate::qemu::replay;
use crate::qemu::snapshot::Captured;
use crate::qemu::span::QemuSpan;
use crate::qemu::stepped;
use crate::replay::Control;
use anyhow::{Context, Result, bail, ensure};
use heddle_proto::qemu::EVENT_COST;
use heddle_proto::verdict::{SideB, TaskResult};
use heddle_proto::{Body, QemuEvent, RecordingId, v1};
use heddle_storage::StoreClient;
use std::sync::atomic::Ordering;
use tokio::runtime::Handle;

/// Further places that are tried where async events are queued.
const ALTERNATIVES: usize = 6;

/// What a node has to run a task with.
#[derive(Clone)]
pub struct Means {
    /// The store.
    pub store: StoreClient,
    /// The node's blocks.
    pub blocks: BlockCache,
    /// The QEMUs it offers.
    pub builds: Vec<QemuBuild>,
}

impl Means {
    fn build(&self, name: &str) -> Result<QemuBuild> {
        let build = self.builds.iter().find(|build| build.name == name).cloned();
        build.with_context(|| format!("this node does not offer {name}"))
    }
}

/// Runs a task.
pub async fn run(means: &Means, task: &v1::Task, control: Control) -> Result<TaskResult> {
    let id = RecordingId::from_slice(&task.recording)?;
    let bounds = task.span.clone().context("the task names no span")?;
    let against = if task.against.is_empty() { &task.build } else { &task.against };
    let build = means.build(against)?;
    ensure_able(&build.name, "replay")?;
    if !bounds.snapshot_root.is_empty() {
        ensure_able(&build.name, "restore")?;
    }
    let began = std::time::Instant::now();
    let span = QemuSpan::fetch(&means.store, &means.blocks, id, bounds).await?;
    tracing::debug!(fetched_ms = began.elapsed().as_millis() as u64, "fetched a span");
    let side_b = side_b(means, &span, &task.side_b).await?;
    match task.kind.as_str() {
        "replay" => {
            let done = tokio::task::spawn_blocking(move || replay::replay(&side_b, &build, &control));
            Ok(done.await??.result)
        }
        "lockstep" => {
            let (recorded, to) = (means.build(&task.build)?, task.span.as_ref().map_or(0, |s| s.to_icount));
            let to = if to == 0 { span.to.icount } else { to.min(span.to.icount) };
            let done = tokio::task::spawn_blocking(move || {
                let a = Side { span, build: recorded };
                let b = Side { span: side_b, build };
                hunt::first_effect(&a, &b, to, &|| control.cancel.load(Ordering::Relaxed))
            });
            let (finding, replayed_instructions) = done.await??;
            Ok(TaskResult::Lockstep { finding, replayed_instructions })
        }
        "index" => index(means, span, build, task.snapshots as usize, control).await,
        other => bail!("this node does not know tasks of kind {other:?} for QEMU"),
    }
}

/// The other side of a hunt: the same span with what was replaced.
async fn side_b(means: &Means, span: &QemuSpan, given: &[u8]) -> Result<QemuSpan> {
    let mut other = span.clone();
    if given.is_empty() {
        return Ok(other);
    }
    let side: SideB = serde_json::from_slice(given).context("the task's other side does not parse")?;
    for (number, image) in &side.files {
        let slot = other.contents.files.get_mut(*number).context("the recording has no such file")?;
        *slot = means.blocks.image(image).await?;
    }
    for (number, image) in &side.disks {
        let slot = other.contents.disks.get_mut(*number).context("the recording has no such disk")?;
        ensure!(slot.len() as u64 == image.bytes, "the other disk has another size");
        *slot = means.blocks.image(image).await?;
    }
    if let Some(log) = side.log {
        other.take_log(&means.store, log).await?;
    }
    Ok(other)
}

/// Makes snapshots with a replay pass, and stores them.
async fn index(
    means: &Means,
    span: QemuSpan,
    build: QemuBuild,
    count: usize,
    control: Control,
) -> Result<TaskResult> {
    let row = means.store.get(span.manifest.id).await?;
    let taken: Vec<u64> = row.snapshots.iter().map(|snapshot| snapshot.icount).collect();
    let wanted = places(&span, count, &taken);
    let (store, runtime, id, epoch) = (means.store.clone(), Handle::current(), span.manifest.id, row.epoch);
    let done = tokio::task::spawn_blocking(move || {
        let mut made = vec![];
        let is_cancelled = || control.cancel.load(Ordering::Relaxed);
        stepped::index(&span, &build, &wanted, &is_cancelled, |captured: Captured| {
            let icount = captured.root.position.icount;
            let event = span.events.partition_point(|event| event.icount <= icount) as u64;
            runtime.block_on(captured.finish(event).store(&store, id, epoch))?;
            made.push(icount);
            Ok(())
        })?;
        anyhow::Ok(made)
    });
    Ok(TaskResult::Index { snapshots: done.await?? })
}

/// Where `count` snapshots cut a recording into parts of equal cost. Each place is in
/// the middle of a run of instructions, where the log alone tells how to go on; no two
/// are in one run, since a state in its middle already knows of the whole run.
fn places(span: &QemuSpan, count: usize, taken: &[u64]) -> Vec<Vec<u64>> {
    let events = &span.events;
    let cost = |at: usize| u128::from(events[at].icount) + at as u128 * u128::from(EVENT_COST);
    let is_free = |at: &usize| {
        let (from, to) = (events[*at].icount, events[at + 1].icount);
        // Not behind a shutdown, whose instructions come after it.
        let is_shutdown = matches!(events[*at].body, Body::Qemu(QemuEvent::Shutdown { .. }));
        to > from + 1 && !is_shutdown && !taken.iter().any(|icount| (from..=to).contains(icount))
    };
    let gaps: Vec<usize> = (0..events.len().saturating_sub(1)).filter(is_free).collect();
    let Some(whole) = events.len().checked_sub(1).map(cost) else { return vec![] };
    let mut next = 0;
    let mut places = vec![];
    for part in 1..=count as u128 {
        let ideal = whole * part / (count as u128 + 1);
        let first = gaps.partition_point(|at| cost(*at) < ideal).saturating_sub(1).max(next);
        // A long run is cut where the ideal is, not at its beginning.
        let place = |at: &usize| {
            let (from, to) = (events[*at].icount, events[at + 1].icount);
            let inside = ideal.saturating_sub(*at as u128 * u128::from(EVENT_COST)) as u64;
            inside.clamp(from + 1, to - 1)
        };
        let alternatives: Vec<u64> = gaps.iter().skip(first).take(ALTERNATIVES).map(place).collect();
        next = first + alternatives.len();
        places.push(alternatives);
    }
    places
}
