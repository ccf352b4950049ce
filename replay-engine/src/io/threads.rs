//! The two threads. Each has its role from birth; the emulator belongs to one at
//! a time, and is handed over only when the other side has something to do.

use super::clocks::HostClocks;
use crate::emulator::{Emulator, Step};
use crate::queue::AsyncQueue;
use crate::role;
use crate::state::Snapshot;
use crate::timer::TimerClock;
use heddle_proto::{AsyncEvent, ClockKind, Event, Hash, Position, Role, Verdict};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Instructions of a recording between two deliveries of events and console, about a
/// millisecond; the other role gets the machine sooner.
const RECORD_RUN: u64 = 1 << 19;
/// Instructions of a replay between two reports of its progress, some milliseconds.
const REPLAY_RUN: u64 = 1 << 20;
/// How often a paused emulator looks whether it may go on.
const PAUSE_POLL: Duration = Duration::from_millis(5);
/// Longest wait of the iothread, against a missed deadline of a stepped host clock.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// What takes a recording's output, on the recording's own threads; or a replay's, which has
/// no events.
pub trait RecordSink: Send {
    /// Events, in order. They may not be lost.
    fn events(&mut self, _events: Vec<Event>) {}
    /// A snapshot.
    fn snapshot(&mut self, snapshot: Snapshot);
    /// Console bytes.
    fn console(&mut self, bytes: &[u8]);
    /// A frame that the guest sent. Without a network it goes nowhere.
    fn frame(&mut self, _frame: &[u8]) {}
    /// Whether the guest must pause, since there is no room for more.
    fn is_full(&self) -> bool;
    /// The guest was paused or goes on.
    fn paused(&mut self, _is_paused: bool) {}
}

/// Wakes the recording's threads from outside: after input was queued.
#[derive(Clone)]
pub struct Kick(Arc<Shared>);

impl Kick {
    /// Asks the vCPU out of its run and wakes whoever waits.
    pub fn kick(&self) {
        self.0.exit.store(true, Ordering::Relaxed);
        self.0.doorbell.ring();
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    exit: Arc<AtomicBool>,
    /// The iothread wants the machine; the vCPU thread lets it go first.
    iothread_wants: AtomicBool,
    /// Rung when the iothread has something to do.
    doorbell: Doorbell,
    queue: AsyncQueue,
    progress: AtomicU64,
}

/// Wakes the iothread. It waits here without the machine, since the vCPU thread
/// keeps that while it runs; a ring that comes before the wait is not lost.
#[derive(Default)]
struct Doorbell {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Doorbell {
    fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.bell.notify_one();
    }

    fn wait(&self, at_most: Duration) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.bell.wait_timeout_while(rung, at_most, |rung| !*rung);
        *wait.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

struct State {
    emulator: Emulator,
    clocks: HostClocks,
    sink: Option<Box<dyn RecordSink>>,
    /// Requests handed to the device's backend.
    submitted: Vec<u64>,
    is_paused: bool,
    console: Vec<u8>,
    snapshots: Vec<Snapshot>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in one role ends the recording; the other only finishes its step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new(emulator: Emulator, queue: AsyncQueue, sink: Option<Box<dyn RecordSink>>) -> Arc<Shared> {
        let exit = Arc::new(AtomicBool::new(false));
        Arc::new(Shared {
            state: Mutex::new(State {
                emulator,
                clocks: HostClocks::new(exit.clone()),
                sink,
                submitted: vec![],
                is_paused: false,
                console: vec![],
                snapshots: vec![],
            }),
            changed: Condvar::new(),
            exit,
            iothread_wants: AtomicBool::new(false),
            doorbell: Doorbell::default(),
            queue,
            progress: AtomicU64::new(0),
        })
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_timeout<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl State {
    /// Hands on what the last step produced.
    fn deliver(&mut self) {
        let events = self.emulator.take_events();
        let mut console = self.emulator.machine_mut().take_console();
        if let Some(complaint) = self.emulator.machine_mut().take_complaint() {
            console.extend(format!("\nheddle: {complaint}\n").bytes());
        }
        let frames = self.emulator.machine_mut().take_frames();
        let snapshots = self.emulator.take_snapshots();
        self.submitted.append(&mut self.emulator.machine_mut().take_submitted());
        let Some(sink) = &mut self.sink else {
            self.console.extend(console);
            self.snapshots.extend(snapshots);
            self.submitted.clear();
            return;
        };
        if !events.is_empty() {
            sink.events(events);
        }
        if !console.is_empty() {
            sink.console(&console);
        }
        frames.iter().for_each(|frame| sink.frame(frame));
        snapshots.into_iter().for_each(|snapshot| sink.snapshot(snapshot));
    }
}

/// However a role's thread ends, the other one and the one that waits are told. After
/// a panic the execution has ended: its state is half a step.
struct EndOfThread<'a> {
    shared: &'a Shared,
    parent: thread::Thread,
}

impl Drop for EndOfThread<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.shared.iothread_wants.store(false, Ordering::Relaxed);
            self.shared.lock().emulator.give_up("a thread of the emulator panicked");
            self.shared.changed.notify_all();
            self.shared.doorbell.ring();
        }
        self.parent.unpark();
    }
}

