//! The wall clock's alarm: recorded under any interleaving, replayed under any other.
#![allow(clippy::unwrap_used, missing_docs)]

use heddle_proto::manifest::{Positions, Sleep};
use heddle_proto::{Body, CheckpointKind, ClockKind, DivergenceKind, Event, Hash, Position, Role};
use heddle_replay_engine::bare::{Bare, Pause};
use heddle_replay_engine::io::{self, RecordSink, ReplayOptions};
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Machine, RAM_BASE};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::timer::TimerClock;
use heddle_replay_engine::{AsyncQueue, Build, Emulator, LogEnd, Replayer, Snapshot, schedule};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

const RAM_BYTES: usize = 1 << 20;
const SOURCE: u64 = 11;
const PLIC: u64 = 0xc00_0000;
const ROUNDS: u64 = 4;
/// How far ahead of the time read the alarm is set: under some schedules that has passed by then.
const AHEAD_NS: u64 = 50_000;
/// The guest reads the clock to set each half of the time, then thrice a round: the time, whether
/// the alarm's has come, and the time once more.
const READS: u64 = 2 + 3 * ROUNDS;
const SECOND_NS: u64 = 1_000_000_000;
const SEEDS: std::ops::Range<u64> = 0..24;

/// Sleeps until its alarm.
const WFI: u32 = 0x1050_0073;
/// Looks again and again.
const NOP: u32 = 0x13;
/// The word of [`CODE`] that says which.
const WAIT: usize = 16;

/// Sets another time, and then alarm after alarm: notes in a0 how late the latest was, and in a1
/// the sum of the sources it has claimed.
const CODE: [u32; 37] = [
    0x0384_a623, //  0  sw s8, 44(s1)    the source's priority
    0x017b_2023, //  4  sw s7, 0(s6)     enabled
    0x304b_9073, //  8  csrw mie, s7
    0x0184_2823, //  c  sw s8, 16(s0)    IRQ_ENABLED
    0x01b4_2223, // 10  sw s11, 4(s0)    TIME_HIGH
    0x01a4_2023, // 14  sw s10, 0(s0)    TIME_LOW
    // A round: t0 is the time a bit ahead.
    0x0004_2283, // 18  lw t0, 0(s0)
    0x0044_2303, // 1c  lw t1, 4(s0)
    0x0202_9293, // 20  slli t0, t0, 32
    0x0202_d293, // 24  srli t0, t0, 32
    0x0203_1313, // 28  slli t1, t1, 32
    0x0062_82b3, // 2c  add t0, t0, t1
    0x0142_82b3, // 30  add t0, t0, s4
    0x0202_d313, // 34  srli t1, t0, 32
    0x0064_2623, // 38  sw t1, 12(s0)    ALARM_HIGH
    0x0054_2423, // 3c  sw t0, 8(s0)     ALARM_LOW
    WFI,         // 40  wfi, or nop
    0x3440_23f3, // 44  csrr t2, mip
    0x0173_f3b3, // 48  and t2, t2, s7
    0xfe03_8ae3, // 4c  beqz t2, 0x40
    // Claims it, and sees how late it is.
    0x000c_a383, // 50  lw t2, 0(s9)
    0x0004_2e03, // 54  lw t3, 0(s0)
    0x0044_2e83, // 58  lw t4, 4(s0)
    0x020e_1e13, // 5c  slli t3, t3, 32
    0x020e_5e13, // 60  srli t3, t3, 32
    0x020e_9e93, // 64  slli t4, t4, 32
    0x01de_0e33, // 68  add t3, t3, t4
    0x405e_0e33, // 6c  sub t3, t3, t0
    0x01c5_7463, // 70  bgeu a0, t3, 0x78
    0x000e_0513, // 74  mv a0, t3
    0x0004_2e23, // 78  sw zero, 28(s0)  CLEAR_INTERRUPT
    0x007c_a023, // 7c  sw t2, 0(s9)     completed
    0x0075_85b3, // 80  add a1, a1, t2
    0xfffa_8a93, // 84  addi s5, s5, -1
    0xf80a_98e3, // 88  bnez s5, 0x18
    0x0139_2023, // 8c  sw s3, 0(s2)
    0x0000_006f, // 90  j 0x90
];

