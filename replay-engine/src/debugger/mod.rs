//! Any instruction of a recording, in any order.
//!
//! A [`Session`] is a replay that is moved: to an icount, or to the next breakpoint, ahead
//! or behind. Behind is ahead of an earlier snapshot: one of the recording's own, or one of
//! those that the session keeps in memory on its way. Whatever is asked, the log decides
//! what happens, and nothing is written: a replay is looked at, not changed.
//!
//! Two states belong to an icount. A replay *arrives* there when so many instructions have
//! run: digests and snapshots are of that state. It is *settled* there when also the log's
//! events of that icount have happened and an interrupt has been taken: pc is then the
//! instruction that runs next, which is what somebody who steps wants to see.

mod memory;
pub mod registers;
mod session;

pub use crate::machine::lookout::{AccessKind, Found, Watchpoint};
pub use session::{Session, Stop};

use crate::emulator::Emulator;
use crate::page_tree::BlockSource;
use heddle_proto::{Hash, Position};
use std::collections::BTreeSet;

/// The recording that a session moves in; its blocks are those of the recording's snapshots.
pub trait Origin: BlockSource + Send {
    /// The machine at power-on, about to replay the log from `from` once a snapshot of there
    /// has been put in.
    fn emulator(&mut self, from: Position) -> Result<Emulator, String>;
    /// The recording's snapshots: where, and their roots.
    fn snapshots(&self) -> Vec<(Position, Hash)>;
}

/// What a run stops at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Points {
    /// Addresses of instructions.
    pub breakpoints: BTreeSet<u64>,
    /// Memory.
    pub watchpoints: Vec<Watchpoint>,
    /// The hart of this number alone meets them; without one, every hart does.
    pub only: Option<usize>,
}

impl Points {
    /// Whether nothing stops a run.
    pub fn is_empty(&self) -> bool {
        self.breakpoints.is_empty() && self.watchpoints.is_empty()
    }
}
