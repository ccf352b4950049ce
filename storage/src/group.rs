//! One Raft group of a replica: proposals, reads, and what Raft wants done.

use crate::apply::{Entry as Applying, Outcome, Planted, Refusal};
use crate::catalog::Catalog;
use crate::command::{self, ENTRY_BYTES, Proposal};
use crate::core::CoreConfig;
use crate::error::Error;
use crate::install::Fetch;
use crate::journal::{Frame, Location};
use crate::raft_log::{RaftLog, entry_frame, hard_state_frame};
use crate::schema::{GroupRow, Key};
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeV2, Entry, EntryType, Message, MessageType};
use raft::{Config, RawNode, ReadState, StateRole};
use std::collections::BTreeMap;
use tokio::sync::oneshot;

/// Elections begin after 10 to 20 ticks without a word of a leader.
pub const ELECTION_TICKS: usize = 10;
/// A read whose answer was lost is given back after so many ticks.
const READ_TICKS: u64 = 10;

/// Why a proposal has no outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotDone {
    /// Ask this replica, zero if none is known.
    NotLeader(u64),
    /// Leadership changed meanwhile; the outcome is unknown, and a retry is safe.
    Retry,
    /// The disk has no room for more.
    Full,
    /// The replica has stopped.
    Stopped,
}

/// The answer to a proposal.
pub type Answer = Result<Outcome, NotDone>;
/// Who waits for it.
pub type Reply = oneshot::Sender<Answer>;
/// Who waits for a read index.
pub type ReadReply = oneshot::Sender<Result<(), NotDone>>;

/// What must be durable before something may go on.
#[derive(Debug)]
pub enum Mark {
    /// Raft's ready of this number: its entries, and messages that may be sent then.
    Ready {
        /// The group.
        group: u32,
        /// The ready.
        number: u64,
        /// Index and term of each entry, in the order of the frames.
        entries: Vec<(u64, u64)>,
        /// What may be said once it is durable.
        after: Vec<Message>,
    },
    /// A hard state that says what is committed.
    Commit {
        /// The group.
        group: u32,
        /// The index.
        commit: u64,
    },
    /// A page of a snapshot that was fetched.
    Page {
        /// The group.
        group: u32,
        /// Which fetch of it: another may have begun meanwhile.
        serial: u64,
    },
    /// All rows of a snapshot, and that it is whole.
    Installed {
        /// The group.
        group: u32,
        /// Which fetch of it.
        serial: u64,
    },
}

/// What a round of a group came to.
#[derive(Debug, Default)]
pub struct Round {
    /// Messages that may go out at once.
    pub messages: Vec<Message>,
    /// Frames to write, and what waits for them: so many frames of the list belong to each.
    pub frames: Vec<Frame>,
    /// The marks, each with how many frames are its own.
    pub marks: Vec<(Mark, usize)>,
}

/// A group.
pub struct Group {
    /// Its number.
    pub id: u32,
    /// raft-rs.
    pub node: RawNode<RaftLog>,
    /// The last entry that rows follow, and its term.
    pub applied: (u64, u64),
    /// A snapshot that is being fetched.
    pub fetch: Option<Fetch>,
    /// When this replica became its leader, in ticks.
    pub led_since: Option<u64>,
    proposals: Vec<(Proposal, Reply)>,
    waiting: BTreeMap<u64, (u64, Vec<Reply>)>,
    new_reads: Vec<ReadReply>,
    reads: BTreeMap<u64, (u64, Vec<ReadReply>)>,
    ready_reads: Vec<(u64, ReadReply)>,
    next_read: u64,
    /// Readies that are not durable yet.
    unwritten: usize,
    election_ticks: usize,
    /// Committed entries from a change of members on, whose commit is not durable yet.
    held: Vec<Entry>,
    durable_commit: u64,
    /// A snapshot's ready and index, until it is durable.
    adopted: Option<(u64, u64)>,
    planted: Planted,
}

