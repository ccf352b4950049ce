//! The bench's own guest, and what it is told to do.
//!
//! `replay-engine/guest/bench.c` is its source. Its image is in the binary, so that neither a
//! toolchain nor a download is needed, and has its parameters at a fixed place:
//!
//! ```text
//!  0  a jump
//! 16  iterations   of the computation, whose checksum it prints
//! 24  naps         of a second of the timer each, after that
//! 32  pages        if not 0: it writes to so many over and over, and does nothing else
//! ```

use anyhow::{Context, Result};
use heddle_replay_engine::guest::BENCH_BIN;

/// Where the image has its parameters.
const PARAMETERS_AT: usize = 16;

/// What the guest does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parameters {
    /// Iterations of the computation.
    pub iterations: u64,
    /// Naps of a second each.
    pub naps: u64,
    /// Pages to write to, every third one, if that is all it shall do.
    pub pages: u64,
}

impl Parameters {
    /// The guest with these parameters: a flat image for the start of RAM.
    pub fn image(self) -> Vec<u8> {
        let words = [self.iterations, self.naps, self.pages].map(u64::to_le_bytes).concat();
        let mut image = BENCH_BIN.to_vec();
        image[PARAMETERS_AT..][..words.len()].copy_from_slice(&words);
        image
    }
}

/// The checksum that the guest has printed.
pub fn checksum(console: &str) -> Result<u64> {
    let printed = console.lines().find_map(|line| line.trim().strip_prefix("checksum "));
    let digits = printed.with_context(|| format!("no checksum is on the console: {console:?}"))?;
    u64::from_str_radix(digits, 16).with_context(|| format!("read the checksum {digits:?}"))
}

#[cfg(test)]
mod tests;
