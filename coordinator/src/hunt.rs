//! A hunt, phase by phase: all spans at once, then the bad one in lockstep, then
//! the same again elsewhere. Pure: from the job's results to its next tasks.
//!
//! ```text
//! spans --bad--> narrowing --> repeat --> done     (other build: to the instruction)
//! spans --bad-------------> repeat --> done        (same build: to the interval)
//! spans --none--> tracing --found--> done, masked  (--none--> done, match)
//! ```

use crate::job::{Job, JobState, Span, Task, TaskState, Work};
use heddle_proto::verdict::{Finding, TaskResult};
use heddle_proto::{Divergence, Verdict};
use serde_json::{Value, json};

/// The first phase.
pub const SPANS: &str = "spans";
const NARROWING: &str = "narrowing";
const TRACING: &str = "tracing";
const REPEAT: &str = "repeat";
/// The kind of a finding that says: nothing but what was put in differs.
const INPUTS: &str = "inputs";

/// The first tasks of a hunt.
pub fn tasks(spans: Vec<Span>) -> Vec<Task> {
    spans.into_iter().map(|span| Task::new(Work::Replay, SPANS, span)).collect()
}

fn of_phase<'a>(job: &'a Job, phase: &'a str) -> impl Iterator<Item = (usize, &'a Task)> {
    job.tasks.iter().enumerate().filter(move |(_, task)| task.phase == phase)
}

/// The first span that is known to diverge, all before it being known to match.
fn first_bad(job: &Job) -> Option<usize> {
    for (index, task) in of_phase(job, SPANS) {
        match task.is_match() {
            Some(true) => {}
            Some(false) => return Some(index),
            None => return None,
        }
    }
    None
}

fn divergence(task: &Task) -> Option<&Divergence> {
    match &task.result {
        Some(TaskResult::Replay(verdict)) => verdict.divergence(),
        _ => None,
    }
}

/// Goes on as far as the results allow.
pub fn advance(job: &mut Job) {
    match job.phase.as_str() {
        SPANS => after_spans(job),
        NARROWING if of_phase(job, NARROWING).all(|(_, task)| task.has_ended()) => repeat(job),
        TRACING if of_phase(job, TRACING).all(|(_, task)| task.has_ended()) => finish(job),
        REPEAT if of_phase(job, REPEAT).all(|(_, task)| task.has_ended()) => finish(job),
        _ => {}
    }
}

fn after_spans(job: &mut Job) {
    let all_ended = of_phase(job, SPANS).all(|(_, task)| task.has_ended());
    match first_bad(job) {
        Some(bad) => {
            // Spans behind the first bad one can't change the answer.
            for task in job.tasks.iter_mut().skip(bad + 1).filter(|task| !task.has_ended()) {
                task.state = TaskState::Dropped;
            }
            if job.is_unchanged() {
                return repeat(job);
            }
            let mut span = job.tasks[bad].span.clone();
            if let Some(divergence) = divergence(&job.tasks[bad]) {
                let to = divergence.position.icount.max(divergence.found.icount).saturating_add(1);
                span.to_icount = if span.to_icount == 0 { to } else { to.min(span.to_icount) };
            }
            job.tasks.push(Task::new(Work::Lockstep, NARROWING, span));
            job.phase = NARROWING.into();
        }
        None if all_ended && job.is_unchanged() => finish(job),
        None if all_ended => {
            let spans: Vec<Span> = of_phase(job, SPANS).map(|(_, task)| task.span.clone()).collect();
            job.tasks.extend(spans.into_iter().map(|span| Task::new(Work::Trace, TRACING, span)));
            job.phase = TRACING.into();
        }
        None => {}
    }
}

/// The bad span once more, on another node if there is one.
fn repeat(job: &mut Job) {
    let Some(bad) = first_bad(job) else { return finish(job) };
    let mut task = Task::new(Work::Replay, REPEAT, job.tasks[bad].span.clone());
    task.avoid = Some(job.tasks[bad].node.clone());
    job.tasks.push(task);
    job.phase = REPEAT.into();
}

fn finish(job: &mut Job) {
    // What was put in, and had no effect, is no divergence.
    let inputs = findings(job).find(|finding| finding.kind == INPUTS).map(|found| found.inputs.clone());
    let finding = findings(job).filter(|f| f.kind != INPUTS).min_by_key(|f| f.icount).cloned();
    let bad = first_bad(job).filter(|_| inputs.is_none() || finding.is_some());
    // What nodes report may be any number.
    let replayed = job.tasks.iter().map(instructions).fold(0, u64::saturating_add);
    let is_found = bad.is_some() || finding.is_some();
    job.result = json!({
        "finding": finding,
        "inputs": inputs,
        "spans": of_phase(job, SPANS).count(),
        "bad_span": bad,
        "interval": bad.and_then(|bad| divergence(&job.tasks[bad])).map(interval),
        "last_good_snapshot": bad.map(|bad| job.tasks[bad].span.from_icount),
        "repeated": bad.and_then(|bad| repeated(job, bad)),
        "replayed_instructions": replayed,
    });
    job.outcome = if is_found { "diverged" } else { "match" }.into();
    job.state = JobState::Done;
}

fn findings(job: &Job) -> impl Iterator<Item = &Finding> {
    job.tasks.iter().filter_map(|task| match &task.result {
        Some(TaskResult::Lockstep { finding, .. }) => finding.as_ref(),
        _ => None,
    })
}

fn instructions(task: &Task) -> u64 {
    match &task.result {
        Some(TaskResult::Replay(verdict)) => verdict.instructions,
        Some(TaskResult::Lockstep { replayed_instructions, .. }) => *replayed_instructions,
        Some(TaskResult::Index { .. }) | None => 0,
    }
}

fn interval(divergence: &Divergence) -> Value {
    let mut interval = json!({
        "kind": divergence.kind,
        "from": divergence.last_good,
        "to": divergence.position,
        "expected": divergence.expected,
        "found": divergence.found,
        "pc": divergence.pc,
    });
    if let Some(hart) = divergence.hart {
        interval["hart"] = json!(hart);
    }
    interval
}

/// Whether the bad span went wrong in the same way on the other node.
fn repeated(job: &Job, bad: usize) -> Option<Value> {
    let verdict = |task: &Task| -> Option<Verdict> {
        match &task.result {
            Some(TaskResult::Replay(verdict)) => Some(verdict.clone()),
            _ => None,
        }
    };
    let (_, again) = of_phase(job, REPEAT).next()?;
    let (first, second) = (verdict(&job.tasks[bad])?, verdict(again)?);
    let is_same = first.divergence() == second.divergence() && first.digest == second.digest;
    Some(json!({ "first": job.tasks[bad].node, "node": again.node, "same": is_same }))
}
