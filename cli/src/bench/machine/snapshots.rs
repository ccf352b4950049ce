//! What a snapshot costs by the pages that were written since the last: the engine alone.

use super::engine::Guest;
use crate::bench::Rows;
use crate::bench::cost::middle;
use crate::commands::record::positions;
use anyhow::{Result, bail, ensure};
use heddle_proto::manifest::Sleep;
use heddle_replay_engine::machine::{Exit, Machine, Nobody};
use heddle_replay_engine::{AsyncQueue, Emulator};
use std::time::Instant;

/// Dirty pages; the first is what the others are compared with. Every third page of 256 MiB is
/// more than the last.
const PAGES: [u64; 4] = [256, 16, 4096, 16_384];
/// Pages of all snapshots of a kind, which bounds how many there are.
const PAGES_IN_ALL: u64 = 1 << 16;
/// Behind the reset vector and what the guest does before its first round.
const BEGINNING: u64 = 100;

/// Snapshots of a machine with 256 MiB, after so many pages were written.
pub fn snapshots(rows: &mut Rows) -> Result<()> {
    let fixed = seconds(0)?;
    let mut compared = 0.0;
    for pages in PAGES {
        let seconds = seconds(pages)?;
        let each = (seconds - fixed) / pages as f64 * 1e6;
        if pages == PAGES[0] {
            compared = each;
            let peer = format!("of {pages} dirty pages");
            let target = "for information";
            rows.row("snapshot of no dirty page", fixed * 1e6, &peer, seconds * 1e6, "us", target);
        }
        let target = if pages > PAGES[0] { "<= 1.5" } else { "for information" };
        let (name, peer) =
            (format!("snapshot of {pages} dirty pages, each"), format!("of {} dirty pages", PAGES[0]));
        rows.row(&name, each, &peer, compared, "us", target);
    }
    Ok(())
}

/// Seconds of a snapshot after `pages` were written, the middle of several.
fn seconds(pages: u64) -> Result<f64> {
    let machine = Guest::writing(pages).machine()?;
    let mut emulator = Emulator::record(machine, positions(0), Sleep::Off, AsyncQueue::default());
    // The first has what the guest's beginning writes, too.
    run_to(emulator.machine_mut(), BEGINNING)?;
    write_all(emulator.machine_mut(), pages)?;
    emulator.snapshot();
    let count = (PAGES_IN_ALL / pages.max(1)).clamp(5, 101);
    let mut times = vec![];
    for _ in 0..count {
        write_all(emulator.machine_mut(), pages)?;
        let began = Instant::now();
        let snapshot = emulator.snapshot();
        times.push(began.elapsed().as_secs_f64());
        ensure!(snapshot.blocks.len() as u64 > pages, "{} blocks are too few", snapshot.blocks.len());
    }
    Ok(middle(times))
}

/// Has the guest write once to each of its pages, all in a round that it goes over and over:
/// wherever a round begins, it is five instructions a page and three more.
fn write_all(machine: &mut Machine, pages: u64) -> Result<()> {
    if pages == 0 {
        return Ok(());
    }
    let until = machine.icount() + 5 * pages + 3;
    run_to(machine, until)
}

fn run_to(machine: &mut Machine, until: u64) -> Result<()> {
    loop {
        match machine.run(until, &mut Nobody) {
            Exit::Budget => return Ok(()),
            Exit::Work => {}
            other => bail!("the writing guest has stopped: {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use heddle_proto::manifest::Positions;

    #[test]
    fn a_round_writes_to_each_page_once() {
        for pages in [1, 16, 4096] {
            let machine = Guest::writing(pages).machine().unwrap();
            let positions =
                Positions { check_every: 1000, digest_every: 1000, snapshot_every: 0, snapshots_at: vec![] };
            let mut emulator = Emulator::record(machine, positions, Sleep::Off, AsyncQueue::default());
            run_to(emulator.machine_mut(), BEGINNING).unwrap();
            write_all(emulator.machine_mut(), pages).unwrap();
            emulator.snapshot();
            for _ in 0..3 {
                write_all(emulator.machine_mut(), pages).unwrap();
                assert_eq!(emulator.machine().ram().dirty().len() as u64, pages);
                assert!(emulator.snapshot().blocks.len() as u64 > pages);
            }
        }
    }
}
