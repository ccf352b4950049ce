//! The simulated world: replicas, a network, time, and what goes wrong, all from one seed.

use super::checks::Checks;
use super::client::{Promised, SimClient};
use super::replica::SimReplica;
use super::rot::Rot;
use heddle_storage::apply::Planted;
use heddle_storage::core::{Envelope, Input, Output};
use heddle_storage::error::Error;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher};

/// Units of time between two ticks.
const TICK: u64 = 50;
/// Units of trouble, and of peace after it.
const TROUBLE: u64 = 24_000;
const PEACE: u64 = 14_000;
/// Clients at a time.
const CLIENTS: usize = 4;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Hash of all that happened, in order.
    pub trace: u64,
    /// What was found to be wrong, if anything was.
    pub violation: Option<String>,
    /// Operations that were answered.
    pub answered: u64,
    /// Crashes, checkpoints that recycled, snapshots that were fetched: what the run has seen.
    pub seen: BTreeMap<&'static str, u64>,
}

enum Event {
    Deliver(usize, u64, u64, Envelope),
    Tick(usize, u64),
    Write(usize, u64),
    Keep(usize, u64),
    Restart(usize),
    Client(usize),
    Trouble,
    Rot,
}

/// The world.
pub struct World {
    /// Replicas, by id - 1.
    pub replicas: Vec<SimReplica>,
    /// Groups of each.
    pub groups: u32,
    /// Time.
    pub now: u64,
    /// What clients were promised.
    pub promised: Promised,
    pub(super) seen: BTreeMap<&'static str, u64>,
    planted: Planted,
    violation: Option<String>,
    events: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    clock: u64,
    trace: DefaultHasher,
    /// Links that are cut, from and to.
    pub(super) cut: Vec<(usize, usize)>,
    loss: f64,
    pub(super) is_peace: bool,
    checks: Checks,
    /// Replicas that are gone for good.
    pub(super) removed: Vec<u64>,
    pub(super) rot: Option<Rot>,
}

/// Runs a world of this seed to its end.
pub fn run(seed: u64, planted: Planted) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut world = World::new(seed, &mut rng, planted);
    let going = std::panic::AssertUnwindSafe(|| world.go(&mut rng));
    if let Err(panic) = std::panic::catch_unwind(going) {
        let what = panic.downcast_ref::<String>().cloned();
        let what = what.or_else(|| panic.downcast_ref::<&str>().map(|what| what.to_string()));
        world.violation(format!("panicked: {}", what.unwrap_or_default()));
    }
    let answered = world.promised.answered;
    let World { trace, violation, seen, .. } = world;
    Outcome { trace: trace.finish(), violation, answered, seen }
}

impl World {
    fn new(seed: u64, rng: &mut ChaCha8Rng, planted: Planted) -> World {
        let voters = vec![1, 2, 3];
        let replicas = (1..=3).map(|id| SimReplica::new(id, voters.clone())).collect();
        let mut world = World {
            replicas,
            groups: rng.gen_range(2..5),
            now: 0,
            promised: Promised::default(),
            seen: BTreeMap::new(),
            planted,
            violation: None,
            events: BTreeMap::new(),
            next_event: 0,
            clock: 0,
            trace: DefaultHasher::new(),
            cut: vec![],
            loss: [0.0, 0.01, 0.1][rng.gen_range(0..3)],
            is_peace: false,
            checks: Checks::default(),
            removed: vec![],
            rot: Rot::of(seed),
        };
        for index in 0..3 {
            world.start(index, rng);
        }
        for slot in 0..CLIENTS {
            world.at(slot as u64 * 7, Event::Client(slot));
        }
        world.at(500, Event::Trouble);
        if world.rot.is_some() {
            world.at(600, Event::Rot);
        }
        world
    }

    /// A time that no other call gets: later calls have a later one.
    pub fn tell_time(&mut self) -> u64 {
        self.clock = (self.clock + 1).max(self.now << 12);
        self.clock
    }

    /// Notes what must never be.
    pub fn violation(&mut self, what: String) {
        let now = self.now;
        self.violation.get_or_insert_with(|| format!("at {now}: {what}"));
    }

    pub(super) fn see(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.next_event += 1;
        self.events.insert((self.now + delay, self.next_event), event);
    }

    pub(super) fn start(&mut self, index: usize, rng: &mut ChaCha8Rng) {
        let (groups, planted) = (self.groups, self.planted);
        match self.replicas[index].start(rng, groups, planted) {
            Ok(()) => {
                let life = self.replicas[index].life;
                self.at(rng.gen_range(1..TICK), Event::Tick(index, life));
                self.after(index, rng);
            }
            Err(Error::Io { .. } | Error::Full { .. }) => {
                // Its disk fails it again, or has no room to begin; somebody mends that.
                self.replicas[index].cut(rng);
                self.replicas[index].disk.set_free(u64::MAX);
                self.at(100, Event::Restart(index));
            }
            Err(error) => self.stopped(index, error),
        }
    }