/// A finished recording.
pub struct Recording {
    /// Where it ended.
    pub position: Position,
    /// Digest of the last state.
    pub digest: Hash,
    /// The guest's exit code.
    pub exit_code: u16,
    /// The sink.
    pub sink: Box<dyn RecordSink>,
}

/// Records until the guest, or a request in `queue`, ends it. `started` gets the
/// handle that wakes the threads.
pub fn record(
    emulator: Emulator,
    queue: AsyncQueue,
    sink: Box<dyn RecordSink>,
    started: impl FnOnce(Kick),
) -> Result<Recording, String> {
    let shared = Shared::new(emulator, queue, Some(sink));
    started(Kick(shared.clone()));
    let iothread = spawn(Role::Iothread, shared.clone(), record_iothread)?;
    let vcpu = spawn(Role::Vcpu, shared.clone(), record_vcpu)?;
    join([vcpu, iothread])?;
    let mut state = shared.lock();
    Ok(Recording {
        position: state.emulator.position(),
        digest: state.emulator.digest(),
        exit_code: state.emulator.machine().shutdown().unwrap_or(0),
        sink: state.sink.take().ok_or("the sink is gone")?,
    })
}

/// Waits for both threads, also if the first has panicked.
fn join(threads: [thread::JoinHandle<()>; 2]) -> Result<(), String> {
    let ends = threads.map(thread::JoinHandle::join);
    let all_well = ends.iter().all(Result::is_ok);
    all_well.then_some(()).ok_or_else(|| "a thread of the emulator panicked".into())
}

fn spawn(role: Role, shared: Arc<Shared>, body: fn(&Shared)) -> Result<thread::JoinHandle<()>, String> {
    let parent = thread::current();
    thread::Builder::new()
        .name(role.to_string())
        .spawn(move || {
            let _end = EndOfThread { shared: &shared, parent };
            role::enter(role, || body(&shared));
        })
        .map_err(|error| format!("start the {role} thread: {error}"))
}

fn record_vcpu(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        loop {
            // In this order, and the other way round in `take_machine`: either the wish is seen
            // here, or the exit that comes with it stays.
            shared.exit.store(false, Ordering::SeqCst);
            if !shared.iothread_wants.load(Ordering::SeqCst) {
                break;
            }
            state = shared.wait(state);
        }
        state = pause_while_full(shared, state);
        let (was_idle, alarm) = (state.emulator.is_idle(), state.emulator.deadline(TimerClock::Host));
        let State { emulator, clocks, .. } = &mut *state;
        let step = emulator.record_vcpu(clocks, RECORD_RUN);
        state.deliver();
        // The iothread waits for the deadlines that it knows.
        let has_new_alarm = state.emulator.deadline(TimerClock::Host) != alarm;
        let has_work =
            !state.submitted.is_empty() || (state.emulator.is_idle() && !was_idle) || has_new_alarm;
        if has_work || step != Step::Continue {
            shared.doorbell.ring();
        }
        match step {
            Step::Continue => {}
            Step::Wait => state = shared.wait(state),
            Step::Ended => return,
        }
    }
}

