//! The command line.

mod bench;
mod record;
mod replays;
mod run;

pub use bench::BenchMachine;
pub use record::{Record, RecordBuiltin, RecordCommon, RecordQemu};
pub use replays::{Debug, Hunt, Index, MemoryRange, Replay, State};
pub use run::Run;

use crate::local::DEFAULT_SHARDS;
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use heddle_proto::manifest::HARTS_MAX;
use std::path::PathBuf;

/// Record whole-system emulators into a Raft-replicated log, and replay them bit for
/// bit, in parallel, each checkpoint on the thread role that recorded it.
#[derive(Parser, Debug)]
#[command(name = "heddle", version, after_help = EXIT_CODES)]
pub struct Args {
    /// The cluster: a directory that `heddle up` wrote to, or the coordinator's URL.
    /// Without it, an embedded one in your data directory.
    #[arg(long, global = true, env = "HEDDLE_CLUSTER", value_name = "DIR|URL")]
    pub cluster: Option<String>,
    /// Credentials for mutual TLS: a directory with ca.pem, cert.pem and key.pem. With a
    /// cluster's directory, those that `heddle up --mtls` left there.
    #[arg(long, global = true, env = "HEDDLE_TLS", value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, global = true, default_value = "table", value_name = "FORMAT")]
    pub output: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Harts a machine can have.
const MOST_HARTS: i64 = HARTS_MAX as i64;

const EXIT_CODES: &str = "Exit codes: 0 ok, 1 unexpected, 2 usage, 3 diverged, 4 nothing selected, \
5 corrupt, 6 incompatible build or version, 7 no quorum, 8 timeout";

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people.
    Table,
    /// More columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Names alone.
    Name,
}

/// Commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Show it all: a cluster, a recording, parallel replays, kills, a planted defect found.
    Demo(Demo),
    /// Run a whole cluster on this machine until Ctrl-C.
    Up(Up),
    /// Run one part of a cluster.
    #[command(subcommand)]
    Serve(Serve),
    /// Record a guest.
    #[command(subcommand)]
    Record(Record),
    /// Run a bare-metal ELF on the built-in RISC-V machine, without a recording or a cluster.
    Run(Run),
    /// List recordings, jobs, nodes or replicas.
    Get(Get),
    /// Say all about one recording, job, node or replica.
    Describe(Describe),
    /// Delete a recording.
    Delete(Describe),
    /// Print a recording's events.
    Events(Events),
    /// Replay a recording and compare it with its log.
    Replay(Replay),
    /// Find the first divergence of a recording from its log, or of another build from it.
    Hunt(Hunt),
    /// Make snapshots of a recording afterwards with a replay, so that it replays in parallel.
    Index(Index),
    /// Compare two recordings' logs, without a replay.
    Diff(Diff),
    /// Write a recording, with all that a replay of it needs, to standard output.
    Export(Export),
    /// Verify an exported recording as a whole, then store it.
    Import(Import),
    /// Stop a replay at an icount, for gdb; backwards, too.
    Debug(Debug),
    /// Show registers, memory and the digest's parts at an icount of the built-in machine.
    State(State),
    /// Test the QEMU builds of this machine: record, replay, snapshot, restore.
    Doctor(Doctor),
    /// Draw a recording: icount against host time, events by kind and role.
    Plot(Plot),
    /// Add a replica to the store, drain it, or remove it for good.
    #[command(subcommand)]
    Replica(ReplicaCommand),
    /// Read and hash again all that the replicas store; mend what has rotted from another replica.
    Scrub(Scrub),
    /// Measure, as ratios against named peers in the same run.
    #[command(subcommand)]
    Bench(Bench),
    /// Make a part's or a user's certificate for mutual TLS, and the authority that signs it.
    Certificate(Certificate),
    /// Print a shell's completions.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// `heddle demo`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Demo {
    /// Draws the planted defect's bit, register and icount.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Keep the cluster's data here.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
}

/// `heddle certificate`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Certificate {
    /// Where the credentials go.
    pub out: PathBuf,
    /// The authority's directory; it is made if it is not there. Keep it from the parts.
    #[arg(long, value_name = "DIR")]
    pub authority: PathBuf,
    /// A name or an IP address under which the part is reached.
    #[arg(long = "host", value_name = "HOST", default_value = "localhost")]
    pub hosts: Vec<String>,
    /// How long the certificate holds.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(i64).range(1..=36500))]
    pub days: i64,
}

/// `heddle up`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Up {
    /// Where the cluster's data lives, and what clients need is written.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Replicas of the store.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    pub replicas: u64,
    /// Shards of a new store: each is a Raft group of its own, and their leaders are spread.
    #[arg(long, default_value_t = DEFAULT_SHARDS, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub shards: u32,
    /// Nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=64))]
    pub nodes: u64,
    /// Replays at once on each node.
    #[arg(long, default_value_t = 1)]
    pub slots: u32,
    /// A lease without a sign of life lasts so long, in milliseconds.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(800..=3_600_000))]
    pub lease_ms: u64,
    /// Parts talk by mutual TLS, with certificates made in the cluster's directory.
    #[arg(long)]
    pub mtls: bool,
    /// Nodes offer builds with a planted fault, for tests and demos alone.
    #[arg(long)]
    pub offer_planted: bool,
    /// A QEMU that nodes offer; without any, the usual ones on the PATH.
    #[arg(long, value_name = "FILE")]
    pub qemu: Vec<PathBuf>,
}