    /// A replica has stopped for good, which rot alone may do.
    fn stopped(&mut self, index: usize, error: Error) {
        if self.is_struck(index) && matches!(error, Error::Corrupt { .. } | Error::Version { .. }) {
            self.lose(index);
        } else {
            self.violation(format!("replica {} has stopped: {error}", index + 1));
        }
    }

    fn crash(&mut self, index: usize, rng: &mut ChaCha8Rng) {
        if self.replicas[index].running.is_some() {
            self.see("crashes");
            self.replicas[index].cut(rng);
            let delay = [20, 200, 2000][rng.gen_range(0..3)];
            self.at(delay, Event::Restart(index));
        }
    }

    /// Gives a replica an input; what it wants done comes in the next round.
    pub fn input(&mut self, index: usize, input: Input) {
        if let Some(running) = &mut self.replicas[index].running
            && let Err(error) = running.core.take(input)
        {
            self.stopped(index, error);
        }
    }

    /// Hands on what a replica wants done.
    pub(super) fn after(&mut self, index: usize, rng: &mut ChaCha8Rng) {
        let outputs = match self.replicas[index].work() {
            Ok(outputs) => outputs,
            Err(error) => return self.stopped(index, error),
        };
        for output in outputs {
            match output {
                Output::Send(to, envelope) => self.send(index, to, envelope, rng),
                Output::Serve(serve) => {
                    let Some(running) = &self.replicas[index].running else { continue };
                    let segments = running.writer.journal.segments();
                    let is_struck = self.is_struck(index);
                    // The others have nothing to mend.
                    let part = |key: &[u8], at| {
                        if is_struck { self.read(index, key, at) } else { segments.read(at) }
                    };
                    match serve.read(part) {
                        Ok(page) => self.send(index, serve.to, Envelope::Page(page), rng),
                        // No peer that has the bytes was reached; it is asked for again.
                        Err(Error::Corrupt { .. } | Error::Stopped) if is_struck => {
                            self.see("pages that rot has kept back");
                        }
                        Err(error) => self.violation(format!("a page can't be read: {error}")),
                    }
                }
                Output::Write(..) | Output::Keep(_) => {}
            }
        }
        let life = self.replicas[index].life;
        let is_full = self.replicas[index].disk.is_full();
        let Some(running) = &mut self.replicas[index].running else { return };
        let writes = !running.writer.is_idle() && !running.is_write_due;
        let keeps = !running.jobs.is_empty() && !running.is_keep_due;
        running.is_write_due |= writes;
        running.is_keep_due |= keeps;
        if writes {
            // A slow disk, now and then; a full one is tried again later.
            let slow = if is_full {
                80
            } else if rng.gen_bool(0.02) {
                400
            } else {
                12
            };
            self.at(rng.gen_range(1..slow), Event::Write(index, life));
        }
        if keeps {
            self.at(rng.gen_range(1..60), Event::Keep(index, life));
        }
        let mut checks = std::mem::take(&mut self.checks);
        checks.look(self, index);
        self.checks = checks;
    }

    fn send(&mut self, from: usize, to: u64, envelope: Envelope, rng: &mut ChaCha8Rng) {
        if let Envelope::Raft { group, message } = &envelope
            && let Some(what) = self.checks.hear(from as u64 + 1, *group, message)
        {
            self.violation(what);
        }
        let to = to as usize - 1;
        let is_cut = self.cut.contains(&(from, to));
        if to >= self.replicas.len() || (!self.is_peace && (is_cut || rng.gen_bool(self.loss))) {
            return;
        }
        let late = if !self.is_peace && rng.gen_bool(0.03) { 600 } else { 15 };
        let life = self.replicas[to].life;
        if !self.is_peace && rng.gen_bool(0.02) {
            let again = Event::Deliver(to, life, from as u64 + 1, envelope.clone());
            self.at(rng.gen_range(1..900), again);
        }
        self.at(rng.gen_range(1..late), Event::Deliver(to, life, from as u64 + 1, envelope));
    }

