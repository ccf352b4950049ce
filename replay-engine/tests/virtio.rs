//! The virtio devices beside the disk: recorded and replayed, and against drivers that mean harm.
#![allow(clippy::unwrap_used, missing_docs)]

use heddle_proto::manifest::{Device, Positions, Sleep};
use heddle_proto::{AsyncEvent, Body, ClockKind, DivergenceKind, Event, Hash, Position, QemuEvent, Verdict};
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Exit, Machine, Nobody, RAM_BASE};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::schedule::{self, Seeded};
use heddle_replay_engine::{AsyncQueue, Build, Emulator, LogEnd, Replayer};
use std::collections::HashMap;

const RAM_BYTES: usize = 2 << 20;
/// The others take the slots from the last down.
const NET: u64 = 0x1000_8000;
const RNG: u64 = 0x1000_7000;
const CONSOLE: u64 = 0x1000_6000;
/// Where the guest's table of register writes, its queues and its buffers are.
const TABLE: u64 = 0x1000;
const QUEUES: u64 = 0x1_0000;
const BUFFERS: u64 = 0x2_0000;

fn i(imm: i32, rs1: u32, f3: u32, rd: u32, opcode: u32) -> u32 {
    (imm as u32) << 20 | rs1 << 15 | f3 << 12 | rd << 7 | opcode
}

/// sw rs2, 0(rs1)
fn sw(rs2: u32, rs1: u32) -> u32 {
    rs2 << 20 | rs1 << 15 | 2 << 12 | 0x23
}

fn branch(offset: i32, rs1: u32, rs2: u32, f3: u32) -> u32 {
    let bits = offset as u32;
    let high = (bits >> 12 & 1) << 31 | (bits >> 5 & 0x3f) << 25;
    high | rs2 << 20 | rs1 << 15 | f3 << 12 | (bits >> 1 & 15) << 8 | (bits >> 11 & 1) << 7 | 0x63
}

fn jump(offset: i32) -> u32 {
    let bits = offset as u32;
    (bits >> 20 & 1) << 31 | (bits >> 1 & 0x3ff) << 21 | (bits >> 11 & 1) << 20 | (bits & 0xf_f000) | 0x6f
}

/// Writes the table's registers, counts down, and switches off.
fn program() -> [u32; 11] {
    [
        i(0, 10, 3, 1, 0x03),   //  0  ld x1, 0(x10)
        branch(24, 1, 0, 0),    //  4  beqz x1, 28
        i(8, 10, 3, 2, 0x03),   //  8  ld x2, 8(x10)
        i(16, 10, 0, 10, 0x13), // 12  addi x10, x10, 16
        sw(2, 1),               // 16  sw x2, 0(x1)
        jump(-20),              // 20  j 0
        0x13,                   // 24  nop
        i(-1, 11, 0, 11, 0x13), // 28  addi x11, x11, -1
        branch(-4, 11, 0, 1),   // 32  bnez x11, 28
        sw(13, 12),             // 36  sw x13, 0(x12)
        jump(0),                // 40  j 40
    ]
}

/// A queue of eight entries, by its number: where its rings are.
#[derive(Clone, Copy)]
struct Queue(u64);

/// A buffer: where in RAM, how long, and whether the device writes it.
type Buffer = (u64, u32, bool);

impl Queue {
    fn at(self) -> u64 {
        QUEUES + self.0 * 0x1000
    }

    fn offer(self, ram: &mut Ram, chains: &[&[Buffer]]) {
        let mut index = 0u64;
        for (slot, chain) in chains.iter().enumerate() {
            ram.write(self.at() + 0x104 + slot as u64 * 2, &(index as u16).to_le_bytes()).unwrap();
            for (i, (at, len, is_writable)) in chain.iter().enumerate() {
                let has_next = i + 1 < chain.len();
                let flags = u64::from(has_next) | u64::from(*is_writable) << 1;
                let word = u64::from(*len) | flags << 32 | (index + 1) << 48;
                ram.write(self.at() + index * 16, &(RAM_BASE + at).to_le_bytes()).unwrap();
                ram.write(self.at() + index * 16 + 8, &word.to_le_bytes()).unwrap();
                index += 1;
            }
        }
        ram.write(self.at() + 0x102, &(chains.len() as u16).to_le_bytes()).unwrap();
    }