fn guest(wait: u32) -> Machine {
    let mut code = CODE;
    code[WAIT] = wait;
    let mut ram = Ram::new(RAM_BYTES);
    ram.write(0, &code.map(u32::to_le_bytes).concat()).unwrap();
    let mut hart = Hart::new(RAM_BASE);
    let registers = [
        (8, 0x10_1000),
        (9, PLIC),
        (18, 0x10_0000),
        (19, 0x5555),
        (20, AHEAD_NS),
        (21, ROUNDS),
        (22, PLIC + 0x2000),
        (23, 1 << SOURCE),
        (24, 1),
        (25, PLIC + 0x20_0004),
        // Years before the host's time, and close to where the upper half counts.
        (26, 0xffff_0000),
        (27, 0x1000_0000),
    ];
    for (register, value) in registers {
        hart.x[register] = value;
    }
    Machine::new(ram, hart, 3, vec![])
}

/// How late the latest alarm was; of one that came too early this is more than years.
fn lateness(machine: &Machine) -> u64 {
    let x = &machine.hart().x;
    assert_eq!((x[11], x[21]), (ROUNDS * SOURCE, 0), "every alarm's interrupt was claimed");
    x[10]
}

fn positions(check_every: u64) -> Positions {
    Positions { check_every, digest_every: 4 * check_every, snapshot_every: 0, snapshots_at: vec![] }
}

struct Recorded {
    wait: u32,
    sleep: Sleep,
    events: Vec<Event>,
    digest: Hash,
}

/// Even seeds sleep, odd ones spin.
fn record(seed: u64) -> Recorded {
    let wait = if seed % 2 == 0 { WFI } else { NOP };
    let sleep = if seed % 4 < 2 { Sleep::On } else { Sleep::Off };
    let queue = AsyncQueue::default();
    let mut emulator = Emulator::record(guest(wait), positions(16), sleep, queue.clone());
    let events = schedule::record(&mut emulator, &queue, seed, vec![], 1_000_000);
    assert!(emulator.has_ended(), "seed {seed}: the guest did not end");
    let late = lateness(emulator.machine());
    assert!(late < SECOND_NS, "seed {seed}: {late} ns late");
    Recorded { wait, sleep, events, digest: emulator.digest() }
}

impl Recorded {
    /// The events at which the alarm's timer was run.
    fn alarms(&self) -> Vec<usize> {
        let is_alarm = |event: &Event| event.body == Body::Checkpoint(CheckpointKind::ClockHost);
        (0..self.events.len()).filter(|at| is_alarm(&self.events[*at])).collect()
    }

    fn replay(&self, events: &[Event], from: Position) -> Emulator {
        let events: Vec<Event> = events.to_vec();
        let replayer = Replayer::new(Box::new(events.into_iter()), from, LogEnd::Complete);
        Emulator::replay(guest(self.wait), replayer, positions(16), self.sleep, Build::default())
    }

    /// Replays to the end, which is the recorded one.
    fn check(&self, emulator: &mut Emulator, seed: u64, what: &str) {
        schedule::replay(emulator, seed);
        let verdict = emulator.verdict().unwrap();
        assert!(verdict.is_match(), "{what}: {:?}", verdict.outcome);
        assert_eq!(verdict.digest, Some(self.digest), "{what}");
        assert_eq!(verdict.role_mismatches, 0, "{what}");
    }
}

fn is_host_clock(event: &Event) -> bool {
    matches!(event.body, Body::Clock { clock: ClockKind::Host, .. })
}

#[test]
fn what_was_recorded_under_any_interleaving_replays_under_any_other() {
    let (mut by_timer, mut at_once) = (0, 0);
    for seed in SEEDS {
        let recorded = record(seed);
        let alarms = recorded.alarms();
        for at in &alarms {
            let [timer, clock] = [&recorded.events[*at], &recorded.events[*at + 1]];
            assert!(is_host_clock(clock), "seed {seed}: {}", clock.body);
            assert_eq!([timer.role, clock.role], [Role::Iothread; 2], "seed {seed}");
        }
        let reads = recorded.events.iter().filter(|event| is_host_clock(event) && event.role == Role::Vcpu);
        assert_eq!(reads.count() as u64, READS, "seed {seed}");
        by_timer += alarms.len() as u64;
        at_once += ROUNDS - alarms.len() as u64;
        for replay_seed in [seed ^ 0x5555, seed.wrapping_mul(7919) + 1] {
            let mut emulator = recorded.replay(&recorded.events, Position::default());
            recorded.check(&mut emulator, replay_seed, &format!("seed {seed} (replay {replay_seed})"));
            assert!(lateness(emulator.machine()) < SECOND_NS);
        }
    }
    assert!(by_timer > 0 && at_once > 0, "{by_timer} alarms by the timer, {at_once} at once");
}

struct Blocks(HashMap<Hash, Vec<u8>>);

