//! Guests on the built-in machine, in this process: bare, recorded, replayed.

use super::compute::Parameters;
use crate::bench::cost::{Cost, Meter, cpu_of_parts};
use crate::cluster::Cluster;
use crate::commands::record::positions;
use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use heddle_node::blocks::BlockCache;
use heddle_node::record::{Console, NamedFile, RecordRequest, Watermarks, record};
use heddle_node::replay::Span;
use heddle_proto::manifest::{MachineSpec, Sleep};
use heddle_proto::{RecordingId, v1};
use heddle_replay_engine::bare::{Bare, Pause};
use heddle_replay_engine::io::{self, ReplayOptions};
use heddle_replay_engine::machine::Machine;
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::{Build, guest};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::mpsc;

/// RAM of the bench's own guest, which needs less than a tenth of it.
const OWN_MEMORY_BYTES: u64 = 16 << 20;
/// RAM of the machine whose snapshots are measured.
const SNAPSHOT_MEMORY_BYTES: u64 = 256 << 20;
/// RAM of Linux.
const LINUX_MEMORY_BYTES: u64 = 256 << 20;
/// Nanoseconds an instruction, as a power of two, as recordings have it unless told otherwise.
const SHIFT: u32 = 3;
/// As much as a recording's outbox has unless told otherwise.
const OUTBOX_BYTES: u64 = 256 << 20;
/// Instructions of a bare guest between two looks at its console.
const SLICE: u64 = 10_000_000;
/// The wall clock of a bare guest at its start: any would do, but always the same.
const EPOCH_NS: i64 = 1_700_000_000_000_000_000;
/// The initramfs's own script, without the line that starts a shell and waits for it.
const LINUX_APPEND: &str = "console=ttyS0 quiet cryptomgr.notests rdinit=/bin/busybox -- sh -c \
\"/bin/busybox sed /cttyhack/d /init > /run.sh; exec /bin/busybox sh /run.sh\"";

/// A guest and the machine it runs on.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its name in the rows.
    pub name: &'static str,
    /// Nanoseconds an instruction, as a power of two.
    pub shift: u32,
    /// Its RAM.
    pub memory_bytes: u64,
    /// What is entered first.
    pub bios: NamedFile,
    /// Kernel.
    pub kernel: Option<NamedFile>,
    /// Initial RAM disk.
    pub initrd: Option<NamedFile>,
    /// Kernel command line.
    pub append: String,
    /// What it prints before it ends, if all went well.
    pub says: &'static str,
}

impl Guest {
    /// So many iterations of integer work, about 213,000 instructions each.
    pub fn compute(iterations: u64) -> Guest {
        Guest::own("compute guest", Parameters { iterations, ..Default::default() })
    }

    /// So many naps of a second.
    pub fn idle(naps: u64) -> Guest {
        Guest::own("idle guest", Parameters { naps, ..Default::default() })
    }

    /// Writes to so many pages over and over; it has to be run piece by piece.
    pub fn writing(pages: u64) -> Guest {
        let guest = Guest::own("writing guest", Parameters { pages, ..Default::default() });
        Guest { memory_bytes: SNAPSHOT_MEMORY_BYTES, ..guest }
    }

    fn own(name: &'static str, parameters: Parameters) -> Guest {
        Guest {
            name,
            shift: SHIFT,
            memory_bytes: OWN_MEMORY_BYTES,
            bios: ("bench.bin".into(), Bytes::from(parameters.image())),
            kernel: None,
            initrd: None,
            append: String::new(),
            says: "checksum ",
        }
    }

    /// Debian's Linux from power-on to poweroff, of the files in `dir`; none where they are not.
    pub fn linux(dir: &Path) -> Result<Option<Guest>> {
        if !dir.join("stamp").exists() {
            return Ok(None);
        }
        let file = |name: &str| -> Result<NamedFile> {
            let path = dir.join(name);
            let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            Ok((name.to_string(), Bytes::from(bytes)))
        };
        Ok(Some(Guest {
            name: "Linux boot",
            shift: SHIFT,
            memory_bytes: LINUX_MEMORY_BYTES,
            bios: file("fw_dynamic.bin")?,
            kernel: Some(file("Image")?),
            initrd: Some(file("initrd")?),
            append: LINUX_APPEND.into(),
            says: "heddle: ready",
        }))
    }

    /// The machine at power-on.
    pub fn machine(&self) -> Result<Machine> {
        let bytes = |file: &NamedFile| -> Arc<[u8]> { Arc::from(&file.1[..]) };
        let images = Images {
            bios: Some(bytes(&self.bios)),
            kernel: self.kernel.as_ref().map(bytes),
            initrd: self.initrd.as_ref().map(bytes),
            dtb: None,
            drives: vec![],
        };
        loader::build(&self.spec(), &images).with_context(|| format!("build the {}'s machine", self.name))
    }

    /// What the loader needs; it looks at no image's name or hash.
    fn spec(&self) -> MachineSpec {
        let mut spec = guest::spec();
        spec.memory_bytes = self.memory_bytes;
        spec.shift = self.shift;
        spec.sleep = Sleep::Off;
        spec.kernel = None;
        spec.append.clone_from(&self.append);
        spec.drives = vec![];
        spec
    }

    fn check(&self, console: &str, exit_code: u16) -> Result<()> {
        let is_well = console.contains(self.says) && exit_code == 0;
        ensure!(is_well, "the {} ended with {exit_code} and has printed:\n{console}", self.name);
        Ok(())
    }
}

