//! A running QEMU: started with the tap, bounded, and always reaped.

use crate::qemu::qmp::Qmp;
use crate::qemu::ring::{Mode, Ring, Stage, write_tap};
use anyhow::{Context, Result, bail};
use heddle_replay_engine::qemu::log::{Dialect, HEADER_BYTES};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A program that has not loaded the tap and opened the log by then never will.
const HELLO: Duration = Duration::from_secs(10);
/// How long its monitor may take to listen.
const CONNECT: Duration = Duration::from_secs(20);
/// How long a process whose monitor failed may take to end.
const GONE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(2);
/// What TCG and QEMU itself may take beside the guest's RAM.
const OWN_MEMORY_BYTES: u64 = 8 << 30;
/// CPU seconds after which a run is ended whatever it does.
const CPU_SECONDS_MAX: u64 = 24 * 3600;
/// Standard error that is kept.
const STDERR_BYTES_MAX: u64 = 64 << 10;
/// How long a stopped guest's requests may take to come back before its state is saved,
/// and how long the main loop to take them.
const SETTLE_MAX: Duration = Duration::from_secs(5);
const SETTLE: Duration = Duration::from_millis(5);
/// The number of the system call, as `/proc/PID/task/TID/syscall` begins.
const FUTEX: &str = if cfg!(target_arch = "x86_64") { "202 " } else { "98 " };
/// Bytes of a log that are read at a time.
const TAIL_BYTES: usize = 256 << 10;
/// Of util-linux.
const SETPRIV: &str = "/usr/bin/setpriv";
/// The name of every run's own drive and snapshot.
pub const VM_STATE: &str = "heddle-vmstate";

/// What to start.
pub struct Launch<'a> {
    /// The program, a wrapper script maybe.
    pub program: &'a Path,
    /// The command line's own part.
    pub arguments: Vec<String>,
    /// `-icount`'s options but for rr.
    pub icount: &'a str,
    /// Record or replay.
    pub mode: Mode,
    /// The log's path: read in a replay, only a name in a recording.
    pub log: PathBuf,
    /// The snapshot to begin from, or to make at power-on.
    pub snapshot: Option<&'a str>,
    /// The file for VM states.
    pub vm_state: &'a Path,
    /// The run's own directory.
    pub scratch: &'a Path,
    /// Where the ring goes.
    pub ring: PathBuf,
    /// The log's dialect.
    pub dialect: Dialect,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Standard input and output.
    pub stdin: Stdio,
    /// Where the console goes.
    pub stdout: Stdio,
    /// Both threads on one core, if one is free: a replay's threads take turns anyway.
    pub is_pinned: bool,
    /// Begin with the guest stopped.
    pub is_stopped: bool,
    /// Where the main loop may sleep in a replay.
    pub holds: Option<PathBuf>,
    /// Whether the program loads the tap. If not, it writes its log to a file.
    pub is_tapped: bool,
}

/// A log that a program without the tap writes.
struct Tail {
    path: PathBuf,
    /// As soon as it is there.
    file: Option<File>,
    /// How far it was read.
    at: u64,
}

/// A QEMU that runs. Dropping it kills and reaps it.
pub struct Process {
    child: Child,
    /// The tap's ring.
    pub ring: Ring,
    /// The log, of a program without the tap.
    tail: Option<Tail>,
    qmp_path: PathBuf,
    stderr: PathBuf,
    _core: Option<File>,
}

