//! The seed of Heddle: clocks, checkpoints, recorder, replayer, judge and the
//! built-in machine.
//!
//! Everything but [`io`] is sans-I/O: it opens nothing, waits for nothing and
//! asks no clock. Start at [`emulator`], which both roles step: [`record`] when
//! the world decides, [`replay`] when the log does.
#![forbid(unsafe_code)]

pub mod emulator;
pub mod record;
pub mod replay;
pub mod recorder;
pub mod replayer;
pub mod queue;
pub mod role;
pub mod timer;
pub mod warp;
pub mod checks;
pub mod page_tree;
pub mod state;
pub mod lockstep;
pub mod builds;
pub mod machine;
pub mod guest;
pub mod schedule;
pub mod io;

pub use builds::{BUILTIN, Build, Fault};
pub use emulator::{Emulator, Step, World};
pub use page_tree::BlockSource;
pub use queue::AsyncQueue;
pub use replayer::{EventSource, LogEnd, Replayer};
pub use state::Snapshot;
