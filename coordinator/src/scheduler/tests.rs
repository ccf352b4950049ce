//! Leases, retries, and what two results of one task come to.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::job::Span;
use heddle_proto::verdict::{Outcome, Proof, Verdict};
use heddle_proto::{Hash, Position, RecordingId};

fn scheduler(kind: JobKind, spans: u64) -> Scheduler {
    let mut scheduler = Scheduler::new(100);
    let span = |i| Span { from_icount: i * 10, to_icount: i * 10 + 10, instructions: 10, ..Span::default() };
    scheduler.submit(Job {
        id: "j".into(),
        kind,
        recording: RecordingId::default(),
        build: "b".into(),
        against: "b".into(),
        side_b: vec![],
        snapshots: 0,
        state: JobState::Running,
        phase: hunt::SPANS.into(),
        tasks: hunt::tasks((0..spans).map(span).collect()),
        outcome: String::new(),
        result: serde_json::Value::Null,
        created_unix_ms: 0,
        ended_unix_ms: 0,
    });
    scheduler
}

fn verdict(digest: u8) -> Verdict {
    Verdict {
        outcome: Outcome::Match,
        from: Position::default(),
        to: Position::default(),
        instructions: 10,
        events: 0,
        role_checked: 0,
        role_mismatches: 0,
        checkpoints: Default::default(),
        digest: Some(Hash([digest; 32])),
        coverage: String::new(),
        proof: Proof::Spans,
    }
}

fn report(task: &v1::Task, node: &str, digest: u8) -> v1::ReportRequest {
    v1::ReportRequest {
        node: node.into(),
        job: task.job.clone(),
        index: task.index,
        attempt: task.attempt,
        verdict: serde_json::to_vec(&TaskResult::Replay(verdict(digest))).unwrap().into(),
        ..Default::default()
    }
}

fn builds() -> Vec<String> {
    vec!["b".into()]
}

#[test]
fn a_lease_that_nobody_renews_goes_to_another() {
    let mut s = scheduler(JobKind::Replay, 1);
    let first = s.lease("one", &builds(), 1, 0).unwrap();
    assert!(s.lease("two", &builds(), 1, 50).is_none());
    let beat =
        v1::HeartbeatRequest { node: "one".into(), running: vec!["j/0/1".into()], ..Default::default() };
    assert!(s.handle_heartbeat(&beat, 90).is_empty());
    s.expire(150);
    assert!(s.lease("two", &builds(), 1, 150).is_none(), "renewed");
    s.expire(190);
    let second = s.lease("two", &builds(), 1, 190).unwrap();
    assert_eq!(second.attempt, 2);
    assert_eq!(s.handle_heartbeat(&beat, 200), vec!["j/0/1"], "the first is told to give up");
    assert!(s.handle_report(&report(&second, "two", 1), 210));
    assert_eq!(s.jobs["j"].state, JobState::Done);
    assert_eq!(s.jobs["j"].outcome, "match");
    assert!(!s.handle_report(&report(&first, "one", 1), 220), "the second result does not count");
    assert!(!s.jobs["j"].tasks[0].is_disputed);
}

#[test]
fn another_digest_from_another_attempt_is_a_dispute_and_a_quarantine() {
    let mut s = scheduler(JobKind::Replay, 1);
    let beat = |name: &str| v1::HeartbeatRequest { node: name.into(), ..Default::default() };
    s.handle_heartbeat(&beat("one"), 0);
    s.handle_heartbeat(&beat("two"), 0);
    let first = s.lease("one", &builds(), 1, 0).unwrap();
    s.expire(200);
    let second = s.lease("two", &builds(), 1, 200).unwrap();
    assert!(s.handle_report(&report(&second, "two", 1), 210));
    assert!(s.handle_report(&report(&second, "two", 1), 211), "a retry gets the same answer");
    s.handle_report(&report(&first, "one", 2), 220);
    assert!(s.jobs["j"].tasks[0].is_disputed);
    assert!(s.nodes["one"].is_quarantined);
}

#[test]
fn a_node_without_the_build_gets_nothing_and_planted_builds_are_offered_by_prefix() {
    let mut s = scheduler(JobKind::Replay, 1);
    assert!(s.lease("one", &["c".into()], 1, 0).is_none());
    assert!(offers(&["b+flip".into()], "b+flip:3:x1:2"));
    assert!(!offers(&["b".into()], "b+flip:3:x1:2"));
}

#[test]
fn a_task_that_always_fails_fails_its_job() {
    let mut s = scheduler(JobKind::Replay, 2);
    for _ in 0..FAILURES_MAX {
        let task = s.lease("one", &builds(), 1, 0).unwrap();
        let mut failed = report(&task, "one", 1);
        failed.error = "no such block".into();
        s.handle_report(&failed, 5);
    }
    assert_eq!(s.jobs["j"].state, JobState::Failed);
    assert_eq!(s.jobs["j"].result["error"], "no such block");
}
