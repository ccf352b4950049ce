//! Replaying a span of a QEMU recording: from power-on or a snapshot, to the next
//! snapshot or the end, parked there, and judged by position, roles and digest.

use crate::qemu::builds::QemuBuild;
use crate::qemu::process::Process;
use crate::qemu::qmp::Qmp;
use crate::qemu::scratch::Scratch;
use crate::qemu::snapshot::{Captured, Tracker, capture};
use crate::qemu::span::{QemuSpan, Run};
use crate::qemu::stepped::pc_of;
use crate::replay::{Control, Replayed};
use anyhow::{Context, Result, bail};
use heddle_proto::qemu::RoleSource;
use heddle_proto::verdict::{Proof, Side, TaskResult};
use heddle_proto::{Body, Divergence, DivergenceKind, Event, Outcome, Position, Role, Verdict};
use heddle_replay_engine::qemu::feed::Feed;
use heddle_replay_engine::qemu::roles::{Marks, is_pinned};
use heddle_replay_engine::qemu::vmstate::COVERAGE;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(2);
const SAVE: Duration = Duration::from_secs(10);
/// No progress in the log for so long: the icount is asked for.
const ASK: Duration = Duration::from_millis(700);
/// How often a QEMU without the tap is asked for its icount, and how long it stands still
/// at the last one before that is the end.
const ASK_WITHOUT_TAP: Duration = Duration::from_millis(20);
const REST: Duration = Duration::from_secs(2);
/// No progress in icount for so long is a stall.
const STALL: Duration = Duration::from_secs(8);
const CONSOLE_BYTES_MAX: u64 = 64 << 20;

/// Watches a replay through the tap.
struct Watch<'a> {
    span: &'a QemuSpan,
    feed: &'a Feed,
    marks: Marks,
    /// Not guessed by rule: those are no measure.
    has_true_roles: bool,
    /// Events whose role was looked at.
    seen: usize,
    role_checked: u64,
    role_mismatches: u64,
    checkpoints: BTreeMap<String, BTreeMap<String, u64>>,
    first_mismatch: Option<(usize, Role)>,
}

impl<'a> Watch<'a> {
    fn new(span: &'a QemuSpan, feed: &'a Feed) -> Watch<'a> {
        Watch {
            span,
            feed,
            marks: Marks::default(),
            has_true_roles: span.spec().is_ok_and(|spec| spec.roles == RoleSource::Tap),
            seen: 0,
            role_checked: 0,
            role_mismatches: 0,
            checkpoints: BTreeMap::new(),
            first_mismatch: None,
        }
    }

    fn event(&self, place: usize) -> (u64, &'a Event) {
        let index = self.feed.places[place].event;
        (index, &self.span.events[(index - self.span.from.event) as usize])
    }

    /// Takes what the tap has seen up to `offset`. Whoever reads behind an event has
    /// handled it; the last event before a cut has no such reader.
    fn take(&mut self, process: &mut Process, offset: u64) -> Result<()> {
        for (from, thread) in process.ring.take_marks()? {
            if from >= self.feed.offset {
                self.marks.push(from, thread);
            }
        }
        let handled = self.feed.handled(offset);
        while self.seen < handled {
            let place = self.seen;
            self.seen += 1;
            let (_, event) = self.event(place);
            let thread = self.marks.at(self.feed.places[place].end);
            let is_last = place + 1 == self.feed.places.len();
            let Some(role) = thread.and_then(|thread| thread.role()) else { continue };
            if is_last || !self.has_true_roles || !is_pinned(&event.body) {
                continue;
            }
            if let Body::Checkpoint(kind) = &event.body {
                let roles = self.checkpoints.entry(format!("{kind:?}")).or_default();
                *roles.entry(role.to_string()).or_default() += 1;
            }
            self.role_checked += 1;
            if role != event.role {
                self.role_mismatches += 1;
                self.first_mismatch.get_or_insert((place, role));
            }
        }
        Ok(())
    }

    fn divergence(&self, place: usize, kind: DivergenceKind, found: Side, pc: u64) -> Divergence {
        let place = place.min(self.feed.places.len().saturating_sub(1));
        let (position, expected) = if self.feed.places.is_empty() {
            let what = "the end of the log".to_string();
            (self.span.to, Side { what, role: None, icount: self.span.to.icount })
        } else {
            let (index, event) = self.event(place);
            let what = event.body.to_string();
            let position = Position { icount: event.icount, event: index };
            (position, Side { what, role: Some(event.role), icount: event.icount })
        };
        Divergence { kind, position, expected, found, last_good: self.span.from, pc, hart: None }
    }
}

/// How far a replay got.
enum End {
    /// Parked behind the last event.
    Parked,
    /// It stands still: icount, and what QEMU says.
    Stuck(u64),
    /// QEMU ended: how, and what it said.
    Ended(String),
    /// An event was handled by the wrong thread.
    WrongRole,
}

