//! Recording a guest into the cluster, live.

use crate::blocks::{IMAGE_BYTES_MAX, put_image};
use crate::chunker::{CHUNK_BYTES_MAX, Chunker};
use crate::live::{Live, SnapshotQueue};
use crate::network::{Netdev, Network};
use crate::outbox::{LeftBehind, left_behind, read_left_behind};
use crate::rewrite::{append, compact};
use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use heddle_proto::manifest::{
    Device, Image, MANIFEST_VERSION, MachineSpec, Manifest, ManifestError, Positions, Sleep,
};
use heddle_proto::{AsyncEvent, Chunk, ChunkBuilder, EmulatorSpec, Event, Hash, Position, RecordingId, v1};
use heddle_replay_engine::io::{self, RecordSink};
use heddle_replay_engine::machine::Machine;
use heddle_replay_engine::machine::loader::{self, Images, LoadError};
use heddle_replay_engine::{AsyncQueue, BUILTIN, Emulator, Snapshot};
use heddle_storage::{StoreClient, StoreError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// Typed bytes that may wait for the guest; beyond it standard input waits.
const TYPED_BYTES_MAX: usize = 16 << 10;
const TYPED_POLL: Duration = Duration::from_millis(10);

/// A file to run, by the user's name for it.
pub type NamedFile = (String, Bytes);

/// What to record.
pub struct RecordRequest {
    /// The recording's name; without one, it is called by its id.
    pub name: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Harts.
    pub harts: u32,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Nanoseconds an instruction, as a power of two.
    pub shift: u32,
    /// What idle time does.
    pub sleep: Sleep,
    /// Firmware.
    pub bios: Option<NamedFile>,
    /// Kernel, or a bare ELF.
    pub kernel: Option<NamedFile>,
    /// Initial RAM disk.
    pub initrd: Option<NamedFile>,
    /// Device tree, if not the machine's own.
    pub dtb: Option<NamedFile>,
    /// What the `rng-seed` of the machine's own device tree is made from, if it is to have one.
    pub seed: Option<u64>,
    /// Kernel command line.
    pub append: String,
    /// Disks.
    pub drives: Vec<NamedFile>,
    /// A network card, and where it is plugged in.
    pub netdev: Option<Netdev>,
    /// A source of entropy.
    pub has_rng: bool,
    /// A virtio console, which then gets what is typed.
    pub has_virtio_console: bool,
    /// Where checks, digests and snapshots stand.
    pub positions: Positions,
    /// Where the outbox goes.
    pub outbox_dir: PathBuf,
    /// How large it may become.
    pub outbox_bytes: u64,
}

/// Why there can't be such a guest: something for the user to mend. Nothing is stored of it.
#[derive(Debug, thiserror::Error)]
pub enum BadRequest {
    /// A value out of its bounds.
    #[error("{option} is {value}: {rule}")]
    Bound {
        /// What the user calls it.
        option: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// Anything else that a reader of the manifest would refuse.
    #[error(transparent)]
    Manifest(ManifestError),
    /// The files don't make a machine.
    #[error(transparent)]
    Load(LoadError),
    /// A file that the store does not take.
    #[error("{name} has {bytes} bytes; at most {IMAGE_BYTES_MAX} can be stored")]
    Large {
        /// The file.
        name: String,
        /// Its length.
        bytes: u64,
    },
    /// The host has no room for the RAM.
    #[error("{0}; give less --memory")]
    Memory(LoadError),
}

impl From<ManifestError> for BadRequest {
    fn from(error: ManifestError) -> BadRequest {
        match error {
            ManifestError::Bound { what, value, rule } => {
                BadRequest::Bound { option: option_of(what), value, rule }
            }
            other => BadRequest::Manifest(other),
        }
    }
}

impl From<LoadError> for BadRequest {
    fn from(error: LoadError) -> BadRequest {
        match error {
            LoadError::Memory(_) => BadRequest::Memory(error),
            other => BadRequest::Load(other),
        }
    }
}

/// What the user calls a field of the manifest; those that no option sets keep their names.
fn option_of(field: &'static str) -> &'static str {
    match field {
        "harts" => "--harts",
        "memory_bytes" => "--memory",
        "shift" => "--shift",
        "seed" => "--seed",
        "snapshot_every" => "--snapshot-every",
        "drives and devices" => {
            "the number of disks and devices (--drive, --netdev, --rng, --virtio-console)"
        }
        other => other,
    }
}

/// What a recording says while it runs. All counters only grow, but `paused`.
#[derive(Clone, Default)]
pub struct Watermarks {
    /// Events recorded.
    pub recorded: Arc<AtomicU64>,
    /// icount of the last event.
    pub icount: Arc<AtomicU64>,
    /// Events on a majority's disks.
    pub committed: Arc<AtomicU64>,
    /// The guest is paused, since the outbox is full.
    pub paused: Arc<AtomicBool>,
}

/// How the guest's console is connected.
pub struct Console {
    /// What is typed.
    pub input: mpsc::Receiver<Vec<u8>>,
    /// Takes what is printed.
    pub output: Box<dyn FnMut(&[u8]) + Send>,
    /// A switch-off from outside: Ctrl-C.
    pub stop: mpsc::UnboundedReceiver<u16>,
}

/// A finished recording.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Its id.
    pub id: RecordingId,
    /// Its name.
    pub name: String,
    /// Where it ended.
    pub end: Position,
    /// Digest of the last state.
    pub digest: Hash,
    /// The guest's exit code.
    pub exit_code: u16,
}

/// Records a guest and seals the recording. `started` is told the id as soon as the
/// recording is open.
pub async fn record(
    store: &StoreClient,
    coordinator: Option<String>,
    mut request: RecordRequest,
    console: Console,
    watermarks: Watermarks,
    started: impl FnOnce(RecordingId),
) -> Result<Recorded> {
    let id = RecordingId(rand::random());
    let mut spec = spec_of(&request);
    // Before anything is stored: what is refused here leaves nothing behind.
    let machine = power_on(&request, id, &spec)?;
    let network = request.netdev.as_ref().map(Network::open).transpose()?;
    let queue = AsyncQueue::default();
    // Hashes all that is loaded, while the store takes the same.
    let emulator = tokio::task::spawn_blocking({
        let (positions, sleep, queue) = (request.positions.clone(), request.sleep, queue.clone());
        move || Emulator::record(machine, positions, sleep, queue)
    });
    store_images(store, id, &request, &mut spec).await?;
    let manifest = manifest_of(&request, id, spec);
    // The machine has its own.
    (request.bios, request.kernel, request.initrd, request.dtb, request.drives) = Default::default();
    let mut live =
        Live::open(store, &manifest, &request.outbox_dir, request.outbox_bytes, &watermarks).await?;
    let emulator = emulator.await?;
    started(id);

    let sink = Sink {
        chunker: live.chunker.clone(),
        snapshots: live.snapshots.take().context("the queue is taken once")?,
        output: console.output,
        network: network.as_ref().map(|network| Box::new(network.sender()) as Output),
        watermarks: watermarks.clone(),
    };
    let kick: Arc<Mutex<Option<io::Kick>>> = Arc::default();
    let typing = tokio::spawn(type_input(console.input, console.stop, queue.clone(), kick.clone()));
    let _typing = AbortOnDrop(typing.abort_handle());
    let _receiving = network.as_ref().map(|network| {
        let kick = kick.clone();
        let receiving = tokio::spawn(network.receive(queue.clone(), move || wake(&kick)));
        AbortOnDrop(receiving.abort_handle())
    });
    if let Some(address) = coordinator {
        let (queue, kick) = (queue.clone(), kick.clone());
        live.show_life(address, move || {
            queue.request_shutdown(1);
            wake(&kick);
        });
    }

    let kick_slot = kick.clone();
    let guest_queue = queue.clone();
    let mut guest = tokio::task::spawn_blocking(move || {
        io::record(emulator, guest_queue, Box::new(sink), |kick| {
            *kick_slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(kick);
        })
    });
    let recording = tokio::select! {
        done = &mut guest => done?.map_err(|error| anyhow!(error))?,
        why = live.refused() => {
            // No use in going on: nobody will take the events any more.
            queue.request_shutdown(1);
            wake(&kick);
            bail!(why);
        }
    };
    let (end, digest, exit_code) = (recording.position, recording.digest, recording.exit_code);
    // Dropping the sink ends the snapshots' channel.
    drop(recording.sink);
    live.seal(false, || {}).await?;
    Ok(Recorded { id, name: manifest.name, end, digest, exit_code })
}

/// Ends a task with the recording it serves.
pub(crate) struct AbortOnDrop(pub(crate) tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The machine asked for, its images not stored yet: they have no hashes, at which the loader
/// does not look.
fn spec_of(request: &RecordRequest) -> MachineSpec {
    fn unstored((name, bytes): &NamedFile) -> Image {
        Image { hash: Hash::ZERO, bytes: bytes.len() as u64, index: Hash::ZERO, name: name.clone() }
    }
    MachineSpec {
        harts: request.harts,
        memory_bytes: request.memory_bytes,
        shift: request.shift,
        sleep: request.sleep,
        bios: request.bios.as_ref().map(unstored),
        kernel: request.kernel.as_ref().map(unstored),
        initrd: request.initrd.as_ref().map(unstored),
        dtb: request.dtb.as_ref().map(unstored),
        seed: request.seed,
        append: request.append.clone(),
        drives: request.drives.iter().map(unstored).collect(),
        devices: devices(request),
    }
}

/// The machine at power-on, if there can be such a one, and such a recording of it.
fn power_on(request: &RecordRequest, id: RecordingId, spec: &MachineSpec) -> Result<Machine, BadRequest> {
    fn bytes((_, bytes): &NamedFile) -> Arc<[u8]> {
        Arc::from(&bytes[..])
    }
    let files = [&spec.bios, &spec.kernel, &spec.initrd, &spec.dtb].into_iter().flatten();
    if let Some(image) = files.chain(&spec.drives).find(|image| image.bytes > IMAGE_BYTES_MAX) {
        return Err(BadRequest::Large { name: image.name.clone(), bytes: image.bytes });
    }
    // The same checks as a reader's.
    Manifest::decode(&manifest_of(request, id, spec.clone()).encode())?;
    let images = Images {
        bios: request.bios.as_ref().map(bytes),
        kernel: request.kernel.as_ref().map(bytes),
        initrd: request.initrd.as_ref().map(bytes),
        dtb: request.dtb.as_ref().map(bytes),
        drives: request.drives.iter().map(bytes).collect(),
    };
    Ok(loader::build(spec, &images)?)
}

/// Stores the images, and puts them into `spec` as they are stored.
async fn store_images(
    store: &StoreClient,
    id: RecordingId,
    request: &RecordRequest,
    spec: &mut MachineSpec,
) -> Result<()> {
    let files = [
        (&mut spec.bios, &request.bios),
        (&mut spec.kernel, &request.kernel),
        (&mut spec.initrd, &request.initrd),
        (&mut spec.dtb, &request.dtb),
    ];
    for (image, file) in files {
        if let Some((name, bytes)) = file {
            *image = Some(put_image(store, id, name, bytes).await?);
        }
    }
    for (image, (name, bytes)) in spec.drives.iter_mut().zip(&request.drives) {
        *image = put_image(store, id, name, bytes).await?;
    }
    Ok(())
}

fn manifest_of(request: &RecordRequest, id: RecordingId, spec: MachineSpec) -> Manifest {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Manifest {
        version: MANIFEST_VERSION,
        id,
        name: request.name.clone().unwrap_or_else(|| format!("builtin-{}", id.short())),
        labels: request.labels.clone(),
        created_unix_ms: created.as_millis() as u64,
        build: BUILTIN.into(),
        emulator: EmulatorSpec::Builtin { machine: Box::new(spec), positions: request.positions.clone() },
    }
}

/// The devices asked for, in the order in which they get their slots.
fn devices(request: &RecordRequest) -> Vec<Device> {
    let asked = [
        (request.netdev.is_some(), Device::Net),
        (request.has_rng, Device::Rng),
        (request.has_virtio_console, Device::Console),
    ];
    asked.into_iter().filter(|(is_asked, _)| *is_asked).map(|(_, device)| device).collect()
}

/// Takes bytes out of the recording.
type Output = Box<dyn FnMut(&[u8]) + Send>;

/// Where the emulator's threads put what they produce.
struct Sink {
    chunker: Chunker,
    snapshots: SnapshotQueue,
    output: Output,
    network: Option<Output>,
    watermarks: Watermarks,
}

impl RecordSink for Sink {
    fn events(&mut self, events: Vec<Event>) {
        self.watermarks.recorded.fetch_add(events.len() as u64, Ordering::Relaxed);
        if let Some(last) = events.last() {
            self.watermarks.icount.store(last.icount, Ordering::Relaxed);
        }
        self.chunker.push(events);
    }

    fn snapshot(&mut self, snapshot: Snapshot) {
        self.snapshots.push(snapshot.into());
    }

    fn console(&mut self, bytes: &[u8]) {
        (self.output)(bytes);
    }

    fn frame(&mut self, frame: &[u8]) {
        if let Some(network) = &mut self.network {
            network(frame);
        }
    }

    fn is_full(&self) -> bool {
        self.snapshots.is_full() || self.chunker.with_outbox(|outbox| outbox.is_full()).unwrap_or(false)
    }

    fn paused(&mut self, is_paused: bool) {
        self.watermarks.paused.store(is_paused, Ordering::Relaxed);
    }
}

fn wake(kick: &Mutex<Option<io::Kick>>) {
    if let Some(kick) = &*kick.lock().unwrap_or_else(PoisonError::into_inner) {
        kick.kick();
    }
}

async fn type_input(
    mut input: mpsc::Receiver<Vec<u8>>,
    mut stop: mpsc::UnboundedReceiver<u16>,
    queue: AsyncQueue,
    kick: Arc<Mutex<Option<io::Kick>>>,
) {
    loop {
        tokio::select! {
            Some(data) = input.recv(), if queue.typed_bytes() < TYPED_BYTES_MAX => queue.push(AsyncEvent::Char { data }),
            () = tokio::time::sleep(TYPED_POLL), if queue.typed_bytes() >= TYPED_BYTES_MAX => {}
            Some(code) = stop.recv() => queue.request_shutdown(code),
            else => return,
        }
        wake(&kick);
    }
}

/// Delivers outboxes that dead recorders left in `dir`, and seals what they recorded
/// as cut. One that the store refuses is kept aside. What was done with each.
pub async fn recover(store: &StoreClient, dir: &Path) -> Vec<String> {
    let mut said = vec![];
    for (path, file) in left_behind(dir) {
        let left = match read_left_behind(&path, &file) {
            Ok(left) => left,
            Err(error) => {
                said.push(aside(&path, &format!("{error:#}")));
                continue;
            }
        };
        let recording = left.recording;
        let ring = path.with_extension("ring");
        match deliver(store, left, &ring).await {
            Ok((events, epoch)) => {
                let _ = std::fs::remove_file(&path);
                let _ = std::fs::remove_file(&ring);
                compact(store, recording, epoch).await;
                said.push(format!(
                    "recording {} sealed as cut at event {events}: its recorder had died",
                    recording.short()
                ));
            }
            // Only what no retry can mend: the store may be away, or another one.
            Err(error @ (StoreError::Fenced(_) | StoreError::Sealed | StoreError::Conflict(_))) => {
                said.push(aside(&path, &error.to_string()));
            }
            Err(error) => said.push(format!("{} is left for later: {error}", path.display())),
        }
    }
    said
}

fn aside(path: &Path, why: &str) -> String {
    let aside = path.with_extension("outbox.refused");
    let _ = std::fs::rename(path, &aside);
    let ring = path.with_extension("ring");
    if ring.exists() {
        let _ = std::fs::rename(&ring, path.with_extension("ring.refused"));
    }
    format!("{} is kept: {why}", aside.display())
}

/// What a QEMU had written and its node not taken, as more chunks.
fn from_ring(ring: &Path, id: RecordingId, row: &v1::RecordingRow) -> Vec<Chunk> {
    if !ring.exists() {
        return vec![];
    }
    let last = Hash::from_slice(&row.last_chunk).unwrap_or(Hash::ZERO);
    let events = crate::qemu::pump::left_in_ring(ring, row.committed_events).unwrap_or_else(|error| {
        let aside = ring.with_extension("ring.refused");
        let _ = std::fs::rename(ring, &aside);
        tracing::warn!("{} is kept: {error:#}", aside.display());
        vec![]
    });
    let mut builder = ChunkBuilder::resume(id, row.committed_events, last);
    let mut chunks = vec![];
    for event in events {
        let is_async = event.body.is_async();
        builder.push(&event);
        if builder.bytes() >= CHUNK_BYTES_MAX && !is_async {
            chunks.extend(builder.take());
        }
    }
    chunks.extend(builder.take());
    chunks
}

/// The events sealed, and the epoch.
async fn deliver(store: &StoreClient, left: LeftBehind, ring: &Path) -> Result<(u64, u64), StoreError> {
    let id = left.recording;
    let opened = store.open(id, &left.token, &[], true).await?;
    if store.get(id).await?.state != "recording" {
        return Err(StoreError::Sealed);
    }
    let missing = left.chunks.into_iter().filter(|chunk| chunk.header.end_event() > opened.committed_events);
    append(store, id, opened.epoch, false, missing).await?;
    let row = store.get(id).await?;
    append(store, id, opened.epoch, false, from_ring(ring, id, &row)).await?;
    let row = store.get(id).await?;
    let last = Hash::from_slice(&row.last_chunk).map_err(|e| StoreError::Corrupt(e.to_string()))?;
    store.seal(id, opened.epoch, row.committed_events, last, true).await?;
    Ok((row.committed_events, opened.epoch))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Firmware that is one instruction long, on 4 MiB.
    fn request() -> RecordRequest {
        RecordRequest {
            name: None,
            labels: BTreeMap::new(),
            harts: 1,
            memory_bytes: 4 << 20,
            shift: 3,
            sleep: Sleep::Off,
            bios: Some(file(4)),
            kernel: None,
            initrd: None,
            dtb: None,
            seed: None,
            append: String::new(),
            drives: vec![],
            netdev: None,
            has_rng: false,
            has_virtio_console: false,
            positions: Positions {
                check_every: 1_000_000,
                digest_every: 10_000_000,
                snapshot_every: 0,
                snapshots_at: vec![],
            },
            outbox_dir: PathBuf::new(),
            outbox_bytes: 0,
        }
    }

    fn file(bytes: usize) -> NamedFile {
        ("file".into(), Bytes::from(vec![0; bytes]))
    }

    fn refused(request: &RecordRequest) -> Option<String> {
        let built = power_on(request, RecordingId([7; 16]), &spec_of(request));
        built.err().map(|error| error.to_string())
    }

    #[test]
    fn what_cannot_be_is_refused_by_the_names_of_its_options() {
        assert_eq!(refused(&request()), None);
        let cases = [
            (
                RecordRequest { memory_bytes: 3 << 20, ..request() },
                "--memory is 3145728: a multiple of 2 MiB",
            ),
            (RecordRequest { shift: 11, ..request() }, "--shift is 11: at most 10"),
            (RecordRequest { harts: 9, ..request() }, "--harts is 9: from 1 to 8"),
            (
                RecordRequest { drives: vec![file(512); 8], has_rng: true, ..request() },
                "--virtio-console) is 9: ",
            ),
            (RecordRequest { seed: Some(7), dtb: Some(file(64)), ..request() }, "--seed is 7: none where"),
            (RecordRequest { dtb: Some(file(64)), ..request() }, "the file given as device tree is none"),
            (
                RecordRequest { bios: None, kernel: Some(file(64)), ..request() },
                "give --bios for a raw image",
            ),
            (RecordRequest { initrd: Some(file(3 << 20)), ..request() }, "initrd does not fit"),
        ];
        for (request, says) in cases {
            let said = refused(&request).unwrap();
            assert!(said.contains(says), "{said}");
        }
        let mut spec = spec_of(&RecordRequest { drives: vec![file(512)], ..request() });
        spec.drives[0].bytes = IMAGE_BYTES_MAX + 1;
        let said = power_on(&request(), RecordingId([7; 16]), &spec).err().unwrap().to_string();
        assert_eq!(said, "file has 4294967297 bytes; at most 4294967296 can be stored");
        let said = BadRequest::from(LoadError::Memory(4 << 30)).to_string();
        assert!(
            said.ends_with("4294967296 bytes of memory for the guest's RAM; give less --memory"),
            "{said}"
        );
    }
}
