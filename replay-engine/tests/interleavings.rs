//! Recorded under any interleaving, replayed under any other: the same digests.
//!
//! `HEDDLE_SEEDS=N` tries N seeds, `HEDDLE_SEED=S` that one alone.
#![allow(clippy::unwrap_used, missing_docs)]

use heddle_proto::Hash;
use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{AsyncEvent, Body, CheckpointKind, DivergenceKind, Event, Position, Role, Verdict};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::schedule::{self, Seeded};
use heddle_replay_engine::{AsyncQueue, Build, Emulator, Fault, LogEnd, Replayer, Snapshot, guest};
use std::collections::HashMap;

const TURNS: u64 = 4_000_000;

fn positions() -> Positions {
    Positions { check_every: 10_000, digest_every: 50_000, snapshot_every: 0, snapshots_at: vec![] }
}

struct Recorded {
    events: Vec<Event>,
    digest: Hash,
    console: Vec<u8>,
    end: Position,
    sleep: Sleep,
}

fn record(seed: u64, rounds: u64) -> Recorded {
    let queue = AsyncQueue::default();
    let sleep = if seed % 4 == 3 { Sleep::Off } else { Sleep::On };
    let mut emulator = Emulator::record(guest::short(rounds, 1).unwrap(), positions(), sleep, queue.clone());
    let input = vec![b"he".to_vec(), b"ddle\n".to_vec(), vec![b'x'; 40]];
    let events = schedule::record(&mut emulator, &queue, seed, input, TURNS);
    assert!(emulator.has_ended(), "seed {seed}: the guest did not end");
    let console = emulator.machine_mut().take_console();
    Recorded { events, digest: emulator.digest(), console, end: emulator.position(), sleep }
}

fn replayer(events: Vec<Event>, from: Position, end: LogEnd) -> Replayer {
    Replayer::new(Box::new(events.into_iter()), from, end)
}

fn emulator(events: Vec<Event>, sleep: Sleep, rounds: u64) -> Emulator {
    let replayer = replayer(events, Position::default(), LogEnd::Complete);
    Emulator::replay(guest::short(rounds, 1).unwrap(), replayer, positions(), sleep, Build::default())
}

fn replay(events: Vec<Event>, sleep: Sleep, rounds: u64, seed: u64) -> (Verdict, Vec<u8>) {
    let mut emulator = emulator(events, sleep, rounds);
    schedule::replay(&mut emulator, seed);
    let verdict = emulator.verdict().unwrap();
    (verdict, emulator.machine_mut().take_console())
}

/// An emulator about to replay two rounds of the guest, as `replayer` says.
fn replay_by(replayer: Replayer, sleep: Sleep) -> Emulator {
    Emulator::replay(guest::short(2, 1).unwrap(), replayer, positions(), sleep, Build::default())
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let read = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
    match (read("HEDDLE_SEED"), read("HEDDLE_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (_, count) => 0..count.unwrap_or(default),
    }
}

#[test]
fn what_was_recorded_under_any_interleaving_replays_under_any_other() {
    let mut digests = std::collections::HashSet::new();
    let mut roles = std::collections::HashSet::new();
    let count = seeds(200).count();
    for seed in seeds(200) {
        let recorded = record(seed, 2);
        let mut checkpoint_role = Role::Vcpu;
        for event in &recorded.events {
            match &event.body {
                Body::Checkpoint(_) => checkpoint_role = event.role,
                Body::Async(AsyncEvent::Block { .. }) => {
                    assert_eq!(event.role, checkpoint_role);
                    roles.insert(event.role);
                }
                _ => {}
            }
        }
        digests.insert(recorded.digest);
        for replay_seed in [seed ^ 0x5555, seed.wrapping_mul(7919) + 1] {
            let (verdict, console) = replay(recorded.events.clone(), recorded.sleep, 2, replay_seed);
            assert!(verdict.is_match(), "HEDDLE_SEED={seed} (replay {replay_seed}): {:?}", verdict.outcome);
            assert_eq!(verdict.digest, Some(recorded.digest), "HEDDLE_SEED={seed}");
            assert_eq!(console, recorded.console, "HEDDLE_SEED={seed}");
            assert_eq!(verdict.role_mismatches, 0);
        }
    }
    eprintln!("{count} seeds, {} different outcomes", digests.len());
    if count > 10 {
        assert!(digests.len() as u64 > count as u64 / 2, "the schedules are all alike");
        assert_eq!(roles.len(), 2, "completions were flushed on one role only");
    }
}

/// Blocks of captured snapshots, by hash.
#[derive(Default)]
struct Blocks(HashMap<Hash, Vec<u8>>);

impl BlockSource for Blocks {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        hashes.iter().map(|hash| self.0.get(hash).cloned().ok_or(format!("no block {hash}"))).collect()
    }
}

