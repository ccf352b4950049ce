//! Recording a QEMU of the user's, live.
//!
//! One thread drives: it takes the log from the tap's ring, decodes it, gives every
//! event the role of the thread that wrote it, and hands it on. What is in the outbox's
//! file is given back to the ring, so that one of the two always has it.

use crate::blocks::put_image;
use crate::chunker::Chunker;
use crate::live::{Live, SnapshotQueue};
use crate::qemu::builds::QemuBuild;
use crate::qemu::doctor::ensure_able;
use crate::qemu::process::{Launch, Process};
use crate::qemu::pump::Pump;
use crate::qemu::qcow2::Qcow2;
use crate::qemu::qmp::Qmp;
use crate::qemu::ring::{Mode, Stage};
use crate::qemu::scratch::Scratch;
use crate::qemu::snapshot::{Captured, Tracker, capture, discard};
use crate::qemu::typing::{Taken, type_all};
use crate::record::{AbortOnDrop, Console, Watermarks};
use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use heddle_proto::manifest::{Image, MANIFEST_VERSION};
use heddle_proto::qemu::{QemuDisk, QemuSpec, RoleSource};
use heddle_proto::{EmulatorSpec, Hash, Manifest, Position, RecordingId};
use heddle_replay_engine::qemu::command::{self, Plan, Target};
use heddle_replay_engine::qemu::log::{Decoder, HEADER_BYTES};
use heddle_replay_engine::qemu::recorded;
use heddle_storage::StoreClient;
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc as threads;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often the ring is looked at: far below the chunker's linger, far above a wake-up's cost.
const PUMP: Duration = Duration::from_millis(4);
/// How often QEMU is asked whether it still runs.
const LOOK: Duration = Duration::from_millis(250);
/// A QEMU that was told to quit and does not is killed: what it logged is here.
const QUIT: Duration = Duration::from_secs(10);
const CONSOLE_BYTES: usize = 16 << 10;
/// Nobody asked for the end.
const NO_STOP: u16 = u16::MAX;

/// What to record.
pub struct QemuRequest {
    /// The recording's name; without one, it is called by its id.
    pub name: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The user's command line, taken apart by [`plan`].
    pub planned: Planned,
    /// Instructions between snapshots, 0 for none but the last.
    pub snapshot_every: u64,
    /// Whether the last state is saved: without it the end has no digest.
    pub last_snapshot: bool,
    /// Where the outbox and the ring go.
    pub outbox_dir: PathBuf,
    /// How large the outbox may become.
    pub outbox_bytes: u64,
}

/// A finished recording.
#[derive(Clone, Debug)]
pub struct QemuRecorded {
    /// Its id.
    pub id: RecordingId,
    /// Its name.
    pub name: String,
    /// Where it ended.
    pub end: Position,
    /// Digest of the last state; `None` when QEMU was killed or left at once.
    pub digest: Option<Hash>,
    /// QEMU's exit code, 128 and the signal if one ended it.
    pub exit_code: u16,
    /// It did not end cleanly: sealed as cut.
    pub is_cut: bool,
    /// Snapshots taken.
    pub snapshots: u64,
    /// User and system seconds of QEMU's.
    pub qemu_cpu_seconds: f64,
    /// What QEMU said on standard error.
    pub said: String,
}

/// A command line that was taken apart and checked, and the build that it is for.
pub struct Planned {
    /// The build.
    pub build: QemuBuild,
    /// The command line.
    pub plan: Plan,
}

/// Checks the command line, before anything runs or is stored. `by_rule` allows a build
/// that does not load the tap, whose threads are told apart by rule.
pub fn plan(command: &[String], by_rule: bool) -> Result<Planned> {
    let (program, arguments) = command.split_first().context("the command line is empty")?;
    let build = QemuBuild::probe(Path::new(program))?;
    ensure_able(&build.name, "record")?;
    ensure!(
        build.is_tapped || by_rule,
        "{} does not load the tap: a static, musl or set-uid build can't be recorded with its true thread \
         roles; --roles by-rule records it with the roles that the log's grammar implies",
        build.program.display()
    );
    let target = Target { arch: &build.arch, dialect: build.dialect()? };
    let plan = command::plan(arguments, target)?;
    Ok(Planned { build, plan })
}