/// `heddle serve`.
#[derive(Subcommand, Debug)]
pub enum Serve {
    /// A replica of the log store.
    Storage {
        /// This replica's id, from 1.
        #[arg(long)]
        id: u64,
        /// The cluster's id.
        #[arg(long, default_value_t = 1)]
        cluster_id: u64,
        /// Its directory.
        #[arg(long)]
        dir: PathBuf,
        /// Where to listen.
        #[arg(long)]
        listen: std::net::SocketAddr,
        /// All replicas of a new cluster, its own included: ID=URL.
        #[arg(long = "peer", value_name = "ID=URL", required = true)]
        peers: Vec<String>,
        /// Shards of a new cluster.
        #[arg(long, default_value_t = DEFAULT_SHARDS, value_parser = clap::value_parser!(u32).range(1..=1024))]
        shards: u32,
        /// A replica of the cluster to join, which `heddle replica add` has told of this one.
        /// --peer then names this replica alone; cluster id and shards are the cluster's.
        #[arg(long, value_name = "URL")]
        join: Option<String>,
        /// End when the parent process ends.
        #[arg(long, hide = true)]
        with_parent: bool,
    },
    /// The coordinator.
    Coordinator {
        /// Where to listen.
        #[arg(long)]
        listen: std::net::SocketAddr,
        /// The store's replicas.
        #[arg(long = "replica", value_name = "URL", required = true)]
        replicas: Vec<String>,
        /// A lease without a sign of life lasts so long, in milliseconds.
        #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(800..=3_600_000))]
        lease_ms: u64,
        /// End when the parent process ends.
        #[arg(long, hide = true)]
        with_parent: bool,
    },
    /// A node.
    Node {
        /// Its name.
        #[arg(long)]
        name: String,
        /// Where to listen.
        #[arg(long)]
        listen: std::net::SocketAddr,
        /// The store's replicas.
        #[arg(long = "replica", value_name = "URL", required = true)]
        replicas: Vec<String>,
        /// The coordinator.
        #[arg(long)]
        coordinator: String,
        /// Replays at once.
        #[arg(long, default_value_t = 1)]
        slots: u32,
        /// Offer builds with a planted fault, for tests and demos alone.
        #[arg(long)]
        offer_planted: bool,
        /// A QEMU to offer; without any, the usual ones on the PATH.
        #[arg(long, value_name = "FILE")]
        qemu: Vec<PathBuf>,
        /// End when the parent process ends.
        #[arg(long, hide = true)]
        with_parent: bool,
    },
}

/// Kinds of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Recordings.
    #[value(alias = "recording")]
    Recordings,
    /// Jobs.
    #[value(alias = "job")]
    Jobs,
    /// Nodes.
    #[value(alias = "node")]
    Nodes,
    /// Replicas of the store.
    #[value(alias = "replica")]
    Replicas,
    /// Shards of the store, and who leads them.
    #[value(alias = "shard")]
    Shards,
}

/// `heddle get`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Get {
    /// What.
    pub kind: Kind,
    /// Only this one.
    pub name: Option<String>,
    /// Only those with these labels: k=v,k2=v2.
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    pub selector: Option<String>,
    /// Print again whenever something has changed.
    #[arg(long, short = 'w')]
    pub watch: bool,
}

/// `heddle describe`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Describe {
    /// What.
    pub kind: Kind,
    /// Which.
    pub name: String,
}

/// `heddle events`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Events {
    /// The recording.
    pub recording: String,
    /// Only this kind: clock-host, block, clock-warp-start, ...
    #[arg(long)]
    pub kind: Option<String>,
    /// Only this role.
    #[arg(long, value_parser = ["vcpu", "iothread"])]
    pub role: Option<String>,
    /// From this icount.
    #[arg(long, default_value_t = 0)]
    pub from: u64,
    /// To this icount.
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    pub to: u64,
    /// Go on printing until the recording has ended.
    #[arg(short, long)]
    pub follow: bool,
}

/// `heddle doctor`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Doctor {
    /// The QEMUs to test; without any, the usual ones on the PATH.
    #[arg(value_name = "FILE")]
    pub qemu: Vec<PathBuf>,
}

/// `heddle plot`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Plot {
    /// The recording.
    pub recording: String,
    /// The picture: .svg or .png.
    #[arg(short = 'o', long = "out", value_name = "FILE")]
    pub out: PathBuf,
}

