//! The planner: cuts a recording into spans at its snapshots.

use crate::job::Span;
use heddle_proto::v1::RecordingRow;
use heddle_proto::v1::RolePlan;
use heddle_proto::{CheckpointKind, Role};

/// The spans of a recording, `count` of them or as many as its snapshots allow, as
/// even in instructions as the snapshots' places permit.
///
/// `event_cost` is what an event costs in a replay, in instructions: a QEMU's two
/// threads hand over at each.
pub fn spans(row: &RecordingRow, count: usize, event_cost: u64) -> Vec<Span> {
    let end = row.committed_icount;
    let cost = |icount: u64, event: u64| u128::from(icount) + u128::from(event) * u128::from(event_cost);
    let whole = cost(end, row.committed_events);
    // Only what is committed may be used: a snapshot can be ahead of its chunks.
    let cuts: Vec<_> = row
        .snapshots
        .iter()
        .filter(|snapshot| snapshot.event < row.committed_events && (1..end).contains(&snapshot.icount))
        .collect();
    let mut chosen = vec![];
    for i in 1..count.max(1) as u128 {
        let ideal = whole * i / count as u128;
        let best = cuts.iter().enumerate().min_by_key(|(_, cut)| cost(cut.icount, cut.event).abs_diff(ideal));
        chosen.extend(best.map(|(at, _)| at));
    }
    chosen.sort_unstable();
    chosen.dedup();
    let mut spans = vec![Span { instructions: end, ..Span::default() }];
    for at in chosen {
        let cut = cuts[at];
        let last = spans.last_mut().expect("it begins with one");
        last.to_icount = cut.icount;
        last.to_event = cut.event;
        last.to_digest = cut.digest.to_vec();
        last.instructions = cut.icount - last.from_icount;
        spans.push(Span {
            snapshot_root: cut.root.to_vec(),
            from_icount: cut.icount,
            from_event: cut.event,
            instructions: end - cut.icount,
            ..Span::default()
        });
    }
    spans
}

/// Which checkpoint runs on which role: what every recording of the built-in machine has.
pub fn roles() -> Vec<RolePlan> {
    let role = |kind| match kind {
        CheckpointKind::ClockWarpAccount | CheckpointKind::ClockVirtual => Role::Vcpu,
        CheckpointKind::Init
        | CheckpointKind::ClockWarpStart
        | CheckpointKind::ClockHost
        | CheckpointKind::ClockVirtualRt
        | CheckpointKind::Shutdown
        | CheckpointKind::ResetRequested
        | CheckpointKind::SuspendRequested
        | CheckpointKind::Reset => Role::Iothread,
    };
    CheckpointKind::ALL
        .into_iter()
        .map(|kind| RolePlan { checkpoint: format!("{kind:?}"), role: role(kind).to_string() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use heddle_proto::v1::SnapshotRow;

    fn row(icounts: &[u64]) -> RecordingRow {
        RecordingRow {
            committed_icount: 1000,
            committed_events: 100,
            snapshots: icounts
                .iter()
                .map(|icount| SnapshotRow { icount: *icount, event: icount / 10, ..Default::default() })
                .collect(),
            ..Default::default()
        }
    }

    #[test]
    fn spans_meet_and_cover_the_recording() {
        for count in 1..12 {
            let spans = spans(&row(&[100, 250, 300, 480, 510, 700, 990]), count, 0);
            assert!(spans.len() <= count);
            assert_eq!(spans[0].from_icount, 0);
            assert_eq!(spans.last().map(|s| s.to_event), Some(0));
            for pair in spans.windows(2) {
                assert_eq!((pair[0].to_icount, pair[0].to_event), (pair[1].from_icount, pair[1].from_event));
            }
            assert_eq!(spans.iter().map(|s| s.instructions).sum::<u64>(), 1000);
        }
    }

    #[test]
    fn a_snapshot_ahead_of_its_chunks_is_not_used() {
        let mut row = row(&[400, 900]);
        row.committed_events = 50;
        assert_eq!(spans(&row, 3, 0).len(), 2);
        assert_eq!(spans(&row, 1, 0).len(), 1);
    }
}
