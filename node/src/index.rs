//! Snapshots of a recording of the built-in machine, made afterwards by a replay.

use crate::live::NewSnapshot;
use crate::replay::{Control, Span};
use anyhow::{Context, Result, anyhow, bail, ensure};
use heddle_proto::verdict::TaskResult;
use heddle_replay_engine::{Build, io};
use heddle_storage::StoreClient;
use std::sync::atomic::Ordering;

/// Replays `span`, a recording from power-on to its end, with `build`, and stores up to `count`
/// snapshots of it. Only a replay that matches stores any: until its end they stay in memory,
/// each but the first as what has changed since the one before.
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
    let cancel = control.cancel.clone();
    let done = tokio::task::spawn_blocking(move || {
        let mut emulator = span.emulator(build)?;
        emulator.capture_at(wanted);
        io::replay(emulator, &control.options())
    });
    let replay = done.await?.map_err(|error| anyhow!(error))?;
    if let Some(divergence) = replay.verdict.divergence() {
        bail!("the recording does not replay, so no snapshot of it was stored: {divergence}");
    }
    ensure!(!cancel.load(Ordering::Relaxed), "cancelled");
    let mut made = vec![];
    // In the order taken: a snapshot's blocks include none of earlier ones.
    for snapshot in replay.snapshots {
        made.push(snapshot.position.icount);
        NewSnapshot::from(snapshot).store(store, id, row.epoch).await.context("store a snapshot")?;
    }
    Ok(TaskResult::Index { snapshots: made })
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
