//! The command line of `heddle record`.

use super::{MOST_HARTS, parse_bytes};
use clap::{Args as ClapArgs, Subcommand};
use heddle_node::network::Netdev;
use std::path::PathBuf;

/// `heddle record`.
#[derive(Subcommand, Debug)]
pub enum Record {
    /// The built-in RISC-V machine. Without firmware and kernel, the bundled guest.
    Builtin(Box<RecordBuiltin>),
    /// A QEMU of yours: its own command line behind `--`.
    Qemu(Box<RecordQemu>),
}

/// What every recording takes.
#[derive(ClapArgs, Debug, Clone)]
pub struct RecordCommon {
    /// The recording's name; without it, `builtin-` or `qemu-` and the first digits of its id.
    #[arg(long)]
    pub name: Option<String>,
    /// A label, KEY=VALUE.
    #[arg(long = "label", value_name = "K=V")]
    pub labels: Vec<String>,
    /// Where events wait for the store.
    #[arg(long, value_name = "DIR")]
    pub outbox: Option<PathBuf>,
    /// How much may wait before the guest pauses.
    #[arg(long, default_value = "256M", value_parser = parse_bytes_not_zero)]
    pub outbox_bytes: u64,
    /// End the recording, with exit code 0, once the console has printed this.
    #[arg(long, value_name = "TEXT")]
    pub until: Option<String>,
    /// Type a line only once the console has printed this, for each line.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
}

/// `heddle record qemu`.
#[derive(ClapArgs, Debug, Clone)]
pub struct RecordQemu {
    /// What every recording takes.
    #[command(flatten)]
    pub common: RecordCommon,
    /// Instructions between snapshots, 0 for none but the last. Each stops the guest for
    /// about a tenth of a second; `heddle index` makes them later without that.
    #[arg(long, default_value_t = 0)]
    pub snapshot_every: u64,
    /// Take no snapshot at the end: the last stretch is then proven by its events and
    /// roles alone.
    #[arg(long)]
    pub no_last_snapshot: bool,
    /// Where events' thread roles come from: `by-rule` allows a QEMU that does not load
    /// the tap (static, musl, set-uid), and guesses them by the log's grammar.
    #[arg(long, value_parser = ["tap", "by-rule"], default_value = "tap")]
    pub roles: String,
    /// Keep the recording only if the guest fails: exit code other than 0.
    #[arg(long, value_name = "WHEN", value_parser = ["always", "fail"], default_value = "always")]
    pub keep_if: String,
    /// QEMU and its options.
    #[arg(last = true, required = true, value_name = "QEMU")]
    pub command: Vec<String>,
}

/// `heddle record builtin`.
#[derive(ClapArgs, Debug, Clone)]
pub struct RecordBuiltin {
    /// What every recording takes.
    #[command(flatten)]
    pub common: RecordCommon,
    /// Firmware: raw or ELF.
    #[arg(long, value_name = "FILE")]
    pub bios: Option<PathBuf>,
    /// Kernel; without firmware, a bare-metal ELF.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "")]
    pub append: String,
    /// A device tree to hand to the guest instead of the machine's own. It is taken as it is:
    /// it has to say where the initial RAM disk lies, and the command line.
    #[arg(long, value_name = "FILE", conflicts_with = "append")]
    pub dtb: Option<PathBuf>,
    /// Put an `rng-seed` made from this number into the machine's own device tree, for the
    /// kernel's random numbers. Without one, Linux collects jitter for them, which takes some
    /// 150 million instructions of a boot. The manifest keeps the number, so that replays have
    /// it. Guests of one seed begin with the same random numbers: nothing for secrets, for
    /// which --rng gives a device. A tree given by --dtb has its own, if any.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Write the device tree that the guest would get to FILE, and record nothing.
    #[arg(long, value_name = "FILE")]
    pub dump_dtb: Option<PathBuf>,
    /// A disk, as a raw image of at most 4 GiB; writes go to an overlay, the file is never
    /// touched. Up to 8, with the other virtio devices.
    #[arg(long = "drive", value_name = "FILE")]
    pub drives: Vec<PathBuf>,
    /// A virtio network card on a Unix datagram socket, one frame a datagram. PATH is made for
    /// the recording; frames go to the peer, or else to who sent last.
    #[arg(long, value_name = "unix:PATH[,peer=PATH]")]
    pub netdev: Option<Netdev>,
    /// A virtio entropy device; what it gave is in the log.
    #[arg(long)]
    pub rng: bool,
    /// A virtio console. What is typed goes there instead of to the UART; both print here.
    #[arg(long)]
    pub virtio_console: bool,
    /// Harts. They take turns of instructions on one thread, so that more of them make a guest
    /// parallel, but not faster. The bundled guest has one.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST_HARTS))]
    pub harts: u32,
    /// Guest RAM: 16M, 1G; 128M without it. The bundled guest has 16M, and takes none.
    #[arg(long, value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// Nanoseconds an instruction, as a power of two.
    #[arg(long, default_value_t = 3)]
    pub shift: u32,
    /// Whether idle time passes in real time or is jumped over.
    #[arg(long, default_value = "on", value_parser = ["on", "off"])]
    pub sleep: String,
    /// Instructions between snapshots, 0 for none; a multiple of 10,000,000. `heddle index` makes
    /// them later.
    #[arg(long, default_value_t = 50_000_000)]
    pub snapshot_every: u64,
}

fn parse_bytes_not_zero(text: &str) -> Result<u64, String> {
    parse_bytes(text).and_then(|bytes| if bytes == 0 { Err("at least 1 byte".into()) } else { Ok(bytes) })
}
