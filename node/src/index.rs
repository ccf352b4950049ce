//! Snapshots of a recording of the built-in machine, made afterwards by a replay.

use crate::live::{SnapshotQueue, WaitingSnapshots};
use crate::record::AbortOnDrop;
use crate::replay::{Control, Span};
use anyhow::{Context, Result, anyhow, bail, ensure};
use heddle_proto::verdict::TaskResult;
use heddle_proto::{RecordingId, v1};
use heddle_replay_engine::io::{self, RecordSink};
use heddle_replay_engine::{Build, Snapshot};
use heddle_storage::{StoreClient, StoreError};
use std::sync::atomic::Ordering;

/// Replays `span`, a recording from power-on to its end, with `build`, and stores up to `count`
/// snapshots of it, each but the first as what has changed since the one before. Their blocks go
/// to the store as they are captured, and the replay waits for it where they come too fast; that
/// there are snapshots the recording says once the replay has matched. Of one that has not, blocks
/// stay until the recording is deleted.
///
/// Done again, it makes those that are missing; if none is, it replays nothing. Fails if the
/// replay diverges, gets nowhere or is cancelled, and with the store's errors.
pub async fn index(
    store: &StoreClient,
    span: Span,
    build: Build,
    count: u32,
    control: Control,
) -> Result<TaskResult> {
    let id = span.manifest().id;
    let row = store.get(id).await.context("look up the recording's snapshots")?;
    let (_, positions) = span.manifest().builtin().context("the recording is QEMU's")?;
    let taken: Vec<u64> = row.snapshots.iter().map(|snapshot| snapshot.icount).collect();
    let wanted = places(row.committed_icount, positions.check_every, count, &taken);
    if wanted.is_empty() {
        return Ok(TaskResult::Index { snapshots: vec![] });
    }
    let (queue, waiting) = SnapshotQueue::new();
    let storing = tokio::spawn(store_blocks(store.clone(), id, waiting));
    let _storing = AbortOnDrop(storing.abort_handle());
    let cancel = control.cancel.clone();
    let done = tokio::task::spawn_blocking(move || {
        let mut emulator = span.emulator(build)?;
        emulator.capture_at(wanted);
        io::replay_into(emulator, &control.options(), Box::new(Captured(queue)))
    });
    let verdict = done.await?.map_err(|error| anyhow!(error))?;
    if let Some(divergence) = verdict.divergence() {
        bail!("the recording does not replay, so it gets no snapshots: {divergence}");
    }
    ensure!(!cancel.load(Ordering::Relaxed), "cancelled");
    let rows = storing.await?.context("store a snapshot")?;
    let made = rows.iter().map(|row| row.icount).collect();
    for snapshot in rows {
        store.add_snapshot(id, row.epoch, snapshot).await.context("add a snapshot to the recording")?;
    }
    Ok(TaskResult::Index { snapshots: made })
}

/// Takes a replay's snapshots, and nothing else of it.
struct Captured(SnapshotQueue);

impl RecordSink for Captured {
    fn snapshot(&mut self, snapshot: Snapshot) {
        self.0.push(snapshot.into());
    }

    fn console(&mut self, _bytes: &[u8]) {}

    fn is_full(&self) -> bool {
        self.0.is_full()
    }
}

/// Stores the blocks of snapshots in the order taken: one's include none of earlier ones. Their
/// rows.
async fn store_blocks(
    store: StoreClient,
    id: RecordingId,
    mut snapshots: WaitingSnapshots,
) -> Result<Vec<v1::SnapshotRow>, StoreError> {
    let mut rows = vec![];
    while let Some((snapshot, bytes)) = snapshots.next().await {
        store.put_blocks(id, snapshot.blocks).await?;
        snapshots.done(bytes);
        rows.push(snapshot.row);
    }
    Ok(rows)
}

/// Where `count` snapshots cut a recording of `end` instructions into even parts, as near to
/// that as its checks stand, ascending; without those that are `taken`.
///
/// A span ends where its last event is: a snapshot elsewhere than at a mark of the log would be
/// past the end of the span before it, and the instructions in between in none. A recording
/// with fewer checks than that gets fewer snapshots.
fn places(end: u64, check_every: u64, count: u32, taken: &[u64]) -> Vec<u64> {
    let mut places: Vec<u64> = (1..=u128::from(count))
        .map(|part| (u128::from(end) * part / (u128::from(count) + 1)) as u64)
        .map(|ideal| ideal.saturating_add(check_every / 2) / check_every * check_every)
        .filter(|at| (1..end).contains(at) && !taken.contains(at))
        .collect();
    places.dedup();
    places
}

#[cfg(test)]
mod tests {
    use super::places;

    #[test]
    fn places_are_even_and_at_checks() {
        assert_eq!(places(4_000_000, 1_000_000, 3, &[]), [1_000_000, 2_000_000, 3_000_000]);
        assert_eq!(places(9_999_999, 1000, 2, &[]), [3_333_000, 6_667_000]);
        // More are wanted than there are checks, or there is none.
        assert_eq!(places(2_500_000, 1_000_000, 9, &[]), [1_000_000, 2_000_000]);
        assert_eq!(places(2_000_000, 1_000_000, 9, &[]), [1_000_000]);
        assert!(places(999_999, 1_000_000, 512, &[]).is_empty());
        assert!(places(0, 1_000_000, 512, &[]).is_empty());
        assert!(places(u64::MAX, u64::MAX, 1, &[]).is_empty());
    }

    #[test]
    fn only_missing_snapshots_are_made() {
        let three = places(80_000_000, 1_000_000, 3, &[]);
        assert_eq!(three, [20_000_000, 40_000_000, 60_000_000]);
        assert!(places(80_000_000, 1_000_000, 3, &three).is_empty());
        let others = places(80_000_000, 1_000_000, 7, &three);
        assert_eq!(others, [10_000_000, 30_000_000, 50_000_000, 70_000_000]);
    }
}
