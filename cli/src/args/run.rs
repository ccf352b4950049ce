//! The argument of `heddle run`.

use super::{MOST_HARTS, parse_bytes};
use clap::Args as ClapArgs;
use std::path::PathBuf;

const MEMORY_STEP: u64 = 2 << 20;
const MEMORY_MAX: u64 = 4 << 30;

/// `heddle run`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Run {
    /// A bare-metal RISC-V ELF. It begins at its entry, in machine mode, on every hart, with the
    /// hart's number in a0 and the device tree's address in a1. It ends by a store to the test
    /// finisher, or to `tohost` where it has that symbol; its exit code is ours, by its low byte,
    /// or 1 where that alone is 0. One over 65535 counts as 65535.
    pub elf: PathBuf,
    /// Harts. They take turns of instructions on one thread.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST_HARTS))]
    pub harts: u32,
    /// Guest RAM: 16M, 1G.
    #[arg(long, default_value = "128M", value_parser = parse_memory)]
    pub memory: u64,
    /// Put an `rng-seed` made from this number into the device tree, as `heddle record builtin
    /// --seed` does. Guests of one seed have the same: nothing for secrets.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Give up after so many instructions.
    #[arg(long, value_name = "N")]
    pub max_instructions: Option<u64>,
    /// Type standard input at the guest's console, too. What the guest prints is on
    /// standard output either way.
    #[arg(long)]
    pub console: bool,
    /// Write what an architectural test leaves, however it ends by itself: the memory from its
    /// ELF's symbol `begin_signature` to `end_signature`, in hex, as Spike's `+signature` does.
    #[arg(long, value_name = "FILE")]
    pub signature: Option<PathBuf>,
    /// Bytes a line of the signature: 4, 8 or 16. The one at the lowest address is the last.
    #[arg(long, value_name = "BYTES", default_value = "16", value_parser = parse_granule, requires = "signature")]
    pub signature_granularity: usize,
}

fn parse_granule(text: &str) -> Result<usize, String> {
    let granule = text.parse::<usize>().ok().filter(|bytes| [4, 8, 16].contains(bytes));
    granule.ok_or_else(|| format!("{text:?} is not 4, 8 or 16"))
}

/// Guest RAM, in the bounds that a recording's has.
fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    let fits = bytes % MEMORY_STEP == 0 && (MEMORY_STEP..=MEMORY_MAX).contains(&bytes);
    fits.then_some(bytes).ok_or_else(|| format!("{text:?} is not a multiple of 2M, from 2M to 4G"))
}
