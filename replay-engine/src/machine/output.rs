//! What a device has sent out of the machine, as a check sees it.

use serde::{Deserialize, Serialize};

/// A fold of all that was sent. It is state, so that it goes on from a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Bytes sent, folded in their order: the output check.
    #[serde(serialize_with = "super::shown::hex")]
    pub fold: u64,
    /// Number of bytes sent.
    pub bytes: u64,
}

impl Output {
    /// A byte was sent.
    pub fn byte(&mut self, byte: u8) {
        self.bytes = self.bytes.wrapping_add(1);
        self.mix(u64::from(byte));
    }

    /// A frame was sent: where it ends counts, too.
    pub fn frame(&mut self, frame: &[u8]) {
        frame.iter().for_each(|byte| self.byte(*byte));
        self.mix(1 << 32 | frame.len() as u64);
    }

    /// Takes what another device has sent so far into this fold.
    pub fn with(mut self, other: Output) -> Output {
        self.mix(other.fold);
        self
    }

    fn mix(&mut self, value: u64) {
        self.fold = (self.fold.rotate_left(7) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
