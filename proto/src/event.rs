//! Events: the non-deterministic happenings of an execution, and where they stand.

use crate::{Hash, QemuEvent};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The logical thread a thing happens on. Never a physical core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Executes the guest.
    Vcpu,
    /// Runs timers, device completions and input.
    Iothread,
}

impl Role {
    /// The other role.
    pub fn other(self) -> Role {
        match self {
            Role::Vcpu => Role::Iothread,
            Role::Iothread => Role::Vcpu,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Vcpu => "vcpu",
            Role::Iothread => "iothread",
        })
    }
}

/// A position in an execution: several events share one icount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Instructions executed.
    pub icount: u64,
    /// Index of the next event in the log.
    pub event: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "icount {}, event {}", self.icount, self.event)
    }
}

/// A clock whose every read is an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ClockKind {
    /// Wall clock, nanoseconds since 1970.
    Host,
    /// Real time that grows the virtual clock while all vCPUs sleep.
    VirtualRt,
}

/// A synchronisation point: async events are flushed here. Never a saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CheckpointKind {
    /// Before the first instruction.
    Init,
    /// `start_warp_timer`, when every vCPU is idle.
    ClockWarpStart,
    /// `account_warp_timer`, before guest code runs again.
    ClockWarpAccount,
    /// Timers of the virtual clock are due.
    ClockVirtual,
    /// Timers of the host clock are due.
    ClockHost,
    /// Timers of the VirtualRt clock are due.
    ClockVirtualRt,
    /// The machine is being switched off.
    Shutdown,
    /// QEMU: a reset was asked for.
    ResetRequested,
    /// QEMU: a suspend was asked for.
    SuspendRequested,
    /// QEMU: the machine is being reset.
    Reset,
}

impl CheckpointKind {
    /// All kinds, in the order of their codes.
    pub const ALL: [CheckpointKind; 10] = [
        CheckpointKind::Init,
        CheckpointKind::ClockWarpStart,
        CheckpointKind::ClockWarpAccount,
        CheckpointKind::ClockVirtual,
        CheckpointKind::ClockHost,
        CheckpointKind::ClockVirtualRt,
        CheckpointKind::Shutdown,
        CheckpointKind::ResetRequested,
        CheckpointKind::SuspendRequested,
        CheckpointKind::Reset,
    ];
    /// The kind with this name, as `Debug` prints it.
    pub fn by_name(name: &str) -> Option<CheckpointKind> {
        Self::ALL.into_iter().find(|kind| format!("{kind:?}") == name)
    }
}

/// An event that comes from outside the instruction stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AsyncEvent {
    /// Deferred work of a device, by the id it got when scheduled.
    BottomHalf {
        /// Counts up from zero in one execution.
        id: u64,
    },
    /// Completion of a block request.
    Block {
        /// Counts up from zero in one execution.
        id: u64,
    },
    /// Console input.
    Char {
        /// The bytes typed.
        data: Vec<u8>,
    },
}

/// What an event is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Body {
    /// A read of a recorded clock, in nanoseconds.
    Clock {
        /// Which clock.
        clock: ClockKind,
        /// What it showed.
        value: i64,
    },
    /// A checkpoint.
    Checkpoint(CheckpointKind),
    /// An async event, flushed at the checkpoint before it.
    Async(AsyncEvent),
    /// The guest, or the user, switched the machine off.
    Shutdown {
        /// The guest's exit code.
        code: u16,
    },
    /// The running checks at a fixed position.
    Check {
        /// pc and registers, folded at every event and fixed position so far.
        value: u64,
        /// The console's bytes so far, folded.
        output: u64,
    },
    /// The digests at a fixed position.
    Digest {
        /// Root of the state tree.
        root: Hash,
        /// `H(previous || events since || root)`: once different, always different.
        history: Hash,
    },
    /// The log is complete.
    End,
    /// A kind that came with QEMU's log. Three of them, `Net`, `CharRead` and `Random`, the
    /// built-in machine's virtio devices write too; the others only a QEMU log has.
    Qemu(QemuEvent),
}

/// One non-deterministic happening.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Event {
    /// Where: instructions executed before it.
    pub icount: u64,
    /// On which thread.
    pub role: Role,
    /// What.
    pub body: Body,
}

/// Number of kind codes; a chunk's header counts events by them.
pub const KINDS: usize = 19 + QemuEvent::KINDS;

/// Names of the kind codes, for people.
pub const KIND_NAMES: [&str; KINDS] = {
    let mut names = [""; KINDS];
    let mut at = 0;
    while at < KINDS {
        names[at] = if at < 19 { OWN_NAMES[at] } else { QemuEvent::NAMES[at - 19] };
        at += 1;
    }
    names
};

const OWN_NAMES: [&str; 19] = [
    "clock-host",
    "clock-virtual-rt",
    "init",
    "clock-warp-start",
    "clock-warp-account",
    "clock-virtual",
    "clock-host-timers",
    "clock-virtual-rt-timers",
    "shutdown-checkpoint",
    "bottom-half",
    "block",
    "char",
    "shutdown",
    "check",
    "digest",
    "end",
    "reset-requested",
    "suspend-requested",
    "reset",
];

impl Body {
    /// The kind's code in a chunk, below [`KINDS`].
    pub fn code(&self) -> u8 {
        match self {
            Body::Clock { clock: ClockKind::Host, .. } => 0,
            Body::Clock { clock: ClockKind::VirtualRt, .. } => 1,
            Body::Checkpoint(kind) if (*kind as u8) < 7 => 2 + *kind as u8,
            Body::Checkpoint(kind) => 9 + *kind as u8,
            Body::Async(AsyncEvent::BottomHalf { .. }) => 9,
            Body::Async(AsyncEvent::Block { .. }) => 10,
            Body::Async(AsyncEvent::Char { .. }) => 11,
            Body::Shutdown { .. } => 12,
            Body::Check { .. } => 13,
            Body::Digest { .. } => 14,
            Body::End => 15,
            Body::Qemu(event) => 19 + event.kind(),
        }
    }

    /// Whether this belongs to the checkpoint before it.
    pub fn is_async(&self) -> bool {
        match self {
            Body::Async(_) => true,
            Body::Qemu(event) => event.is_async(),
            _ => false,
        }
    }

    /// Whether this stands at a fixed position and only verifies.
    pub fn is_mark(&self) -> bool {
        matches!(self, Body::Check { .. } | Body::Digest { .. })
    }
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Body::Clock { clock, value } => write!(f, "clock {clock:?} = {value} ns"),
            Body::Checkpoint(kind) => write!(f, "checkpoint {kind:?}"),
            Body::Async(AsyncEvent::BottomHalf { id }) => write!(f, "async bottom-half {id}"),
            Body::Async(AsyncEvent::Block { id }) => write!(f, "async block {id}"),
            Body::Async(AsyncEvent::Char { data }) => {
                write!(f, "async char \"{}\"", data.escape_ascii())
            }
            Body::Shutdown { code } => write!(f, "shutdown, code {code}"),
            Body::Check { value, output } => write!(f, "check {value:016x} output {output:016x}"),
            Body::Digest { root, history } => {
                write!(f, "digest {} history {}", root.short(), history.short())
            }
            Body::End => f.write_str("end"),
            Body::Qemu(event) => write!(f, "{event}"),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>14}  {:<8}  {}", self.icount, self.role.to_string(), self.body)
    }
}
