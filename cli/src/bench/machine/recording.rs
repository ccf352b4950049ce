//! What recording, snapshots, replaying and seeking cost, of the computing guest and of Linux.

use super::engine::{Guest, Made, Replayed, bare};
use super::{Bench, NO_LINUX, NO_PEER, peer};
use crate::bench::cost::{Cost, middle, middle_pair, timed};
use crate::bench::peers::installed;
use anyhow::{Result, ensure};
use heddle_proto::manifest::Sleep;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::process::Command;

/// Instructions between snapshots, where there are any.
const SNAPSHOT_EVERY: u64 = 100_000_000;
/// Seeks to random places.
const SEEKS: usize = 5;
/// The peer of a recorded boot.
const QEMU_RECORDS: &str = "QEMU -icount shift=0,sleep=on,rr=record";
const RECORDED: &str = "Linux boot, recorded";
const SOUGHT: &str = "Linux boot, state at a random icount";

/// A boot to poweroff, recorded by both, with as many nanoseconds an instruction and without
/// snapshots, which QEMU has none of here.
pub(super) async fn boot(bench: &mut Bench<'_>) -> Result<()> {
    let Some(guest) = bench.linux.clone() else {
        bench.rows.without(RECORDED, QEMU_RECORDS, "<= 3", NO_LINUX);
        return Ok(());
    };
    let guest = Guest { shift: 0, ..guest };
    let log = bench.dir.join("rr.log");
    let icount = format!("shift=0,sleep=on,rr=record,rrfile={}", log.display());
    let (mut ours, mut wholes, mut theirs) = (vec![], vec![], vec![]);
    for _ in 0..bench.command.runs {
        let made = bench.recorder.record(&guest, "boot", Sleep::On, 0).await?;
        bench.recorder.delete(made.id).await?;
        ours.push(made.guest.wall);
        wholes.push(made.whole.wall);
        if installed(peer::PROGRAM) {
            let (cost, console) = peer::run(&guest, &bench.dir, Some(&icount))?;
            ensure!(console.contains("heddle: ready"), "Linux on QEMU did not come up:\n{console}");
            theirs.push(cost.wall);
        }
    }
    if theirs.is_empty() {
        bench.rows.without(RECORDED, QEMU_RECORDS, "<= 3", NO_PEER);
        return Ok(());
    }
    let theirs = middle(theirs);
    bench.rows.row(RECORDED, middle(ours), QEMU_RECORDS, theirs, "s", "<= 3");
    let name = format!("{RECORDED}, its files stored");
    bench.rows.row(&name, middle(wholes), QEMU_RECORDS, theirs, "s", "for information");
    Ok(())
}

/// Both guests by turns: without a recording, recorded, recorded with snapshots, replayed.
pub(super) async fn cost(bench: &mut Bench<'_>) -> Result<()> {
    let compute = Guest::compute(bench.command.iterations);
    cost_of(bench, &compute).await?;
    match bench.linux.clone() {
        Some(linux) => cost_of(bench, &linux).await?,
        None => bench.rows.without(RECORDED, "without recording", "<= 1.02", NO_LINUX),
    }
    Ok(())
}

/// What was measured of one guest, one after the other.
struct Round {
    without: Cost,
    recorded: Made,
    with_snapshots: Made,
    replayed: Replayed,
}

async fn cost_of(bench: &mut Bench<'_>, guest: &Guest) -> Result<()> {
    // Once before, so that nothing is stored or touched for the first time while it counts.
    let instructions = bare(guest)?.instructions;
    let first = bench.recorder.record(guest, guest.name, Sleep::Off, 0).await?;
    bench.recorder.delete(first.id).await?;
    let mut rounds = vec![];
    for _ in 0..bench.command.runs {
        let without = bare(guest)?.cost;
        let recorded = bench.recorder.record(guest, guest.name, Sleep::Off, 0).await?;
        let replayed = bench.recorder.replay(recorded.id).await?;
        bench.recorder.delete(recorded.id).await?;
        let with_snapshots = bench.recorder.record(guest, guest.name, Sleep::Off, SNAPSHOT_EVERY).await?;
        bench.recorder.delete(with_snapshots.id).await?;
        rounds.push(Round { without, recorded, with_snapshots, replayed });
    }
    rows_of(bench, guest, &rounds, instructions);
    Ok(())
}

/// `instructions`: of the guest without a recording.
fn rows_of(bench: &mut Bench<'_>, guest: &Guest, rounds: &[Round], instructions: u64) {
    let mut row = |what: &str, peer: &str, unit: &str, target: &str, of: fn(&Round) -> (f64, f64)| {
        let (ours, theirs) = middle_pair(rounds.iter().map(of).collect());
        bench.rows.row(&format!("{}, {what}", guest.name), ours, peer, theirs, unit, target);
    };
    let (peer, info) = ("without recording", "for information");
    row("recorded, CPU", peer, "CPU s", "<= 1.02", |r| (r.recorded.guest.cpu, r.without.cpu));
    row("recorded, wall", peer, "s", "<= 1.02", |r| (r.recorded.guest.wall, r.without.wall));
    row("recorded, CPU, the store's and its files", peer, "CPU s", info, |r| {
        (r.recorded.whole.cpu + r.recorded.store_cpu, r.without.cpu)
    });
    row("recorded, wall, its files stored", peer, "s", info, |r| (r.recorded.whole.wall, r.without.wall));
    let peer = "recorded without snapshots";
    row("a snapshot every 100 M, CPU", peer, "CPU s", "<= 1.03", |r| {
        (r.with_snapshots.guest.cpu, r.recorded.guest.cpu)
    });
    row("a snapshot every 100 M, wall", peer, "s", info, |r| {
        (r.with_snapshots.guest.wall, r.recorded.guest.wall)
    });
    row("replayed", "recorded", "s", "<= 1", |r| (r.replayed.engine.wall, r.recorded.guest.wall));
    row("replayed, fetched from the store", "recorded", "s", info, |r| {
        (r.replayed.whole.wall, r.recorded.guest.wall)
    });
    let icount = middle(rounds.iter().map(|round| round.recorded.icount as f64).collect());
    let name = format!("{}, instructions", guest.name);
    let unit = "million";
    bench.rows.row(&name, icount / 1e6, "without recording", instructions as f64 / 1e6, unit, info);
}

/// `heddle state` at random icounts of a boot with snapshots: a process each, as a user has it.
pub(super) async fn seek(bench: &mut Bench<'_>, cluster: &Path) -> Result<()> {
    let Some(guest) = bench.linux.clone() else {
        bench.rows.without(SOUGHT, "the whole replay", "for information", NO_LINUX);
        return Ok(());
    };
    let made = bench.recorder.record(&guest, "sought", Sleep::Off, SNAPSHOT_EVERY).await?;
    let replayed = bench.recorder.replay(made.id).await?;
    let mut random = StdRng::seed_from_u64(0);
    let mut times = vec![];
    for _ in 0..SEEKS {
        let at = random.gen_range(1..made.icount).to_string();
        let mut command = Command::new(std::env::current_exe().unwrap_or_else(|_| "heddle".into()));
        command.arg("--cluster").arg(cluster).args(["-o", "json", "state", "sought", "--at", &at]);
        times.push(timed(&mut command)?.0.wall);
    }
    let peer = "the whole replay";
    bench.rows.row(SOUGHT, middle(times), peer, replayed.whole.wall, "s", "for information");
    Ok(())
}