impl Blocks {
    fn add(&mut self, snapshot: &Snapshot) {
        self.0.extend(snapshot.blocks.iter().cloned());
    }
}

#[test]
fn snapshots_anywhere_change_nothing_and_start_a_replay() {
    for seed in seeds(20) {
        let recorded = record(seed, 2);
        let mut rng = Seeded::new(seed);
        let mut at: Vec<u64> = (0..12).map(|_| 1 + rng.below(recorded.end.icount - 1)).collect();
        // Boundaries where something is in flight: right at and after async events.
        let busy = recorded.events.iter().filter(|e| e.body.is_async()).map(|e| e.icount + 1);
        at.extend(busy.take(12));
        at.sort_unstable();
        at.dedup();
        let mut emulator = emulator(recorded.events.clone(), recorded.sleep, 2);
        emulator.capture_at(at);
        schedule::replay(&mut emulator, seed + 1);
        assert_eq!(emulator.verdict().unwrap().digest, Some(recorded.digest), "HEDDLE_SEED={seed}");
        let mut blocks = Blocks::default();
        let snapshots = emulator.take_snapshots();
        assert!(snapshots.len() > 10);
        for snapshot in &snapshots {
            blocks.add(snapshot);
        }
        for snapshot in &snapshots {
            let from = snapshot.position;
            let rest = recorded.events[from.event as usize..].to_vec();
            let replayer = replayer(rest, from, LogEnd::Complete);
            let mut emulator = replay_by(replayer, recorded.sleep);
            assert_eq!(emulator.restore(snapshot.root, &mut blocks).unwrap(), from);
            assert_eq!(emulator.digest(), snapshot.digest);
            schedule::replay(&mut emulator, seed + 2);
            let verdict = emulator.verdict().unwrap();
            assert!(verdict.is_match(), "HEDDLE_SEED={seed} from {from}: {:?}", verdict.outcome);
            assert_eq!(verdict.digest, Some(recorded.digest), "HEDDLE_SEED={seed} from {from}");
        }
    }
}

fn diverges(events: Vec<Event>, recorded: &Recorded, kind: DivergenceKind, at_event: usize) -> Verdict {
    let mut last = None;
    for seed in 0..3 {
        let (verdict, _) = replay(events.clone(), recorded.sleep, 2, seed);
        let divergence = verdict.divergence().unwrap_or_else(|| panic!("a match, not {kind}")).clone();
        assert_eq!(divergence.kind, kind, "{divergence}");
        assert_eq!(divergence.position.event as usize, at_event, "{divergence}");
        last = Some(verdict);
    }
    last.unwrap()
}

fn position_of(recorded: &Recorded, nth: usize, what: impl Fn(&Body) -> bool) -> usize {
    let mut found = recorded.events.iter().enumerate().filter(|(_, event)| what(&event.body));
    found.nth(nth).unwrap().0
}

#[test]
fn a_flipped_role_is_named_at_once_for_every_kind_of_checkpoint() {
    let recorded = record(1, 2);
    for kind in [
        CheckpointKind::ClockWarpStart,
        CheckpointKind::ClockWarpAccount,
        CheckpointKind::ClockVirtual,
        CheckpointKind::ClockVirtualRt,
        CheckpointKind::Init,
    ] {
        let at = position_of(&recorded, 0, |body| *body == Body::Checkpoint(kind));
        let mut events = recorded.events.clone();
        events[at].role = events[at].role.other();
        let verdict = diverges(events, &recorded, DivergenceKind::WrongRole, at);
        let divergence = verdict.divergence().unwrap();
        assert_eq!(divergence.expected.role, Some(recorded.events[at].role.other()));
        assert_eq!(divergence.found.role, Some(recorded.events[at].role));
        assert!(divergence.found.what.contains(&format!("{kind:?}")), "{divergence}");
        assert_eq!(verdict.role_mismatches, 1);
    }
}

