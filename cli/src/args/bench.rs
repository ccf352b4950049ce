//! The arguments of `heddle bench machine`.

use clap::Args as ClapArgs;
use std::path::PathBuf;

/// `heddle bench machine`.
#[derive(ClapArgs, Debug, Clone)]
pub struct BenchMachine {
    /// The directory that `tests/riscv-guest` makes; the rows of Linux need it.
    #[arg(long, value_name = "DIR", default_value = "target/guests/riscv")]
    pub guest: PathBuf,
    /// Iterations of the computing guest, about 213,000 instructions each.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub iterations: u64,
    /// Seconds that the idle guest sleeps while it is recorded in real time.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub idle_seconds: u64,
    /// Only these parts; without any, all.
    #[arg(long, value_name = "PART", value_parser = ["speed", "snapshots", "boot", "recording", "idle", "seek"])]
    pub part: Vec<String>,
    /// Runs of everything. The median counts; of what recording and replaying cost, the median of
    /// the ratios of two that ran one after the other.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
}
