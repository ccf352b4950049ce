//! Real QEMU: its processes, its files, its recordings and replays.

pub mod builds;
pub mod difference;
pub mod doctor;
pub mod hunt;
pub mod process;
pub mod pump;
pub mod qcow2;
pub mod qmp;
pub mod record;
pub mod replay;
pub mod ring;
pub mod scratch;
pub mod snapshot;
pub mod span;
pub mod stepped;
pub mod task;
mod typing;