/// Stores the files that the command line names, and makes the manifest.
async fn prepare(store: &StoreClient, request: &QemuRequest) -> Result<Manifest> {
    let Planned { build, plan } = &request.planned;
    let id = RecordingId(rand::random());
    let mut files = vec![];
    for path in &plan.files {
        files.push(store_file(store, id, path).await?.0);
    }
    let mut disks = vec![];
    for disk in &plan.disks {
        let (image, bytes) = store_file(store, id, &disk.path).await?;
        let is_qcow2 = bytes.starts_with(b"QFI\xfb");
        let format = disk.format.clone().unwrap_or_else(|| if is_qcow2 { "qcow2" } else { "raw" }.into());
        let guest_bytes = match format.as_str() {
            "raw" => bytes.len() as u64 / 512 * 512,
            "qcow2" => {
                let file = std::fs::File::open(&disk.path)?;
                let image = Qcow2::open(&file).with_context(|| format!("read {}", disk.path.display()))?;
                ensure!(
                    !image.has_backing,
                    "{} is an overlay over another file; flatten it: qemu-img convert",
                    disk.path.display()
                );
                image.guest_bytes
            }
            other => bail!("{} is {other}; raw and qcow2 can be recorded", disk.path.display()),
        };
        disks.push(QemuDisk { image, format, guest_bytes });
    }
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let spec = QemuSpec {
        version: build.version.clone(),
        program: build.binary_name.clone(),
        machine_type: build.machine_type(&plan.machine)?,
        arguments: plan.arguments.clone(),
        files,
        disks,
        icount: plan.icount.clone(),
        roles: build.roles(),
        memory_bytes: plan.memory_bytes,
    };
    // A replay anywhere must be able to run it: the same checks as theirs.
    recorded::check(&spec.arguments)?;
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        id,
        name: request.name.clone().unwrap_or_else(|| format!("qemu-{}", id.short())),
        labels: request.labels.clone(),
        created_unix_ms: created.as_millis() as u64,
        build: build.name.clone(),
        emulator: EmulatorSpec::Qemu(spec),
    };
    Ok(Manifest::decode(&manifest.encode())?)
}

async fn store_file(store: &StoreClient, id: RecordingId, path: &Path) -> Result<(Image, Bytes)> {
    let bytes = tokio::fs::read(path).await.with_context(|| format!("read {}", path.display()))?;
    let bytes = Bytes::from(bytes);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok((put_image(store, id, &name, &bytes).await?, bytes))
}