fn record_iothread(shared: &Shared) {
    loop {
        let mut state = take_machine(shared);
        state = pause_while_full(shared, state);
        let State { emulator, clocks, .. } = &mut *state;
        let step = emulator.record_iothread(clocks);
        state.deliver();
        shared.iothread_wants.store(false, Ordering::Relaxed);
        shared.changed.notify_all();
        let submitted = std::mem::take(&mut state.submitted);
        if !submitted.is_empty() {
            // The device works without the machine: the guest goes on meanwhile.
            drop(state);
            for id in submitted {
                shared.queue.push(AsyncEvent::Block { id });
            }
            continue;
        }
        match step {
            Step::Continue => {}
            Step::Ended => return,
            Step::Wait => wait_for_work(shared, state),
        }
    }
}

/// Gets the machine from the vCPU thread at an instruction boundary.
fn take_machine(shared: &Shared) -> MutexGuard<'_, State> {
    shared.iothread_wants.store(true, Ordering::SeqCst);
    shared.exit.store(true, Ordering::SeqCst);
    shared.lock()
}

/// Waits until the doorbell rings or a deadline has come; the machine is free meanwhile.
fn wait_for_work(shared: &Shared, mut state: MutexGuard<'_, State>) {
    let deadlines = [(TimerClock::VirtualRt, ClockKind::VirtualRt), (TimerClock::Host, ClockKind::Host)]
        .map(|(timer, clock)| (clock, state.emulator.deadline(timer)));
    let mut at_most = WAIT_MAX;
    for (clock, deadline) in deadlines {
        if let Some(deadline) = deadline {
            at_most = at_most.min(state.clocks.until(clock, deadline));
        }
    }
    drop(state);
    shared.doorbell.wait(at_most);
}

/// Stands still, VirtualRt too, while the sink has no room.
fn pause_while_full<'a>(shared: &Shared, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    let is_full = |state: &State| state.sink.as_ref().is_some_and(|sink| sink.is_full());
    // Whoever found it first keeps the time.
    if state.is_paused || !is_full(&state) {
        while state.is_paused {
            state = shared.wait_timeout(state, PAUSE_POLL);
        }
        return state;
    }
    let began = Instant::now();
    state.is_paused = true;
    if let Some(sink) = &mut state.sink {
        sink.paused(true);
    }
    let is_over = |state: &State| state.emulator.has_ended() || shared.queue.shutdown_requested().is_some();
    while is_full(&state) && !is_over(&state) {
        state = shared.wait_timeout(state, PAUSE_POLL);
    }
    state.clocks.add_pause(began.elapsed());
    state.is_paused = false;
    if let Some(sink) = &mut state.sink {
        sink.paused(false);
    }
    shared.changed.notify_all();
    state
}

/// How a replay is run.
pub struct ReplayOptions {
    /// No progress of icount or log for so long is a stall.
    pub stall_after: Duration,
    /// Set from outside to give up: the lease is gone.
    pub cancel: Arc<AtomicBool>,
    /// Counts instructions as they are replayed, for progress.
    pub progress: Arc<AtomicU64>,
}

impl Default for ReplayOptions {
    fn default() -> Self {
        ReplayOptions {
            stall_after: Duration::from_secs(30),
            cancel: Arc::default(),
            progress: Arc::default(),
        }
    }
}

/// A finished replay.
pub struct Replay {
    /// How it ended.
    pub verdict: Verdict,
    /// What the console printed.
    pub console: Vec<u8>,
    /// Snapshots that were asked for.
    pub snapshots: Vec<Snapshot>,
}

/// Replays on two threads until the log's end or a divergence.
pub fn replay(emulator: Emulator, options: &ReplayOptions) -> Result<Replay, String> {
    replay_to(emulator, options, None)
}

/// The same; console and snapshots go to `sink` as they come, and the replay pauses while that is
/// full. A pause is no stall.
pub fn replay_into(
    emulator: Emulator,
    options: &ReplayOptions,
    sink: Box<dyn RecordSink>,
) -> Result<Verdict, String> {
    Ok(replay_to(emulator, options, Some(sink))?.verdict)
}