/// `heddle replica`.
#[derive(Subcommand, Debug)]
pub enum ReplicaCommand {
    /// Take in a replica: it is sent all that is stored, and then votes. Start it with
    /// `heddle serve storage --id ID --join URL`.
    Add {
        /// Its id, which none had before, and where it listens: ID=URL.
        #[arg(value_name = "ID=URL")]
        replica: String,
        /// How long to wait.
        #[command(flatten)]
        wait: Wait,
    },
    /// Let a replica go, for good: its id never comes back. Its process can be stopped then.
    Remove {
        /// Which.
        id: u64,
        /// How long to wait.
        #[command(flatten)]
        wait: Wait,
    },
    /// Move all leaders off a replica, before it is stopped for a while.
    Drain {
        /// Which.
        id: u64,
        /// How long to wait.
        #[command(flatten)]
        wait: Wait,
    },
    /// Let a drained replica lead again.
    Undrain {
        /// Which.
        id: u64,
    },
}

/// How long to wait.
#[derive(ClapArgs, Debug, Clone, Copy)]
pub struct Wait {
    /// Give up waiting after so many seconds; what was asked for goes on.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub timeout: u64,
}

/// `heddle scrub`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Scrub {
    /// Read at most so many MiB a second of each replica; 0: as fast as it goes.
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    pub rate: u64,
}

/// `heddle bench`.
#[derive(Subcommand, Debug)]
pub enum Bench {
    /// The built-in machine: speed, recording, replaying, idling, snapshots, seeking, against QEMU.
    Machine(BenchMachine),
    /// Recording, storing and replaying Debian's Linux on QEMU.
    Qemu(BenchQemu),
    /// The log store against etcd and NATS JetStream, three replicas each on this machine.
    Store(BenchStore),
}

/// `heddle bench store`.
#[derive(ClapArgs, Debug, Clone)]
pub struct BenchStore {
    /// Seconds that count of each load, after a second of warm-up.
    #[arg(long, default_value_t = 8.0)]
    pub seconds: f64,
    /// Chunks of the large store that is opened.
    #[arg(long, default_value_t = 1_000_000)]
    pub chunks: u64,
    /// Recordings that are written at the same time.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub recordings: u64,
    /// Only this load, by its payload's KiB.
    #[arg(long, value_name = "KIB")]
    pub load: Option<usize>,
    /// Only these parts; without any, all.
    #[arg(long, value_name = "PART", value_parser = ["peers", "steady", "many", "open"])]
    pub part: Vec<String>,
}

/// `heddle bench qemu`.
#[derive(ClapArgs, Debug, Clone)]
pub struct BenchQemu {
    /// The guest's kernel.
    #[arg(long, default_value = "target/guests/vmlinuz")]
    pub kernel: PathBuf,
    /// Its initramfs, as `tests/linux-guest` makes it.
    #[arg(long, default_value = "target/guests/initrd")]
    pub initrd: PathBuf,
    /// Rounds of the computing guest.
    #[arg(long, default_value_t = 300)]
    pub rounds: u32,
    /// Rounds of the guest with a long log: 64 MiB or more.
    #[arg(long, default_value_t = 1300)]
    pub log_rounds: u32,
    /// Only these parts; without any, all.
    #[arg(long, value_name = "PART", value_parser = ["recording", "spans", "many", "stored"])]
    pub part: Vec<String>,
    /// Seconds the idle guest sleeps.
    #[arg(long, default_value_t = 25)]
    pub idle: u32,
    /// Runs of each recording; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
}

/// `heddle export`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Export {
    /// The recording.
    pub recording: String,
}

/// `heddle import`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Import {
    /// What `heddle export` has written.
    pub file: PathBuf,
}

/// `heddle diff`.
#[derive(ClapArgs, Debug, Clone)]
pub struct Diff {
    /// One recording.
    pub a: String,
    /// The other.
    pub b: String,
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size like 64M or 1G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(line: &str) -> Option<String> {
        Args::try_parse_from(line.split(' ')).err().map(|error| error.to_string())
    }

    #[test]
    fn an_option_that_would_do_nothing_is_refused() {
        let cases = [
            ("heddle replay a --console --spans 2", "--spans"),
            ("heddle replay a --qemu q", "--console"),
            ("heddle replay a --qemu q --spans 2", "--spans"),
            ("heddle replay a --qemu q --from 1", "--from"),
            ("heddle replay a --console --to 1", "--to"),
            ("heddle run a --signature-granularity 4", "--signature <FILE>"),
            ("heddle state a --at 1 --virtual", "--memory"),
        ];
        for (line, named) in cases {
            let said = refusal(line).unwrap_or_default();
            assert!(said.contains(named), "{line}: {said}");
        }
    }

    #[test]
    fn defaults_are_in_nobodys_way() {
        for line in [
            "heddle replay a --console --qemu q --timeout 3",
            "heddle replay a --spans 2 --timeout 3",
            "heddle replay a --from 1 --to 2",
            "heddle run a",
            "heddle run a --signature f --signature-granularity 4",
            "heddle record builtin",
        ] {
            assert_eq!(refusal(line), None, "{line}");
        }
    }
}