/// Records, and seals the recording. `started` is told the id, and QEMU's process id.
pub async fn record(
    store: &StoreClient,
    coordinator: Option<String>,
    request: QemuRequest,
    console: Console,
    watermarks: Watermarks,
    started: impl FnOnce(RecordingId, u32),
) -> Result<QemuRecorded> {
    ensure!(
        request.planned.build.is_tapped || request.snapshot_every == 0,
        "without the tap the place of a state in the log is not known while QEMU records; leave out \
         --snapshot-every, and let `heddle index` make snapshots afterwards"
    );
    let manifest = prepare(store, &request).await?;
    let (id, name) = (manifest.id, manifest.name.clone());
    let mut live =
        Live::open(store, &manifest, &request.outbox_dir, request.outbox_bytes, &watermarks).await?;
    let stop = Arc::new(AtomicU16::new(NO_STOP));
    if let Some(address) = coordinator {
        let stop = stop.clone();
        live.show_life(address, move || stop.store(1, Ordering::Relaxed));
    }
    let Console { mut input, mut output, stop: mut stop_asked } = console;
    let (type_sender, typed) = threads::sync_channel::<Vec<u8>>(16);
    let asked = stop.clone();
    let typing = tokio::spawn(async move {
        loop {
            tokio::select! {
                Some(data) = input.recv() => {
                    let sender = type_sender.clone();
                    // A guest that reads nothing makes the user wait, not the others.
                    let _ = tokio::task::spawn_blocking(move || sender.send(data)).await;
                }
                Some(code) = stop_asked.recv() => asked.store(code, Ordering::Relaxed),
                else => return,
            }
        }
    });
    let _typing = AbortOnDrop(typing.abort_handle());
    let driver = Driver {
        chunker: live.chunker.clone(),
        snapshots: live.snapshots.take().context("the queue is taken once")?,
        watermarks: watermarks.clone(),
        stop: stop.clone(),
        snapshot_every: request.snapshot_every,
        last_snapshot: request.last_snapshot,
        roles: request.planned.build.roles(),
        taken: Taken { icount: watermarks.icount.clone(), ..Taken::default() },
    };
    let ring = request.outbox_dir.join(format!("{id}.ring"));
    let ring_path = ring.clone();
    let (pid_sender, pid) = tokio::sync::oneshot::channel();
    let Planned { build, plan } = request.planned;
    let mut guest = tokio::task::spawn_blocking(move || {
        let EmulatorSpec::Qemu(spec) = &manifest.emulator else { bail!("the manifest is not QEMU's") };
        let bases = plan.disks.iter().map(|disk| std::path::absolute(&disk.path));
        let files = plan.files.iter().map(std::path::absolute);
        let bases = bases.collect::<Result<Vec<_>, _>>().context("find the disks")?;
        let files = files.collect::<Result<Vec<_>, _>>().context("find the files")?;
        let scratch = Scratch::of_user(spec, files, bases)?;
        let mut process = Process::start(Launch {
            program: &build.program,
            arguments: scratch.arguments(spec)?,
            icount: &spec.icount,
            mode: Mode::Record,
            log: scratch.path().join("log"),
            snapshot: None,
            vm_state: &scratch.vm_state(),
            scratch: scratch.path(),
            ring: ring_path,
            dialect: build.dialect()?,
            memory_bytes: spec.memory_bytes,
            stdin: Stdio::piped(),
            stdout: Stdio::piped(),
            is_pinned: false,
            is_stopped: false,
            holds: None,
            is_tapped: build.is_tapped,
        })?;
        let _ = pid_sender.send(process.id());
        if let Some(stdin) = process.take_stdin() {
            let taken = driver.taken.clone();
            let writer = move || type_all(&typed, stdin, &taken);
            std::thread::Builder::new().name("typing".into()).spawn(writer).context("start a thread")?;
        }
        let printer = process.take_stdout().map(|mut stdout| {
            std::thread::spawn(move || {
                let mut buffer = vec![0; CONSOLE_BYTES];
                while let Ok(read @ 1..) = stdout.read(&mut buffer) {
                    output(&buffer[..read]);
                }
            })
        });
        let done = driver.run(&mut process, &scratch);
        let said = process.said();
        drop(process);
        if let Some(printer) = printer {
            let _ = printer.join();
        }
        done.map(|done| (done, said))
    });
    if let Ok(pid) = pid.await {
        started(id, pid);
    }
    let (done, said) = tokio::select! {
        done = &mut guest => done??,
        why = live.refused() => {
            stop.store(1, Ordering::Relaxed);
            let _ = guest.await;
            bail!(why);
        }
    };
    live.seal(done.is_cut, || drop(std::fs::remove_file(&ring))).await?;
    Ok(QemuRecorded {
        id,
        name,
        end: done.end,
        digest: done.digest,
        exit_code: done.exit_code,
        is_cut: done.is_cut,
        snapshots: done.snapshots,
        qemu_cpu_seconds: done.cpu_seconds,
        said,
    })
}

struct Done {
    end: Position,
    digest: Option<Hash>,
    exit_code: u16,
    is_cut: bool,
    snapshots: u64,
    cpu_seconds: f64,
}

struct Driver {
    chunker: Chunker,
    snapshots: SnapshotQueue,
    watermarks: Watermarks,
    stop: Arc<AtomicU16>,
    snapshot_every: u64,
    last_snapshot: bool,
    roles: RoleSource,
    taken: Taken,
}

/// A state that was saved and is being taken apart on a thread of its own. While it is,
/// the ring gives nothing back: its place among the events is not known yet.
struct Capturing {
    thread: std::thread::JoinHandle<(Tracker, Result<Captured>)>,
}

/// A recording in progress.
struct Course {
    pump: Pump,
    qmp: Qmp,
    /// Away while a state is taken apart.
    tracker: Option<Tracker>,
    capturing: Option<Capturing>,
    next_snapshot: u64,
    is_paused: bool,
    is_ending: bool,
    stop_code: Option<u16>,
    saved: u32,
    digest: Option<Hash>,
    snapshots: u64,
    cpu_seconds: f64,
    /// When QEMU was last asked whether it still runs.
    looked: Instant,
}

