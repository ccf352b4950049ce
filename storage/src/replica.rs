//! A replica of one Raft group: a thread that takes inputs, and persists, sends and applies.
//!
//! One loop, in this order: messages of a leader go out before its own write, as
//! Raft allows; then one journal write and one fsync for all that has come
//! meanwhile (the group commit); then what may only be said when durable; then apply.

use crate::apply::{self, Outcome};
use crate::catalog::{Catalog, Changes};
use crate::command::Command;
use crate::error::Error;
use crate::journal::Journal;
use crate::raft_log::{RaftLog, entry_frame, hard_state_frame};
use crate::transport::Outbound;
use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{Config, RawNode, StateRole};
use std::collections::{BTreeMap, HashMap};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// One group for now; frames and messages carry the number, so that more can come.
pub const GROUP: u64 = 1;
/// Raft's clock: elections after 10 to 20 ticks, heartbeats every 2.
const TICK: Duration = Duration::from_millis(50);
/// Inputs taken before the group commit; bounds its size together with the byte budget.
const INPUTS_MAX: usize = 512;
/// Entries applied between two syncs of the catalog.
const CATALOG_SYNC_EVERY: u64 = 4096;

/// Why a proposal has no outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotDone {
    /// Ask this replica, zero if none is known.
    NotLeader(u64),
    /// Leadership changed meanwhile; the outcome is unknown, and a retry is safe.
    Retry,
    /// The replica has stopped.
    Stopped,
}

/// The answer to a proposal.
pub type Answer = Result<Outcome, NotDone>;

/// What a replica takes in.
pub enum Input {
    /// A command, encoded.
    Propose(Bytes, oneshot::Sender<Answer>),
    /// A message from a peer.
    Message(Box<Message>),
    /// Answered once this replica has applied all that was committed when asked.
    ReadIndex(oneshot::Sender<Result<(), NotDone>>),
    /// A peer can't be reached.
    Unreachable(u64),
    /// How it stands.
    Status(oneshot::Sender<Status>),
    /// Stop.
    Stop,
}

/// How a replica stands.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Status {
    pub id: u64,
    pub role: &'static str,
    pub leader: u64,
    pub term: u64,
    pub committed: u64,
    pub applied: u64,
    pub journal_bytes: u64,
}

/// Sends inputs to a replica from anywhere.
#[derive(Clone)]
pub struct Handle(Sender<Input>);

impl Handle {
    /// The sending end for a replica that reads `Receiver`.
    pub fn new(sender: Sender<Input>) -> Handle {
        Handle(sender)
    }

    /// Hands an input over.
    pub fn send(&self, input: Input) {
        // A stopped replica drops the answer's sender, which its caller sees.
        let _ = self.0.send(input);
    }

    /// Proposes a command.
    pub async fn propose(&self, data: Bytes) -> Answer {
        let (sender, answer) = oneshot::channel();
        self.send(Input::Propose(data, sender));
        answer.await.unwrap_or(Err(NotDone::Stopped))
    }

    /// Waits until all that was committed when asked is applied here.
    pub async fn read_index(&self) -> Result<(), NotDone> {
        let (sender, answer) = oneshot::channel();
        self.send(Input::ReadIndex(sender));
        answer.await.unwrap_or(Err(NotDone::Stopped))
    }

    /// How the replica stands.
    pub async fn status(&self) -> Option<Status> {
        let (sender, answer) = oneshot::channel();
        self.send(Input::Status(sender));
        answer.await.ok()
    }
}

/// The loop's state.
pub struct ReplicaLoop {
    id: u64,
    node: RawNode<RaftLog>,
    journal: Journal,
    catalog: Catalog,
    outbound: Outbound,
    /// Proposals by index, with their term.
    waiting: BTreeMap<u64, (u64, oneshot::Sender<Answer>)>,
    /// Reads by request context, then by the index to apply first.
    reads: HashMap<Vec<u8>, (Instant, oneshot::Sender<Result<(), NotDone>>)>,
    ready_reads: Vec<(u64, oneshot::Sender<Result<(), NotDone>>)>,
    next_read: u64,
    applied: u64,
    synced_at: u64,
}

