//! The running check and the history digest.

use crate::machine::hart::Hart;
use heddle_proto::{Body, Event, Hash, QemuEvent};
use serde::{Deserialize, Serialize};

/// What chains an execution's past to its present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checks {
    /// pc and registers, folded at every event and fixed position.
    pub running: u64,
    /// The history digest at the last digest position.
    pub history: Hash,
    /// The events since then, chained.
    pub since: Hash,
}

impl Checks {
    /// An event happens while the hart is in this state.
    pub fn event(&mut self, event: &Event, hart: &Hart) {
        self.fold(hart);
        let mut bytes = Vec::with_capacity(64);
        bytes.extend_from_slice(&self.since.0);
        bytes.extend_from_slice(&event.icount.to_le_bytes());
        bytes.extend_from_slice(&[event.body.code(), event.role as u8]);
        match &event.body {
            Body::Clock { value, .. } => bytes.extend_from_slice(&value.to_le_bytes()),
            Body::Async(event) => match event {
                heddle_proto::AsyncEvent::BottomHalf { id } | heddle_proto::AsyncEvent::Block { id } => {
                    bytes.extend_from_slice(&id.to_le_bytes());
                }
                heddle_proto::AsyncEvent::Char { data } => bytes.extend_from_slice(data),
            },
            Body::Shutdown { code } => bytes.extend_from_slice(&code.to_le_bytes()),
            Body::Qemu(
                QemuEvent::Net { data, .. }
                | QemuEvent::CharRead { data, .. }
                | QemuEvent::Random { data, .. },
            ) => bytes.extend_from_slice(data),
            // QEMU's other events never happen on this hart.
            Body::Qemu(_) | Body::Checkpoint(_) | Body::Check { .. } | Body::Digest { .. } | Body::End => {}
        }
        self.since = Hash::of(&bytes);
    }

    /// Folds pc and registers in.
    pub fn fold(&mut self, hart: &Hart) {
        self.running = (self.running.rotate_left(9) ^ hart.fold()).wrapping_mul(0x2545_f491_4f6c_dd1d);
    }

    /// A digest position: chains `root` in and returns the history digest.
    pub fn digest(&mut self, root: Hash) -> Hash {
        self.history = Hash::of(&[self.history.0, self.since.0, root.0].concat());
        self.since = Hash::ZERO;
        self.history
    }
}
