//! The scheduler: who works on what until when. Pure: `now` is handed in.

use crate::hunt;
use crate::job::{Job, JobKind, JobState, Task, TaskState, Work};
use crate::plan;
use heddle_proto::v1;
use heddle_proto::verdict::TaskResult;
use std::collections::{BTreeMap, HashMap, HashSet};

/// A task that ends in an error so often fails its job.
const FAILURES_MAX: u32 = 4;

/// A node, as last heard.
#[derive(Clone, Debug, Default)]
pub struct NodeState {
    /// Builds it offers; one that ends in `+flip` stands for all with a planted fault.
    pub builds: Vec<String>,
    /// Replays it runs at once.
    pub slots: u32,
    /// Where it answers.
    pub address: String,
    /// When it was last heard, milliseconds since 1970.
    pub heard_unix_ms: u64,
    /// Tasks it has done.
    pub done: u64,
    /// Its verdicts disagree with others': it gets no work.
    pub is_quarantined: bool,
}

/// Jobs and nodes.
#[derive(Debug, Default)]
pub struct Scheduler {
    /// Jobs by id.
    pub jobs: BTreeMap<String, Job>,
    /// Nodes by name.
    pub nodes: HashMap<String, NodeState>,
    /// How long a lease lasts without a sign of life.
    pub lease_ms: u64,
    /// Jobs that changed since they were last taken.
    changed: HashSet<String>,
}

fn offers(builds: &[String], wanted: &str) -> bool {
    builds
        .iter()
        .any(|build| build == wanted || (build.ends_with("+flip") && wanted.starts_with(build.as_str())))
}

impl Scheduler {
    /// An empty scheduler.
    pub fn new(lease_ms: u64) -> Scheduler {
        Scheduler { lease_ms, ..Scheduler::default() }
    }

    /// Whether a known node offers this build.
    pub fn is_offered(&self, build: &str) -> bool {
        self.nodes.values().any(|node| offers(&node.builds, build))
    }

    /// Jobs that changed since the last call.
    pub fn take_changed(&mut self) -> Vec<Job> {
        let changed = std::mem::take(&mut self.changed);
        changed.iter().filter_map(|id| self.jobs.get(id)).cloned().collect()
    }

    /// Takes a job in; the same id again changes nothing.
    pub fn submit(&mut self, job: Job) {
        if !self.jobs.contains_key(&job.id) {
            self.changed.insert(job.id.clone());
            self.jobs.insert(job.id.clone(), job);
        }
    }

    /// A node's sign of life. Returns the tasks among `running` that it should give up.
    pub fn handle_heartbeat(&mut self, request: &v1::HeartbeatRequest, now: u64) -> Vec<String> {
        let node = self.nodes.entry(request.node.clone()).or_default();
        node.builds = request.builds.clone();
        node.slots = request.slots;
        node.address = request.address.clone();
        node.heard_unix_ms = now;
        let lease_ms = self.lease_ms;
        let mut cancelled = vec![];
        for key in &request.running {
            let mut parts = key.split('/');
            let (job, index, attempt) = (parts.next(), parts.next(), parts.next());
            let number = |text: Option<&str>| text.and_then(|t| t.parse::<u32>().ok());
            let task = job.zip(number(index)).and_then(|(job, index)| self.task_mut(job, index));
            match task {
                Some(task) if Some(task.attempt) == number(attempt) => {
                    if let TaskState::Leased { until_unix_ms, .. } = &mut task.state {
                        // Renewals are not written: after a restart a lease ends a little earlier.
                        *until_unix_ms = now + lease_ms;
                    } else {
                        cancelled.push(key.clone());
                    }
                }
                _ => cancelled.push(key.clone()),
            }
        }
        cancelled
    }

    fn task_mut(&mut self, job: &str, index: u32) -> Option<&mut Task> {
        self.jobs.get_mut(job)?.tasks.get_mut(index as usize)
    }

    /// A task for a node with a free slot.
    pub fn lease(&mut self, node: &str, builds: &[String], epoch: u64, now: u64) -> Option<v1::Task> {
        if self.nodes.get(node).is_some_and(|state| state.is_quarantined) {
            return None;
        }
        let others: Vec<Vec<String>> = self
            .nodes
            .iter()
            .filter(|(name, state)| {
                *name != node && !state.is_quarantined && now < state.heard_unix_ms + self.lease_ms
            })
            .map(|(_, state)| state.builds.clone())
            .collect();
        let until = now + self.lease_ms;
        for job in self.jobs.values_mut().filter(|job| job.state == JobState::Running) {
            let (build, against) = (job.build.clone(), job.against.clone());
            if !offers(builds, &against) || !offers(builds, &build) {
                continue;
            }
            let free = job.tasks.iter_mut().enumerate().find(|(_, task)| {
                let another_can =
                    others.iter().any(|theirs| offers(theirs, &against) && offers(theirs, &build));
                let is_unwanted = task.avoid.as_deref() == Some(node) && another_can;
                task.state == TaskState::Waiting && !is_unwanted
            });
            let Some((index, task)) = free else { continue };
            task.state = TaskState::Leased { node: node.into(), until_unix_ms: until };
            task.attempt += 1;
            task.node = node.into();
            self.changed.insert(job.id.clone());
            return Some(v1::Task {
                job: job.id.clone(),
                index: index as u32,
                attempt: task.attempt,
                kind: match task.work {
                    Work::Replay => "replay",
                    Work::Index => "index",
                    Work::Lockstep | Work::Trace => "lockstep",
                }
                .into(),
                recording: job.recording.to_vec().into(),
                build,
                against,
                span: Some(task.span.bounds()),
                roles: plan::roles(),
                epoch,
                every_instruction: task.work == Work::Trace,
                side_b: job.side_b.clone().into(),
                snapshots: job.snapshots,
            });
        }
        None
    }