/// A guest that has run bare.
pub struct Ran {
    /// What it took, without the making of the machine.
    pub cost: Cost,
    /// Instructions.
    pub instructions: u64,
    /// What it has printed.
    pub console: String,
}

/// Runs a guest without a recording; idle time is jumped over.
pub fn bare(guest: &Guest) -> Result<Ran> {
    let mut bare = Bare::new(guest.machine()?, EPOCH_NS);
    let mut console = vec![];
    let meter = Meter::start();
    loop {
        let pause = bare.run(bare.machine().icount().saturating_add(SLICE));
        console.extend(bare.machine_mut().take_console());
        match pause {
            Pause::Budget => {}
            Pause::Off => break,
            Pause::Stuck => bail!("the {} waits for ever", guest.name),
        }
    }
    let cost = meter.cost();
    let console = String::from_utf8_lossy(&console).into_owned();
    guest.check(&console, bare.machine().shutdown().unwrap_or(0))?;
    Ok(Ran { cost, instructions: bare.machine().icount(), console })
}

/// Records into the store and replays from there, both in this process.
pub struct Recorder {
    client: Cluster,
}

/// A guest that was recorded.
pub struct Made {
    /// The recording's id.
    pub id: RecordingId,
    /// Its last icount.
    pub icount: u64,
    /// This process, from power-on until the recording was sealed, and its chunks made one.
    pub guest: Cost,
    /// This process, with opening the recording and storing the guest's files.
    pub whole: Cost,
    /// CPU seconds of the store's processes, for the whole.
    pub store_cpu: f64,
}

/// A recording that was replayed and matched.
pub struct Replayed {
    /// The replay, from power-on.
    pub engine: Cost,
    /// With fetching log and files from the store, and making the machine.
    pub whole: Cost,
}

impl Recorder {
    /// Of this cluster.
    pub fn new(client: Cluster) -> Recorder {
        Recorder { client }
    }

    /// Records a guest, checks and digests where every recording has them.
    pub async fn record(&self, guest: &Guest, name: &str, sleep: Sleep, snapshot_every: u64) -> Result<Made> {
        // Nobody types; the channels stay open, as a terminal's do.
        let (_typed, input) = mpsc::channel(1);
        let (_stops, stop) = mpsc::unbounded_channel();
        let (printed, prints) = std::sync::mpsc::channel::<Vec<u8>>();
        let output = Box::new(move |bytes: &[u8]| {
            let _ = printed.send(bytes.to_vec());
        });
        let console = Console { input, output, stop };
        let coordinator = Some(self.client.file.coordinator.clone());
        let request = self.request(guest, name, sleep, snapshot_every);
        let store_before = cpu_of_parts();
        let mut power_on = None;
        let whole = Meter::start();
        let started = |_: RecordingId| power_on = Some(Meter::start());
        let store = &self.client.store;
        let recorded = record(store, coordinator, request, console, Watermarks::default(), started).await;
        let recorded = recorded.with_context(|| format!("record the {}", guest.name))?;
        let whole = whole.cost();
        let power_on = power_on.context("the guest was not started")?;
        let printed: Vec<u8> = prints.try_iter().flatten().collect();
        guest.check(&String::from_utf8_lossy(&printed), recorded.exit_code)?;
        Ok(Made {
            id: recorded.id,
            icount: recorded.end.icount,
            guest: power_on.cost(),
            whole,
            store_cpu: cpu_of_parts() - store_before,
        })
    }

    fn request(&self, guest: &Guest, name: &str, sleep: Sleep, snapshot_every: u64) -> RecordRequest {
        RecordRequest {
            harts: 1,
            name: Some(name.into()),
            labels: BTreeMap::new(),
            memory_bytes: guest.memory_bytes,
            shift: guest.shift,
            sleep,
            bios: Some(guest.bios.clone()),
            kernel: guest.kernel.clone(),
            initrd: guest.initrd.clone(),
            dtb: None,
            seed: None,
            append: guest.append.clone(),
            drives: vec![],
            netdev: None,
            has_rng: false,
            has_virtio_console: false,
            positions: positions(snapshot_every),
            outbox_dir: self.client.outbox_dir.clone(),
            outbox_bytes: OUTBOX_BYTES,
        }
    }

    /// Replays a recording whole, and makes sure that it matches.
    pub async fn replay(&self, id: RecordingId) -> Result<Replayed> {
        let whole = Meter::start();
        let blocks = BlockCache::new(self.client.store.clone());
        let span = Span::fetch(&self.client.store, &blocks, id, v1::SpanBounds::default()).await?;
        let build: Build = span.build().parse()?;
        let emulator = tokio::task::spawn_blocking(move || span.emulator(build)).await?;
        let emulator = emulator.map_err(|error| anyhow!(error))?;
        let engine = Meter::start();
        let replay = tokio::task::spawn_blocking(move || io::replay(emulator, &ReplayOptions::default()));
        let replayed = replay.await?.map_err(|error| anyhow!(error))?;
        let (engine, whole) = (engine.cost(), whole.cost());
        ensure!(replayed.verdict.is_match(), "recording {} does not match its log", id.short());
        Ok(Replayed { engine, whole })
    }

    /// Deletes a recording, so that the next has as much room.
    pub async fn delete(&self, id: RecordingId) -> Result<()> {
        self.client.store.delete(id).await.context("delete a recording")
    }
}