#[test]
fn every_other_kind_of_divergence_is_named() {
    let recorded = record(1, 2);
    let is = |kind: CheckpointKind| move |body: &Body| *body == Body::Checkpoint(kind);

    // Wrong kind: a warp start where the vCPU has to account.
    let at = position_of(&recorded, 1, is(CheckpointKind::ClockWarpAccount));
    let mut events = recorded.events.clone();
    events[at].body = Body::Checkpoint(CheckpointKind::ClockHost);
    diverges(events, &recorded, DivergenceKind::WrongKind, at);

    // Wrong icount: the clock is read by another instruction.
    let at = position_of(&recorded, 0, |body| {
        matches!(body, Body::Clock { clock: heddle_proto::ClockKind::Host, .. })
    });
    for shift in [-3i64, 3] {
        let mut events = recorded.events.clone();
        events[at].icount = events[at].icount.wrapping_add_signed(shift);
        diverges(events, &recorded, DivergenceKind::WrongIcount, at);
    }

    // Wrong payload: a completion of a request that is not in flight.
    let at = position_of(&recorded, 0, |body| matches!(body, Body::Async(AsyncEvent::Block { .. })));
    let mut events = recorded.events.clone();
    events[at].body = Body::Async(AsyncEvent::Block { id: 99 });
    diverges(events, &recorded, DivergenceKind::WrongPayload, at);

    // State: a clock value that the guest then holds in a register.
    let at = position_of(&recorded, 0, |body| {
        matches!(body, Body::Clock { clock: heddle_proto::ClockKind::Host, .. })
    });
    let mut events = recorded.events.clone();
    if let Body::Clock { value, .. } = &mut events[at].body {
        *value ^= 1 << 13;
    }
    let next_check = at + events[at..].iter().position(|e| e.body.is_mark()).unwrap();
    let verdict = diverges(events, &recorded, DivergenceKind::State, next_check);
    let divergence = verdict.divergence().unwrap();
    assert!((divergence.last_good.event as usize) <= at && at < next_check, "{divergence}");

    // Output: the console's fold alone differs.
    let at = position_of(&recorded, 2, |body| matches!(body, Body::Check { .. }));
    let mut events = recorded.events.clone();
    if let Body::Check { output, .. } = &mut events[at].body {
        *output ^= 1;
    }
    diverges(events, &recorded, DivergenceKind::Output, at);

    // The log ends early, and is left over.
    let mut events = recorded.events.clone();
    events.pop();
    let end = events.len();
    diverges(events, &recorded, DivergenceKind::LogEndedEarly, end);
    let mut events = recorded.events.clone();
    let last = events.last().unwrap().clone();
    events.push(last);
    diverges(events, &recorded, DivergenceKind::LogLeftOver, end + 1);
    let at = position_of(&recorded, 0, |body| matches!(body, Body::Shutdown { .. }));
    let mut events = recorded.events.clone();
    let icount = events[at].icount;
    events.insert(
        at,
        Event { icount, role: Role::Vcpu, body: Body::Checkpoint(CheckpointKind::ClockWarpAccount) },
    );
    diverges(events, &recorded, DivergenceKind::LogLeftOver, at);
}

#[test]
fn without_pinning_the_guest_can_tell() {
    let mut differing = 0;
    for seed in 0..12 {
        let recorded = record(seed * 4, 2);
        let mut replayer = replayer(recorded.events.clone(), Position::default(), LogEnd::Complete);
        replayer.unpin();
        let mut emulator = replay_by(replayer, recorded.sleep);
        schedule::replay(&mut emulator, seed);
        differing += u32::from(!emulator.verdict().unwrap().is_match());
    }
    assert!(differing > 6, "only {differing} of 12 unpinned replays differed");
}

