//! `heddle bench machine`: how fast the built-in machine is, and what recording, replaying, idling,
//! snapshots and seeking cost on it, beside QEMU's riscv64 with the same guests.
//!
//! Guests run, record and replay in this process, so that what it took is known without the
//! start of a process; the store is three replicas in processes of their own.

mod compute;
mod engine;
mod idle;
mod peer;
mod recording;
mod snapshots;
mod speed;

use super::peers::installed;
use super::{Rows, start_cluster};
use crate::args::{BenchMachine, Format};
use crate::cluster::Cluster;
use crate::exit::OK;
use anyhow::{Context, Result};
use engine::{Guest, Recorder};
use std::path::PathBuf;

/// The parts that need a store.
const WITH_STORE: [&str; 4] = ["boot", "recording", "idle", "seek"];
/// Why rows of QEMU are missing.
const NO_PEER: &str = "not installed: apt-get install qemu-system-misc";
/// Why rows of Linux are missing.
const NO_LINUX: &str = "the guest is not there: tests/riscv-guest makes it, --guest names it";

/// What the parts share that need a store.
struct Bench<'a> {
    command: &'a BenchMachine,
    recorder: Recorder,
    /// Debian's Linux, if its files are there.
    linux: Option<Guest>,
    dir: PathBuf,
    rows: Rows,
}

/// Runs the benchmark of the built-in machine.
pub async fn machine(command: BenchMachine, format: Format) -> Result<u8> {
    let dir = tempfile::tempdir().context("make a directory")?;
    let linux = Guest::linux(&command.guest)?;
    if !installed(peer::PROGRAM) {
        eprintln!("  {} is {NO_PEER}; the rows beside it are missing", peer::PROGRAM);
    }
    if linux.is_none() {
        eprintln!("  Linux in {}: {NO_LINUX}; its rows are missing", command.guest.display());
    }
    let is_wanted = |part: &str| command.part.is_empty() || command.part.iter().any(|wanted| wanted == part);
    let mut rows = Rows::default();
    // Before the store runs, so that it takes nothing from them.
    if is_wanted("speed") {
        speed::speed(&mut rows, &command, dir.path())?;
    }
    if is_wanted("snapshots") {
        snapshots::snapshots(&mut rows)?;
    }
    if WITH_STORE.into_iter().any(is_wanted) {
        // What replays is this process.
        let cluster = start_cluster(&dir.path().join("cluster"), 0).await?;
        let recorder = Recorder::new(Cluster::in_dir(cluster.dir())?);
        let mut bench = Bench { command: &command, recorder, linux, dir: dir.path().into(), rows };
        if is_wanted("boot") {
            recording::boot(&mut bench).await?;
        }
        if is_wanted("recording") {
            recording::cost(&mut bench).await?;
        }
        if is_wanted("idle") {
            idle::idle(&mut bench).await?;
        }
        if is_wanted("seek") {
            recording::seek(&mut bench, cluster.dir()).await?;
        }
        rows = bench.rows;
        cluster.stop().await;
    }
    rows.print("machine", format)?;
    Ok(OK)
}