impl Group {
    /// A group over its log, as it stands after what rows follow.
    pub fn new(id: u32, config: &CoreConfig, mut log: RaftLog, row: &GroupRow) -> Result<Group, Error> {
        let (me, planted, first_read) = (config.id, config.planted, config.seed >> 1);
        let message_bytes = config.message_bytes;
        let mut conf = raft::eraftpb::ConfState::default();
        conf.merge_from_bytes(&row.conf)
            .map_err(|error| Error::Row(format!("the members of group {id}: {error}")))?;
        log.set_conf_state(conf);
        let mut hard_state = log.hard_state().clone();
        hard_state.commit = hard_state.commit.max(row.applied).min(log.last()).max(log.before().0);
        hard_state.term = hard_state.term.max(row.term);
        log.set_hard_state(hard_state);
        log.set_applied(row.applied);
        let config = Config {
            id: me,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: 2,
            applied: row.applied,
            pre_vote: true,
            check_quorum: true,
            // It would merge a lagging follower's whole window into one message.
            batch_append: false,
            max_size_per_msg: message_bytes,
            max_inflight_msgs: 64,
            max_uncommitted_size: 128 << 20,
            max_committed_size_per_ready: 16 << 20,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let node = RawNode::new(&config, log, &logger)?;
        Ok(Group {
            id,
            node,
            applied: (row.applied, row.term),
            fetch: None,
            led_since: None,
            proposals: vec![],
            waiting: BTreeMap::new(),
            new_reads: vec![],
            reads: BTreeMap::new(),
            ready_reads: vec![],
            // A context that an earlier life has used must not be taken for this one's.
            next_read: first_read,
            unwritten: 0,
            election_ticks: ELECTION_TICKS,
            held: vec![],
            durable_commit: 0,
            adopted: None,
            planted,
        })
    }

    /// Whether this replica leads it.
    pub fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// Its row as of what is applied.
    pub fn row(&self) -> GroupRow {
        let conf = self.node.store().conf_state().write_to_bytes().unwrap_or_default();
        GroupRow { applied: self.applied.0, term: self.applied.1, conf }
    }

    /// Draws the length of the next wait for an election, so that a seed decides it.
    fn settle(&mut self, before: (u64, StateRole), draw: &mut dyn FnMut() -> usize) {
        if before != (self.node.raft.term, self.node.raft.state) {
            self.election_ticks = draw();
        }
        self.node.raft.set_randomized_election_timeout(self.election_ticks);
    }

    fn phase(&self) -> (u64, StateRole) {
        (self.node.raft.term, self.node.raft.state)
    }

    /// Raft's clock.
    pub fn tick(&mut self, now: u64, draw: &mut dyn FnMut() -> usize) {
        let before = self.phase();
        // Until a snapshot is durable raft-rs looks, at an election, for entries before it.
        if self.adopted.is_none() {
            self.node.tick();
        }
        self.settle(before, draw);
        let old = self.reads.iter().filter(|(_, (asked, _))| now.saturating_sub(*asked) > READ_TICKS);
        let old: Vec<u64> = old.map(|(context, _)| *context).collect();
        for (_, senders) in old.into_iter().filter_map(|context| self.reads.remove(&context)) {
            senders.into_iter().for_each(|sender| drop(sender.send(Err(NotDone::Retry))));
        }
        self.led_since = if self.leads() { self.led_since.or(Some(now)) } else { None };
    }

    /// Asks for votes at once: nobody else could lead.
    pub fn campaign_alone(&mut self) {
        let voters = self.node.store().conf_state().voters.clone();
        if voters == [self.node.raft.id] {
            let _ = self.node.campaign();
        }
    }

    /// A message of a peer.
    pub fn step(&mut self, message: Message, draw: &mut dyn FnMut() -> usize) {
        let last = self.node.raft.raft_log.last_index();
        if message.get_msg_type() == MessageType::MsgHeartbeat && message.commit > last {
            tracing::error!(last, commit = message.commit, "a heartbeat commits what this replica never had");
            return;
        }
        if message.get_msg_type() == MessageType::MsgTimeoutNow && self.adopted.is_some() {
            return;
        }
        let before = self.phase();
        if let Err(error) = self.node.step(message) {
            tracing::debug!(%error, group = self.id, "a message was not taken");
        }
        self.settle(before, draw);
        if self.planted == Planted::CommitOfOldTerm && self.leads() {
            self.commit_by_count_alone();
        }
    }

    /// The planted fault: what a majority has is taken for committed, whatever its term.
    fn commit_by_count_alone(&mut self) {
        let mut matched: Vec<u64> =
            self.node.raft.prs().iter().map(|(_, progress)| progress.matched).collect();
        matched.sort_unstable();
        let index = matched.get((matched.len() - 1) / 2).copied().unwrap_or(0);
        let index = index.min(self.node.raft.raft_log.last_index());
        if index > self.node.raft.raft_log.committed {
            self.node.raft.raft_log.commit_to(index);
        }
    }

    /// A proposal; it goes into an entry with others at the end of the round.
    pub fn propose(&mut self, proposal: Proposal, reply: Reply) {
        if !self.leads() {
            let _ = reply.send(Err(NotDone::NotLeader(self.node.raft.leader_id)));
            return;
        }
        self.proposals.push((proposal, reply));
    }

    /// A read that must see all that is committed now.
    pub fn read_index(&mut self, reply: ReadReply) {
        self.new_reads.push(reply);
    }

    /// A change of the members.
    pub fn propose_change(&mut self, change: ConfChangeV2) -> bool {
        self.node.propose_conf_change(vec![], change).is_ok()
    }

    fn flush_proposals(&mut self) {
        if self.proposals.is_empty() {
            return;
        }
        let proposals = std::mem::take(&mut self.proposals);
        // It may have stepped down since they came; a follower would hand them on.
        if !self.leads() {
            let leader = self.node.raft.leader_id;
            proposals.into_iter().for_each(|(_, reply)| drop(reply.send(Err(NotDone::NotLeader(leader)))));
            return;
        }
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.node.raft.id;
        let mut replies: Vec<Vec<Reply>> = vec![];
        let mut part: Vec<Proposal> = vec![];
        let mut bytes = 0;
        let mut entries = vec![];
        let close = |part: &mut Vec<Proposal>, entries: &mut Vec<Entry>| {
            if !part.is_empty() {
                entries.push(Entry { data: command::encode(&*part), ..Entry::default() });
                part.clear();
            }
        };
        for (proposal, reply) in proposals {
            if part.is_empty() || bytes + proposal.bytes() > ENTRY_BYTES {
                close(&mut part, &mut entries);
                replies.push(vec![]);
                bytes = 0;
            }
            bytes += proposal.bytes();
            part.push(proposal);
            replies.last_mut().expect("pushed above").push(reply);
        }
        close(&mut part, &mut entries);
        let count = entries.len() as u64;
        message.set_entries(entries.into());
        let refusal = match self.node.step(message) {
            Ok(()) => {
                let first = self.node.raft.raft_log.last_index() + 1 - count;
                let term = self.node.raft.term;
                let indexed = replies.into_iter().enumerate();
                self.waiting.extend(indexed.map(|(i, replies)| (first + i as u64, (term, replies))));
                return;
            }
            Err(_) if self.leads() => NotDone::Retry,
            Err(_) => NotDone::NotLeader(self.node.raft.leader_id),
        };
        for reply in replies.into_iter().flatten() {
            let _ = reply.send(Err(refusal.clone()));
        }
    }

    fn flush_reads(&mut self, now: u64) {
        if self.new_reads.is_empty() {
            return;
        }
        self.next_read += 1;
        let context = [self.node.raft.id.to_le_bytes(), self.next_read.to_le_bytes()].concat();
        self.reads.insert(self.next_read, (now, std::mem::take(&mut self.new_reads)));
        self.node.read_index(context);
    }

    fn take_reads(&mut self, states: Vec<ReadState>) {
        for state in states {
            let number = state.request_ctx.last_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            if let Some((_, senders)) = self.reads.remove(&number) {
                self.ready_reads.extend(senders.into_iter().map(|sender| (state.index, sender)));
            }
        }
        let applied = self.applied.0;
        let (ready, later) =
            std::mem::take(&mut self.ready_reads).into_iter().partition(|(index, _)| *index <= applied);
        self.ready_reads = later;
        for (_, sender) in ready {
            let _ = sender.send(Ok(()));
        }
    }

    /// Does all that Raft wants done now.
    pub fn round(&mut self, now: u64, catalog: &Catalog, round: &mut Round) -> Result<(), Error> {
        self.flush_proposals();
        self.flush_reads(now);
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            // With an entry that can't be read it would be ready for ever.
            if let Some(error) = self.node.store().take_failed() {
                return Err(error);
            }
            round.messages.append(&mut ready.take_messages());
            let reads = ready.take_read_states();
            if !ready.snapshot().is_empty() {
                let metadata = ready.snapshot().get_metadata().clone();
                self.adopt(&metadata, catalog)?;
            }
            let committed = ready.take_committed_entries();
            let snapshot = ready.snapshot().get_metadata().index;
            let frames_before = round.frames.len();
            let entries = ready.take_entries();
            let indexes = entries.iter().map(|entry| (entry.index, entry.term)).collect();
            round.frames.extend(entries.iter().map(|entry| entry_frame(self.id, entry)));
            self.node.mut_store().append(entries);
            if let Some(hard_state) = ready.hs() {
                self.node.mut_store().set_hard_state(hard_state.clone());
                // A hard state that only moves commit needs no sync of its own.
                if ready.must_sync() && self.planted != Planted::VoteNotPersisted {
                    round.frames.push(hard_state_frame(self.id, hard_state));
                }
            }
            let (number, mut after) = (ready.number(), ready.take_persisted_messages());
            if snapshot > 0 {
                self.adopted = Some((number, snapshot));
            }
            self.node.advance_append_async(ready);
            let count = round.frames.len() - frames_before;
            if self.planted == Planted::AckBeforeFsync {
                round.messages.append(&mut after);
            }
            if count == 0 && self.unwritten == 0 {
                round.messages.append(&mut after);
                self.durable(number);
            } else {
                self.unwritten += 1;
                let mark = Mark::Ready { group: self.id, number, entries: indexes, after };
                round.marks.push((mark, count));
                if self.planted == Planted::AckBeforeFsync {
                    self.durable(number);
                }
            }
            // Only now: what is applied can make Raft append, which it must not before.
            self.hold_or_apply(committed, catalog, round)?;
            self.take_reads(reads);
        }
        if let Some(error) = self.node.store().take_failed() {
            return Err(error);
        }
        if !self.leads() && !self.waiting.is_empty() {
            for (_, (_, replies)) in std::mem::take(&mut self.waiting) {
                replies.into_iter().for_each(|reply| drop(reply.send(Err(NotDone::Retry))));
            }
        }
        Ok(())
    }

