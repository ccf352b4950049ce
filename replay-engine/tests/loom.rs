//! The bundled guest, recorded and replayed.
#![allow(clippy::unwrap_used, missing_docs)]

use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{DivergenceKind, Event, Position};
use heddle_replay_engine::io::{self, RecordSink, ReplayOptions};
use heddle_replay_engine::machine::loader;
use heddle_replay_engine::{
    AsyncQueue, Build, Emulator, EventSource, LogEnd, Replayer, Snapshot, guest, schedule,
};
use std::sync::{Arc, Mutex};

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
    fn paused(&mut self, _: bool) {}
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