#[test]
fn a_planted_fault_is_found_at_its_instruction_or_shown_masked() {
    use heddle_replay_engine::lockstep::{Pair, first_difference};
    let recorded = record(8, 2);
    let mut rng = Seeded::new(99);
    let (mut exact, mut masked) = (0, 0);
    for _ in 0..seeds(25).count() {
        let fault = Fault {
            icount: 1 + rng.below(recorded.end.icount),
            register: 1 + rng.below(31) as u8,
            bit: rng.below(64) as u8,
        };
        let side = |fault| {
            Emulator::replay(
                guest::short(2, 1).unwrap(),
                replayer(recorded.events.clone(), Position::default(), LogEnd::Complete),
                positions(),
                recorded.sleep,
                Build { fault },
            )
        };
        let make = || Ok(Pair { a: side(None), b: side(Some(fault)) });
        let mut b = side(Some(fault));
        schedule::replay(&mut b, 5);
        let verdict = b.verdict().unwrap();
        let shows = !verdict.is_match();
        let to = recorded.end.icount;
        let (finding, _) = first_difference(make, 0, to, !shows, &|| false).unwrap();
        let finding = finding.unwrap_or_else(|| panic!("{fault:?} was not found"));
        assert_eq!(finding.icount, fault.icount, "{fault:?} {finding:?}");
        match finding.masked {
            None => exact += 1,
            Some(m) => {
                assert!(!shows && m.from == fault.icount && m.to > m.from);
                masked += 1;
            }
        }
    }
    eprintln!("{exact} exact, {masked} masked");
    assert!(exact > 0);
}

#[test]
fn a_log_cut_anywhere_ends_in_a_clear_verdict() {
    let recorded = record(5, 2);
    let count = recorded.events.len();
    let step = if seeds(20).count() > 1000 { 1 } else { (count / 60).max(1) };
    for cut in (0..count).step_by(step) {
        let events = recorded.events[..cut].to_vec();
        let (verdict, _) = replay(events.clone(), recorded.sleep, 2, cut as u64);
        let divergence = verdict.divergence().unwrap_or_else(|| panic!("cut at {cut}: a match"));
        assert_eq!(divergence.kind, DivergenceKind::LogEndedEarly, "cut at {cut}: {divergence}");
        // Known to be cut, the same prefix is a match up to its last event.
        let replayer = replayer(events.clone(), Position::default(), LogEnd::Cut);
        let mut emulator = replay_by(replayer, recorded.sleep);
        schedule::replay(&mut emulator, cut as u64);
        let verdict = emulator.verdict().unwrap();
        assert!(verdict.is_match(), "cut at {cut}: {:?}", verdict.outcome);
        assert_eq!(verdict.events, cut as u64);
    }
}

#[test]
fn a_log_changed_anywhere_never_panics_and_never_hangs() {
    let recorded = record(6, 2);
    let changes = seeds(150).count();
    let mut rng = Seeded::new(4242);
    let (mut diverged, mut matched) = (0, 0);
    for change in 0..changes {
        let mut events = recorded.events.clone();
        let at = rng.below(events.len() as u64) as usize;
        let what = rng.below(7);
        match what {
            0 => events[at].role = events[at].role.other(),
            1 => events[at].icount = events[at].icount.wrapping_add(rng.below(2000)).wrapping_sub(1000),
            2 => drop(events.remove(at)),
            3 => events.insert(at, recorded.events[rng.below(recorded.events.len() as u64) as usize].clone()),
            4 => {
                let other = rng.below(events.len() as u64) as usize;
                events.swap(at, other);
            }
            5 => {
                events[at].body =
                    recorded.events[rng.below(recorded.events.len() as u64) as usize].body.clone()
            }
            _ => events[at].icount = rng.draw(),
        }
        let is_same = events == recorded.events;
        let (verdict, _) = replay(events, recorded.sleep, 2, change as u64);
        match verdict.divergence() {
            None => matched += 1,
            Some(divergence) => {
                diverged += 1;
                assert_ne!(divergence.kind, DivergenceKind::Stall, "change {what} at {at}: {divergence}");
            }
        }
        assert!(!is_same || verdict.is_match());
    }
    eprintln!("{diverged} diverged, {matched} matched");
    assert!(diverged > changes * 8 / 10);
}
