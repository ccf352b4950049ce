//! A session goes anywhere in a recording, and finds there what a straight replay has.
#![allow(clippy::unwrap_used, missing_docs)]

use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{AsyncEvent, Body, Event, Hash, Position};
use heddle_replay_engine::debugger::{AccessKind, Found, Origin, Points, Session, Stop, Watchpoint};
use heddle_replay_engine::machine::Machine;
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::schedule::{self, Seeded};
use heddle_replay_engine::{AsyncQueue, Build, Emulator, LogEnd, Replayer, guest};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};

const ROUNDS: u64 = 2;
/// So many instructions between two snapshots in memory: enough of them to be thinned.
const SPACING: u64 = 1 << 10;

fn positions() -> Positions {
    Positions { check_every: 10_000, digest_every: 50_000, snapshot_every: 0, snapshots_at: vec![] }
}

/// A recording of the guest cut short, in memory.
#[derive(Clone, Default)]
struct Recorded {
    events: Vec<Event>,
    end: u64,
    snapshots: Vec<(Position, Hash)>,
    blocks: HashMap<Hash, Vec<u8>>,
}

impl BlockSource for Recorded {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        hashes.iter().map(|hash| self.blocks.get(hash).cloned().ok_or(format!("no block {hash}"))).collect()
    }
}

impl Origin for Recorded {
    fn emulator(&mut self, from: Position) -> Result<Emulator, String> {
        let events = self.events[from.event as usize..].to_vec();
        let replayer = Replayer::new(Box::new(events.into_iter()), from, LogEnd::Complete);
        let machine = guest::short(ROUNDS, 1).unwrap();
        Ok(Emulator::replay(machine, replayer, positions(), Sleep::On, Build::default()))
    }

    fn snapshots(&self) -> Vec<(Position, Hash)> {
        self.snapshots.clone()
    }
}

/// Records, and gives the recording `snapshots` snapshots of its own.
fn record(seed: u64, snapshots: u64) -> Recorded {
    let queue = AsyncQueue::default();
    let mut emulator =
        Emulator::record(guest::short(ROUNDS, 1).unwrap(), positions(), Sleep::On, queue.clone());
    let input = vec![b"he".to_vec(), b"ddle\n".to_vec()];
    let events = schedule::record(&mut emulator, &queue, seed, input, 4_000_000);
    assert!(emulator.has_ended(), "seed {seed}: the guest did not end");
    let mut recorded = Recorded { events, end: emulator.position().icount, ..Recorded::default() };
    let mut replay = recorded.emulator(Position::default()).unwrap();
    replay.capture_at((1..=snapshots).map(|n| recorded.end * n / (snapshots + 1)).collect());
    schedule::replay(&mut replay, seed);
    for snapshot in replay.take_snapshots() {
        recorded.snapshots.push((snapshot.position, snapshot.root));
        recorded.blocks.extend(snapshot.blocks);
    }
    assert_eq!(recorded.snapshots.len() as u64, snapshots);
    recorded
}

fn session(recorded: &Recorded) -> Session {
    Session::with_spacing(Box::new(recorded.clone()), SPACING).unwrap()
}

/// pc, mode and registers.
fn registers(machine: &Machine) -> (u64, u8, Vec<u64>) {
    let hart = machine.hart();
    (hart.pc, hart.mode as u8, hart.x[..32].to_vec())
}

fn never() -> impl FnMut() -> bool {
    || false
}

fn draw(rng: &mut Seeded, end: u64, count: usize) -> Vec<u64> {
    (0..count).map(|_| rng.below(end)).collect()
}

