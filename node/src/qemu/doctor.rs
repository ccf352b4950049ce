//! A self-test of a QEMU build: record, replay, snapshot, restore, in seconds. Builds
//! differ, and some hang where others don't.

use crate::blocks::BlockCache;
use crate::qemu::builds::QemuBuild;
use crate::qemu::process::{Launch, Process};
use crate::qemu::pump::Pump;
use crate::qemu::replay::replay;
use crate::qemu::ring::Mode;
use crate::qemu::scratch::{Contents, Scratch};
use crate::qemu::snapshot::{Tracker, capture};
use crate::qemu::span::QemuSpan;
use crate::replay::Control;
use anyhow::{Context, Result, bail, ensure};
use heddle_proto::manifest::MANIFEST_VERSION;
use heddle_proto::qemu::QemuSpec;
use heddle_proto::verdict::TaskResult;
use heddle_proto::{EmulatorSpec, Event, Manifest, Position, RecordingId};
use heddle_replay_engine::guest;
use heddle_replay_engine::qemu::command::{Target, plan};
use heddle_replay_engine::qemu::log::{Decoder, HEADER_BYTES};
use heddle_storage::StoreClient;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Nobody listens there: what is not held can't be had.
const NO_STORE: &str = "http://127.0.0.1:1";
const LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(4);
/// A self-test waits less for a hang than a real replay.
const STALL: Duration = Duration::from_secs(4);

/// What one check came to.
#[derive(Clone, Debug)]
pub struct Check {
    /// `record` (with snapshots), `replay` or `restore`.
    pub name: &'static str,
    /// How long it took; why it failed.
    pub result: Result<Duration, String>,
}

/// Where results are kept, for the nodes of this user on this machine.
fn kept(build: &str) -> PathBuf {
    let base = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
    base.unwrap_or_else(std::env::temp_dir).join("heddle/doctor").join(build)
}