impl Process {
    /// Starts QEMU. Must be called from a thread that lives as long as the process:
    /// the process dies with it.
    pub fn start(launch: Launch) -> Result<Process> {
        let tap = write_tap(launch.scratch)?;
        let ring = Ring::create(&launch.ring, launch.mode, launch.dialect)?;
        let qmp_path = launch.scratch.join("qmp");
        let stderr = launch.scratch.join("stderr");
        let mode = if launch.mode == Mode::Record { "record" } else { "replay" };
        let mut icount = format!("{},rr={mode},rrfile={}", launch.icount, launch.log.display());
        if let Some(snapshot) = launch.snapshot {
            icount.push_str(&format!(",rrsnapshot={snapshot}"));
        }
        let mut command = match (launch.is_tapped, Path::new(SETPRIV).exists()) {
            // Without the tap, which sees to it, somebody else must end it with its node. The
            // kernel forgets that wish when a set-uid or set-gid program starts.
            (false, true) => {
                let mut command = Command::new(SETPRIV);
                command.args(["--pdeathsig", "KILL", "--"]).arg(launch.program);
                command
            }
            _ => Command::new(launch.program),
        };
        if launch.is_tapped {
            command
                .env("LD_PRELOAD", &tap)
                .env("HEDDLE_TAP_RING", &launch.ring)
                .env("HEDDLE_TAP_LOG", &launch.log)
                .envs(launch.holds.map(|holds| ("HEDDLE_TAP_HOLDS", holds)));
        }
        command
            // The first drive is the one that QEMU saves VM states to. Nothing in a scratch
            // directory outlives the run, so nothing there is flushed.
            .arg("-drive")
            .arg(format!(
                "if=none,id={VM_STATE},format=qcow2,cache=unsafe,file={}",
                launch.vm_state.display()
            ))
            .args(&launch.arguments)
            .args(["-icount", &icount])
            .args(["-name", "debug-threads=on", "-action", "shutdown=pause"])
            .arg("-chardev")
            .arg(format!("socket,id=heddle-qmp,path={},server=on,wait=off", qmp_path.display()))
            .args(["-mon", "chardev=heddle-qmp,mode=control"])
            .args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"])
            .args(launch.is_stopped.then_some("-S"))
            .stdin(launch.stdin)
            .stdout(launch.stdout)
            .stderr(File::create(&stderr).context("create QEMU's standard error")?)
            .current_dir(launch.scratch)
            .process_group(0);
        let child = command.spawn().with_context(|| format!("start {}", launch.program.display()))?;
        if !launch.is_tapped {
            ring.set_by_rule()?;
        }
        let is_tailed = !launch.is_tapped && launch.mode == Mode::Record;
        let tail = is_tailed.then(|| Tail { path: launch.log.clone(), file: None, at: HEADER_BYTES });
        let mut process = Process { child, ring, tail, qmp_path, stderr, _core: None };
        process.limit(launch.memory_bytes, launch.mode);
        if launch.is_pinned {
            process._core = process.pin();
        }
        process.await_hello(launch.program, launch.is_tapped)?;
        Ok(process)
    }

    /// Takes what a program without the tap has logged into the ring. What it still
    /// buffers is lost with it.
    pub fn tail(&mut self) -> Result<()> {
        let Some(Tail { path, file, at }) = &mut self.tail else { return Ok(()) };
        let what = || format!("read {}", path.display());
        if file.is_none() {
            *file = File::open(&*path).ok();
        }
        let Some(file) = file else { return Ok(()) };
        let bytes = file.metadata().with_context(what)?.len();
        while *at < bytes {
            let mut buffer = vec![0; TAIL_BYTES.min((bytes - *at) as usize)];
            file.read_exact_at(&mut buffer, *at).with_context(what)?;
            let taken = self.ring.push(&buffer)?;
            *at += taken as u64;
            if taken < buffer.len() {
                // The ring is full.
                return Ok(());
            }
        }
        // The version is written over the header when the log is closed.
        let mut version = [0; 4];
        if file.read_exact_at(&mut version, 0).is_ok() && version != [0; 4] {
            self.ring.close()?;
        }
        Ok(())
    }

    /// Whether such a log has more than was taken.
    pub fn has_tail(&self) -> Result<bool> {
        let Some(Tail { path, file: Some(file), at }) = &self.tail else { return Ok(false) };
        let bytes = file.metadata().with_context(|| format!("read {}", path.display()))?.len();
        Ok(*at < bytes)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn limit(&self, memory_bytes: u64, mode: Mode) {
        let memory = memory_bytes.saturating_mul(2).saturating_add(OWN_MEMORY_BYTES);
        // A recording may run for as long as its user likes.
        let cpu = (mode == Mode::Replay).then_some(CPU_SECONDS_MAX);
        for (resource, limit) in
            [(Resource::As, Some(memory)), (Resource::Cpu, cpu), (Resource::Core, Some(0))]
        {
            let limit = Rlimit { current: limit, maximum: limit };
            // A host that bounds it lower already keeps its own bound.
            let _ = rustix::process::prlimit(Some(self.pid()), resource, limit);
        }
    }

    /// Gives the process a core of its own, if this host has one that no other replay holds.
    fn pin(&self) -> Option<File> {
        let allowed = sched_getaffinity(None).ok()?;
        let cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        for core in cores {
            let path = std::env::temp_dir().join(format!("heddle-core-{core}"));
            let Ok(file) = File::options().create(true).truncate(false).write(true).open(path) else {
                continue;
            };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let mut set = CpuSet::new();
                set.set(core);
                sched_setaffinity(Some(self.pid()), &set).ok()?;
                return Some(file);
            }
        }
        None
    }

