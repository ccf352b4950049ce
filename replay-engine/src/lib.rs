//! The seed of Heddle: clocks, checkpoints, recorder, replayer, judge and the
//! built-in machine.
//!
//! Everything but [`io`] is sans-I/O: it opens nothing, waits for nothing and
//! asks no clock. Start at [`emulator`], which both roles step: [`record`] when
//! the world decides, [`replay`] when the log does.
#![forbid(unsafe_code)]

pub mod bare;
pub mod builds;
pub mod checks;
pub mod debugger;
pub mod emulator;
pub mod guest;
pub mod io;
pub mod lockstep;
pub mod machine;
pub mod page_hash;
pub mod page_tree;
pub mod qemu;
pub mod queue;
pub mod record;
pub mod recorder;
pub mod replay;
pub mod replayer;
pub mod role;
pub mod schedule;
pub mod state;
pub mod timer;
pub mod warp;

pub use builds::{BUILTIN, Build, Fault};
pub use emulator::{Emulator, Step, World};
pub use page_tree::BlockSource;
pub use queue::AsyncQueue;
pub use replayer::{EventSource, LogEnd, Replayer};
pub use state::{Snapshot, snapshot_blocks};
