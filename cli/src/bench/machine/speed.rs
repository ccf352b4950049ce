//! Instructions a second of the computing guest, without a recording, beside QEMU.

use super::compute::checksum;
use super::engine::{Guest, bare};
use super::{NO_PEER, peer};
use crate::args::BenchMachine;
use crate::bench::Rows;
use crate::bench::cost::middle;
use crate::bench::peers::installed;
use anyhow::Result;
use std::path::Path;

/// What the built-in machine should do, in million instructions a second.
const TARGET_MIPS: f64 = 300.0;
/// Less than this after the start was taken off is noise, in seconds.
const SECONDS_MIN: f64 = 1e-3;

/// A way to run QEMU, and what was measured of it.
struct Peer {
    name: &'static str,
    icount: Option<&'static str>,
    target: &'static str,
    /// Wall seconds of a whole run.
    runs: Vec<f64>,
    /// Wall seconds of a run of no iterations.
    starts: Vec<f64>,
    console: String,
}

impl Peer {
    fn new(name: &'static str, icount: Option<&'static str>, target: &'static str) -> Peer {
        Peer { name, icount, target, runs: vec![], starts: vec![], console: String::new() }
    }

    fn run(&mut self, guest: &Guest, nothing: &Guest, dir: &Path) -> Result<()> {
        self.starts.push(peer::run(nothing, dir, self.icount)?.0.wall);
        let (cost, console) = peer::run(guest, dir, self.icount)?;
        self.runs.push(cost.wall);
        self.console = console;
        Ok(())
    }

    /// Seconds without QEMU's start.
    fn seconds(&self) -> f64 {
        (middle(self.runs.clone()) - middle(self.starts.clone())).max(SECONDS_MIN)
    }
}

/// Runs the guest on the built-in machine and on QEMU by turns.
pub fn speed(rows: &mut Rows, command: &BenchMachine, dir: &Path) -> Result<()> {
    let (guest, nothing) = (Guest::compute(command.iterations), Guest::compute(0));
    let mut peers = [
        Peer::new("QEMU without icount", None, "for information"),
        Peer::new("QEMU -icount shift=0,sleep=off", Some("shift=0,sleep=off"), ">= 0.4"),
    ];
    let start = bare(&nothing)?.instructions;
    let first = bare(&guest)?;
    let expected = checksum(&first.console)?;
    let mut seconds = vec![];
    for _ in 0..command.runs {
        seconds.push(bare(&guest)?.cost.wall);
        if installed(peer::PROGRAM) {
            for peer in &mut peers {
                peer.run(&guest, &nothing, dir)?;
            }
        }
    }
    let ours = first.instructions as f64 / middle(seconds) / 1e6;
    rows.row("compute guest", ours, "the target", TARGET_MIPS, "MIPS", ">= 1");
    for peer in &peers {
        if peer.runs.is_empty() {
            rows.without("compute guest", peer.name, peer.target, NO_PEER);
            continue;
        }
        match checksum(&peer.console) {
            Ok(found) if found == expected => {
                // It has the same instructions, but for a few of its reset vector.
                let theirs = (first.instructions - start) as f64 / peer.seconds() / 1e6;
                rows.row("compute guest", ours, peer.name, theirs, "MIPS", peer.target);
            }
            Ok(found) => {
                let why = format!("error: its checksum is {found:016x}, ours {expected:016x}");
                rows.without("compute guest", peer.name, peer.target, &why);
            }
            Err(error) => {
                rows.without("compute guest", peer.name, peer.target, &format!("error: {error:#}"));
            }
        }
    }
    Ok(())
}