impl BlockSource for Blocks {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        hashes.iter().map(|hash| self.0.get(hash).cloned().ok_or(format!("no block {hash}"))).collect()
    }
}

#[test]
fn a_snapshot_has_the_alarm_that_is_set() {
    let mut restored = 0;
    for seed in SEEDS {
        let recorded = record(seed);
        // A snapshot is of the state in which the icount is reached: its timers have yet to run.
        let icounts = recorded.alarms().into_iter().map(|at| recorded.events[at].icount);
        let mut whole = recorded.replay(&recorded.events, Position::default());
        whole.capture_at(icounts.collect());
        recorded.check(&mut whole, seed + 1, &format!("seed {seed}"));
        let snapshots = whole.take_snapshots();
        assert_eq!(snapshots.len(), recorded.alarms().len(), "seed {seed}");
        let mut blocks = Blocks(snapshots.iter().flat_map(|snapshot| snapshot.blocks.clone()).collect());
        for snapshot in &snapshots {
            let from = snapshot.position;
            let mut emulator = recorded.replay(&recorded.events[from.event as usize..], from);
            assert_eq!(emulator.restore(snapshot.root, &mut blocks).unwrap(), from);
            assert_eq!(emulator.digest(), snapshot.digest);
            assert!(emulator.deadline(TimerClock::Host).is_some(), "seed {seed} from {from}");
            recorded.check(&mut emulator, seed + 2, &format!("seed {seed} from {from}"));
            restored += 1;
        }
    }
    assert!(restored > SEEDS.count(), "only {restored} snapshots");
}

#[test]
fn an_alarm_on_the_other_role_or_at_another_time_is_a_divergence() {
    let recorded = SEEDS.map(record).find(|recorded| !recorded.alarms().is_empty()).unwrap();
    let at = recorded.alarms()[0];
    let verdict = |events: &[Event]| {
        let mut emulator = recorded.replay(events, Position::default());
        schedule::replay(&mut emulator, 3);
        emulator.verdict().unwrap()
    };
    let mut events = recorded.events.clone();
    events[at].role = Role::Vcpu;
    let flipped = verdict(&events);
    let divergence = flipped.divergence().unwrap();
    let found = (divergence.kind, divergence.position.event as usize);
    assert_eq!(found, (DivergenceKind::WrongRole, at), "{divergence}");
    // By this clock the alarm's time has not come.
    let mut events = recorded.events.clone();
    if let Body::Clock { value, .. } = &mut events[at + 1].body {
        *value = 0;
    }
    let divergence = verdict(&events).divergence().unwrap().clone();
    assert!(divergence.position.event as usize > at + 1, "{divergence}");
}

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<Event>>>);

impl RecordSink for Kept {
    fn events(&mut self, events: Vec<Event>) {
        self.0.lock().unwrap().extend(events);
    }
    fn snapshot(&mut self, _: Snapshot) {}
    fn console(&mut self, _: &[u8]) {}
    fn is_full(&self) -> bool {
        false
    }
    fn paused(&mut self, _: bool) {}
}

#[test]
fn on_two_threads_it_wakes_who_sleeps_and_who_spins() {
    for wait in [WFI, NOP] {
        let positions = || positions(100_000);
        let queue = AsyncQueue::default();
        let emulator = Emulator::record(guest(wait), positions(), Sleep::On, queue.clone());
        let kept = Kept::default();
        let done = io::record(emulator, queue, Box::new(kept.clone()), |_| {}).unwrap();
        let events = kept.0.lock().unwrap().clone();
        let replayer = Replayer::new(Box::new(events.into_iter()), Position::default(), LogEnd::Complete);
        let emulator = Emulator::replay(guest(wait), replayer, positions(), Sleep::On, Build::default());
        let verdict = io::replay(emulator, &ReplayOptions::default()).unwrap().verdict;
        assert!(verdict.is_match(), "{:?}", verdict.outcome);
        assert_eq!(verdict.digest, Some(done.digest));
    }
}

#[test]
fn with_nobody_to_record_it_an_alarm_is_as_late_as_the_guest_is_slow() {
    // Who sleeps reads the clock with the fifth instruction of 8 ns behind the alarm; who spins
    // has up to three more to go.
    for (wait, least, most) in [(WFI, 40, 40), (NOP, 40, 64)] {
        let mut bare = Bare::new(guest(wait), 1_700_000_000_000_000_000);
        assert_eq!(bare.run(1_000_000), Pause::Off);
        let late = lateness(bare.machine());
        assert!((least..=most).contains(&late), "{late} ns late");
    }
}
