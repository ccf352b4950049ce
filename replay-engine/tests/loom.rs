//! The bundled guest, recorded and replayed.
#![allow(clippy::unwrap_used, missing_docs)]

use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{DivergenceKind, Event, Hash, Position};
use heddle_replay_engine::io::{self, RecordSink, ReplayOptions};
use heddle_replay_engine::machine::loader;
use heddle_replay_engine::{
    AsyncQueue, Build, Emulator, EventSource, LogEnd, Replayer, Snapshot, guest, schedule,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[derive(Default, Clone)]
struct Kept(Arc<Mutex<(Vec<Event>, Vec<Snapshot>, Vec<u8>)>>);

impl RecordSink for Kept {
    fn events(&mut self, events: Vec<Event>) {
        self.0.lock().unwrap().0.extend(events);
    }
    fn snapshot(&mut self, snapshot: Snapshot) {
        self.0.lock().unwrap().1.push(snapshot);
    }
    fn console(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().2.extend(bytes);
    }
    fn is_full(&self) -> bool {
        false
    }
}

fn positions() -> Positions {
    Positions {
        check_every: 1_000_000,
        digest_every: 10_000_000,
        snapshot_every: 20_000_000,
        snapshots_at: vec![],
    }
}

#[test]
fn the_whole_guest_on_two_threads() {
    let queue = AsyncQueue::default();
    let machine = loader::build(&guest::spec(), &guest::images()).unwrap();
    let emulator = Emulator::record(machine, positions(), Sleep::On, queue.clone());
    let kept = Kept::default();
    let t = std::time::Instant::now();
    let done = io::record(emulator, queue, Box::new(kept.clone()), |_| {}).unwrap();
    eprintln!("recorded {} in {:?}", done.position, t.elapsed());
    let (events, snapshots, console) = kept.0.lock().unwrap().clone();
    eprintln!("{} events {} snapshots\n{}", events.len(), snapshots.len(), String::from_utf8_lossy(&console));
    let machine = loader::build(&guest::spec(), &guest::images()).unwrap();
    let replayer = Replayer::new(Box::new(events.into_iter()), Position::default(), LogEnd::Complete);
    let emulator = Emulator::replay(machine, replayer, positions(), Sleep::On, Build::default());
    let t = std::time::Instant::now();
    let replay = io::replay(emulator, &ReplayOptions::default()).unwrap();
    eprintln!("{:?} {:#?}", t.elapsed(), replay.verdict);
    assert!(replay.verdict.is_match());
    assert_eq!(replay.verdict.digest, Some(done.digest));
    assert_eq!(replay.console, console);
}

/// Gives some events, then never comes back, like a log on a disk that hangs.
struct Hangs {
    events: Option<Vec<Event>>,
    forever: std::sync::mpsc::Receiver<()>,
}

impl EventSource for Hangs {
    fn next_events(&mut self) -> Result<Option<Vec<Event>>, String> {
        match self.events.take() {
            Some(events) => Ok(Some(events)),
            None => {
                let _ = self.forever.recv();
                Ok(None)
            }
        }
    }
}

#[test]
fn code_that_never_comes_back_is_a_stall() {
    let queue = AsyncQueue::default();
    let mut recorded = Emulator::record(guest::short(1, 1).unwrap(), positions(), Sleep::On, queue.clone());
    let mut events = schedule::record(&mut recorded, &queue, 1, vec![], 1_000_000);
    events.truncate(20);
    let (keep, forever) = std::sync::mpsc::channel();
    let source = Hangs { events: Some(events), forever };
    let replayer = Replayer::new(Box::new(source), Position::default(), LogEnd::Complete);
    let emulator =
        Emulator::replay(guest::short(1, 1).unwrap(), replayer, positions(), Sleep::On, Build::default());
    let options =
        ReplayOptions { stall_after: std::time::Duration::from_millis(200), ..ReplayOptions::default() };
    let verdict = io::replay(emulator, &options).unwrap().verdict;
    assert_eq!(verdict.divergence().unwrap().kind, DivergenceKind::Stall);
    drop(keep);
}

/// Is full for so long after each snapshot.
#[derive(Clone)]
struct Slow {
    takes: Duration,
    /// The snapshots' roots, when the last one came, and how often the replay stood still.
    seen: Arc<Mutex<(Vec<Hash>, Option<Instant>, u32)>>,
    /// Set when it stands still.
    cancel: Arc<AtomicBool>,
}

impl Slow {
    fn new(takes: Duration) -> Slow {
        Slow { takes, seen: Arc::default(), cancel: Arc::default() }
    }
}

impl RecordSink for Slow {
    fn snapshot(&mut self, snapshot: Snapshot) {
        let mut seen = self.seen.lock().unwrap();
        seen.0.push(snapshot.root);
        seen.1 = Some(Instant::now());
    }
    fn console(&mut self, _: &[u8]) {}
    fn is_full(&self) -> bool {
        self.seen.lock().unwrap().1.is_some_and(|last| last.elapsed() < self.takes)
    }
    fn paused(&mut self, is_paused: bool) {
        self.seen.lock().unwrap().2 += u32::from(is_paused);
        self.cancel.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_replay_stands_still_while_its_snapshots_are_not_taken() {
    let queue = AsyncQueue::default();
    let mut recorded = Emulator::record(guest::short(1, 1).unwrap(), positions(), Sleep::On, queue.clone());
    let events = schedule::record(&mut recorded, &queue, 1, vec![], 1_000_000);
    let end = recorded.position().icount;
    let replay = || {
        let source = Box::new(events.clone().into_iter());
        let replayer = Replayer::new(source, Position::default(), LogEnd::Complete);
        let machine = guest::short(1, 1).unwrap();
        let mut replay = Emulator::replay(machine, replayer, positions(), Sleep::On, Build::default());
        replay.capture_at(vec![end / 3, end / 3 * 2]);
        replay
    };
    let plain = io::replay(replay(), &ReplayOptions::default()).unwrap();
    assert!(plain.verdict.is_match());
    let roots: Vec<Hash> = plain.snapshots.iter().map(|snapshot| snapshot.root).collect();
    assert_eq!(roots.len(), 2);

    // For longer than a stall takes: it is none.
    let slow = Slow::new(Duration::from_millis(1500));
    let options = ReplayOptions { stall_after: Duration::from_secs(1), ..ReplayOptions::default() };
    let verdict = io::replay_into(replay(), &options, Box::new(slow.clone())).unwrap();
    assert_eq!((verdict.is_match(), verdict.digest), (true, plain.verdict.digest));
    let seen = slow.seen.lock().unwrap();
    assert_eq!((&seen.0, seen.2), (&roots, 2));

    // For ever, until somebody gives up.
    let stuck = Slow::new(Duration::MAX);
    let options = ReplayOptions { cancel: stuck.cancel.clone(), ..ReplayOptions::default() };
    let given_up = io::replay_into(replay(), &options, Box::new(stuck));
    assert_eq!(given_up.err().as_deref(), Some("cancelled"));
}
