//! Both roles in one thread, interleaved by a seed: the shipped logic, any order.

use crate::emulator::{Emulator, Step, World};
use crate::queue::AsyncQueue;
use crate::role;
use crate::timer::TimerClock;
use heddle_proto::{AsyncEvent, ClockKind, Event, Role};

/// A small deterministic generator (SplitMix64), so that schedules need no crate.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// A generator that always gives the same for the same seed.
    pub fn new(seed: u64) -> Seeded {
        Seeded(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound.max(1)
    }
}

/// A world whose clocks move when the schedule says so.
pub struct ScheduledWorld {
    host: i64,
    virtual_rt: i64,
    rng: Seeded,
}

impl World for ScheduledWorld {
    fn now(&mut self, clock: ClockKind) -> i64 {
        // Time passes between any two reads.
        self.advance_below(2000);
        match clock {
            ClockKind::Host => self.host,
            ClockKind::VirtualRt => self.virtual_rt,
        }
    }
    fn entropy(&mut self, out: &mut [u8]) {
        out.iter_mut().for_each(|byte| *byte = self.rng.draw() as u8);
    }
    fn must_exit(&mut self) -> bool {
        self.rng.below(3) == 0
    }
}

impl ScheduledWorld {
    fn advance_below(&mut self, ns: u64) {
        let step = self.rng.below(ns) as i64;
        self.host += step;
        self.virtual_rt += step;
    }
}

/// Records `emulator` under the interleaving of `seed`; `input` is typed piece by
/// piece. At most `turns` turns; the events.
pub fn record(
    emulator: &mut Emulator,
    queue: &AsyncQueue,
    seed: u64,
    mut input: Vec<Vec<u8>>,
    turns: u64,
) -> Vec<Event> {
    let mut rng = Seeded::new(seed);
    let mut world =
        ScheduledWorld { host: 1_700_000_000_000_000_000, virtual_rt: 0, rng: Seeded::new(!seed) };
    let mut submitted: Vec<u64> = vec![];
    let mut events = vec![];
    input.reverse();
    for _ in 0..turns {
        if emulator.has_ended() {
            break;
        }
        let (role, step) = if rng.below(3) < 2 {
            let scale = rng.below(18);
            let run = 1 + rng.below(1 << scale);
            (Role::Vcpu, role::enter(Role::Vcpu, || emulator.record_vcpu(&mut world, run)))
        } else {
            (Role::Iothread, role::enter(Role::Iothread, || emulator.record_iothread(&mut world)))
        };
        events.append(&mut emulator.take_events());
        submitted.append(&mut emulator.machine_mut().take_submitted());
        if !submitted.is_empty() && rng.below(4) == 0 {
            let id = submitted.swap_remove(rng.below(submitted.len() as u64) as usize);
            queue.push(AsyncEvent::Block { id });
        }
        if !input.is_empty() && rng.below(40) == 0 {
            queue.push(AsyncEvent::Char { data: input.pop().unwrap_or_default() });
        }
        let pass = 8 + rng.below(10);
        world.advance_below(1 << pass);
        if step == Step::Wait && role == Role::Iothread && emulator.is_idle() {
            // Nothing but time can help: go to the deadline, or well past it.
            if let Some(deadline) = emulator.deadline(TimerClock::VirtualRt) {
                world.virtual_rt = world.virtual_rt.max(deadline);
                let late = rng.below(22);
                world.advance_below(1 << late);
            }
        }
    }
    events
}

/// Replays `emulator` to its end under the interleaving of `seed`.
pub fn replay(emulator: &mut Emulator, seed: u64) {
    let mut rng = Seeded::new(seed);
    let mut waits = 0;
    while !emulator.has_ended() {
        let step = if rng.below(2) == 0 {
            let scale = rng.below(18);
            let run = 1 + rng.below(1 << scale);
            role::enter(Role::Vcpu, || emulator.replay_vcpu(run))
        } else {
            role::enter(Role::Iothread, || emulator.replay_iothread())
        };
        // Under a fair schedule both roles have had many turns by then.
        waits = if step == Step::Wait { waits + 1 } else { 0 };
        if waits > 1000 {
            emulator.stall("neither role makes progress");
        }
    }
}

/// Replays up to icount `until` in one thread, roles taking turns; `false` once the
/// replay has ended. Gives the same state as any schedule.
pub fn advance(emulator: &mut Emulator, until: u64) -> bool {
    while !emulator.has_ended() && emulator.machine().icount() < until {
        let run = until - emulator.machine().icount();
        let step = role::enter(Role::Vcpu, || emulator.replay_vcpu(run));
        if step == Step::Wait {
            role::enter(Role::Iothread, || emulator.replay_iothread());
        }
    }
    !emulator.has_ended()
}