/// Keeps what a test came to: what failed is off for that build until it is tested again.
pub fn remember(build: &str, checks: &[Check]) -> Result<()> {
    let path = kept(build);
    let failed: Vec<String> = checks
        .iter()
        .filter_map(|check| {
            Some(format!("{} {}", check.name, check.result.as_ref().err()?.replace('\n', " ")))
        })
        .collect();
    let dir = path.parent().context("it has a directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    std::fs::write(&path, failed.join("\n")).with_context(|| format!("write {}", path.display()))
}

/// What is known to fail on builds that nobody has tested here.
const KNOWN: [(&str, &str, &str); 1] =
    [("qemu-riscv64-", "restore", "QEMU 7.2 and 10.0 do not restore the timer of riscv64")];

/// Fails with the reason if a test has found that a build can't do this.
pub fn ensure_able(build: &str, check: &str) -> Result<()> {
    let Ok(failed) = std::fs::read_to_string(kept(build)) else {
        let known = KNOWN.iter().find(|(prefix, known, _)| build.starts_with(prefix) && *known == check);
        return match known {
            Some((_, _, why)) => {
                bail!("{check} is off for {build} until `heddle doctor` has tested it: {why}")
            }
            None => Ok(()),
        };
    };
    let found = failed.lines().find_map(|line| line.strip_prefix(check)?.strip_prefix(' '));
    match found {
        Some(why) => bail!("{check} is off for {build}, as `heddle doctor` found: {why}"),
        None => Ok(()),
    }
}

/// The self-test guest of an architecture, and the command line that runs it.
///
/// With it: icounts behind which its state is saved, in its middle and near its end. It
/// sleeps between its rounds, so that there is time for both.
fn guest_of(arch: &str) -> Option<(&'static [u8], &'static [&'static str], [u64; 2])> {
    match arch {
        "x86_64" | "i386" => Some((
            guest::TICK_ELF,
            &["-M", "pc", "-m", "16", "-nographic", "-nic", "none", "-kernel", "guest"],
            [7_000_000, 10_000_000],
        )),
        "riscv64" => Some((
            guest::TICK_RISCV_ELF,
            &["-M", "virt", "-m", "16", "-nographic", "-nic", "none", "-bios", "none", "-kernel", "guest"],
            [2_000_000, 5_000_000],
        )),
        _ => None,
    }
}

/// What a short recording of the self-test guest came to, in memory.
struct Recorded {
    span: QemuSpan,
    /// From a snapshot in its middle to its end.
    second: QemuSpan,
}

/// Tests a build; what each step came to, in order. A step that fails ends the test.
pub fn examine(build: &QemuBuild) -> Vec<Check> {
    let mut checks = vec![];
    let mut run = |name: &'static str, step: &mut dyn FnMut() -> Result<()>| -> bool {
        let began = Instant::now();
        let result = step().map(|()| began.elapsed()).map_err(|error| format!("{error:#}"));
        let is_good = result.is_ok();
        checks.push(Check { name, result });
        is_good
    };
    let mut recorded = None;
    let is_recorded = run("record", &mut || {
        recorded = Some(record(build)?);
        Ok(())
    });
    let Some(recorded) = recorded.filter(|_| is_recorded) else { return checks };
    let judged = |span: &QemuSpan| -> Result<()> {
        let control = Control { stall_after: Some(STALL), ..Control::default() };
        let TaskResult::Replay(verdict) = replay(span, build, &control)?.result else { return Ok(()) };
        ensure!(verdict.is_match(), "{}", verdict.divergence().map_or_else(String::new, ToString::to_string));
        ensure!(verdict.role_checked > 0, "the tap saw no event handled");
        Ok(())
    };
    if run("replay", &mut || judged(&recorded.span)) {
        run("restore", &mut || judged(&recorded.second));
    }
    checks
}

fn record(build: &QemuBuild) -> Result<Recorded> {
    let (image, line, places) =
        guest_of(&build.arch).with_context(|| format!("there is no self-test guest for {}", build.arch))?;
    let line: Vec<String> = line.iter().map(ToString::to_string).collect();
    let plan = plan(&line, Target { arch: &build.arch, dialect: build.dialect()? })?;
    let spec = QemuSpec {
        version: build.version.clone(),
        program: build.binary_name.clone(),
        machine_type: String::new(),
        arguments: plan.arguments,
        files: vec![heddle_proto::manifest::Image {
            hash: heddle_proto::Hash::of(image),
            bytes: image.len() as u64,
            index: heddle_proto::Hash::ZERO,
            name: "guest".into(),
        }],
        disks: vec![],
        icount: plan.icount,
        roles: build.roles(),
        memory_bytes: plan.memory_bytes,
    };
    let contents = Contents { files: vec![Arc::from(image)], disks: vec![] };
    let scratch = Scratch::of_store(&spec, &contents, None)?;
    let dialect = build.dialect()?;
    let mut process = Process::start(Launch {
        program: &build.program,
        arguments: scratch.arguments(&spec)?,
        icount: &spec.icount,
        mode: Mode::Record,
        log: scratch.path().join("log"),
        snapshot: None,
        vm_state: &scratch.vm_state(),
        scratch: scratch.path(),
        ring: scratch.path().join("ring"),
        dialect,
        memory_bytes: spec.memory_bytes,
        stdin: Stdio::piped(),
        stdout: Stdio::null(),
        is_pinned: false,
        is_stopped: false,
        holds: None,
        is_tapped: build.is_tapped,
    })?;
    let mut qmp = process.qmp()?;
    let mut pump =
        Pump::new(Decoder::new(dialect, HEADER_BYTES, 0), HEADER_BYTES, Position::default(), build.roles());
    let mut events: Vec<Event> = vec![];
    let mut saved: Vec<&str> = vec![];
    let began = Instant::now();
    while saved.len() < places.len() {
        process.tail()?;
        events.extend(pump.take(&mut process.ring)?);
        if pump.position().icount > places[saved.len()] {
            let name = ["middle", "end"][saved.len()];
            qmp.command("stop", serde_json::json!({}))?;
            if qmp.try_save(name)? {
                saved.push(name);
            }
            if saved.len() < places.len() {
                qmp.command("cont", serde_json::json!({}))?;
            }
        }
        if process.try_wait()?.is_some() {
            bail!("the self-test guest ended before its state could be saved: {}", process.said());
        }
        ensure!(began.elapsed() < LIMIT, "the self-test guest has not come that far in {LIMIT:?}");
        std::thread::sleep(POLL);
    }
    if !build.is_tapped {
        // Its log is whole once it has ended.
        let _ = qmp.command("quit", serde_json::json!({}));
        process.wait(LIMIT)?;
        process.tail()?;
    }
    events.extend(pump.take(&mut process.ring)?);
    let mut middle = capture(&mut Tracker::default(), "middle", &scratch.vm_state(), &[])?;
    let mut end = capture(&mut Tracker::default(), "end", &scratch.vm_state(), &[])?;
    let _ = qmp.command("quit", serde_json::json!({}));
    end.root.position.event = pump.event_at(end.root.log_offset);
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        id: RecordingId::default(),
        name: "doctor".into(),
        labels: Default::default(),
        created_unix_ms: 0,
        build: build.name.clone(),
        emulator: EmulatorSpec::Qemu(spec),
    };
    // Everything a restore needs is in the capture: the store is never asked.
    let blocks = BlockCache::with(StoreClient::new(vec![NO_STORE.into()]), middle.blocks.clone());
    let part = |start| {
        QemuSpan::of_parts(manifest.clone(), contents.clone(), &events, start, &end.root, blocks.clone())
    };
    middle.root.position.event = pump.event_at(middle.root.log_offset);
    let mut span = part(None)?;
    span.skip_saving(middle.root.position);
    Ok(Recorded { span, second: part(Some(middle.root))? })
}
