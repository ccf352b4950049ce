//! A replay that is stopped at chosen icounts: for snapshots, hunts and debuggers.

use crate::qemu::builds::QemuBuild;
use crate::qemu::qmp::Qmp;
use crate::qemu::replay::console;
use crate::qemu::snapshot::{Captured, Tracker, capture, discard};
use crate::qemu::span::{QemuSpan, Run, Started};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::time::{Duration, Instant};

/// How long to wait for a stop before the icount is asked for.
const LOOK: Duration = Duration::from_millis(400);
/// No progress in icount for so long: it will not come.
const STUCK: Duration = Duration::from_secs(5);

/// Where a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Stopped where it was to stop.
    There,
    /// It stands still before that, at this icount.
    Stuck(u64),
    /// QEMU ended, saying this.
    Ended(String),
}

/// A stopped replay.
pub struct Stepped {
    started: Started,
    qmp: Qmp,
    /// Instructions executed.
    pub icount: u64,
    saved: u32,
}

impl Stepped {
    /// Starts a span's replay, stopped at its beginning.
    pub fn start(span: &QemuSpan, build: &QemuBuild, is_pinned: bool) -> Result<Stepped> {
        let run = Run { is_pinned, is_stopped: true };
        let mut started = span.start(build, run)?;
        let qmp = started.process.qmp()?;
        Ok(Stepped { started, qmp, icount: span.from.icount, saved: 0 })
    }

    /// Runs to `icount` and stops there.
    pub fn advance(&mut self, icount: u64) -> Result<Reached> {
        if icount <= self.icount {
            return Ok(Reached::There);
        }
        self.try_advance(icount).or_else(|error| {
            // Its monitor fell silent because it ended.
            match self.started.process.end_in_silence()? {
                Some(status) => Ok(Reached::Ended(format!("{} ({status})", self.started.process.said()))),
                None => Err(error),
            }
        })
    }

    fn try_advance(&mut self, icount: u64) -> Result<Reached> {
        self.qmp.events.clear();
        self.qmp.command("replay-break", json!({ "icount": icount }))?;
        self.qmp.command("cont", json!({}))?;
        let (mut last, mut moved) = (self.icount, Instant::now());
        loop {
            if self.qmp.wait_for("STOP", LOOK)? {
                self.icount = self.qmp.icount()?;
                if self.icount >= icount {
                    return Ok(Reached::There);
                }
                // The guest switched itself off first.
                return Ok(Reached::Stuck(self.icount));
            }
            self.forget_marks()?;
            if let Some(status) = self.started.process.try_wait()? {
                return Ok(Reached::Ended(format!("{} ({status})", self.started.process.said())));
            }
            let at = self.qmp.icount()?;
            if at != last {
                (last, moved) = (at, Instant::now());
            } else if moved.elapsed() > STUCK {
                self.icount = at;
                let _ = self.qmp.command("replay-delete-break", json!({}));
                let _ = self.qmp.command("stop", json!({}));
                return Ok(Reached::Stuck(at));
            }
        }
    }

    /// Makes room for the tap's marks, which nobody reads here: without it QEMU would wait.
    pub fn forget_marks(&mut self) -> Result<()> {
        self.started.process.ring.take_marks().map(drop)
    }

    /// All registers of all vCPUs, as QEMU prints them.
    pub fn registers(&mut self) -> Result<String> {
        self.qmp.human("info registers -a")
    }

    /// The instruction at the program counter, disassembled.
    pub fn instruction(&mut self) -> Result<String> {
        let said = self.qmp.human("x /1i $pc")?;
        let line = said.lines().next().unwrap_or_default();
        // "0xffffffff81000000:  90   nop": the bytes are of no use on a card.
        let text = line.split_once(':').map_or(line, |(_, rest)| rest);
        Ok(text.split_whitespace().skip_while(|word| is_hex_byte(word)).collect::<Vec<_>>().join(" "))
    }

    /// The state, taken apart. `None` while async events are queued, with which QEMU
    /// saves nothing.
    pub fn capture(&mut self) -> Result<Option<Captured>> {
        // A name of its own each time: deleting a state would wait for the guest's requests.
        self.saved += 1;
        let name = format!("heddle-{}", self.saved);
        if !self.qmp.try_save(&name)? {
            return Ok(None);
        }
        let (vm_state, overlays) = (self.started.scratch.vm_state(), &self.started.scratch.overlays);
        let captured = capture(&mut Tracker::default(), &name, &vm_state, overlays)?;
        discard(&name, &vm_state)?;
        Ok(Some(captured))
    }

