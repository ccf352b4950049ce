//! The signature of an architectural test: its results, as RISC-V's frameworks compare them.
//!
//! The memory between two symbols, one granule a line, as Spike writes it: its little-endian
//! value in hex, so that the byte at the lowest address is the last. What the last line lacks
//! is zero.

use heddle_replay_engine::machine::{Machine, RAM_BASE};
use std::fmt::Write;
use std::ops::Range;

/// The lines of what is at `place`; none if not all of that is RAM.
pub fn lines(machine: &Machine, place: &Range<u64>, granule: usize) -> Option<String> {
    let length = usize::try_from(place.end.checked_sub(place.start)?).ok()?;
    let bytes = machine.ram().slice(place.start.wrapping_sub(RAM_BASE), length)?;
    let mut text = String::new();
    for line in bytes.chunks(granule) {
        text.push_str(&"00".repeat(granule - line.len()));
        for byte in line.iter().rev() {
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
    }
    Some(text)
}