    /// Raft's ready of this number is durable, its entries at these places.
    pub fn persisted(&mut self, number: u64, entries: &[(u64, u64)], places: &[Location]) {
        for ((index, term), at) in entries.iter().zip(places) {
            self.node.mut_store().persisted(*index, *term, *at);
        }
        self.unwritten -= 1;
        self.durable(number);
    }

    fn durable(&mut self, number: u64) {
        self.node.on_persist_ready(number);
        if let Some((_, index)) = self.adopted.take_if(|(adopted, _)| *adopted <= number) {
            self.node.advance_apply_to(index);
        }
    }

    /// Applies committed entries; from a change of members on only once their commit is durable.
    ///
    /// A replica that came back with the members before, and without knowing what is
    /// committed, could win an election among those who are no members any more.
    fn hold_or_apply(
        &mut self,
        committed: Vec<Entry>,
        catalog: &Catalog,
        round: &mut Round,
    ) -> Result<(), Error> {
        let last_change =
            committed.iter().rev().find(|entry| entry.get_entry_type() != EntryType::EntryNormal);
        let commit = self.node.raft.raft_log.committed;
        let must_write = last_change.is_some_and(|entry| entry.index > self.durable_commit);
        if must_write {
            let hard_state = self.node.raft.hard_state();
            round.frames.push(hard_state_frame(self.id, &hard_state));
            round.marks.push((Mark::Commit { group: self.id, commit }, 1));
        }
        if must_write || !self.held.is_empty() {
            self.held.extend(committed);
            return Ok(());
        }
        self.apply(committed, catalog)
    }

