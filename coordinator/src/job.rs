//! Jobs and tasks, as they are kept.

use heddle_proto::verdict::TaskResult;
use heddle_proto::{RecordingId, v1};
use serde::{Deserialize, Serialize};

/// What a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Replay a recording, whole or in spans.
    Replay,
    /// Find the first divergence.
    Hunt,
    /// Make snapshots.
    Index,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Tasks are waiting or running.
    Running,
    /// It has an outcome.
    Done,
    /// It could not be decided.
    Failed,
}

/// One user's request and all that came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Made by the client.
    pub id: String,
    /// What for.
    pub kind: JobKind,
    /// Of which recording.
    pub recording: RecordingId,
    /// The build that recorded it.
    pub build: String,
    /// The build to replay with.
    pub against: String,
    /// What else differs on the other side, for the nodes.
    #[serde(default)]
    pub side_b: Vec<u8>,
    /// Snapshots to make.
    #[serde(default)]
    pub snapshots: u32,
    /// How far it is.
    pub state: JobState,
    /// What a hunt is doing.
    pub phase: String,
    /// Its tasks, in the order of their spans; later phases are appended.
    pub tasks: Vec<Task>,
    /// `match`, `diverged` or `error`.
    pub outcome: String,
    /// A hunt's card, or why the job failed.
    pub result: serde_json::Value,
    /// Milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Milliseconds since 1970.
    pub ended_unix_ms: u64,
}

/// How far a task is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Nobody has it.
    Waiting,
    /// A node has it.
    Leased {
        /// Which.
        node: String,
        /// Until when, milliseconds since 1970.
        until_unix_ms: u64,
    },
    /// It has a result.
    Done,
    /// Its result is of no more use.
    Dropped,
}

/// What kind of work a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// Replay with `against`.
    Replay,
    /// Make snapshots.
    Index,
    /// Compare the recorded build with `against`, coarse to fine.
    Lockstep,
    /// The same, after every instruction.
    Trace,
}

/// One span to work on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// What to do.
    pub work: Work,
    /// The phase it belongs to.
    pub phase: String,
    /// Where.
    pub span: Span,
    /// How far it is.
    pub state: TaskState,
    /// Counts leases from 1.
    pub attempt: u32,
    /// Attempts that ended in an error.
    pub failures: u32,
    /// A node that should not get it, if another can.
    pub avoid: Option<String>,
    /// Who did it.
    pub node: String,
    /// What came of it.
    pub result: Option<TaskResult>,
    /// The last error.
    pub error: String,
    /// Another attempt's result differs.
    pub is_disputed: bool,
    /// How long it took.
    pub elapsed_us: u64,
}

/// The part of a recording between two snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Root block of the snapshot at its beginning; empty for power-on.
    pub snapshot_root: Vec<u8>,
    /// Where it begins.
    pub from_icount: u64,
    /// Where it begins.
    pub from_event: u64,
    /// Where it ends, zero for the log's end.
    pub to_icount: u64,
    /// The event it ends before, zero for the log's end.
    pub to_event: u64,
    /// The state's digest there, empty for the log's end.
    pub to_digest: Vec<u8>,
    /// Instructions, for balance and display.
    pub instructions: u64,
}

impl Span {
    /// As it goes to a node.
    pub fn bounds(&self) -> v1::SpanBounds {
        v1::SpanBounds {
            snapshot_root: self.snapshot_root.clone().into(),
            from_icount: self.from_icount,
            from_event: self.from_event,
            to_icount: self.to_icount,
            to_event: self.to_event,
            to_digest: self.to_digest.clone().into(),
        }
    }
}

impl Job {
    /// Whether the recording is replayed as it was recorded.
    pub fn is_unchanged(&self) -> bool {
        self.against == self.build && self.side_b.is_empty()
    }
}

impl Task {
    /// A task nobody has.
    pub fn new(work: Work, phase: &str, span: Span) -> Task {
        Task {
            work,
            phase: phase.into(),
            span,
            state: TaskState::Waiting,
            attempt: 0,
            failures: 0,
            avoid: None,
            node: String::new(),
            result: None,
            error: String::new(),
            is_disputed: false,
            elapsed_us: 0,
        }
    }

    /// Whether it needs nobody any more.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, TaskState::Done | TaskState::Dropped)
    }

    /// Whether its replay matched; `None` without a replay's verdict.
    pub fn is_match(&self) -> Option<bool> {
        match &self.result {
            Some(TaskResult::Replay(verdict)) => Some(verdict.is_match()),
            _ => None,
        }
    }
}
