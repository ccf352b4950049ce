//! What recording, snapshots, replaying and seeking cost, of the computing guest and of Linux.

use super::engine::{Guest, Made, Replayed, bare};
use super::{Bench, NO_LINUX, NO_PEER, peer};
use crate::bench::cost::{Cost, least, middle, timed};
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

/// What was measured of one guest.
#[derive(Default)]
struct Measured {
    without: Vec<Cost>,
    recorded: Vec<Made>,
    with_snapshots: Vec<Made>,
    replayed: Vec<Replayed>,
    /// Instructions of the guest without a recording.
    instructions: u64,
}

async fn cost_of(bench: &mut Bench<'_>, guest: &Guest) -> Result<()> {
    // Once before, so that nothing is stored or touched for the first time while it counts.
    let mut measured = Measured { instructions: bare(guest)?.instructions, ..Measured::default() };
    let first = bench.recorder.record(guest, guest.name, Sleep::Off, 0).await?;
    bench.recorder.delete(first.id).await?;
    for _ in 0..bench.command.runs {
        measured.without.push(bare(guest)?.cost);
        let made = bench.recorder.record(guest, guest.name, Sleep::Off, 0).await?;
        measured.replayed.push(bench.recorder.replay(made.id).await?);
        bench.recorder.delete(made.id).await?;
        measured.recorded.push(made);
        let made = bench.recorder.record(guest, guest.name, Sleep::Off, SNAPSHOT_EVERY).await?;
        bench.recorder.delete(made.id).await?;
        measured.with_snapshots.push(made);
    }
    measured.rows(bench, guest);
    Ok(())
}

impl Measured {
    fn rows(&self, bench: &mut Bench<'_>, guest: &Guest) {
        let of = |runs: &[Made], cost: fn(&Made) -> Cost| least(&runs.iter().map(cost).collect::<Vec<_>>());
        let without = least(&self.without);
        let recorded = of(&self.recorded, |made| made.guest);
        let whole = of(&self.recorded, |made| made.whole);
        let with_store =
            of(&self.recorded, |made| Cost { cpu: made.whole.cpu + made.store_cpu, ..made.whole });
        let snapshots = of(&self.with_snapshots, |made| made.guest);
        let engine = least(&self.replayed.iter().map(|replayed| replayed.engine).collect::<Vec<_>>());
        let fetched = least(&self.replayed.iter().map(|replayed| replayed.whole).collect::<Vec<_>>());
        let icount = middle(self.recorded.iter().map(|made| made.icount as f64).collect());
        let mut row = |what: &str, ours: f64, peer: &str, theirs: f64, unit: &str, target: &str| {
            bench.rows.row(&format!("{}, {what}", guest.name), ours, peer, theirs, unit, target);
        };
        let (peer, info) = ("without recording", "for information");
        row("recorded, CPU", recorded.cpu, peer, without.cpu, "CPU s", "<= 1.02");
        row("recorded, wall", recorded.wall, peer, without.wall, "s", "<= 1.02");
        row("recorded, CPU, the store's and its files", with_store.cpu, peer, without.cpu, "CPU s", info);
        row("recorded, wall, its files stored", whole.wall, peer, without.wall, "s", info);
        row("instructions", icount / 1e6, peer, self.instructions as f64 / 1e6, "million", info);
        let peer = "recorded without snapshots";
        row("a snapshot every 100 M, CPU", snapshots.cpu, peer, recorded.cpu, "CPU s", "<= 1.03");
        row("a snapshot every 100 M, wall", snapshots.wall, peer, recorded.wall, "s", info);
        row("replayed", engine.wall, "recorded", recorded.wall, "s", "<= 1");
        row("replayed, fetched from the store", fetched.wall, "recorded", recorded.wall, "s", info);
    }
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