    /// What the device gave back: for each chain its length.
    fn used(self, ram: &Ram) -> Vec<u32> {
        let count = ram.load::<2>(self.at() + 0x202).unwrap();
        (0..count).map(|slot| ram.load::<4>(self.at() + 0x204 + slot * 8 + 4).unwrap() as u32).collect()
    }
}

/// Register writes that bring a device with these queues up and notify each.
fn bring_up(device: u64, queues: &[Queue]) -> Vec<(u64, u64)> {
    let mut writes = vec![(0x70, 0), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)];
    for (number, queue) in queues.iter().enumerate() {
        let at = RAM_BASE + queue.at();
        writes.extend([(0x30, number as u64), (0x38, 8), (0x80, at), (0x90, at + 0x100), (0xa0, at + 0x200)]);
        writes.push((0x44, 1));
    }
    writes.push((0x70, 15));
    writes.extend((0..queues.len() as u64).map(|number| (0x50, number)));
    writes.into_iter().map(|(register, value)| (device + register, value)).collect()
}

const FROM_NET: Queue = Queue(0);
const TO_NET: Queue = Queue(1);
const ENTROPY: Queue = Queue(2);
const TYPED: Queue = Queue(3);
const PRINTED: Queue = Queue(4);

/// A machine with all devices, whose guest offers buffers and notifies everybody.
fn machine() -> Machine {
    let mut ram = Ram::new(RAM_BYTES);
    let code: Vec<u8> = program().iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &code).unwrap();
    let buffer = |n: u64| BUFFERS + n * 0x1000;
    ENTROPY.offer(
        &mut ram,
        &[
            &[(buffer(0), 64, true)],
            &[(buffer(1), 10, true), (buffer(2), 20, true)],
            &[(buffer(3), 4000, true)],
        ],
    );
    ram.write(buffer(4), b"hello virtio\n").unwrap();
    PRINTED.offer(
        &mut ram,
        &[&[(buffer(4), 3, false), (buffer(4) + 3, 3, false)], &[(buffer(4) + 6, 7, false)]],
    );
    TYPED.offer(&mut ram, &[&[(buffer(5), 16, true)], &[(buffer(6), 16, true)]]);
    ram.write(buffer(7) + 12, b"a frame").unwrap();
    TO_NET
        .offer(&mut ram, &[&[(buffer(7), 19, false)], &[(buffer(7), 12, false), (buffer(7) + 14, 5, false)]]);
    let large = |n: u64| -> [Buffer; 1] { [(buffer(n), 1530, true)] };
    FROM_NET.offer(&mut ram, &[&large(8), &large(9), &large(10), &[(buffer(11), 20, true)]]);
    let mut table = bring_up(NET, &[FROM_NET, TO_NET]);
    table.extend(bring_up(RNG, &[ENTROPY]));
    table.extend(bring_up(CONSOLE, &[TYPED, PRINTED]));
    for (n, (address, value)) in table.iter().enumerate() {
        ram.write(TABLE + n as u64 * 16, &address.to_le_bytes()).unwrap();
        ram.write(TABLE + n as u64 * 16 + 8, &value.to_le_bytes()).unwrap();
    }
    let mut hart = Hart::new(RAM_BASE);
    hart.mtvec = RAM_BASE + 40;
    for (register, value) in [(10, RAM_BASE + TABLE), (11, 200_000), (12, 0x10_0000), (13, 0x5555)] {
        hart.x[register] = value;
    }
    let mut machine = Machine::new(ram, hart, 3, vec![]);
    [Device::Net, Device::Rng, Device::Console].into_iter().for_each(|device| machine.plug(device));
    machine
}