#[test]
fn any_icount_in_any_order_is_what_a_straight_replay_has_there() {
    for (seed, snapshots) in [(1, 0), (2, 3), (3, 1)] {
        let mut recorded = record(seed, snapshots);
        let mut rng = Seeded::new(seed);
        let mut places = draw(&mut rng, recorded.end, 40);
        // Where events are, and beside them.
        places.extend(recorded.events.iter().step_by(29).map(|event| event.icount).take(20));
        places.extend([0, 1, recorded.end]);
        let mut straight = recorded.emulator(Position::default()).unwrap();
        let mut expected = BTreeMap::new();
        for at in places.iter().copied().collect::<BTreeSet<u64>>() {
            schedule::advance(&mut straight, at);
            expected.insert(at, (registers(straight.machine()), straight.digest()));
        }
        let mut session = session(&recorded);
        for at in places {
            assert_eq!(session.goto(at).unwrap(), Stop::There);
            assert_eq!(session.icount(), at);
            let found = (registers(session.machine()), session.digest());
            assert_eq!(found, expected[&at], "seed {seed}, icount {at}");
            if rng.below(2) == 0 {
                session.settle();
                assert_eq!(session.icount(), at, "settling runs no instruction");
            }
        }
        // And the whole is still a match, however it was gone through.
        assert_eq!(session.goto(u64::MAX).unwrap(), Stop::End);
        assert_eq!(session.icount(), recorded.end);
        assert!(session.ending().unwrap().contains("exit code 0"), "{:?}", session.ending());
        let named: Vec<String> = session.leaves().into_iter().map(|(name, _)| name).collect();
        assert!(["ram", "disk-0", "hart", "clint"].iter().all(|leaf| named.iter().any(|n| n == leaf)));
    }
}

/// What `0x...` says.
fn number(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap()
}

/// What must hold between the leaves of any state; the deadline that the CLINT has armed.
fn check_leaves(session: &mut Session) -> (BTreeMap<String, Value>, Option<i64>) {
    let leaves: BTreeMap<String, Value> = session.leaf_values().into_iter().collect();
    let named = session.leaves().into_iter().map(|(name, _)| name);
    let with_values: BTreeSet<String> = named.filter(|name| name != "ram" && name != "disk-0").collect();
    assert!(leaves.keys().eq(&with_values), "{leaves:?}");
    let machine = session.machine();
    let clock = &leaves["clock"];
    let now = (machine.icount() << clock["shift"].as_u64().unwrap()) as i64 + clock["bias"].as_i64().unwrap();
    assert_eq!(now, machine.virtual_now());
    assert_eq!(leaves["machine"]["icount"], machine.icount());
    assert_eq!(number(&leaves["hart"]["pc"]), machine.hart().pc);
    assert_eq!(number(&leaves["hart"]["x"][2]), machine.hart().x[2]);
    // What was popped is in flight, or was given back.
    let disk = &leaves["virtio-block-0"];
    let queue = &disk["transport"]["queues"][0];
    let in_flight = disk["in_flight"].as_array().unwrap().len() as u64;
    let given_back = queue["next_used"].as_u64().unwrap();
    assert_eq!(queue["next_available"], given_back + in_flight);
    assert_eq!(queue["next_available"], leaves["machine"]["next_request"]);
    let armed = leaves["timers"]["lists"]["Virtual"].as_array().unwrap().first().map(|timer| {
        let deadline = timer[0].as_i64().unwrap();
        assert_eq!(timer[1], json!({ "Clint": 0 }));
        // Whole ticks from where it was set.
        let tick = number(&leaves["clint"]["harts"][0]["mtimecmp"]) as i64 * 100;
        assert!((tick..tick + 100).contains(&deadline), "{deadline} for {tick}");
        deadline
    });
    (leaves, armed)
}