    /// Lets all its threads run everywhere again: parked, the vCPU thread spins, and the
    /// main loop would wait for it on one core.
    pub fn unpin(&mut self) {
        let Some(_core) = self._core.take() else { return };
        let Ok(allowed) = sched_getaffinity(None) else { return };
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.child.id())) else { return };
        for thread in threads.flatten() {
            let id = thread.file_name().to_str().and_then(|id| id.parse::<i32>().ok());
            if let Some(id) = id.and_then(Pid::from_raw) {
                let _ = sched_setaffinity(Some(id), &allowed);
            }
        }
    }

    fn await_hello(&mut self, program: &Path, is_tapped: bool) -> Result<()> {
        let until = Instant::now() + HELLO;
        loop {
            if self.ring.stage()? >= Stage::Open || (!is_tapped && self.qmp_path.exists()) {
                return Ok(());
            }
            if let Some(status) = self.try_wait()? {
                // It may have opened the log and ended at once.
                if self.ring.stage()? >= Stage::Open {
                    return Ok(());
                }
                bail!("{} ended at once, {status}: {}", program.display(), self.said());
            }
            if Instant::now() > until {
                let stage = self.ring.stage()?;
                bail!(
                    "{} does not say hello through the tap ({stage:?}): a static, musl or set-uid build can't be \
                     recorded with its true thread roles",
                    program.display()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("ask after QEMU")
    }

    /// What it printed on standard error, at most the last of it.
    pub fn said(&self) -> String {
        let mut text = vec![];
        if let Ok(file) = File::open(&self.stderr) {
            let _ = file.take(STDERR_BYTES_MAX).read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).trim().to_string()
    }

    /// The process id, for tests and people.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// User and system seconds so far; `None` once it has ended.
    pub fn cpu_seconds(&self) -> Option<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        // Behind the name, which may hold anything but the last bracket.
        let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
        let mut ticks = || fields.next()?.parse::<f64>().ok();
        Some((ticks()? + ticks()?) / rustix::param::clock_ticks_per_second() as f64)
    }

    /// Standard input, if it is a pipe.
    pub fn take_stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// Standard output, if it is a pipe.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits until its requests to disks have come back, as far as that can be seen. The
    /// guest is stopped, so no new ones come.
    pub fn settle(&self) {
        let began = Instant::now();
        while self.is_at_disks() && began.elapsed() < SETTLE_MAX {
            std::thread::sleep(POLL);
        }
        // The main loop still has to take what came back.
        std::thread::sleep(SETTLE);
    }

    /// Whether a thread of QEMU's pool is at work. One that is not waits on a futex.
    fn is_at_disks(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.child.id())) else { return false };
        threads.flatten().any(|thread| {
            let read = |name| std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            let call = read("syscall");
            read("comm").trim() == "worker" && !call.is_empty() && !call.starts_with(FUTEX)
        })
    }

    /// Connects to its monitor.
    pub fn qmp(&mut self) -> Result<Qmp> {
        let path = self.qmp_path.clone();
        let connected = Qmp::connect(&path, CONNECT, || matches!(self.child.try_wait(), Ok(None)));
        connected.with_context(|| self.said())
    }

    /// Waits for its end; kills it after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Some(status) = self.try_wait()? {
                return Ok(Some(status));
            }
            std::thread::sleep(POLL);
        }
        self.kill();
        Ok(None)
    }

    /// Its end, if it has ended or soon does: its monitor fell silent. One that lives on has
    /// another trouble, and is killed.
    pub fn end_in_silence(&mut self) -> Result<Option<ExitStatus>> {
        self.wait(GONE)
    }

    /// Ends it and everything it has started.
    pub fn kill(&mut self) {
        let _ = rustix::process::kill_process_group(self.pid(), Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