fn replay_to(
    emulator: Emulator,
    options: &ReplayOptions,
    sink: Option<Box<dyn RecordSink>>,
) -> Result<Replay, String> {
    let shared = Shared::new(emulator, AsyncQueue::default(), sink);
    let threads = [
        spawn(Role::Iothread, shared.clone(), replay_iothread)?,
        spawn(Role::Vcpu, shared.clone(), replay_vcpu)?,
    ];
    if let Some(verdict) = watch(&shared, &threads, options)? {
        return Ok(Replay { verdict, console: vec![], snapshots: vec![] });
    }
    join(threads)?;
    let mut state = shared.lock();
    options.progress.store(state.emulator.machine().icount(), Ordering::Relaxed);
    if options.cancel.load(Ordering::Relaxed) && state.emulator.verdict().is_err() {
        return Err("cancelled".into());
    }
    let verdict = state.emulator.verdict()?;
    state.deliver();
    let snapshots = std::mem::take(&mut state.snapshots);
    Ok(Replay { verdict, console: std::mem::take(&mut state.console), snapshots })
}

/// Watches for progress until both threads have ended; a stall is a verdict.
fn watch(
    shared: &Shared,
    threads: &[thread::JoinHandle<()>; 2],
    options: &ReplayOptions,
) -> Result<Option<Verdict>, String> {
    let mut seen = (0, Instant::now());
    loop {
        if threads.iter().all(thread::JoinHandle::is_finished) {
            return Ok(None);
        }
        thread::park_timeout(Duration::from_millis(20));
        let progress = shared.progress.load(Ordering::Relaxed);
        if progress != seen.0 {
            options.progress.store(progress, Ordering::Relaxed);
            seen = (progress, Instant::now());
        }
        let is_cancelled = options.cancel.load(Ordering::Relaxed);
        if !is_cancelled && seen.1.elapsed() < options.stall_after {
            continue;
        }
        if is_cancelled {
            shared.exit.store(true, Ordering::Relaxed);
        }
        // The lock is free unless a thread is stuck in its step: then it is left behind.
        match shared.state.try_lock() {
            Ok(state) if state.is_paused && !is_cancelled => seen.1 = Instant::now(),
            Ok(mut state) => {
                if is_cancelled {
                    state.emulator.give_up("cancelled");
                } else {
                    state.emulator.stall("no progress");
                }
                shared.changed.notify_all();
            }
            Err(_) if is_cancelled && seen.1.elapsed() < options.stall_after => {}
            Err(_) => return stuck(shared.progress.load(Ordering::Relaxed)).map(Some),
        }
    }
}

/// A step that never came back: its thread can't be ended, and its state can't be read.
fn stuck(icount: u64) -> Result<Verdict, String> {
    use heddle_proto::verdict::{Proof, Side};
    use heddle_proto::{Divergence, DivergenceKind, Outcome};
    let side = |what: &str| Side { what: what.into(), role: None, icount };
    let position = Position { icount, event: 0 };
    Ok(Verdict {
        outcome: Outcome::Diverged(Box::new(Divergence {
            kind: DivergenceKind::Stall,
            position,
            expected: side("progress"),
            found: side("a step that never came back"),
            last_good: Position::default(),
            pc: 0,
            hart: None,
        })),
        from: Position::default(),
        to: position,
        instructions: icount,
        events: 0,
        role_checked: 0,
        role_mismatches: 0,
        checkpoints: Default::default(),
        digest: None,
        coverage: crate::state::COVERAGE.into(),
        proof: Proof::Whole,
    })
}

fn replay_vcpu(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        state = pause_while_full(shared, state);
        // Long runs: in replay nobody else wants the machine until the log says so.
        let step = state.emulator.replay_vcpu(REPLAY_RUN);
        state.deliver();
        let position = state.emulator.position();
        shared.progress.store(position.icount + position.event, Ordering::Relaxed);
        match step {
            Step::Continue => {}
            Step::Wait => {
                shared.changed.notify_all();
                state = shared.wait(state);
            }
            Step::Ended => {
                shared.changed.notify_all();
                return;
            }
        }
    }
}

fn replay_iothread(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        match state.emulator.replay_iothread() {
            Step::Continue => {
                state.deliver();
                shared.changed.notify_all();
            }
            Step::Wait => {
                shared.changed.notify_all();
                state = shared.wait(state);
            }
            Step::Ended => {
                shared.changed.notify_all();
                return;
            }
        }
    }
}