    /// Leases that nobody has renewed go to others.
    pub fn expire(&mut self, now: u64) {
        for job in self.jobs.values_mut().filter(|job| job.state == JobState::Running) {
            for task in &mut job.tasks {
                if matches!(task.state, TaskState::Leased { until_unix_ms, .. } if until_unix_ms <= now) {
                    task.state = TaskState::Waiting;
                    self.changed.insert(job.id.clone());
                }
            }
        }
    }

    /// Takes a report. The first result counts; whether this one did.
    pub fn handle_report(&mut self, report: &v1::ReportRequest, now: u64) -> bool {
        let Some(job) = self.jobs.get_mut(&report.job) else { return false };
        let Some(task) = job.tasks.get_mut(report.index as usize) else { return false };
        let result = match report.error.is_empty() {
            true => serde_json::from_slice::<TaskResult>(&report.verdict).map_err(|e| e.to_string()),
            false => Err(report.error.clone()),
        };
        if task.has_ended() {
            return Self::late(&mut self.nodes, &mut self.changed, job, report, result.ok());
        }
        match result {
            Ok(result) => {
                task.state = TaskState::Done;
                task.node = report.node.clone();
                task.result = Some(result);
                task.elapsed_us = report.elapsed_us;
                self.nodes.entry(report.node.clone()).or_default().done += 1;
            }
            // An older attempt's failure says nothing of the one that runs.
            Err(_) if report.attempt != task.attempt => return false,
            Err(error) => {
                task.failures += 1;
                task.error = error;
                task.avoid = Some(report.node.clone());
                task.state = TaskState::Waiting;
            }
        }
        self.changed.insert(job.id.clone());
        Self::advance(job, now);
        true
    }

    /// A second result of a task: kept from counting, but compared.
    fn late(
        nodes: &mut HashMap<String, NodeState>,
        changed: &mut HashSet<String>,
        job: &mut Job,
        report: &v1::ReportRequest,
        result: Option<TaskResult>,
    ) -> bool {
        let task = &mut job.tasks[report.index as usize];
        let is_retry = task.attempt == report.attempt && task.node == report.node;
        if let (Some(TaskResult::Replay(first)), Some(TaskResult::Replay(second))) = (&task.result, &result)
            && !is_retry
            && (first.is_match() != second.is_match() || first.digest != second.digest)
        {
            task.is_disputed = true;
            changed.insert(job.id.clone());
            if let Some(node) = nodes.get_mut(&report.node) {
                node.is_quarantined = true;
            }
        }
        is_retry
    }

    /// Sees whether the job has ended, or a hunt goes on to its next phase.
    fn advance(job: &mut Job, now: u64) {
        if job.state != JobState::Running {
            return;
        }
        if let Some(failed) = job.tasks.iter().find(|task| task.failures >= FAILURES_MAX) {
            job.result = serde_json::json!({ "error": failed.error });
            job.outcome = "error".into();
            job.state = JobState::Failed;
        } else {
            match job.kind {
                JobKind::Hunt => hunt::advance(job),
                JobKind::Replay if job.tasks.iter().all(Task::has_ended) => {
                    let all_match = job.tasks.iter().all(|task| task.is_match() == Some(true));
                    job.outcome = if all_match { "match" } else { "diverged" }.into();
                    job.state = JobState::Done;
                }
                JobKind::Index if job.tasks.iter().all(Task::has_ended) => {
                    let made = job.tasks.iter().filter_map(|task| match &task.result {
                        Some(TaskResult::Index { snapshots }) => Some(snapshots.clone()),
                        _ => None,
                    });
                    job.result = serde_json::json!({ "snapshots": made.flatten().collect::<Vec<_>>() });
                    job.outcome = "match".into();
                    job.state = JobState::Done;
                }
                JobKind::Replay | JobKind::Index => {}
            }
        }
        if job.state != JobState::Running {
            job.ended_unix_ms = now;
            job.phase = "done".into();
        }
    }
}

#[cfg(test)]
#[path = "scheduler/tests.rs"]
mod tests;