impl Driver {
    fn run(&self, process: &mut Process, scratch: &Scratch) -> Result<Done> {
        let decoder = Decoder::new(process.ring.dialect()?, HEADER_BYTES, 0);
        let mut course = Course {
            pump: Pump::new(decoder, HEADER_BYTES, Position::default(), self.roles),
            qmp: process.qmp()?,
            tracker: Some(Tracker::default()),
            capturing: None,
            next_snapshot: self.snapshot_after(0),
            is_paused: false,
            is_ending: false,
            stop_code: None,
            saved: 0,
            digest: None,
            snapshots: 0,
            cpu_seconds: 0.0,
            looked: Instant::now(),
        };
        let status = loop {
            match self.step(&mut course, process, scratch) {
                Ok(Some(status)) => break status,
                Ok(None) => std::thread::sleep(PUMP),
                // Its monitor fell silent because it was killed: what it logged is here.
                Err(error) => break process.end_in_silence()?.ok_or(error)?,
            }
        };
        self.finish(course, process, status)
    }

    /// One look at everything; QEMU's end, if it has come.
    fn step(
        &self,
        course: &mut Course,
        process: &mut Process,
        scratch: &Scratch,
    ) -> Result<Option<ExitStatus>> {
        self.pump(&mut course.pump, process, course.capturing.is_some())?;
        if let Some(status) = process.try_wait()? {
            return Ok(Some(status));
        }
        if course.capturing.as_ref().is_some_and(|capturing| capturing.thread.is_finished()) {
            if self.roles == RoleSource::ByRule {
                // The log's last bytes are in QEMU's buffer until it ends; where the state stands
                // among the events is known only then.
                let _ = course.qmp.command("quit", serde_json::json!({}));
                let status = process.wait(QUIT)?.context("QEMU did not quit when told to")?;
                return Ok(Some(status));
            }
            if let Err(error) = self.finish_capture(course) {
                tracing::warn!("a snapshot is lost: {error:#}");
                course.digest = None;
                // What it had seen was not stored: the next one begins anew.
                course.tracker = Some(Tracker::default());
            }
            if course.is_ending {
                let _ = course.qmp.command("quit", serde_json::json!({}));
                let status = process.wait(QUIT)?.context("QEMU did not quit when told to")?;
                return Ok(Some(status));
            }
        }
        if course.is_ending {
            return Ok(None);
        }
        course.cpu_seconds = process.cpu_seconds().unwrap_or(course.cpu_seconds);
        self.pause_if_full(&mut course.qmp, &mut course.is_paused)?;
        let asked = self.stop.load(Ordering::Relaxed);
        course.stop_code = (asked != NO_STOP).then_some(asked);
        // Not every stop is in the log, and one that is may be there before it is done.
        let is_time = course.looked.elapsed() > LOOK;
        let asks = is_time || std::mem::take(&mut course.pump.has_shutdown);
        let has_stopped = asks && {
            course.looked = Instant::now();
            !matches!(course.qmp.status()?.as_str(), "running" | "paused" | "suspended")
        };
        let wants_final = has_stopped || asked != NO_STOP;
        let is_due = wants_final || course.pump.icount >= course.next_snapshot;
        if is_due && course.capturing.is_none() && (wants_final || !course.is_paused) {
            self.save(course, process, scratch, wants_final)?;
        }
        course.pump.has_shutdown |= has_stopped && !course.is_ending;
        Ok(None)
    }

