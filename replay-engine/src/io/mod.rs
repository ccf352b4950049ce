//! Where threads, clocks and waiting live.

mod clocks;
mod threads;

pub use clocks::HostClocks;
pub use threads::{Kick, RecordSink, Recording, Replay, ReplayOptions, record, replay, replay_into};
