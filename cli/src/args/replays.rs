//! The command line of what replays: verdicts, hunts, snapshots, debuggers, states.

use clap::Args as ClapArgs;
use std::path::PathBuf;
use std::str::FromStr;

/// Most bytes of memory that `heddle state` prints.
const MEMORY_BYTES_MAX: u64 = 1 << 20;

/// `heddle replay`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Replay {
    /// The recording.
    pub recording: String,
    /// Cut it into so many spans.
    #[arg(long, default_value_t = 1)]
    pub spans: u32,
    /// Built-in machine: judge from here on. The replay begins at the last snapshot before,
    /// in this process.
    #[arg(long, value_name = "ICOUNT", conflicts_with_all = ["spans", "console", "qemu"])]
    pub from: Option<u64>,
    /// Built-in machine: judge up to here.
    #[arg(long, value_name = "ICOUNT", conflicts_with_all = ["spans", "console", "qemu"])]
    pub to: Option<u64>,
    /// Replay with this build instead of the recorded one.
    #[arg(long, value_name = "BUILD")]
    pub against: Option<String>,
    /// Print the guest's console; replays whole, in this process.
    #[arg(long, conflicts_with = "spans")]
    pub console: bool,
    /// QEMU, with --console: the one to use; without any, the usual ones on the PATH.
    #[arg(long, value_name = "FILE", requires = "console", conflicts_with = "spans")]
    pub qemu: Vec<PathBuf>,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

/// `heddle hunt`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Hunt {
    /// The recording.
    pub recording: String,
    /// The build to compare; without it, the recorded one against its own log.
    #[arg(long, value_name = "BUILD")]
    pub against: Option<String>,
    /// QEMU: put another file in place of one of the recording's, by its name there.
    #[arg(long, value_name = "NAME=FILE")]
    pub with: Vec<String>,
    /// QEMU: feed this recording's log instead.
    #[arg(long, value_name = "RECORDING")]
    pub log: Option<String>,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

/// `heddle index`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Index {
    /// The recording.
    pub recording: String,
    /// How many snapshots to make, spread so that the parts cost the same to replay. On the
    /// built-in machine they stand at multiples of 1,000,000 instructions, and those that it has
    /// there already are not made again.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub snapshots: u32,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

/// `heddle debug`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Debug {
    /// The recording.
    pub recording: String,
    /// Where to stop.
    #[arg(long, value_name = "ICOUNT")]
    pub at: u64,
    /// Built-in machine: wait for gdb at this address, where whoever reaches it may come in,
    /// instead of on a socket of yours.
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// QEMU: the one to use; without any, the usual ones on the PATH.
    #[arg(long, value_name = "FILE")]
    pub qemu: Vec<PathBuf>,
}

/// `heddle state`.
#[derive(ClapArgs, Debug, Clone)]
pub struct State {
    /// The recording.
    pub recording: String,
    /// Where: so many instructions have run.
    #[arg(long, value_name = "ICOUNT")]
    pub at: u64,
    /// The hart to show, from 0; without it, the one whose turn it is.
    #[arg(long, value_name = "N")]
    pub hart: Option<usize>,
    /// Memory to print, at most 1 MiB: 0x80000000:256. Without --virtual the address is
    /// physical, and only RAM can be printed.
    #[arg(long, value_name = "ADDR:LEN")]
    pub memory: Option<MemoryRange>,
    /// --memory is a virtual address, as the hart's page table has it there.
    #[arg(long, requires = "memory")]
    pub r#virtual: bool,
    /// Print what devices and timers hold, too, beside the hashes of that; JSON and YAML
    /// always have it.
    #[arg(long)]
    pub leaves: bool,
}

/// Some memory, as `heddle state --memory` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Where it begins.
    pub address: u64,
    /// How many bytes.
    pub bytes: u64,
}

impl FromStr for MemoryRange {
    type Err = String;

    fn from_str(text: &str) -> Result<MemoryRange, String> {
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        let parts = text.split_once(':').and_then(|(address, bytes)| {
            Some(MemoryRange { address: number(address).ok()?, bytes: number(bytes).ok()? })
        });
        let range = parts.ok_or_else(|| format!("{text:?} is not ADDR:LEN, as in 0x80000000:256"))?;
        if !(1..=MEMORY_BYTES_MAX).contains(&range.bytes) {
            return Err(format!("LEN is 1 to {MEMORY_BYTES_MAX} bytes"));
        }
        Ok(range)
    }
}