fn positions() -> Positions {
    Positions { check_every: 10_000, digest_every: 50_000, snapshot_every: 0, snapshots_at: vec![] }
}

struct Recorded {
    events: Vec<Event>,
    digest: Hash,
    console: Vec<u8>,
    frames: Vec<Vec<u8>>,
    ram: Ram,
}

fn incoming() -> [Vec<u8>; 4] {
    [vec![1; 60], (0..1518).map(|n| n as u8).collect(), vec![3; 14], vec![4; 60]]
}

fn record(seed: u64) -> Recorded {
    let queue = AsyncQueue::default();
    incoming().into_iter().for_each(|frame| queue.push_frame(frame));
    queue.push_frame(vec![5; 4000]);
    let mut emulator = Emulator::record(machine(), positions(), Sleep::On, queue.clone());
    let input = vec![b"typed at the virtio".to_vec()];
    let events = schedule::record(&mut emulator, &queue, seed, input, 4_000_000);
    assert!(emulator.has_ended(), "seed {seed}: the guest did not end");
    let digest = emulator.digest();
    let machine = emulator.machine_mut();
    let (console, frames) = (machine.take_console(), machine.take_frames());
    Recorded { events, digest, console, frames, ram: emulator.machine().ram().clone() }
}

fn emulator(events: Vec<Event>, from: Position) -> Emulator {
    let replayer = Replayer::new(Box::new(events.into_iter()), from, LogEnd::Complete);
    Emulator::replay(machine(), replayer, positions(), Sleep::On, Build::default())
}

fn replay(events: Vec<Event>, seed: u64) -> (Verdict, Emulator) {
    let mut emulator = emulator(events, Position::default());
    schedule::replay(&mut emulator, seed);
    (emulator.verdict().unwrap(), emulator)
}

