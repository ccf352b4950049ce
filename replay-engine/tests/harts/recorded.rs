//! What several harts do is recorded, replayed, gone through and hunted as what one does.

use super::Blocks;
use super::guest::{READS_CLOCK, weaving};
use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{Event, Hash, Position};
use heddle_replay_engine::debugger::{Found, Origin, Session, Stop};
use heddle_replay_engine::lockstep::{Pair, first_difference};
use heddle_replay_engine::machine::Machine;
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::schedule::{self, Seeded};
use heddle_replay_engine::{AsyncQueue, Build, Emulator, Fault, LogEnd, Replayer, Snapshot};
use serde_json::Value;
use std::collections::{HashMap, HashSet};

const HARTS: usize = 4;
const ROUNDS: u64 = 4;

fn guest() -> Machine {
    weaving(HARTS, ROUNDS, 2500)
}

fn positions() -> Positions {
    Positions { check_every: 10_000, digest_every: 50_000, snapshot_every: 0, snapshots_at: vec![] }
}

#[derive(Clone)]
struct Recorded {
    events: Vec<Event>,
    digest: Hash,
    console: Vec<u8>,
    end: u64,
    sleep: Sleep,
    blocks: Blocks,
}

fn record(seed: u64) -> Recorded {
    record_with(seed, positions()).0
}

fn record_with(seed: u64, positions: Positions) -> (Recorded, Vec<Snapshot>) {
    let queue = AsyncQueue::default();
    let sleep = if seed % 4 == 3 { Sleep::Off } else { Sleep::On };
    let mut emulator = Emulator::record(guest(), positions, sleep, queue.clone());
    let input = vec![b"he".to_vec(), b"ddle\n".to_vec()];
    let events = schedule::record(&mut emulator, &queue, seed, input, 4_000_000);
    assert!(emulator.has_ended(), "seed {seed}: the guest did not end");
    let recorded = Recorded {
        events,
        digest: emulator.digest(),
        console: emulator.machine_mut().take_console(),
        end: emulator.position().icount,
        sleep,
        blocks: Blocks::default(),
    };
    (recorded, emulator.take_snapshots())
}

impl Recorded {
    fn replay(&self, from: Position, build: Build) -> Emulator {
        self.replay_to(LogEnd::Complete, from, build)
    }

    fn replay_to(&self, end: LogEnd, from: Position, build: Build) -> Emulator {
        let events = self.events[from.event as usize..].to_vec();
        let replayer = Replayer::new(Box::new(events.into_iter()), from, end);
        Emulator::replay(guest(), replayer, positions(), self.sleep, build)
    }
}

impl BlockSource for Recorded {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        self.blocks.blocks(hashes)
    }
}

impl Origin for Recorded {
    fn emulator(&mut self, from: Position) -> Result<Emulator, String> {
        Ok(self.replay(from, Build::default()))
    }

    fn snapshots(&self) -> Vec<(Position, Hash)> {
        vec![]
    }
}

#[test]
fn what_was_recorded_under_any_interleaving_replays_under_any_other() {
    let mut digests = HashSet::new();
    for seed in 0..24 {
        let recorded = record(seed);
        digests.insert(recorded.digest);
        for replay_seed in [seed ^ 0x5555, seed.wrapping_mul(7919) + 1] {
            let mut emulator = recorded.replay(Position::default(), Build::default());
            schedule::replay(&mut emulator, replay_seed);
            let verdict = emulator.verdict().unwrap();
            assert!(verdict.is_match(), "seed {seed} (replay {replay_seed}): {:?}", verdict.outcome);
            assert_eq!(verdict.digest, Some(recorded.digest), "seed {seed}");
            assert_eq!(emulator.machine_mut().take_console(), recorded.console, "seed {seed}");
            assert_eq!(verdict.role_mismatches, 0);
        }
    }
    assert!(digests.len() > 12, "the schedules are all alike");
}

#[test]
fn snapshots_anywhere_change_nothing_and_start_a_replay() {
    for seed in 0..6 {
        let mut recorded = record(seed);
        let mut rng = Seeded::new(seed);
        let mut places: Vec<u64> = (0..12).map(|_| 1 + rng.below(recorded.end - 1)).collect();
        places.sort_unstable();
        places.dedup();
        let mut whole = recorded.replay(Position::default(), Build::default());
        whole.capture_at(places);
        schedule::replay(&mut whole, seed + 1);
        assert_eq!(whole.verdict().unwrap().digest, Some(recorded.digest), "seed {seed}");
        let snapshots = whole.take_snapshots();
        for snapshot in &snapshots {
            recorded.blocks.0.extend(snapshot.blocks.iter().cloned());
        }
        for snapshot in &snapshots {
            let from = snapshot.position;
            let mut emulator = recorded.replay(from, Build::default());
            assert_eq!(emulator.restore(snapshot.root, &mut recorded.blocks).unwrap(), from);
            assert_eq!(emulator.digest(), snapshot.digest);
            schedule::replay(&mut emulator, seed + 2);
            let verdict = emulator.verdict().unwrap();
            assert!(verdict.is_match(), "seed {seed} from {from}: {:?}", verdict.outcome);
            assert_eq!(verdict.digest, Some(recorded.digest), "seed {seed} from {from}");
        }
    }
}

