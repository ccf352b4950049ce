//! What idle time costs a replay.

use super::Bench;
use super::engine::Guest;
use crate::bench::cost::middle;
use anyhow::Result;
use heddle_proto::manifest::Sleep;

/// Seconds that the guest sleeps where idle time is jumped over, when it is recorded.
const JUMPED_SECONDS: u64 = 60;
/// A replay takes at most so much of the time that its guest slept.
const TARGET: &str = "<= 0.05";
const NO_TARGET: &str = "for information";

/// Replays a guest that sleeps; recorded in no time, and in real time.
pub(super) async fn idle(bench: &mut Bench<'_>) -> Result<()> {
    let real = bench.command.idle_seconds;
    for (sleep, seconds, how) in [(Sleep::Off, JUMPED_SECONDS, "off"), (Sleep::On, real, "on")] {
        let guest = Guest::idle(seconds);
        let made = bench.recorder.record(&guest, "idle", sleep, 0).await?;
        let mut replays = vec![];
        for _ in 0..bench.command.runs {
            replays.push(bench.recorder.replay(made.id).await?.engine.wall);
        }
        bench.recorder.delete(made.id).await?;
        let (replayed, idle) = (middle(replays), seconds as f64);
        let name = format!("idle guest, --sleep {how}");
        let mut row = |what: &str, ours: f64, peer: &str, theirs: f64, unit: &str, target: &str| {
            bench.rows.row(&format!("{name}, {what}"), ours, peer, theirs, unit, target);
        };
        row("recorded", made.guest.wall, "idle time", idle, "s", NO_TARGET);
        row("replayed", replayed * 1e3, "idle time", idle * 1e3, "ms", TARGET);
        row("replay of an idle second", replayed / idle * 1e3, "one second", 1e3, "ms", NO_TARGET);
        row("idle time replayed a second", idle / replayed.max(1e-9), "real time", 1.0, "s", NO_TARGET);
    }
    Ok(())
}