    /// Runs a command of QEMU's monitor.
    pub fn human(&mut self, command: &str) -> Result<String> {
        self.qmp.human(command)
    }

    /// What the guest has printed so far.
    pub fn console(&self) -> Result<Vec<u8>> {
        console(&self.started.scratch)
    }

    /// The process behind it.
    pub fn started(&mut self) -> &mut Started {
        &mut self.started
    }
}

fn is_hex_byte(word: &str) -> bool {
    word.len() == 2 && word.chars().all(|c| c.is_ascii_hexdigit())
}

/// The program counter out of a register dump.
pub fn pc_of(registers: &str) -> u64 {
    ["RIP=", "EIP=", "PC=", "pc "]
        .iter()
        .find_map(|mark| {
            let rest = registers.split(mark).nth(1)?.trim_start();
            let digits: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
            u64::from_str_radix(&digits, 16).ok()
        })
        .unwrap_or(0)
}

/// Names and values of a register dump: `NAME=VALUE`, `NAME VALUE` or `NAME =VALUES`.
pub fn named(registers: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = vec![];
    for line in registers.lines() {
        let line = line.replace(" =", "=");
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut at = 0;
        while at < words.len() {
            match words[at].split_once('=') {
                Some((name, value)) => {
                    let name = if name.is_empty() { "" } else { name };
                    found.push((name.to_string(), value.to_string()));
                }
                None if at + 1 < words.len() && !words[at + 1].contains('=') && line.starts_with(' ') => {
                    found.push((words[at].to_string(), words[at + 1].to_string()));
                    at += 1;
                }
                None => {
                    if let Some((_, value)) = found.last_mut() {
                        value.push(' ');
                        value.push_str(words[at]);
                    } else {
                        found.push((words[at].to_string(), String::new()));
                    }
                }
            }
            at += 1;
        }
    }
    found
}

/// What differs between two register dumps.
pub fn differing(a: &str, b: &str) -> Vec<String> {
    if a == b {
        return vec![];
    }
    let (a, b) = (named(a), named(b));
    let differing = a.iter().zip(&b).filter(|(x, y)| x != y);
    let lines: Vec<String> = differing.map(|((name, x), (_, y))| format!("{name} {x} / {y}")).collect();
    if lines.is_empty() { vec!["registers, in their number".into()] } else { lines }
}

/// Makes snapshots at the icounts in `wanted` (rising, each between two events): QEMU is
/// stopped there and its state taken. `take` gets each. Where async events are queued,
/// the next of its alternatives is taken.
pub fn index(
    span: &QemuSpan,
    build: &QemuBuild,
    wanted: &[Vec<u64>],
    is_cancelled: &dyn Fn() -> bool,
    mut take: impl FnMut(Captured) -> Result<()>,
) -> Result<()> {
    let mut stepped = Stepped::start(span, build, true)?;
    for alternatives in wanted {
        for icount in alternatives {
            if is_cancelled() {
                bail!("the task was cancelled");
            }
            if *icount <= stepped.icount {
                continue;
            }
            match stepped.advance(*icount)? {
                Reached::There => {}
                Reached::Stuck(at) => bail!("the replay is stuck at icount {at}: hunt the recording first"),
                Reached::Ended(said) => bail!("QEMU ended while it replayed: {said}"),
            }
            if let Some(captured) = stepped.capture().context("save the state")? {
                take(captured)?;
                break;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_compared_by_name() {
        let a = "CPU#0\nRAX=0000000000000001 RBX=0000000000000002\nES =0010 00000000 ffffffff 00cf9300\nRIP=0000000000100020 RFL=2";
        let b = a.replace("RBX=0000000000000002", "RBX=0000000000000003").replace("ffffffff", "fffffffe");
        let found = differing(a, &b);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("RBX 0000000000000002 / 0000000000000003"), "{found:?}");
        assert_eq!(pc_of(a), 0x100020);
        assert!(differing(a, a).is_empty());
    }
}
