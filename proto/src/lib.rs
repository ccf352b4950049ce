//! Heddle's vocabulary: what all parts say to each other and keep on disk.
//!
//! Start at [`event`], then [`chunk`]. Knows no I/O, no async, no wall clock.
#![forbid(unsafe_code)]

pub mod chunk;
pub mod compress;
pub mod event;
pub mod id;
pub mod manifest;
pub mod qemu;
pub mod verdict;

pub use chunk::{Chunk, ChunkBuilder, ChunkError, ChunkHeader};
pub use event::{AsyncEvent, Body, CheckpointKind, ClockKind, Event, Position, Role};
pub use id::{Hash, RecordingId};
pub use manifest::{EmulatorSpec, Manifest};
pub use qemu::{QemuEvent, QemuSpec};
pub use verdict::{Divergence, DivergenceKind, Outcome, Verdict};

/// The generated gRPC messages, clients and servers of `heddle.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("heddle.v1");
}

/// The encoded descriptors of `heddle.v1`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/heddle.fds"));