#[test]
fn a_replay_makes_the_snapshots_of_the_recording_and_spans_end_at_them() {
    for seed in 0..4 {
        let Positions { check_every, digest_every, .. } = positions();
        let every = Positions { snapshot_every: digest_every, ..positions() };
        let (mut recorded, originals) = record_with(seed, every);
        assert!(originals.len() > 1, "seed {seed}: the guest ended at {}", recorded.end);
        let mut whole = recorded.replay(Position::default(), Build::default());
        whole.capture_at((1..).map(|n| n * check_every).take_while(|at| *at < recorded.end).collect());
        schedule::replay(&mut whole, seed + 1);
        assert!(whole.verdict().unwrap().is_match(), "seed {seed}");
        let made = whole.take_snapshots();
        // The root has the checks and the place in the log, too.
        let named = |snapshot: &Snapshot| (snapshot.position, snapshot.digest, snapshot.root);
        let is_original = |snapshot: &&Snapshot| snapshot.position.icount % digest_every == 0;
        let again: Vec<_> = made.iter().filter(is_original).map(named).collect();
        let originals = originals.iter().filter(|snapshot| snapshot.position.icount < recorded.end);
        assert_eq!(again, originals.map(named).collect::<Vec<_>>(), "seed {seed}");
        // Each is where the span before it ends, though most have no digest in the log.
        for snapshot in &made {
            recorded.blocks.0.extend(snapshot.blocks.iter().cloned());
        }
        for pair in made.windows(2) {
            let (from, to) = (pair[0].position, pair[1].position);
            let mut span = recorded.replay_to(LogEnd::Before(to.event), from, Build::default());
            span.restore(pair[0].root, &mut recorded.blocks).unwrap();
            schedule::replay(&mut span, seed + 2);
            let verdict = span.verdict().unwrap();
            assert!(verdict.is_match(), "seed {seed} from {from}: {:?}", verdict.outcome);
            assert_eq!((verdict.to, verdict.digest), (to, Some(pair[1].digest)), "seed {seed} from {from}");
        }
    }
}

/// Every stop of a session that goes through all of the recording: where, and on which hart.
fn stops(session: &mut Session, end: u64, is_backward: bool) -> Vec<(u64, usize)> {
    session.goto(if is_backward { end } else { 0 }).unwrap();
    let mut stops = vec![];
    loop {
        let stop = if is_backward {
            session.run_backward(0, &mut || false)
        } else {
            session.run_forward(end, &mut || false)
        };
        if stop.unwrap() != Stop::Found(Found::Breakpoint) {
            return stops;
        }
        assert_eq!(session.machine().hart().pc, READS_CLOCK);
        stops.push((session.icount(), session.machine().current_hart()));
    }
}

#[test]
fn a_breakpoint_is_hit_on_every_hart_forwards_and_backwards() {
    let recorded = record(5);
    let end = recorded.end;
    let mut session = Session::with_spacing(Box::new(recorded), 1 << 14).unwrap();
    session.points.breakpoints.insert(READS_CLOCK);
    let forward = stops(&mut session, end, false);
    for hart in 0..HARTS {
        assert_eq!(forward.iter().filter(|stop| stop.1 == hart).count() as u64, ROUNDS, "hart {hart}");
    }
    let mut backward = stops(&mut session, end, true);
    backward.reverse();
    assert_eq!(backward, forward);
    for hart in [0, HARTS - 1] {
        session.points.only = Some(hart);
        let mut own = forward.clone();
        own.retain(|stop| stop.1 == hart);
        assert_eq!(stops(&mut session, end, false), own, "of hart {hart} alone");
        own.reverse();
        assert_eq!(stops(&mut session, end, true), own, "of hart {hart} alone, backwards");
    }
    let named: HashSet<String> = session.leaves().into_iter().map(|(name, _)| name).collect();
    assert!(["hart-0", "hart-3", "turn", "clint"].iter().all(|leaf| named.contains(*leaf)), "{named:?}");
    assert!(!named.contains("hart") && !named.contains("hart-4"));
    let values: HashMap<String, Value> = session.leaf_values().into_iter().collect();
    let machine = session.machine();
    assert_eq!(values["turn"]["hart"], machine.current_hart());
    assert_eq!(values["clint"]["harts"].as_array().unwrap().len(), HARTS);
    for (number, hart) in machine.all_harts().enumerate() {
        let value = &values[&format!("hart-{number}")];
        assert_eq!(value["pc"], format!("{:#x}", hart.pc));
        assert_eq!(value["x"][10], format!("{:#x}", hart.x[10]));
        assert_eq!(machine.view_of(number).unwrap().hart().pc, hart.pc);
    }
}

#[test]
fn a_planted_fault_is_found_at_its_instruction_and_its_hart_is_named() {
    let recorded = record(9);
    let mut rng = Seeded::new(7);
    let mut harts = HashSet::new();
    for _ in 0..12 {
        let icount = 1 + rng.below(recorded.end - 1);
        let fault = Fault { icount, register: 1 + rng.below(31) as u8, bit: rng.below(64) as u8 };
        let side = |fault| recorded.replay(Position::default(), Build { fault });
        let make = || Ok(Pair { a: side(None), b: side(Some(fault)) });
        let mut wrong = side(Some(fault));
        schedule::replay(&mut wrong, 5);
        let verdict = wrong.verdict().unwrap();
        let is_masked = verdict.is_match();
        assert!(verdict.divergence().is_none_or(|divergence| divergence.hart.is_some()));
        let (finding, _) = first_difference(make, 0, recorded.end, is_masked, &|| false).unwrap();
        let finding = finding.unwrap_or_else(|| panic!("{fault:?} was not found"));
        assert_eq!(finding.icount, icount, "{fault:?} {finding:?}");
        harts.insert(finding.hart.unwrap());
    }
    assert!(harts.len() > 1, "only {harts:?}");
}
