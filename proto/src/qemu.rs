//! Events as a real QEMU's log has them, and what a QEMU recording pins.

use crate::manifest::Image;
use serde::{Deserialize, Serialize};
use std::fmt;

/// An event of a QEMU log. Of these, the built-in machine has `CharRead`, `Net` and `Random`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum QemuEvent {
    /// Instructions that were logged apart, with no event behind them at their icount.
    Instruction,
    /// The vCPU accepted a hardware interrupt.
    Interrupt,
    /// The vCPU delivered an exception.
    Exception,
    /// A bottom half that runs once; its id is the icount at which it was scheduled.
    BottomHalfOneshot {
        /// icount at which it was scheduled.
        id: u64,
    },
    /// Keyboard or pointer input, as the log has it.
    Input {
        /// The log's encoding, without the kind byte.
        data: Vec<u8>,
    },
    /// End of a group of input.
    InputSync,
    /// A character device got bytes.
    CharRead {
        /// The device, in the order of registration.
        device: u8,
        /// The bytes.
        data: Vec<u8>,
    },
    /// A packet came in.
    Net {
        /// The `filter-replay`, in the order of creation.
        filter: u8,
        /// QEMU's packet flags.
        flags: u32,
        /// The packet.
        data: Vec<u8>,
    },
    /// Somebody asked for a shutdown or reset.
    Shutdown {
        /// QEMU's `ShutdownCause`.
        cause: u8,
    },
    /// The guest wrote to a character device.
    CharWrite {
        /// What the backend returned, an i32.
        result: u32,
        /// Bytes written.
        written: u32,
    },
    /// A synchronous read from a character device.
    CharReadAll {
        /// The bytes.
        data: Vec<u8>,
    },
    /// A synchronous read that failed.
    CharReadAllError {
        /// A negative errno, an i32.
        error: u32,
    },
    /// Samples that were played.
    AudioOut {
        /// How many.
        played: u64,
    },
    /// A capture without samples.
    AudioIn {
        /// Where the ring stands.
        position: u64,
    },
    /// The guest got random bytes.
    Random {
        /// Zero if that went well.
        result: u32,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Bytes that this build can't decode, kept as they are.
    Raw {
        /// The bytes.
        data: Vec<u8>,
    },
}

/// What an event costs in a replay, in instructions: measured, about 2.5 us against 3 ns an
/// instruction. Snapshots are made, and spans are cut, by cost.
pub const EVENT_COST: u64 = 800;

/// QEMU's `ShutdownCause`, by its number.
pub const SHUTDOWN_CAUSES: [&str; 12] = [
    "none",
    "host-error",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "host-signal",
    "host-ui",
    "guest-shutdown",
    "guest-reset",
    "guest-panic",
    "subsystem-reset",
    "snapshot-load",
    "reserved",
];

impl QemuEvent {
    /// Number of the kinds.
    pub const KINDS: usize = 16;
    /// Names of the kinds, in the order of their codes.
    pub const NAMES: [&str; QemuEvent::KINDS] = [
        "instruction",
        "interrupt",
        "exception",
        "bottom-half-oneshot",
        "input",
        "input-sync",
        "char-read",
        "net",
        "shutdown-request",
        "char-write",
        "char-read-all",
        "char-read-all-error",
        "audio-out",
        "audio-in",
        "random",
        "raw",
    ];

    /// The kind's number among QEMU's own kinds.
    pub fn kind(&self) -> u8 {
        match self {
            QemuEvent::Instruction => 0,
            QemuEvent::Interrupt => 1,
            QemuEvent::Exception => 2,
            QemuEvent::BottomHalfOneshot { .. } => 3,
            QemuEvent::Input { .. } => 4,
            QemuEvent::InputSync => 5,
            QemuEvent::CharRead { .. } => 6,
            QemuEvent::Net { .. } => 7,
            QemuEvent::Shutdown { .. } => 8,
            QemuEvent::CharWrite { .. } => 9,
            QemuEvent::CharReadAll { .. } => 10,
            QemuEvent::CharReadAllError { .. } => 11,
            QemuEvent::AudioOut { .. } => 12,
            QemuEvent::AudioIn { .. } => 13,
            QemuEvent::Random { .. } => 14,
            QemuEvent::Raw { .. } => 15,
        }
    }

    /// Whether this waits in the async queue and is flushed by `account_warp_timer`.
    pub fn is_async(&self) -> bool {
        matches!(
            self,
            QemuEvent::BottomHalfOneshot { .. }
                | QemuEvent::Input { .. }
                | QemuEvent::InputSync
                | QemuEvent::CharRead { .. }
                | QemuEvent::Net { .. }
        )
    }

    /// Its numbers, in the order in which [`QemuEvent::from_parts`] takes them.
    pub(crate) fn numbers(&self) -> ([i64; 2], usize) {
        match self {
            QemuEvent::BottomHalfOneshot { id } => ([*id as i64, 0], 1),
            QemuEvent::CharRead { device, .. } => ([i64::from(*device), 0], 1),
            QemuEvent::Net { filter, flags, .. } => ([i64::from(*filter), i64::from(*flags)], 2),
            QemuEvent::Shutdown { cause } => ([i64::from(*cause), 0], 1),
            QemuEvent::CharWrite { result, written } => ([i64::from(*result), i64::from(*written)], 2),
            QemuEvent::CharReadAllError { error } => ([i64::from(*error), 0], 1),
            QemuEvent::AudioOut { played } => ([*played as i64, 0], 1),
            QemuEvent::AudioIn { position } => ([*position as i64, 0], 1),
            QemuEvent::Random { result, .. } => ([i64::from(*result), 0], 1),
            _ => ([0; 2], 0),
        }
    }