impl ReplicaLoop {
    /// A replica over an opened journal and catalog.
    pub fn new(
        id: u64,
        log: RaftLog,
        journal: Journal,
        catalog: Catalog,
        outbound: Outbound,
    ) -> Result<ReplicaLoop, Error> {
        let applied = catalog.applied()?;
        let config = Config {
            id,
            election_tick: 10,
            heartbeat_tick: 2,
            applied,
            pre_vote: true,
            check_quorum: true,
            // It would merge a lagging follower's whole window into one message.
            batch_append: false,
            max_size_per_msg: 1 << 20,
            max_inflight_msgs: 64,
            max_uncommitted_size: 128 << 20,
            max_committed_size_per_ready: 16 << 20,
            ..Config::default()
        };
        let mut log = log;
        log.raise_commit(applied);
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let node = RawNode::new(&config, log, &logger)?;
        Ok(ReplicaLoop {
            id,
            node,
            journal,
            catalog,
            outbound,
            waiting: BTreeMap::new(),
            reads: HashMap::new(),
            ready_reads: vec![],
            next_read: 0,
            applied,
            synced_at: applied,
        })
    }

    /// Runs until told to stop, or until this replica's own disk fails it.
    pub fn run(mut self, inputs: Receiver<Input>) -> Result<(), Error> {
        if self.node.raft.prs().conf().voters().ids().iter().count() == 1 {
            self.node.campaign()?;
        }
        let mut next_tick = Instant::now() + TICK;
        loop {
            let wait = next_tick.saturating_duration_since(Instant::now());
            match inputs.recv_timeout(wait) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return self.catalog.sync(),
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => {}
            }
            for input in inputs.try_iter().take(INPUTS_MAX) {
                if matches!(input, Input::Stop) {
                    return self.catalog.sync();
                }
                self.take(input);
            }
            if Instant::now() >= next_tick {
                self.node.tick();
                self.expire_reads();
                // Ticks that a stall has missed are skipped, or they would start elections.
                next_tick = Instant::now() + TICK;
            }
            self.handle_ready()?;
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Propose(data, sender) => self.propose(data, sender),
            Input::Message(message) => {
                let last = self.node.raft.raft_log.last_index();
                if message.get_msg_type() == MessageType::MsgHeartbeat && message.commit > last {
                    tracing::error!(
                        last,
                        commit = message.commit,
                        "a heartbeat commits what this replica never had"
                    );
                    return;
                }
                if let Err(error) = self.node.step(*message) {
                    tracing::debug!(%error, "a message was not taken");
                }
            }
            Input::ReadIndex(sender) => {
                self.next_read += 1;
                let context = [self.id.to_le_bytes(), self.next_read.to_le_bytes()].concat();
                self.reads.insert(context.clone(), (Instant::now(), sender));
                self.node.read_index(context);
            }
            Input::Unreachable(peer) => self.node.report_unreachable(peer),
            Input::Status(sender) => {
                let _ = sender.send(self.status());
            }
            Input::Stop => {}
        }
    }

    fn status(&self) -> Status {
        let raft = &self.node.raft;
        Status {
            id: self.id,
            role: match raft.state {
                StateRole::Leader => "leader",
                StateRole::Follower => "follower",
                StateRole::Candidate | StateRole::PreCandidate => "candidate",
            },
            leader: raft.leader_id,
            term: raft.term,
            committed: raft.raft_log.committed,
            applied: self.applied,
            journal_bytes: self.journal.total_bytes(),
        }
    }

    fn propose(&mut self, data: Bytes, sender: oneshot::Sender<Answer>) {
        let raft = &mut self.node.raft;
        if raft.state != StateRole::Leader {
            let _ = sender.send(Err(NotDone::NotLeader(raft.leader_id)));
            return;
        }
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.id;
        message.mut_entries().push(Entry { data, ..Entry::default() });
        match self.node.step(message) {
            Ok(()) => {
                let log = &self.node.raft.raft_log;
                self.waiting.insert(log.last_index(), (self.node.raft.term, sender));
            }
            Err(_) => {
                let _ = sender.send(Err(NotDone::Retry));
            }
        }
    }

    /// A read whose answer was lost, with a leader that is gone, is asked again by its caller.
    fn expire_reads(&mut self) {
        let old = Duration::from_millis(500);
        let expired: Vec<Vec<u8>> = self
            .reads
            .iter()
            .filter(|(_, (asked, _))| asked.elapsed() > old)
            .map(|(c, _)| c.clone())
            .collect();
        for context in expired {
            if let Some((_, sender)) = self.reads.remove(&context) {
                let _ = sender.send(Err(NotDone::Retry));
            }
        }
    }

    fn handle_ready(&mut self) -> Result<(), Error> {
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            self.outbound.send(ready.take_messages());
            self.take_reads(ready.take_read_states());
            let committed = ready.take_committed_entries();
            self.apply(committed)?;
            let entries = ready.take_entries();
            let mut frames: Vec<_> = entries.iter().map(|entry| entry_frame(GROUP, entry)).collect();
            if let Some(hard_state) = ready.hs() {
                self.node.mut_store().set_hard_state(hard_state.clone());
                // A hard state that only moves commit needs no sync of its own.
                if ready.must_sync() {
                    frames.push(hard_state_frame(GROUP, hard_state));
                }
            }
            if !frames.is_empty() {
                let places = self.journal.append(&frames)?;
                self.node.mut_store().append(entries, &places);
            }
            self.outbound.send(ready.take_persisted_messages());
            let mut light = self.node.advance(ready);
            self.outbound.send(light.take_messages());
            self.apply(light.take_committed_entries())?;
            self.node.advance_apply();
        }
        if self.node.raft.state != StateRole::Leader && !self.waiting.is_empty() {
            for (_, (_, sender)) in std::mem::take(&mut self.waiting) {
                let _ = sender.send(Err(NotDone::Retry));
            }
        }
        Ok(())
    }

    fn take_reads(&mut self, states: Vec<raft::ReadState>) {
        for state in states {
            if let Some((_, sender)) = self.reads.remove(&state.request_ctx) {
                self.ready_reads.push((state.index, sender));
            }
        }
        self.answer_reads();
    }

    fn answer_reads(&mut self) {
        let applied = self.applied;
        let (ready, later) =
            std::mem::take(&mut self.ready_reads).into_iter().partition(|(index, _)| *index <= applied);
        self.ready_reads = later;
        for (_, sender) in ready {
            let _ = sender.send(Ok(()));
        }
    }

    /// Applies committed entries: one batch of rows, then the answers.
    fn apply(&mut self, entries: Vec<Entry>) -> Result<(), Error> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut changes = Changes::default();
        let mut answers = vec![];
        for entry in entries {
            let (index, term) = (entry.index, entry.term);
            if index <= self.applied {
                continue;
            }
            let outcome = self.apply_one(entry, &mut changes)?;
            self.applied = index;
            if let Some((proposed_term, sender)) = self.waiting.remove(&index) {
                let answer = if proposed_term == term { Ok(outcome) } else { Err(NotDone::Retry) };
                answers.push((sender, answer));
            }
        }
        self.catalog.write(changes, self.applied)?;
        if self.applied >= self.synced_at + CATALOG_SYNC_EVERY {
            self.catalog.sync()?;
            self.synced_at = self.applied;
        }
        for (sender, answer) in answers {
            let _ = sender.send(answer);
        }
        self.answer_reads();
        Ok(())
    }

    fn apply_one(&mut self, entry: Entry, changes: &mut Changes) -> Result<Outcome, Error> {
        if entry.get_entry_type() != EntryType::EntryNormal {
            let mut change = raft::eraftpb::ConfChangeV2::default();
            if change.merge_from_bytes(&entry.data).is_ok() {
                let conf_state = self.node.apply_conf_change(&change)?;
                self.node.mut_store().set_conf_state(conf_state);
            }
            return Ok(Outcome::Done);
        }
        if entry.data.is_empty() {
            return Ok(Outcome::Done);
        }
        let (command, bulk_from) = match Command::decode(&entry.data) {
            Ok(decoded) => decoded,
            Err(error) => {
                tracing::error!(%error, index = entry.index, "an entry does not decode");
                return Ok(Outcome::Refused(apply::Refusal::Invalid(error)));
            }
        };
        let at = self.node.store().location(entry.index);
        let at = at.ok_or(raft::Error::Store(raft::StorageError::Unavailable))?;
        let bulk = entry.data.slice(bulk_from..);
        let bulk_at = at.part(bulk_from, bulk.len());
        apply::Entry { command, bulk, bulk_at, catalog: &self.catalog, changes }.apply()
    }
}