/// Replays a span and judges it. Called from a thread that lives as long.
pub fn replay(span: &QemuSpan, build: &QemuBuild, control: &Control) -> Result<Replayed> {
    let began = Instant::now();
    let mut started = span.start(build, Run { is_pinned: true, is_stopped: false })?;
    let started_ms = began.elapsed().as_millis() as u64;
    let feed = std::mem::take(&mut started.feed);
    let mut watch = Watch::new(span, &feed);
    let mut qmp = None;
    let end = if build.is_tapped {
        follow(&mut started.process, &mut watch, &mut qmp, control)?
    } else {
        follow_icount(&mut started.process, &mut watch, &mut qmp, control)?
    };
    let followed_ms = began.elapsed().as_millis() as u64;
    let mut captured = None;
    let outcome = match end {
        End::WrongRole => {
            let (place, role) = watch.first_mismatch.context("there is one")?;
            let (_, event) = watch.event(place);
            let found = Side { what: event.body.to_string(), role: Some(role), icount: event.icount };
            Outcome::Diverged(Box::new(watch.divergence(place, DivergenceKind::WrongRole, found, 0)))
        }
        End::Stuck(icount) => {
            let pc = stuck_at(&mut started.process, &mut qmp);
            let what = "stuck, waiting for it".to_string();
            let found = Side { what, role: None, icount };
            Outcome::Diverged(Box::new(watch.divergence(watch.seen, DivergenceKind::Stall, found, pc)))
        }
        End::Ended(said) => {
            let kind = match said.as_str() {
                said if said.contains("error reading the replay data") => DivergenceKind::LogEndedEarly,
                said if said.contains("in the replay log") || said.contains("event kind") => {
                    DivergenceKind::WrongKind
                }
                said => bail!("QEMU ended in the middle of a replay: {said}"),
            };
            let last = feed.places.len().checked_sub(1);
            let icount = last.map_or(span.to.icount, |last| watch.event(watch.seen.min(last)).1.icount);
            let found = Side { what: said, role: None, icount };
            Outcome::Diverged(Box::new(watch.divergence(watch.seen, kind, found, 0)))
        }
        End::Parked => {
            started.process.unpin();
            let qmp = connected(&mut started.process, &mut qmp)?;
            tracing::debug!(connected_ms = began.elapsed().as_millis() as u64, "connected");
            let (outcome, state) = judge_parked(qmp, &watch, &started.scratch)?;
            captured = state;
            outcome
        }
    };
    let judged_ms = began.elapsed().as_millis() as u64;
    tracing::debug!(started_ms, followed_ms, judged_ms, from = span.from.icount, "replayed a span");
    let console = console(&started.scratch)?;
    let reached = match &outcome {
        Outcome::Diverged(divergence) => {
            Position { icount: divergence.found.icount, event: divergence.position.event }
        }
        Outcome::Match => span.to,
    };
    let coverage = if span.digest.is_some() {
        COVERAGE.to_string()
    } else {
        "icount, events and roles; the recording has no digest at its end".to_string()
    };
    let coverage = match (build.is_tapped, watch.has_true_roles) {
        (true, true) => coverage,
        (true, false) => format!("{coverage}; roles were recorded by rule and not checked"),
        (false, _) if span.digest.is_some() => format!("{coverage}; without the tap, roles were not checked"),
        (false, _) => "icount alone: no tap, and no digest at the end".to_string(),
    };
    let verdict = Verdict {
        outcome,
        from: span.from,
        to: reached,
        instructions: reached.icount.saturating_sub(span.from.icount),
        events: watch.seen as u64,
        role_checked: watch.role_checked,
        role_mismatches: watch.role_mismatches,
        checkpoints: watch.checkpoints,
        digest: captured.as_ref().map(|state: &Captured| state.digest()),
        coverage,
        proof: if span.from == Position::default() && span.is_last { Proof::Whole } else { Proof::Spans },
    };
    Ok(Replayed { result: TaskResult::Replay(verdict), console })
}

fn connected<'q>(process: &mut Process, qmp: &'q mut Option<Qmp>) -> Result<&'q mut Qmp> {
    if qmp.is_none() {
        *qmp = Some(process.qmp()?);
    }
    qmp.as_mut().context("it was just connected")
}

/// Follows a replay until it parks, stands still, ends, or leaves its roles.
fn follow(process: &mut Process, watch: &mut Watch, qmp: &mut Option<Qmp>, control: &Control) -> Result<End> {
    let stall = control.stall_after.unwrap_or(STALL);
    let end = watch.feed.end_offset();
    let (mut last_offset, mut last_icount) = (0, 0);
    let (mut moved, mut asked) = (Instant::now(), Instant::now());
    loop {
        if control.cancel.load(Ordering::Relaxed) {
            bail!("the task was cancelled");
        }
        let status = process.try_wait()?;
        let offset = process.ring.offset()?;
        watch.take(process, offset)?;
        if watch.first_mismatch.is_some() {
            return Ok(End::WrongRole);
        }
        if offset > end {
            return Ok(End::Parked);
        }
        if let Some(status) = status {
            return Ok(End::Ended(format!("{} ({status})", process.said())));
        }
        if offset != last_offset {
            last_offset = offset;
            moved = Instant::now();
            asked = moved;
            if let Some(place) = watch.seen.checked_sub(1) {
                control.progress.store(watch.event(place).1.icount, Ordering::Relaxed);
            }
        } else if asked.elapsed() > ASK {
            // A guest that computes reads nothing for long; only its icount tells.
            asked = Instant::now();
            let next = (watch.seen < watch.feed.places.len()).then(|| watch.event(watch.seen));
            tracing::debug!(
                ?next,
                offset,
                still_ms = moved.elapsed().as_millis() as u64,
                "the log stands still"
            );
            if let Ok(icount) = connected(process, qmp).and_then(Qmp::icount)
                && icount != last_icount
            {
                last_icount = icount;
                moved = Instant::now();
                control.progress.store(icount, Ordering::Relaxed);
            }
        }
        if moved.elapsed() > stall {
            return Ok(End::Stuck(last_icount));
        }
        std::thread::sleep(POLL);
    }
}