    /// Its bytes, if its kind has any.
    pub(crate) fn data(&self) -> Option<&[u8]> {
        match self {
            QemuEvent::Input { data }
            | QemuEvent::CharRead { data, .. }
            | QemuEvent::Net { data, .. }
            | QemuEvent::CharReadAll { data }
            | QemuEvent::Random { data, .. }
            | QemuEvent::Raw { data } => Some(data),
            _ => None,
        }
    }

    /// The numbers and whether bytes belong to the kind; `None` for no kind.
    pub(crate) fn shape(kind: u8) -> Option<(usize, bool)> {
        Some(match kind {
            0..=2 | 5 => (0, false),
            3 | 8 | 11..=13 => (1, false),
            4 | 10 | 15 => (0, true),
            6 | 14 => (1, true),
            7 => (2, true),
            9 => (2, false),
            _ => return None,
        })
    }

    /// The event of a kind from its numbers and bytes; `None` if they are out of range.
    pub(crate) fn from_parts(kind: u8, numbers: [i64; 2], data: Vec<u8>) -> Option<QemuEvent> {
        let [first, second] = numbers;
        Some(match kind {
            0 => QemuEvent::Instruction,
            1 => QemuEvent::Interrupt,
            2 => QemuEvent::Exception,
            3 => QemuEvent::BottomHalfOneshot { id: first as u64 },
            4 => QemuEvent::Input { data },
            5 => QemuEvent::InputSync,
            6 => QemuEvent::CharRead { device: u8::try_from(first).ok()?, data },
            7 => {
                QemuEvent::Net { filter: u8::try_from(first).ok()?, flags: u32::try_from(second).ok()?, data }
            }
            8 => QemuEvent::Shutdown { cause: u8::try_from(first).ok()? },
            9 => QemuEvent::CharWrite {
                result: u32::try_from(first).ok()?,
                written: u32::try_from(second).ok()?,
            },
            10 => QemuEvent::CharReadAll { data },
            11 => QemuEvent::CharReadAllError { error: u32::try_from(first).ok()? },
            12 => QemuEvent::AudioOut { played: first as u64 },
            13 => QemuEvent::AudioIn { position: first as u64 },
            14 => QemuEvent::Random { result: u32::try_from(first).ok()?, data },
            15 => QemuEvent::Raw { data },
            _ => return None,
        })
    }
}

impl fmt::Display for QemuEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = QemuEvent::NAMES[self.kind() as usize];
        match self {
            QemuEvent::BottomHalfOneshot { id } => write!(f, "async bottom-half-oneshot {id}"),
            QemuEvent::Input { data } => write!(f, "async input {}", hex(data)),
            QemuEvent::InputSync => f.write_str("async input-sync"),
            QemuEvent::CharRead { device, data } => {
                write!(f, "async char-read device {device} \"{}\"", data.escape_ascii())
            }
            QemuEvent::Net { filter, flags, data } => {
                write!(f, "async net filter {filter} flags {flags:#x}, {} bytes", data.len())
            }
            QemuEvent::Shutdown { cause } => {
                let cause = SHUTDOWN_CAUSES.get(usize::from(*cause)).unwrap_or(&"unknown");
                write!(f, "{name}, cause {cause}")
            }
            QemuEvent::CharWrite { result, written } => {
                write!(f, "{name} {written} bytes, returned {}", *result as i32)
            }
            QemuEvent::CharReadAll { data } => write!(f, "{name} \"{}\"", data.escape_ascii()),
            QemuEvent::CharReadAllError { error } => write!(f, "{name} {}", *error as i32),
            QemuEvent::AudioOut { played } => write!(f, "{name} {played} samples"),
            QemuEvent::AudioIn { position } => write!(f, "{name} at {position}"),
            QemuEvent::Random { result, data } => {
                write!(f, "{name} {} bytes, returned {}", data.len(), *result as i32)
            }
            QemuEvent::Raw { data } => write!(f, "{name}, {} bytes not decoded", data.len()),
            QemuEvent::Instruction | QemuEvent::Interrupt | QemuEvent::Exception => f.write_str(name),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A QEMU recording: the build it needs, its command line, and the files that names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuSpec {
    /// What QEMU says of itself.
    pub version: String,
    /// The real program's file name, as `qemu-system-x86_64`.
    pub program: String,
    /// The machine type with its version, as `pc-i440fx-7.2`.
    pub machine_type: String,
    /// The command line behind the program, with `{file:N}`, `{disk:N}` and `{scratch}`
    /// where files stand; without what each run adds for itself.
    pub arguments: Vec<String>,
    /// Files that are read as they are.
    pub files: Vec<Image>,
    /// Disks: each run writes to an overlay of its own.
    pub disks: Vec<QemuDisk>,
    /// `-icount`'s options but for rr.
    pub icount: String,
    /// How the events' roles are known.
    pub roles: RoleSource,
    /// Guest RAM, to bound what a replay may take.
    pub memory_bytes: u64,
}

/// A disk behind `blkreplay`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuDisk {
    /// Its contents at the start.
    pub image: Image,
    /// The image's format: `raw` or `qcow2`.
    pub format: String,
    /// Bytes the guest sees.
    pub guest_bytes: u64,
}

/// How the roles of a QEMU recording's events are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoleSource {
    /// The tap saw the thread that wrote each event.
    Tap,
    /// By the rule of the log's grammar.
    ByRule,
}
