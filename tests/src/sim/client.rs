//! Simulated clients: writers of recordings with blocks, rivals that fence them, readers.

use super::world::World;
use crate::linear::Op;
use crate::recording_model::{Input as Asked, Output as Said, Progress, RecordingOp, Refusal as Refused};
use bytes::Bytes;
use heddle_proto::compress::compress;
use heddle_proto::{Body, Chunk, ChunkBuilder, Event, Hash, RecordingId, Role};
use heddle_storage::apply::{Outcome, Refusal};
use heddle_storage::command::{Command, Proposal};
use heddle_storage::core::Input;
use heddle_storage::group::{Answer, NotDone};
use heddle_storage::placement::{block_shard, placement};
use heddle_storage::schema::{Key, RecordingRow, RecordingState};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::oneshot;

/// Units of time after which a client gives an operation up: its outcome is unknown.
const PATIENCE: u64 = 1500;
/// Different blocks that clients store.
const BLOCKS: u32 = 12;

enum Waiting {
    Answer(oneshot::Receiver<Answer>),
    /// A read of this replica, in this life of it.
    Read(oneshot::Receiver<Result<(), NotDone>>, usize, u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Open,
    Blocks,
    Write,
    Delete,
    DropOwner(u32),
    Forget,
}

/// What a client has been told, and must find again.
#[derive(Default)]
pub struct Promised {
    /// All operations on each recording.
    pub history: BTreeMap<RecordingId, Vec<RecordingOp>>,
    /// Chunks that were acknowledged, by recording and first event.
    pub chunks: BTreeMap<(RecordingId, u64), Chunk>,
    /// Blocks that were acknowledged, by owner.
    pub blocks: BTreeMap<RecordingId, BTreeSet<u32>>,
    /// Recordings whose deletion was begun: nothing of them is promised.
    pub deleted: BTreeSet<RecordingId>,
    /// Operations that were answered.
    pub answered: u64,
}

/// A client.
pub struct SimClient {
    id: RecordingId,
    token: Vec<u8>,
    fences: bool,
    epoch: u64,
    chunks: Vec<Chunk>,
    /// Chunks that the store has acknowledged to this writer.
    next: usize,
    goal: usize,
    step: Step,
    waiting: Option<(Waiting, Asked, u64, u32)>,
    blocks: Vec<u32>,
    stored: usize,
    deletes: bool,
}

/// The bytes of a block of the simulation.
pub fn block(number: u32) -> (Hash, Bytes) {
    let bytes = Bytes::from(number.to_le_bytes().repeat(64));
    (Hash::of(&bytes), bytes)
}

fn chunks_of(id: RecordingId, count: usize, rng: &mut ChaCha8Rng) -> Vec<Chunk> {
    let mut builder = ChunkBuilder::new(id);
    let mut icount = 0;
    let mut event = |builder: &mut ChunkBuilder, rng: &mut ChaCha8Rng| {
        icount += 10;
        let body = Body::Check { value: rng.r#gen(), output: icount };
        builder.push(&Event { icount, role: Role::Vcpu, body });
    };
    let one = |_| {
        for _ in 0..rng.gen_range(1..60) {
            event(&mut builder, rng);
        }
        builder.take().expect("events were pushed")
    };
    (0..count).map(one).collect()
}

impl SimClient {
    /// A writer of a new recording.
    pub fn new(rng: &mut ChaCha8Rng) -> SimClient {
        let id = RecordingId(rng.r#gen());
        let count = rng.gen_range(3..14);
        let chunks = chunks_of(id, count, rng);
        let blocks = (0..rng.gen_range(0..5)).map(|_| rng.gen_range(0..BLOCKS)).collect();
        SimClient {
            id,
            token: vec![1],
            fences: false,
            epoch: 0,
            goal: chunks.len(),
            chunks,
            next: 0,
            step: Step::Open,
            waiting: None,
            blocks,
            stored: 0,
            deletes: rng.gen_bool(0.5),
        }
    }

    /// One who takes a recording over.
    pub fn rival(&self, rng: &mut ChaCha8Rng) -> SimClient {
        SimClient {
            id: self.id,
            token: vec![rng.gen_range(2..250)],
            fences: true,
            epoch: 0,
            chunks: self.chunks.clone(),
            next: 0,
            goal: self.chunks.len(),
            step: Step::Open,
            waiting: None,
            blocks: vec![],
            stored: 0,
            deletes: false,
        }
    }

    /// One who deletes goes on to the end, so that blocks are let go.
    pub fn must_go_on(&self) -> bool {
        matches!(self.step, Step::DropOwner(_) | Step::Forget)
    }

    /// Does what is next: looks for an answer, or asks.
    pub fn act(&mut self, world: &mut World, rng: &mut ChaCha8Rng) {
        if let Some((waiting, asked, since, shard)) = self.waiting.take() {
            self.listen(world, waiting, asked, since, shard);
            return;
        }
        let shards = world.groups - 1;
        let home = placement(self.id, shards);
        if self.epoch > 0 && rng.gen_bool(0.2) {
            self.look(world, rng, home);
            return;
        }
        let recording = self.id;
        let (shard, command, bulk, asked) = match self.step {
            Step::Open => {
                let command = Command::Open { recording, token: self.token.clone(), fence: self.fences };
                let asked = Asked::Open { token: self.token.clone(), fence: self.fences };
                (home, command, Bytes::from_static(b"{}"), asked)
            }
            Step::Blocks => match self.blocks.get(self.stored) {
                None => {
                    self.step = Step::Write;
                    return;
                }
                Some(number) => {
                    let (hash, bytes) = block(*number);
                    let shard = block_shard(hash, shards);
                    let command = if rng.gen_bool(0.5) {
                        Command::Pin { owner: recording, hashes: vec![hash] }
                    } else {
                        let bulk = compress(&bytes, 1);
                        let blocks = vec![(hash, bulk.len() as u32, bytes.len() as u32)];
                        let command = Command::PutBlocks { owner: recording, blocks };
                        self.ask(world, rng, (shard, command, bulk.into(), Asked::Get));
                        return;
                    };
                    (shard, command, Bytes::new(), Asked::Get)
                }
            },
            Step::Write if self.next < self.goal => {
                let chunk = &self.chunks[self.next];
                let asked = Asked::append(self.epoch, chunk);
                let command = Command::Append { recording, epoch: self.epoch };
                (home, command, chunk.bytes.clone(), asked)
            }
            Step::Write => {
                let events = self.chunks.last().map_or(0, |chunk| chunk.header.end_event());
                let last_chunk = self.chunks.last().map_or(Hash::ZERO, Chunk::id);
                let (epoch, cut) = (self.epoch, false);
                let command = Command::Seal { recording, epoch, events, last_chunk, cut };
                (home, command, Bytes::new(), Asked::Seal { epoch, events, last_chunk, cut })
            }
            Step::Delete => {
                world.promised.deleted.insert(recording);
                (home, Command::Delete { recording }, Bytes::new(), Asked::Delete)
            }
            Step::DropOwner(shard) => {
                // As the service does it: what is applied somewhere covers what was acknowledged.
                let running = world.replicas.iter().filter_map(|replica| replica.running.as_ref());
                let applied = running.map(|running| running.core.groups()[shard as usize].applied.0);
                let command = Command::DropOwner { owner: recording, until: applied.max().unwrap_or(0) };
                (shard, command, Bytes::new(), Asked::Get)
            }
            Step::Forget => (home, Command::Forget { recording }, Bytes::new(), Asked::Get),
        };
        self.ask(world, rng, (shard, command, bulk, asked));
    }

    /// Proposes a command to a replica that takes itself for the leader.
    fn ask(
        &mut self,
        world: &mut World,
        rng: &mut ChaCha8Rng,
        (shard, command, bulk, asked): (u32, Command, Bytes, Asked),
    ) {
        let leads = |index: &usize| {
            let running = world.replicas[*index].running.as_ref();
            running.is_some_and(|running| running.core.groups()[shard as usize].leads())
        };
        let leaders: Vec<usize> = (0..world.replicas.len()).filter(leads).collect();
        if leaders.is_empty() {
            return;
        }
        let leader = leaders[rng.gen_range(0..leaders.len())];
        let (sender, answer) = oneshot::channel();
        let since = world.tell_time();
        let input = Input::Propose(shard, Proposal { command, bulk }, sender);
        self.waiting = Some((Waiting::Answer(answer), asked, since, shard));
        world.input(leader, input);
    }

    /// Reads the recording's row at any replica, by a read index.
    fn look(&mut self, world: &mut World, rng: &mut ChaCha8Rng, home: u32) {
        let index = rng.gen_range(0..world.replicas.len());
        if world.replicas[index].running.is_none() {
            return;
        }
        let (sender, answer) = oneshot::channel();
        let since = world.tell_time();
        let life = world.replicas[index].life;
        self.waiting = Some((Waiting::Read(answer, index, life), Asked::Get, since, home));
        world.input(index, Input::ReadIndex(home, sender));
    }

    fn listen(&mut self, world: &mut World, waiting: Waiting, asked: Asked, since: u64, shard: u32) {
        let is_late = world.now > since + PATIENCE;
        match waiting {
            Waiting::Answer(mut answer) => match answer.try_recv() {
                Ok(Ok(outcome)) => self.hear(world, asked, since, outcome),
                // It was never taken in.
                Ok(Err(NotDone::NotLeader(_) | NotDone::Full)) => {}
                Ok(Err(_)) | Err(oneshot::error::TryRecvError::Closed) => self.unknown(world, asked, since),
                Err(oneshot::error::TryRecvError::Empty) if is_late => self.unknown(world, asked, since),
                Err(oneshot::error::TryRecvError::Empty) => {
                    self.waiting = Some((Waiting::Answer(answer), asked, since, shard));
                }
            },
            Waiting::Read(mut answer, index, life) => match answer.try_recv() {
                Ok(Ok(())) => {
                    let replica = &world.replicas[index];
                    let Some(running) = replica.running.as_ref().filter(|_| replica.life == life) else {
                        return;
                    };
                    let row = running.core.catalog().get::<RecordingRow>(&Key::recording(shard, self.id));
                    let row = row.ok().flatten().filter(|row| row.state != RecordingState::Deleted);
                    let found = row.map(|row| (progress(row.state), row.chain.events));
                    if let Some((_, events)) = found {
                        self.read_last(world, index, shard, events);
                    }
                    self.note(world, Asked::Get, since, Some(Said::Found(found)));
                }
                Err(oneshot::error::TryRecvError::Empty) if !is_late => {
                    self.waiting = Some((Waiting::Read(answer, index, life), asked, since, shard));
                }
                _ => {}
            },
        }
    }

    /// Reads the last whole chunk of so many events: its bytes or an error, and no others.
    fn read_last(&self, world: &mut World, index: usize, shard: u32, events: u64) {
        let known = self.chunks.iter().rev().find(|chunk| chunk.header.end_event() <= events);
        let Some(running) = &world.replicas[index].running else { return };
        let Some(chunk) = known else { return };
        let first = chunk.header.first_event;
        let page = running.core.catalog().chunks_at(shard, self.id, first);
        let row = page.ok().and_then(|(key, rows)| {
            rows.into_iter().find(|row| row.first_event == first).map(|row| (key, row.at))
        });
        let read = row.map(|(key, at)| world.read(index, &key, at));
        match read {
            Some(Ok(bytes)) if bytes == chunk.bytes => {}
            Some(Err(_)) if world.is_struck(index) => world.see("reads that rot has failed"),
            other => {
                let what = other.map(|read| read.map(|bytes| bytes.len()).map_err(|e| e.to_string()));
                let id = self.id;
                world.violation(format!(
                    "a reader of the chunk at event {first} of {id} at replica {} got {what:?}",
                    index + 1
                ));
            }
        }
    }

    fn note(&mut self, world: &mut World, input: Asked, called: u64, output: Option<Said>) {
        let returned = output.is_some().then(|| world.tell_time());
        let op = Op { input, output: output.unwrap_or(Said::Unknown), called, returned };
        world.promised.history.entry(self.id).or_default().push(op);
    }

    fn unknown(&mut self, world: &mut World, asked: Asked, since: u64) {
        if asked != Asked::Get {
            self.note(world, asked, since, None);
        }
    }

    fn hear(&mut self, world: &mut World, asked: Asked, since: u64, outcome: Outcome) {
        world.promised.answered += 1;
        let said = match &outcome {
            Outcome::Opened { epoch, events, .. } => Said::Opened { epoch: *epoch, events: *events },
            Outcome::Committed { events } => Said::Committed { events: *events },
            Outcome::Done => Said::Done,
            Outcome::Refused(refusal) => match refusal {
                Refusal::Fenced { .. } => Said::Refused(Refused::Fenced),
                Refusal::Conflict(_) => Said::Refused(Refused::Conflict),
                Refusal::Gap { events } => Said::Refused(Refused::Gap { events: *events }),
                Refusal::Sealed => Said::Refused(Refused::Sealed),
                Refusal::NotFound => Said::Refused(Refused::NotFound),
                // Nothing was done, and later it can be.
                Refusal::BeingDeleted => return,
                Refusal::Invalid(what) => {
                    world.violation(format!("a sound command was refused: {what}"));
                    return;
                }
            },
            _ => Said::Done,
        };
        if asked != Asked::Get {
            self.note(world, asked.clone(), since, Some(said));
        }
        let is_refused = matches!(outcome, Outcome::Refused(_));
        match (self.step, outcome) {
            (Step::Open, Outcome::Opened { epoch, events, .. }) => {
                self.epoch = epoch;
                self.next = self.chunks.partition_point(|chunk| chunk.header.end_event() <= events);
                self.step = Step::Blocks;
            }
            (Step::Blocks, outcome) => {
                let is_wanted = matches!(&outcome, Outcome::Wanted(wanted) if wanted.contains(&true));
                if !is_wanted {
                    let number = self.blocks[self.stored];
                    world.promised.blocks.entry(self.id).or_default().insert(number);
                    self.stored += 1;
                }
            }
            (Step::Write, Outcome::Committed { events }) if self.next < self.goal => {
                let chunk = &self.chunks[self.next];
                if events >= chunk.header.end_event() {
                    let key = (self.id, chunk.header.first_event);
                    world.promised.chunks.insert(key, chunk.clone());
                    self.next += 1;
                }
            }
            (Step::Write, Outcome::Committed { .. }) if self.deletes => self.step = Step::Delete,
            (Step::Delete, Outcome::Done) => self.step = Step::DropOwner(1),
            (Step::DropOwner(shard), Outcome::Done) => {
                let is_last = shard + 1 >= world.groups;
                self.step = if is_last { Step::Forget } else { Step::DropOwner(shard + 1) };
            }
            (Step::Write, Outcome::Committed { .. }) | (Step::Forget, _) => self.finish(),
            // Another writer has it; or it ended.
            _ if is_refused => self.finish(),
            _ => {}
        }
    }

    fn finish(&mut self) {
        self.goal = usize::MAX;
    }

    /// Whether it has nothing more to do.
    pub fn is_done(&self) -> bool {
        self.goal == usize::MAX && self.waiting.is_none()
    }
}

fn progress(state: RecordingState) -> Progress {
    match state {
        RecordingState::Recording => Progress::Recording,
        RecordingState::Sealed => Progress::Sealed,
        RecordingState::Cut | RecordingState::Deleted => Progress::Cut,
    }
}