    fn save(
        &self,
        course: &mut Course,
        process: &mut Process,
        scratch: &Scratch,
        is_final: bool,
    ) -> Result<()> {
        // Stopped first, so that requests on their way to the disks come back: with
        // one in the queue, QEMU refuses to save.
        course.qmp.command("stop", serde_json::json!({}))?;
        process.settle();
        let name = format!("heddle-{}", course.saved);
        let is_wanted = self.last_snapshot || !is_final;
        let is_saved = is_wanted && course.qmp.try_save(&name).context("save the guest's state")?;
        self.pump(&mut course.pump, process, true)?;
        let is_off = !matches!(course.qmp.status()?.as_str(), "running" | "paused");
        if !is_wanted || (!is_saved && is_off) {
            // Nobody wants it, or it was switched off with async events queued, which nothing
            // will ever take: it ends without a last state.
            course.is_ending = true;
            course.digest = None;
            let _ = course.qmp.command("quit", serde_json::json!({}));
            return Ok(());
        }
        if !is_off && (!is_final || !is_saved) {
            course.qmp.command("cont", serde_json::json!({}))?;
        }
        if !is_saved {
            return Ok(());
        }
        course.saved += 1;
        course.next_snapshot = self.snapshot_after(course.pump.icount);
        course.is_ending = is_final;
        let mut tracker = course.tracker.take().context("one capture at a time")?;
        let (vm_state, disks) = (scratch.vm_state(), scratch.overlays.clone());
        let thread = std::thread::spawn(move || {
            let captured = capture(&mut tracker, &name, &vm_state, &disks);
            if let Err(error) = discard(&name, &vm_state) {
                tracing::warn!("a snapshot's disk space is not given back: {error:#}");
            }
            (tracker, captured)
        });
        course.capturing = Some(Capturing { thread });
        Ok(())
    }

    fn snapshot_after(&self, icount: u64) -> u64 {
        match self.snapshot_every {
            0 => u64::MAX,
            every => (icount / every + 1).saturating_mul(every),
        }
    }

    fn finish(&self, mut course: Course, process: &mut Process, status: ExitStatus) -> Result<Done> {
        self.pump(&mut course.pump, process, course.capturing.is_some())?;
        while process.has_tail()? {
            self.pump(&mut course.pump, process, false)?;
            std::thread::sleep(PUMP);
        }
        if course.capturing.is_some() {
            // QEMU may have been killed in the middle of saving it.
            if let Err(error) = self.finish_capture(&mut course) {
                tracing::warn!("the last snapshot is lost: {error:#}");
            }
        }
        self.chunker.push(course.pump.finish());
        self.chunker.flush(true);
        let end = course.pump.position();
        self.watermarks.icount.store(end.icount, Ordering::Relaxed);
        let exit_code = match (status.code(), status.signal()) {
            (Some(code), _) => code as u16,
            (None, signal) => 128 + signal.unwrap_or(0) as u16,
        };
        Ok(Done {
            end,
            digest: course.digest.filter(|_| course.is_ending),
            exit_code: course.stop_code.unwrap_or(exit_code),
            is_cut: process.ring.stage()? != Stage::Closed,
            snapshots: course.snapshots,
            cpu_seconds: course.cpu_seconds,
        })
    }

    fn pump(&self, pump: &mut Pump, process: &mut Process, keeps_ends: bool) -> Result<()> {
        process.tail()?;
        let events = pump.take(&mut process.ring)?;
        if !events.is_empty() {
            self.watermarks.recorded.fetch_add(events.len() as u64, Ordering::Relaxed);
            self.watermarks.icount.store(pump.icount, Ordering::Relaxed);
            self.taken.bytes.store(pump.char_bytes, Ordering::Relaxed);
            self.chunker.push(events);
        }
        let written = self.chunker.with_outbox(|outbox| outbox.written_events()).unwrap_or(0);
        if !keeps_ends && let Some((offset, position)) = pump.written(written) {
            process.ring.give_back(offset, position)?;
        }
        Ok(())
    }

    fn pause_if_full(&self, qmp: &mut Qmp, is_paused: &mut bool) -> Result<()> {
        let is_full =
            self.snapshots.is_full() || self.chunker.with_outbox(|outbox| outbox.is_full()).unwrap_or(false);
        if is_full != *is_paused {
            qmp.command(if is_full { "stop" } else { "cont" }, serde_json::json!({}))?;
            *is_paused = is_full;
            self.watermarks.paused.store(is_full, Ordering::Relaxed);
        }
        Ok(())
    }

    fn finish_capture(&self, course: &mut Course) -> Result<()> {
        let capturing = course.capturing.take().context("there is one")?;
        let (returned, captured) =
            capturing.thread.join().map_err(|_| anyhow!("taking a snapshot panicked"))?;
        course.tracker = Some(returned);
        let captured = captured.context("take the snapshot apart")?;
        course.digest = Some(captured.digest());
        let event = course.pump.event_at(captured.root.log_offset);
        self.snapshots.push(captured.finish(event));
        course.snapshots += 1;
        Ok(())
    }
}