#[test]
fn every_device_does_its_work_and_the_log_has_what_came_from_outside() {
    let recorded = record(1);
    let (mut random, mut frames, mut typed) = (vec![], vec![], vec![]);
    let mut checkpoint_role = None;
    for event in &recorded.events {
        match &event.body {
            Body::Checkpoint(_) => checkpoint_role = Some(event.role),
            Body::Qemu(QemuEvent::Random { data, .. }) => {
                assert_eq!(Some(event.role), checkpoint_role);
                random.push(data.clone());
            }
            Body::Qemu(QemuEvent::Net { data, .. }) => frames.push(data.clone()),
            Body::Qemu(QemuEvent::CharRead { device: 1, data }) => typed.extend_from_slice(data),
            Body::Async(AsyncEvent::Char { .. }) => panic!("what is typed goes to the virtio console"),
            _ => {}
        }
    }
    let ram = &recorded.ram;
    let slice = |n: u64, len: usize| ram.slice(BUFFERS + n * 0x1000, len).unwrap();
    assert_eq!(random.iter().map(Vec::len).collect::<Vec<_>>(), [64, 30, 1024]);
    assert_eq!(ENTROPY.used(ram), [64, 30, 1024]);
    assert_eq!((slice(0, 64), slice(1, 10)), (&random[0][..], &random[1][..10]));
    assert_eq!((slice(2, 20), slice(3, 1024)), (&random[1][10..], &random[2][..]));

    // The fourth frame finds a buffer that is too small, the fifth is longer than any frame.
    assert_eq!(frames, incoming());
    assert_eq!(FROM_NET.used(ram), [72, 1530, 26]);
    assert_eq!(slice(8, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(slice(9, 1530)[12..], incoming()[1]);
    assert_eq!(recorded.frames, [b"a frame".to_vec(), b"frame".to_vec()]);
    assert_eq!(TO_NET.used(ram), [0, 0]);

    assert_eq!(recorded.console, b"hello virtio\n");
    assert_eq!(PRINTED.used(ram), [0, 0]);
    assert_eq!(typed, b"typed at the virtio");
    assert_eq!((slice(5, 16), slice(6, 3)), (&typed[..16], &typed[16..]));
    assert_eq!(TYPED.used(ram), [16, 3]);
}

#[test]
fn what_was_recorded_replays_under_any_interleaving() {
    let mut digests = std::collections::HashSet::new();
    for seed in 0..20 {
        let recorded = record(seed);
        digests.insert(recorded.digest);
        for replay_seed in [seed ^ 0x5555, seed.wrapping_mul(7919) + 1] {
            let (verdict, mut emulator) = replay(recorded.events.clone(), replay_seed);
            assert!(verdict.is_match(), "seed {seed} (replay {replay_seed}): {:?}", verdict.outcome);
            assert_eq!(verdict.digest, Some(recorded.digest), "seed {seed}");
            assert_eq!(verdict.role_mismatches, 0);
            assert_eq!(emulator.machine_mut().take_console(), recorded.console);
            assert_eq!(emulator.machine_mut().take_frames(), recorded.frames);
        }
    }
    assert_eq!(digests.len(), 20, "entropy differs from run to run");
}

struct Blocks(HashMap<Hash, Vec<u8>>);

impl BlockSource for Blocks {
    fn blocks(&mut self, hashes: &[Hash]) -> Result<Vec<Vec<u8>>, String> {
        hashes.iter().map(|hash| self.0.get(hash).cloned().ok_or(format!("no block {hash}"))).collect()
    }
}

#[test]
fn a_snapshot_has_the_devices() {
    let recorded = record(2);
    let asynchronous = recorded.events.iter().filter(|event| event.body.is_async());
    let mut at: Vec<u64> = asynchronous.flat_map(|event| [event.icount, event.icount + 1]).collect();
    at.retain(|icount| *icount > 0);
    at.sort_unstable();
    at.dedup();
    let mut whole = emulator(recorded.events.clone(), Position::default());
    whole.capture_at(at);
    schedule::replay(&mut whole, 3);
    let snapshots = whole.take_snapshots();
    assert!(snapshots.len() > 3, "{} snapshots", snapshots.len());
    let mut blocks = Blocks(snapshots.iter().flat_map(|snapshot| snapshot.blocks.clone()).collect());
    for snapshot in &snapshots {
        let from = snapshot.position;
        let mut emulator = emulator(recorded.events[from.event as usize..].to_vec(), from);
        assert_eq!(emulator.restore(snapshot.root, &mut blocks).unwrap(), from);
        assert_eq!(emulator.digest(), snapshot.digest);
        schedule::replay(&mut emulator, 4);
        let verdict = emulator.verdict().unwrap();
        assert!(verdict.is_match(), "from {from}: {:?}", verdict.outcome);
        assert_eq!(verdict.digest, Some(recorded.digest), "from {from}");
    }
    // Devices that the machine does not have are not passed over.
    let mut bare = Machine::new(machine().ram().clone(), Hart::new(RAM_BASE), 3, vec![]);
    bare.plug(Device::Rng);
    let replayer =
        Replayer::new(Box::new(Vec::<Event>::new().into_iter()), Position::default(), LogEnd::Complete);
    let mut bare = Emulator::replay(bare, replayer, positions(), Sleep::On, Build::default());
    let error = bare.restore(snapshots[0].root, &mut blocks).unwrap_err();
    assert!(error.contains("leaf"), "{error}");
}

#[test]
fn a_changed_log_is_named() {
    let recorded = record(3);
    let find = |what: fn(&Body) -> bool| recorded.events.iter().position(|event| what(&event.body)).unwrap();
    let random = find(|body| matches!(body, Body::Qemu(QemuEvent::Random { .. })));
    let net = find(|body| matches!(body, Body::Qemu(QemuEvent::Net { .. })));
    let behind =
        |at: usize, what: fn(&Event) -> bool| at + recorded.events[at..].iter().position(what).unwrap();
    // Registers and the number of events show in a check, what lies in RAM in a digest.
    let next_digest = behind(random, |event| matches!(event.body, Body::Digest { .. }));
    let next_mark = behind(net, |event| event.body.is_mark());
    let check = |change: &dyn Fn(&mut Vec<Event>), kind: DivergenceKind, at: usize| {
        let mut events = recorded.events.clone();
        change(&mut events);
        let (verdict, _) = replay(events, 5);
        let divergence = verdict.divergence().unwrap_or_else(|| panic!("a match, not {kind}"));
        assert_eq!((divergence.kind, divergence.position.event as usize), (kind, at), "{divergence}");
    };
    let change_random = |events: &mut Vec<Event>, change: fn(&mut Vec<u8>)| {
        if let Body::Qemu(QemuEvent::Random { data, .. }) = &mut events[random].body {
            change(data);
        }
    };
    check(&|events| change_random(events, |data| data[0] ^= 1), DivergenceKind::State, next_digest);
    check(
        &|events| change_random(events, |data| data.truncate(data.len() - 1)),
        DivergenceKind::WrongPayload,
        random,
    );
    let flip = |events: &mut Vec<Event>| events[random].role = events[random].role.other();
    check(&flip, DivergenceKind::WrongRole, random);
    // The next request asks for less.
    check(&|events| drop(events.remove(random)), DivergenceKind::WrongPayload, random);
    let clock = Body::Clock { clock: ClockKind::Host, value: 0 };
    check(&|events| events[random].body = clock.clone(), DivergenceKind::WrongKind, random);
    check(&|events| drop(events.remove(net)), DivergenceKind::State, next_mark - 1);
    // A device that is not there.
    let stranger = Body::Qemu(QemuEvent::CharRead { device: 9, data: vec![0] });
    check(&|events| events[net].body = stranger.clone(), DivergenceKind::WrongPayload, net);
}

/// Executes one instruction of a machine whose code is a store and a load.
fn execute(machine: &mut Machine, at: u64, address: u64, value: u64) -> u64 {
    machine.hart_mut().pc = RAM_BASE + at;
    machine.hart_mut().x[1] = address;
    machine.hart_mut().x[2] = value;
    let until = machine.icount() + 1;
    while machine.run(until, &mut Nobody) == Exit::Work {}
    machine.hart().x[3]
}

fn poke(machine: &mut Machine, (address, value): (u64, u64)) {
    execute(machine, 0, address, value);
}

fn peek(machine: &mut Machine, address: u64) -> u64 {
    execute(machine, 4, address, 0)
}

fn poked(ram: Option<Ram>) -> Machine {
    let mut ram = ram.unwrap_or_else(|| Ram::new(RAM_BYTES));
    let code = [sw(2, 1), i(0, 1, 2, 3, 0x03)].map(u32::to_le_bytes).concat();
    ram.write(0, &code).unwrap();
    let mut machine = Machine::new(ram, Hart::new(RAM_BASE), 0, vec![]);
    [Device::Net, Device::Rng, Device::Console].into_iter().for_each(|device| machine.plug(device));
    machine
}

/// All bottom halves, and what they ask for.
fn run_bottom_halves(machine: &mut Machine) {
    for id in 0..machine.next_async() {
        machine.run_async(&AsyncEvent::BottomHalf { id });
        while let Some(bytes) = machine.entropy_wanted() {
            machine.give_entropy(&vec![7; bytes]);
        }
    }
}

#[test]
fn slots_features_and_the_reset_that_a_broken_driver_needs() {
    let mut m = poked(None);
    for (device, id, features) in [(NET, 1, 1 << 5), (RNG, 4, 0), (CONSOLE, 3, 0), (0x1000_1000, 0, 0)] {
        assert_eq!(peek(&mut m, device), 0x7472_6976);
        assert_eq!(peek(&mut m, device + 8), id);
        assert_eq!(peek(&mut m, device + 0x10), features);
    }
    assert_eq!((peek(&mut m, NET + 0x100), peek(&mut m, NET + 0x104)), (0x1200_5452, 0x5634));
    // A choice that was not offered is refused; so is one without VERSION_1.
    for (low, high, status) in [(0, 1, 11), (1 << 5, 1, 3), (0, 0, 3)] {
        for write in [(0x70, 0), (0x70, 3), (0x24, 0), (0x20, low), (0x24, 1), (0x20, high), (0x70, 11)] {
            poke(&mut m, (RNG + write.0, write.1));
        }
        assert_eq!(peek(&mut m, RNG + 0x70), status);
    }
    // More chains than the queue has entries.
    let mut ram = Ram::new(RAM_BYTES);
    ENTROPY.offer(&mut ram, &[&[(BUFFERS, 8, true)]]);
    ram.write(ENTROPY.at() + 0x102, &9u16.to_le_bytes()).unwrap();
    let mut m = poked(Some(ram));
    bring_up(RNG, &[ENTROPY]).into_iter().for_each(|write| poke(&mut m, write));
    run_bottom_halves(&mut m);
    assert!(ENTROPY.used(m.ram()).is_empty());
    assert_eq!((peek(&mut m, RNG + 0x70), peek(&mut m, RNG + 0x60)), (15 | 64, 2));
    // Only a reset takes that back.
    poke(&mut m, (RNG + 0x70, 15));
    assert_eq!(peek(&mut m, RNG + 0x70), 15 | 64);
    poke(&mut m, (RNG + 0x70, 0));
    assert_eq!((peek(&mut m, RNG + 0x70), peek(&mut m, RNG + 0x60)), (0, 0));
}

/// Drivers that mean harm: random rings, descriptors, registers and notifications.
#[test]
fn hostile_queues_never_panic() {
    for seed in 0..600 {
        let mut rng = Seeded::new(seed);
        let near = |rng: &mut Seeded| match rng.below(6) {
            0 => rng.draw(),
            1 => RAM_BASE + RAM_BYTES as u64 - rng.below(32),
            _ => RAM_BASE + QUEUES + rng.below(0x2000),
        };
        let mut ram = Ram::new(RAM_BYTES);
        for at in (QUEUES..QUEUES + 0x2000).step_by(16) {
            let len = if rng.below(8) == 0 { rng.draw() & 0xffff_ffff } else { rng.below(5000) };
            let flags = rng.below(8) << 32 | rng.below(300) << 48;
            ram.write(at, &near(&mut rng).to_le_bytes()).unwrap();
            ram.write(at + 8, &(flags | len).to_le_bytes()).unwrap();
        }
        let mut m = poked(Some(ram));
        for _ in 0..3 {
            let device = [NET, RNG, CONSOLE][rng.below(3) as usize];
            for queue in 0..2 {
                let mut writes = vec![(0x30, queue), (0x38, rng.below(300)), (0x44, 1)];
                for register in [0x80, 0x90, 0xa0] {
                    let at = near(&mut rng);
                    writes.extend([(register, at & 0xffff_ffff), (register + 4, at >> 32)]);
                }
                writes.extend([(0x70, 15), (0x50, queue), (0x50, rng.below(4))]);
                writes.into_iter().for_each(|(register, value)| poke(&mut m, (device + register, value)));
            }
            run_bottom_halves(&mut m);
            for bytes in [0, 60, 1518, 9000] {
                m.receive(&QemuEvent::Net { filter: 0, flags: 0, data: vec![9; bytes] });
                m.receive(&QemuEvent::CharRead { device: 1, data: vec![9; bytes] });
            }
            run_bottom_halves(&mut m);
            if rng.below(2) == 0 {
                poke(&mut m, (device + 0x70, 0));
            }
        }
    }
}