/// Follows a replay that has no tap, by its icount alone.
fn follow_icount(
    process: &mut Process,
    watch: &mut Watch,
    qmp: &mut Option<Qmp>,
    control: &Control,
) -> Result<End> {
    let stall = control.stall_after.unwrap_or(STALL);
    let mut last_icount = u64::MAX;
    let mut moved = Instant::now();
    loop {
        if control.cancel.load(Ordering::Relaxed) {
            bail!("the task was cancelled");
        }
        if let Some(status) = process.try_wait()? {
            return Ok(End::Ended(format!("{} ({status})", process.said())));
        }
        if let Ok(icount) = connected(process, qmp).and_then(Qmp::icount)
            && icount != last_icount
        {
            last_icount = icount;
            moved = Instant::now();
            control.progress.store(icount, Ordering::Relaxed);
            while watch.seen < watch.feed.places.len() && watch.event(watch.seen).1.icount < icount {
                watch.seen += 1;
            }
        }
        // What comes at the last icount needs a moment; the digest tells whether it came.
        if last_icount == watch.span.to.icount && moved.elapsed() > REST {
            watch.seen = watch.feed.places.len();
            return Ok(End::Parked);
        }
        if moved.elapsed() > stall {
            return Ok(End::Stuck(last_icount));
        }
        std::thread::sleep(ASK_WITHOUT_TAP);
    }
}

/// All events are handled: position first, then the digest. Without a digest to
/// compare, nothing is saved: async events may be queued, and stay so.
fn judge_parked(qmp: &mut Qmp, watch: &Watch, scratch: &Scratch) -> Result<(Outcome, Option<Captured>)> {
    let span = watch.span;
    qmp.command("stop", serde_json::json!({}))?;
    tracing::debug!("stopped");
    let icount = qmp.icount()?;
    tracing::debug!("asked its icount");
    if icount != span.to.icount {
        let found = Side { what: "parked".into(), role: None, icount };
        let divergence = watch.divergence(watch.seen, DivergenceKind::WrongIcount, found, 0);
        return Ok((Outcome::Diverged(Box::new(divergence)), None));
    }
    let Some(digest) = span.digest else { return Ok((Outcome::Match, None)) };
    let captured = save(qmp, scratch)?;
    if digest == captured.digest() {
        return Ok((Outcome::Match, Some(captured)));
    }
    let differs = span.differs_from_end(&captured).unwrap_or_else(|error| vec![format!("{error:#}")]);
    let expected = Side { what: format!("digest {}", digest.short()), role: None, icount };
    let what = format!("digest {}, differs in {}", captured.digest().short(), differs.join(", "));
    let found = Side { what, role: None, icount };
    let divergence = Divergence {
        kind: DivergenceKind::State,
        position: span.to,
        expected,
        found,
        last_good: span.from,
        pc: 0,
        hart: None,
    };
    Ok((Outcome::Diverged(Box::new(divergence)), Some(captured)))
}

/// Saves a stopped replay's state and takes it apart.
fn save(qmp: &mut Qmp, scratch: &Scratch) -> Result<Captured> {
    let began = Instant::now();
    qmp.save(VM_STATE_CHECK, SAVE)?;
    tracing::debug!(saved_ms = began.elapsed().as_millis() as u64, "saved a state");
    capture(&mut Tracker::default(), VM_STATE_CHECK, &scratch.vm_state(), &scratch.overlays)
}

/// The name under which a parked state is saved.
const VM_STATE_CHECK: &str = "heddle-check";

/// The guest's program counter, as far as it can be had from a QEMU that is stuck.
fn stuck_at(process: &mut Process, qmp: &mut Option<Qmp>) -> u64 {
    let said = connected(process, qmp).and_then(|qmp| qmp.human("info registers"));
    said.map_or(0, |said| pc_of(&said))
}

/// What a run has printed so far.
pub fn console(scratch: &Scratch) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = vec![];
    let file = File::open(scratch.path().join("console")).context("open the console's file")?;
    file.take(CONSOLE_BYTES_MAX).read_to_end(&mut bytes).context("read the console's file")?;
    Ok(bytes)
}
