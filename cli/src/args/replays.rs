//! The command line of what replays: verdicts, hunts, snapshots, debuggers.

use clap::Args as ClapArgs;
use std::path::PathBuf;

/// `heddle replay`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Replay {
    /// The recording.
    pub recording: String,
    /// Cut it into so many spans.
    #[arg(long, default_value_t = 1)]
    pub spans: u32,
    /// Replay with this build instead of the recorded one.
    #[arg(long, value_name = "BUILD")]
    pub against: Option<String>,
    /// Print the guest's console; replays whole, in this process.
    #[arg(long)]
    pub console: bool,
    /// With --console: the QEMU to use; without any, the usual ones on the PATH.
    #[arg(long, value_name = "FILE")]
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
    /// How many snapshots to make, spread so that the parts cost the same to replay.
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
    /// The QEMU to use; without any, the usual ones on the PATH.
    #[arg(long, value_name = "FILE")]
    pub qemu: Vec<PathBuf>,
}