#[test]
fn the_leaves_of_a_state_say_what_devices_hold() {
    let (mut in_flight, mut typed, mut armed) = (0, 0, 0);
    for seed in 1..=4 {
        let recorded = record(seed, 0);
        let mut session = session(&recorded);
        for event in &recorded.events {
            let Body::Async(event_of) = &event.body else { continue };
            session.goto(event.icount).unwrap();
            let (leaves, deadline) = check_leaves(&mut session);
            armed += usize::from(deadline.is_some());
            match event_of {
                // It may be popped, and complete, at one icount.
                AsyncEvent::Block { id } => {
                    let requests = leaves["virtio-block-0"]["in_flight"].as_array().unwrap().iter();
                    in_flight += requests.filter(|request| request["id"] == *id).count();
                }
                AsyncEvent::Char { data } => {
                    session.settle();
                    let (leaves, _) = check_leaves(&mut session);
                    let part = |name: &str| leaves["uart"][name].as_str().unwrap();
                    let waiting = format!("{}{}", part("fifo"), part("backlog"));
                    let digits: String = data.iter().map(|byte| format!("{byte:02x}")).collect();
                    assert!(waiting.contains(&digits), "{digits} in {waiting}");
                    typed += 1;
                }
                AsyncEvent::BottomHalf { id } => {
                    let mut pending = leaves["machine"]["bottom_halves"].as_array().unwrap().iter();
                    assert!(pending.any(|half| half["id"] == *id), "{leaves:?}");
                }
            }
        }
        session.goto(recorded.end).unwrap();
        let (leaves, _) = check_leaves(&mut session);
        assert_eq!(leaves["plic"]["contexts"][0]["enable"], json!([1, 10]));
        assert_eq!(leaves["plic"]["priority"], json!({ "1": 1, "10": 1 }));
        assert_eq!((&leaves["uart"]["ier"], &leaves["uart"]["fifo_on"]), (&json!("0x1"), &json!(true)));
        assert_eq!(leaves["virtio-block-0"]["transport"]["queues"][0]["size"], 8);
    }
    assert!(in_flight > 0 && typed > 0 && armed > 0, "{in_flight} {typed} {armed}");
}

#[test]
fn a_step_back_undoes_a_step() {
    let recorded = record(4, 2);
    let mut session = session(&recorded);
    let mut rng = Seeded::new(4);
    for at in draw(&mut rng, recorded.end - 10, 12) {
        session.goto(at).unwrap();
        session.settle();
        let mut seen = vec![registers(session.machine())];
        for n in 1..=6 {
            assert_eq!(session.run_forward(at + n, &mut never()).unwrap(), Stop::There);
            seen.push(registers(session.machine()));
        }
        for n in (0..6).rev() {
            assert_eq!(session.run_backward(at + n, &mut never()).unwrap(), Stop::There);
            assert_eq!(session.icount(), at + n);
            assert_eq!(registers(session.machine()), seen[n as usize], "icount {}", at + n);
        }
    }
}

/// Where each instruction of `from..to` is, as steps show it.
fn stepped(session: &mut Session, from: u64, to: u64) -> Vec<u64> {
    session.goto(from).unwrap();
    session.settle();
    let mut pcs = vec![];
    for icount in from..to {
        pcs.push(session.machine().hart().pc);
        session.run_forward(icount + 1, &mut never()).unwrap();
    }
    pcs
}

/// All hits of `from..to` from one end to the other.
fn hits(session: &mut Session, from: u64, to: u64, backward: bool) -> Vec<u64> {
    session.goto(if backward { to } else { from }).unwrap();
    let mut hits = vec![];
    loop {
        let stop = if backward {
            session.run_backward(from, &mut never())
        } else {
            session.run_forward(to, &mut never())
        };
        match stop.unwrap() {
            Stop::Found(Found::Breakpoint) => hits.push(session.icount()),
            other => {
                assert_eq!(other, Stop::There);
                return hits;
            }
        }
    }
}

