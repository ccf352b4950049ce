//! Verdicts: how a replay ended. A divergence is a result, not an error.

use crate::manifest::Image;
use crate::{Hash, Position, RecordingId, Role};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// How a task or job ended, with what proves it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Match, or how it diverged.
    pub outcome: Outcome,
    /// Where the replay began.
    pub from: Position,
    /// Where it ended.
    pub to: Position,
    /// Instructions executed.
    pub instructions: u64,
    /// Events consumed.
    pub events: u64,
    /// Events whose role was checked against the thread that ran them.
    pub role_checked: u64,
    /// Of these, how many ran on the wrong role.
    pub role_mismatches: u64,
    /// Checkpoints run, by kind and the role they ran on.
    #[serde(default)]
    pub checkpoints: BTreeMap<String, BTreeMap<String, u64>>,
    /// Digest of the state at the end.
    pub digest: Option<Hash>,
    /// Which state the digests covered.
    pub coverage: String,
    /// Proved by one replay of the whole, or by spans that meet.
    pub proof: Proof,
}

/// What a match was proved by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proof {
    /// One replay from power-on to the end.
    Whole,
    /// Spans between snapshots: as far as the coverage reaches.
    Spans,
}

/// Match or divergence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Same events, same roles, same digests, to the end.
    Match,
    /// Something differed.
    Diverged(Box<Divergence>),
}

/// What can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DivergenceKind {
    /// Another kind of event came.
    WrongKind,
    /// The right event came on the other role.
    WrongRole,
    /// The event came at another icount.
    WrongIcount,
    /// The event carried something else.
    WrongPayload,
    /// Check or digest differs.
    State,
    /// The console printed something else.
    Output,
    /// The log ended while the guest went on.
    LogEndedEarly,
    /// The guest ended while the log went on.
    LogLeftOver,
    /// Code that never comes back.
    Stall,
}

impl fmt::Display for DivergenceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DivergenceKind::WrongKind => "wrong kind",
            DivergenceKind::WrongRole => "wrong role",
            DivergenceKind::WrongIcount => "wrong icount",
            DivergenceKind::WrongPayload => "wrong payload",
            DivergenceKind::State => "state",
            DivergenceKind::Output => "output",
            DivergenceKind::LogEndedEarly => "log ended early",
            DivergenceKind::LogLeftOver => "log left over",
            DivergenceKind::Stall => "stall",
        })
    }
}

/// One side of a divergence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// What stood or came there.
    pub what: String,
    /// On which role.
    pub role: Option<Role>,
    /// At which icount.
    pub icount: u64,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if let Some(role) = self.role {
            write!(f, " on {role}")?;
        }
        write!(f, " at icount {}", self.icount)
    }
}

/// Where and how a replay left the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Divergence {
    /// What differed.
    pub kind: DivergenceKind,
    /// The event of the log where it showed.
    pub position: Position,
    /// What the log has.
    pub expected: Side,
    /// What the replay did.
    pub found: Side,
    /// The last position where check or digest agreed.
    pub last_good: Position,
    /// The guest's program counter.
    pub pc: u64,
    /// Of which hart, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hart: Option<u32>,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} at {}: expected {}; found {}; pc {:#x}{}; last good at {}",
            self.kind,
            self.position,
            self.expected,
            self.found,
            self.pc,
            on_hart(self.hart),
            self.last_good
        )
    }
}

/// Said behind a program counter: whose it is, where there are several harts.
pub fn on_hart(hart: Option<u32>) -> String {
    hart.map_or_else(String::new, |hart| format!(" on hart {hart}"))
}

impl Verdict {
    /// Whether this is a match.
    pub fn is_match(&self) -> bool {
        self.outcome == Outcome::Match
    }

    /// The divergence, if there is one.
    pub fn divergence(&self) -> Option<&Divergence> {
        match &self.outcome {
            Outcome::Match => None,
            Outcome::Diverged(divergence) => Some(divergence),
        }
    }
}

/// What a hunt found: the first difference between two sides.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// First icount at which the two states differ, or the icount where it showed.
    pub icount: u64,
    /// Index of the next event there.
    pub event: u64,
    /// Program counter of the instruction that ran last before.
    pub pc: u64,
    /// The hart that ran it, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hart: Option<u32>,
    /// That instruction, disassembled.
    pub instruction: String,
    /// What differs: registers, pages, leaves, each with both values.
    pub differs: Vec<String>,
    /// How it differs: a divergence kind's name.
    pub kind: String,
    /// If the states became equal again: from, and to.
    pub masked: Option<Masked>,
    /// Instructions that this task replayed, both sides.
    pub replayed_instructions: u64,
    /// What was put in on one side, and how far it has come: no divergence.
    #[serde(default)]
    pub inputs: Vec<String>,
}

/// Two states that differed for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Masked {
    /// First icount at which they differ.
    pub from: u64,
    /// First icount at which they are equal again.
    pub to: u64,
}

/// What a task reports: a verdict, or what a lockstep run found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskResult {
    /// Of a replay.
    Replay(Verdict),
    /// Of a lockstep comparison; `None`: no difference.
    Lockstep {
        /// The first difference.
        finding: Option<Finding>,
        /// Instructions replayed, both sides.
        replayed_instructions: u64,
    },
    /// Of a pass that makes snapshots: where they stand.
    Index {
        /// icounts.
        snapshots: Vec<u64>,
    },
}

/// What differs on the other side of a hunt beside the build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideB {
    /// Files of the command line that are replaced, by their number.
    #[serde(default)]
    pub files: Vec<(usize, Image)>,
    /// Disks that are replaced, by their number.
    #[serde(default)]
    pub disks: Vec<(usize, Image)>,
    /// The recording whose log is fed instead.
    #[serde(default)]
    pub log: Option<RecordingId>,
}

impl SideB {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.disks.is_empty() && self.log.is_none()
    }
}