    fn go(&mut self, rng: &mut ChaCha8Rng) {
        let mut clients: Vec<SimClient> = (0..CLIENTS).map(|_| SimClient::new(rng)).collect();
        while self.now < TROUBLE + PEACE && self.violation.is_none() {
            let Some(((time, number), event)) = self.events.pop_first() else { break };
            self.now = time;
            (time, number).hash(&mut self.trace);
            if time >= TROUBLE && !self.is_peace {
                self.make_peace(rng);
            }
            match event {
                Event::Deliver(to, life, from, envelope) => {
                    if self.replicas[to].life == life && !self.removed.contains(&from) {
                        if let Envelope::Raft { message, group } = &envelope {
                            (to, *group, message.index, message.term).hash(&mut self.trace);
                        }
                        self.input(to, Input::Message(from, envelope));
                        self.after(to, rng);
                    }
                }
                Event::Tick(index, life) => self.tick(index, life, rng),
                Event::Write(index, life) => {
                    let done = self.replicas[index].write_if(life);
                    self.done(index, done, rng);
                }
                Event::Keep(index, life) => {
                    let done = self.replicas[index].keep_if(life);
                    self.done(index, done, rng);
                }
                Event::Restart(index) => {
                    if self.replicas[index].running.is_none() && !self.removed.contains(&(index as u64 + 1)) {
                        self.start(index, rng);
                    }
                }
                Event::Client(slot) => {
                    let mut client = std::mem::replace(&mut clients[slot], SimClient::new(rng));
                    if !client.is_done() {
                        client.act(self, rng);
                    }
                    // At the end nobody begins anew.
                    let late = self.now > TROUBLE + PEACE / 2;
                    if !client.is_done() {
                        clients[slot] = client;
                    } else if late {
                        continue;
                    } else if rng.gen_bool(0.3) {
                        clients[slot] = client.rival(rng);
                    }
                    if !late || clients[slot].must_go_on() {
                        self.at(rng.gen_range(5..40), Event::Client(slot));
                    }
                    for index in 0..self.replicas.len() {
                        self.after(index, rng);
                    }
                }
                Event::Trouble => self.trouble(&clients, rng),
                Event::Rot => {
                    let delay = self.rot(rng);
                    self.at(delay, Event::Rot);
                }
            }
        }
        if self.violation.is_none() {
            self.scrub();
            let mut checks = std::mem::take(&mut self.checks);
            checks.finish(self);
        }
        self.promised.answered.hash(&mut self.trace);
    }

    fn done(&mut self, index: usize, done: Result<bool, Error>, rng: &mut ChaCha8Rng) {
        match done {
            Ok(_) => self.after(index, rng),
            // Its own disk has failed it: it stops, and loses what was not synced.
            Err(Error::Io { .. } | Error::Stopped) => {
                self.see("failed disks");
                self.crash(index, rng);
            }
            Err(error) => self.stopped(index, error),
        }
    }

    fn tick(&mut self, index: usize, life: u64, rng: &mut ChaCha8Rng) {
        if self.replicas[index].life != life || self.replicas[index].running.is_none() {
            return;
        }
        self.input(index, Input::Tick);
        let addresses = (1..=3).map(|id| (id, format!("http://replica-{id}"))).collect();
        let proposed = self.replicas[index].running.as_mut().map(|r| r.core.propose_members(&addresses));
        if let Some(Err(error)) = proposed {
            self.violation(error.to_string());
        }
        if rng.gen_bool(0.02) {
            // An idle writer marks its last batch.
            let _ = self.replicas[index].write();
        }
        self.after(index, rng);
        // A clock that stands still for a while, or runs fast.
        let next = match rng.gen_range(0..200) {
            0 if !self.is_peace => 20 * TICK,
            1 if !self.is_peace => 1,
            _ => TICK,
        };
        self.at(next, Event::Tick(index, life));
    }

    fn make_peace(&mut self, rng: &mut ChaCha8Rng) {
        self.is_peace = true;
        self.cut.clear();
        for index in 0..self.replicas.len() {
            self.replicas[index].disk.set_free(u64::MAX);
            // One that failed while its replica had nothing to write has been noticed by nobody.
            self.replicas[index].disk.recover();
            if self.replicas[index].running.is_none() {
                self.at(rng.gen_range(1..50), Event::Restart(index));
            }
        }
    }

    fn trouble(&mut self, clients: &[SimClient], rng: &mut ChaCha8Rng) {
        if self.is_peace {
            return;
        }
        let index = rng.gen_range(0..self.replicas.len());
        match rng.gen_range(0..14) {
            0..=2 => self.crash(index, rng),
            3 => {
                for index in 0..self.replicas.len() {
                    self.crash(index, rng);
                }
            }
            4 | 5 => {
                self.see("partitions");
                let n = self.replicas.len();
                for other in (0..n).filter(|other| *other != index) {
                    self.cut.push((index, other));
                    if rng.gen_bool(0.7) {
                        self.cut.push((other, index));
                    }
                }
            }
            6..=8 => self.cut.clear(),
            9 => {
                self.see("full disks");
                self.replicas[index].disk.set_free(0);
            }
            10 | 11 => self.replicas.iter().for_each(|replica| replica.disk.set_free(u64::MAX)),
            12 => self.replicas[index].disk.fail(),
            _ => self.change_members(rng),
        }
        // A leader in the middle of something is worth most.
        if rng.gen_bool(0.3) && !clients.is_empty() {
            let leads = |r: &SimReplica| r.running.as_ref().is_some_and(|r| r.core.groups()[1].leads());
            if let Some(leader) = self.replicas.iter().position(leads) {
                self.crash(leader, rng);
            }
        }
        self.at(rng.gen_range(50..900), Event::Trouble);
    }
}