#[test]
fn breakpoints_are_hit_at_the_same_icounts_forwards_and_backwards() {
    let recorded = record(5, 2);
    let mut session = session(&recorded);
    session.goto(recorded.end / 2).unwrap();
    let trap_entry = session.machine().hart().mtvec & !3;
    // The handler of an interrupt is entered between two instructions.
    session.points.breakpoints.insert(trap_entry);
    let entered = hits(&mut session, 0, recorded.end, false);
    assert!(entered.len() > 4, "{entered:?}");
    let mut back = hits(&mut session, 0, recorded.end, true);
    back.reverse();
    assert_eq!(back, entered);
    for at in &entered {
        session.goto(*at).unwrap();
        session.settle();
        assert_eq!(session.machine().hart().pc, trap_entry);
    }
    // Against single steps, around one of them.
    let (from, to) = (entered[2] - 150, entered[2] + 150);
    session.points = Points::default();
    let pcs = stepped(&mut session, from, to);
    for pc in [trap_entry, pcs[3], pcs[100], pcs[220]] {
        session.points.breakpoints = BTreeSet::from([pc]);
        let expected: Vec<u64> =
            (from..to).zip(&pcs).filter(|(_, at)| **at == pc).map(|(icount, _)| icount).collect();
        assert!(!expected.is_empty());
        // Who stands at one has been there: forwards it is the next that counts.
        let forward = hits(&mut session, from, to, false);
        assert_eq!(forward, expected.iter().copied().filter(|at| *at > from).collect::<Vec<u64>>());
        let mut back = hits(&mut session, from, to, true);
        back.reverse();
        assert_eq!(back, expected);
    }
}

#[test]
fn watched_memory_stops_before_an_access_forwards_and_behind_it_backwards() {
    let recorded = record(6, 1);
    let mut session = session(&recorded);
    session.goto(recorded.end / 2).unwrap();
    session.points.breakpoints.insert(session.machine().hart().mtvec & !3);
    assert_eq!(
        session.run_forward(recorded.end, &mut never()).unwrap(),
        Stop::Found(Found::Breakpoint),
        "no interrupt in the second half"
    );
    // The handler makes room on the stack, then saves ra.
    let (entry, sp, ra) = (session.icount(), session.machine().hart().x[2], session.machine().hart().x[1]);
    let watchpoint = Watchpoint { address: sp - 136, bytes: 8, kind: AccessKind::Write };
    let read = Watchpoint { kind: AccessKind::Read, ..watchpoint };
    session.points = Points { watchpoints: vec![watchpoint], ..Points::default() };
    let found = Stop::Found(Found::Watchpoint(watchpoint));
    assert_eq!(session.run_forward(recorded.end, &mut never()).unwrap(), found);
    let saved = session.icount();
    assert_eq!(saved, entry + 1);
    assert_eq!(session.run_forward(recorded.end, &mut never()).unwrap(), found, "it has not happened yet");
    assert_eq!(session.icount(), saved);
    let value = |session: &Session| {
        let mut bytes = [0; 8];
        assert_eq!(session.machine().peek(sp - 136, &mut bytes), 8);
        u64::from_le_bytes(bytes)
    };
    session.goto(saved + 1).unwrap();
    assert_eq!(value(&session), ra);
    // From far behind it, past the loads of the handler's end.
    session.goto(saved + 20).unwrap();
    assert_eq!(session.run_backward(0, &mut never()).unwrap(), found);
    assert_eq!(session.icount(), saved + 1);
    assert_eq!(value(&session), ra);
    session.points.watchpoints = vec![read];
    assert_eq!(
        session.run_forward(recorded.end, &mut never()).unwrap(),
        Stop::Found(Found::Watchpoint(read))
    );
    assert!(session.icount() > saved);
    let text = session.machine().instruction_at(session.machine().hart().pc);
    assert!(text.starts_with("ld"), "{text}");
}

#[test]
fn an_interrupted_run_stands_where_it_can_go_on() {
    let recorded = record(7, 0);
    let mut session = session(&recorded);
    session.points.breakpoints.insert(1);
    let mut looks = 0;
    let mut third = || {
        looks += 1;
        looks == 3
    };
    assert_eq!(session.run_forward(u64::MAX, &mut third).unwrap(), Stop::Interrupted);
    let here = session.icount();
    assert!(here > 0 && here < recorded.end);
    assert_eq!(session.run_forward(u64::MAX, &mut never()).unwrap(), Stop::End);
    assert_eq!(session.run_backward(0, &mut || true).unwrap(), Stop::Interrupted);
    assert_eq!(session.icount(), recorded.end);
    assert_eq!(session.run_backward(here, &mut never()).unwrap(), Stop::There);
    assert_eq!(session.icount(), here);
}