    /// All up to `commit` is durably known to be committed.
    pub fn commit_is_durable(&mut self, commit: u64, catalog: &Catalog) -> Result<(), Error> {
        self.durable_commit = self.durable_commit.max(commit);
        let waits = |entry: &Entry| {
            entry.get_entry_type() != EntryType::EntryNormal && entry.index > self.durable_commit
        };
        let ready = self.held.iter().position(waits).unwrap_or(self.held.len());
        let ready: Vec<Entry> = self.held.drain(..ready).collect();
        self.apply(ready, catalog)
    }

    /// Applies committed entries, and answers.
    fn apply(&mut self, entries: Vec<Entry>, catalog: &Catalog) -> Result<(), Error> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut answers = vec![];
        let before = self.applied;
        let mut rows = catalog.begin();
        for entry in entries {
            let (index, term) = (entry.index, entry.term);
            if index <= self.applied.0 {
                continue;
            }
            let outcomes = if entry.get_entry_type() != EntryType::EntryNormal {
                let mut change = ConfChangeV2::default();
                if change.merge_from_bytes(&entry.data).is_ok() {
                    let conf_state = self.node.apply_conf_change(&change)?;
                    // raft-rs would go on leading, and panic at its next commit.
                    let me = self.node.raft.id;
                    let is_voter =
                        conf_state.voters.contains(&me) || conf_state.voters_outgoing.contains(&me);
                    if self.leads() && !is_voter {
                        let term = self.node.raft.term;
                        self.node.raft.become_follower(term, 0);
                    }
                    self.node.mut_store().set_conf_state(conf_state);
                }
                vec![]
            } else if entry.data.is_empty() {
                vec![]
            } else {
                self.apply_commands(&entry, &mut rows)?
            };
            self.applied = (index, term);
            if let Some((proposed_term, replies)) = self.waiting.remove(&index) {
                answers.push((replies, (proposed_term == term).then_some(outcomes)));
            }
        }
        if self.applied == before {
            return Ok(());
        }
        rows.put(&Key::group(self.id), &self.row());
        drop(rows);
        catalog.changed().notify_waiters();
        self.node.mut_store().set_applied(self.applied.0);
        self.node.advance_apply_to(self.applied.0);
        for (replies, outcomes) in answers {
            let mut outcomes = outcomes.map(Vec::into_iter);
            for reply in replies {
                let outcome = outcomes.as_mut().and_then(Iterator::next);
                let _ = reply.send(outcome.ok_or(NotDone::Retry));
            }
        }
        Ok(())
    }

    fn apply_commands(
        &self,
        entry: &Entry,
        rows: &mut crate::catalog::Txn<'_>,
    ) -> Result<Vec<Outcome>, Error> {
        let commands = match command::decode(&entry.data) {
            Ok(commands) => commands,
            Err(error) => {
                // All replicas refuse it alike.
                tracing::error!(%error, index = entry.index, "an entry does not decode");
                return Ok(vec![Outcome::Refused(Refusal::Invalid(error))]);
            }
        };
        let at = self.node.store().location(entry.index);
        // Under the planted fault an entry is applied before it has a place.
        let entry_at = match (at, self.planted) {
            (Some(at), _) => at,
            (None, Planted::AckBeforeFsync) => Location::NONE,
            (None, _) => return Err(raft::Error::Store(raft::StorageError::Unavailable).into()),
        };
        let (group, index) = (self.id, entry.index);
        let apply = |(proposal, bulk_from): (Proposal, usize)| {
            let bulk = proposal.bulk.clone();
            Applying { group, index, bulk, entry_at, bulk_from, rows, planted: self.planted }.apply(proposal)
        };
        commands.into_iter().map(apply).collect()
    }

    /// Takes over the state of a snapshot whose rows are all here.
    fn adopt(&mut self, metadata: &raft::eraftpb::SnapshotMetadata, catalog: &Catalog) -> Result<(), Error> {
        let (index, term) = (metadata.index, metadata.term);
        // Raft saw it because its rows are here; no other is begun before they are taken.
        let fetch = self.fetch.take().filter(|fetch| fetch.at() == (index, term)).ok_or(Error::Stopped)?;
        // What was to be applied is in the snapshot.
        self.held.clear();
        let log = self.node.mut_store();
        log.begin_behind(index, term);
        log.set_conf_state(metadata.get_conf_state().clone());
        log.set_applied(index);
        self.applied = (index, term);
        let mut rows = catalog.begin();
        rows.replace_group(self.id, fetch.rows)?;
        rows.put(&Key::group(self.id), &self.row());
        Ok(())
    }
}
