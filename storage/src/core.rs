//! A replica without its surroundings: inputs and ticks in, outputs out.
//!
//! No sockets, files, threads or clocks: the shipped replica and the simulated one run this.
//! Everything goes in by [`Core::take`]; [`Core::work`] then says what is to be sent,
//! written and kept, for all groups together.

use crate::apply::Planted;
use crate::catalog::Catalog;
use crate::command::Proposal;
use crate::error::Error;
use crate::group::{ELECTION_TICKS, Group, Mark, NotDone, ReadReply, Reply, Round};
use crate::install::{Fetch, Page, ServePage, VIEW_TICKS, View};
use crate::journal::{Frame, Location, Segments};
use crate::keeper::{Job, Kept};
use crate::schema::MemberRow;
use raft::SnapshotStatus;
use raft::eraftpb::{Message, MessageType};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::oneshot;

/// A message from replica to replica.
#[derive(Clone, Debug)]
pub enum Envelope {
    /// Raft's own.
    Raft {
        /// The group.
        group: u32,
        /// It.
        message: Box<Message>,
    },
    /// Asks for rows of a snapshot.
    Pull {
        /// The group.
        group: u32,
        /// The snapshot's index.
        index: u64,
        /// The first row wanted.
        from: u64,
    },
    /// Rows of a snapshot.
    Page(Page),
}

/// What a replica takes in.
#[derive(Debug)]
pub enum Input {
    /// A command.
    Propose(u32, Proposal, Reply),
    /// A message of a peer.
    Message(u64, Envelope),
    /// Answered once this replica has applied all that was committed in the group when asked.
    ReadIndex(u32, ReadReply),
    /// A peer can't be reached.
    Unreachable(u64),
    /// What was handed out to be written is durable.
    Written(Vec<(Mark, Vec<Location>)>),
    /// The disk has no room for the next segment, or has again.
    Full(bool),
    /// What was handed out to be kept is done.
    Kept(Box<Kept>),
    /// Bytes of a row were mended, and lie here now.
    Mended(Vec<u8>, BTreeMap<(u64, u32), Location>),
    /// Raft's clock.
    Tick,
    /// How the replica stands.
    Status(oneshot::Sender<Status>),
    /// Stop.
    Stop,
}

/// What a replica wants done.
#[derive(Debug)]
pub enum Output {
    /// Send a message.
    Send(u64, Envelope),
    /// Write frames, with one sync, and say that their marks are durable.
    Write(Vec<Frame>, Vec<(Mark, usize)>),
    /// Run a job of the keeper.
    Keep(Job),
    /// Read a page and send it.
    Serve(ServePage),
}

/// How a replica stands.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Status {
    pub id: u64,
    pub groups: Vec<GroupStatus>,
    pub journal_bytes: u64,
    pub live_bytes: u64,
    pub is_full: bool,
}

/// How a group stands.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct GroupStatus {
    pub group: u32,
    pub role: &'static str,
    pub leader: u64,
    pub term: u64,
    pub committed: u64,
    pub applied: u64,
    pub first: u64,
    pub voters: Vec<u64>,
    pub learners: Vec<u64>,
    pub is_fetching: bool,
}

/// When a replica does what.
#[derive(Clone, Copy, Debug)]
pub struct CoreConfig {
    /// Its id.
    pub id: u64,
    /// Decides the lengths of waits for elections.
    pub seed: u64,
    /// Rows that wait in memory before they are written.
    pub flush_rows: usize,
    /// Ticks after which they are written anyway.
    pub flush_ticks: u64,
    /// Journal bytes between two checkpoints, at least; more if the rows are many.
    pub checkpoint_bytes: u64,
    /// Bytes of entries that are kept for followers that lag.
    pub retain_bytes: u64,
    /// Newest entries in memory, in bytes, over all groups.
    pub cache_bytes: usize,
    /// Bytes of entries in a message, at most, if it has more than one.
    pub message_bytes: u64,
    /// For tests.
    pub planted: Planted,
}

impl CoreConfig {
    /// Of a real replica.
    pub fn new(id: u64, seed: u64) -> CoreConfig {
        CoreConfig {
            id,
            seed,
            flush_rows: 8192,
            flush_ticks: 20,
            checkpoint_bytes: 512 << 20,
            retain_bytes: 256 << 20,
            cache_bytes: 64 << 20,
            message_bytes: 1 << 20,
            planted: Planted::None,
        }
    }
}

/// On a full disk a follower takes entries of no more than this part of a segment.
const SMALL_PART: u64 = 256;

/// The replica.
pub struct Core {
    pub(crate) config: CoreConfig,
    pub(crate) groups: Vec<Group>,
    pub(crate) catalog: Catalog,
    pub(crate) segments: Segments,
    pub(crate) rng: ChaCha8Rng,
    /// Ticks so far.
    pub(crate) now: u64,
    /// Groups that may have something to do.
    pub(crate) touched: BTreeSet<u32>,
    pub(crate) outputs: Vec<Output>,
    /// Snapshots that were begun to be fetched.
    pub(crate) fetches: u64,
    /// The segment of the newest bytes that are known to be durable.
    pub(crate) newest_segment: u64,
    pub(crate) is_full: bool,
    pub(crate) views: BTreeMap<u32, View>,
    pub(crate) views_asked: BTreeSet<u32>,
    pub(crate) is_keeping: bool,
    pub(crate) last_flush: u64,
    /// Journal bytes since the last checkpoint.
    pub(crate) since_checkpoint: u64,
    pub(crate) checkpoint_size: u64,
    pub(crate) checkpoint_number: u64,
    /// Victims have been moved, so the next job is the checkpoint.
    pub(crate) is_moved: bool,
}

impl Core {
    /// A replica over what was recovered.
    pub fn new(
        config: CoreConfig,
        groups: Vec<Group>,
        catalog: Catalog,
        segments: Segments,
        checkpoint_number: u64,
        since_checkpoint: u64,
    ) -> Core {
        let mut core = Core {
            config,
            groups,
            catalog,
            segments,
            rng: ChaCha8Rng::seed_from_u64(config.seed),
            now: 0,
            touched: BTreeSet::new(),
            outputs: vec![],
            fetches: 0,
            newest_segment: 0,
            is_full: false,
            views: BTreeMap::new(),
            views_asked: BTreeSet::new(),
            is_keeping: false,
            last_flush: 0,
            since_checkpoint,
            checkpoint_size: 0,
            checkpoint_number,
            is_moved: false,
        };
        core.newest_segment = core.segments.current();
        for group in &mut core.groups {
            group.campaign_alone();
            core.touched.insert(group.id);
        }
        core
    }

    /// Its rows.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Its groups.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Takes an input.
    pub fn take(&mut self, input: Input) -> Result<(), Error> {
        match input {
            Input::Propose(group, proposal, reply) => {
                // What frees space needs little of it.
                if self.is_full && !proposal.bulk.is_empty() {
                    let _ = reply.send(Err(NotDone::Full));
                } else if let Some(group) = self.touch(group) {
                    group.propose(proposal, reply);
                }
            }
            Input::Message(from, envelope) => self.take_message(from, envelope)?,
            Input::ReadIndex(group, reply) => {
                if let Some(group) = self.touch(group) {
                    group.read_index(reply);
                }
            }
            Input::Unreachable(peer) => {
                for group in &mut self.groups {
                    group.node.report_unreachable(peer);
                }
            }
            Input::Written(marks) => {
                for (mark, places) in marks {
                    let newest = places.iter().map(|at| at.segment).max().unwrap_or(0);
                    self.newest_segment = self.newest_segment.max(newest);
                    self.take_mark(mark, &places)?;
                }
            }
            Input::Full(is_full) => {
                if is_full != self.is_full {
                    tracing::warn!(is_full, "the disk's room for another segment has changed");
                }
                self.is_full = is_full;
            }
            Input::Kept(kept) => self.take_kept(*kept)?,
            Input::Mended(key, moved) => self.catalog.begin().relocate(&key, &moved)?,
            Input::Tick => self.tick()?,
            Input::Status(sender) => drop(sender.send(self.status())),
            Input::Stop => {}
        }
        Ok(())
    }

    fn touch(&mut self, group: u32) -> Option<&mut Group> {
        let found = self.groups.get_mut(group as usize)?;
        self.touched.insert(group);
        Some(found)
    }

    /// Runs `with` on a group, with what draws the lengths of its waits.
    fn with_group(&mut self, group: u32, with: impl FnOnce(&mut Group, &mut dyn FnMut() -> usize)) {
        let rng = &mut self.rng;
        if let Some(found) = self.groups.get_mut(group as usize) {
            self.touched.insert(group);
            with(found, &mut || rng.gen_range(ELECTION_TICKS..2 * ELECTION_TICKS));
        }
    }

    fn take_message(&mut self, from: u64, envelope: Envelope) -> Result<(), Error> {
        match envelope {
            Envelope::Raft { group, message } => {
                let kind = message.get_msg_type();
                // A full follower lags rather than take what it can't write.
                if self.is_full && kind == MessageType::MsgAppend {
                    let bytes: usize = message.entries.iter().map(|entry| entry.data.len()).sum();
                    if bytes as u64 > self.segments.segment_bytes() / SMALL_PART {
                        return Ok(());
                    }
                }
                if kind == MessageType::MsgSnapshot {
                    return self.take_snapshot(group, *message);
                }
                self.with_group(group, |group, draw| group.step(*message, draw));
            }
            Envelope::Pull { group, index, from: first } => match self.views.get_mut(&group) {
                Some(view) if view.index == index => {
                    // One that asks for the same again and again does not keep it for ever.
                    if first >= view.pulled {
                        (view.used, view.pulled) = (self.now, first + 1);
                    }
                    let view = view.clone();
                    self.outputs.push(Output::Serve(ServePage { to: from, group, view, from: first }));
                }
                _ => self.with_group(group, |group, _| {
                    if group.leads() {
                        group.node.report_snapshot(from, SnapshotStatus::Failure);
                    }
                }),
            },
            Envelope::Page(page) => {
                let id = page.group;
                let Some(group) = self.groups.get_mut(id as usize) else { return Ok(()) };
                let Some(fetch) = &mut group.fetch else { return Ok(()) };
                let serial = fetch.serial;
                if let Some(frames) = fetch.take(page) {
                    let count = frames.len();
                    let marks = vec![(Mark::Page { group: id, serial }, count)];
                    self.write(frames, marks);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, frames: Vec<Frame>, marks: Vec<(Mark, usize)>) {
        self.since_checkpoint += frames.iter().map(|frame| frame.bytes() as u64).sum::<u64>();
        self.outputs.push(Output::Write(frames, marks));
    }

    /// A snapshot is offered: its bytes are fetched before Raft sees it.
    fn take_snapshot(&mut self, id: u32, message: Message) -> Result<(), Error> {
        let now = self.now;
        let planted = self.config.planted;
        let Some(group) = self.groups.get_mut(id as usize) else { return Ok(()) };
        let metadata = message.get_snapshot().get_metadata();
        let is_stale =
            metadata.index <= group.node.raft.raft_log.committed || message.term < group.node.raft.term;
        if is_stale && planted != Planted::SnapshotOverNewerLog {
            self.with_group(id, |group, draw| group.step(message, draw));
            return Ok(());
        }
        let at = (metadata.index, metadata.term);
        // One that is being installed is not given up: Raft may have seen it.
        if group.fetch.as_ref().is_some_and(|fetch| fetch.at() == at || fetch.is_installing()) {
            return Ok(());
        }
        let from = message.from;
        self.fetches += 1;
        let mut fetch = Fetch::new(message, self.fetches);
        let pull = fetch.pull(id, now, true);
        group.fetch = Some(fetch);
        self.outputs.extend(pull.map(|pull| Output::Send(from, pull)));
        Ok(())
    }

    fn take_mark(&mut self, mark: Mark, places: &[Location]) -> Result<(), Error> {
        match mark {
            Mark::Ready { group, number, entries, after } => {
                if let Some(group) = self.touch(group) {
                    group.persisted(number, &entries, places);
                }
                self.send(group, after);
            }
            Mark::Commit { group: id, commit } => {
                let catalog = self.catalog.clone();
                if let Some(group) = self.touch(id) {
                    group.commit_is_durable(commit, &catalog)?;
                }
            }
            Mark::Page { group: id, serial } => {
                let now = self.now;
                let Some(group) = self.groups.get_mut(id as usize) else { return Ok(()) };
                let fetch = group.fetch.as_mut().filter(|fetch| fetch.serial == serial);
                let Some(fetch) = fetch else { return Ok(()) };
                fetch.placed(places)?;
                let from = fetch.message.from;
                if let Some(frames) = fetch.finish(id) {
                    let count = frames.len();
                    self.write(frames, vec![(Mark::Installed { group: id, serial }, count)]);
                } else if let Some(pull) = fetch.pull(id, now, true) {
                    self.outputs.push(Output::Send(from, pull));
                }
            }
            Mark::Installed { group: id, serial } => {
                let planted = self.config.planted;
                let Some(group) = self.groups.get_mut(id as usize) else { return Ok(()) };
                let fetch = group.fetch.as_ref().filter(|fetch| fetch.serial == serial);
                let Some(fetch) = fetch else { return Ok(()) };
                let message = fetch.message.clone();
                let at = fetch.at();
                if planted == Planted::SnapshotOverNewerLog && at.0 <= group.applied.0 {
                    let fetch = group.fetch.take();
                    let rows = fetch.map(|fetch| fetch.rows).unwrap_or_default();
                    return self.catalog.begin().replace_group(id, rows);
                }
                self.with_group(id, |group, draw| group.step(message, draw));
                // What Raft takes is adopted in the next round; what it refuses is let go.
                let group = &mut self.groups[id as usize];
                let is_taken = group.node.snap().is_some_and(|s| s.get_metadata().index == at.0);
                if !is_taken {
                    group.fetch = None;
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, group: u32, messages: Vec<Message>) {
        self.outputs.extend(
            messages.into_iter().map(|message| {
                Output::Send(message.to, Envelope::Raft { group, message: Box::new(message) })
            }),
        );
    }

    fn tick(&mut self) -> Result<(), Error> {
        self.now += 1;
        let now = self.now;
        for id in 0..self.groups.len() as u32 {
            self.with_group(id, |group, draw| group.tick(now, draw));
            let group = &mut self.groups[id as usize];
            if group.leads() && group.node.store().take_asked() {
                self.views_asked.insert(id);
            }
            let pull = group
                .fetch
                .as_mut()
                .and_then(|fetch| Some((fetch.message.from, fetch.pull(id, now, false)?)));
            self.outputs.extend(pull.map(|(from, pull)| Output::Send(from, pull)));
        }
        let old: Vec<u32> =
            self.views.iter().filter(|(_, view)| now - view.used > VIEW_TICKS).map(|(id, _)| *id).collect();
        for id in old {
            self.views.remove(&id);
            let group = &mut self.groups[id as usize];
            group.node.mut_store().set_offer(None);
            let waiting: Vec<u64> = group
                .node
                .raft
                .prs()
                .iter()
                .filter(|(_, progress)| progress.state == raft::ProgressState::Snapshot)
                .map(|(id, _)| *id)
                .collect();
            for peer in waiting {
                group.node.report_snapshot(peer, SnapshotStatus::Failure);
            }
        }
        self.converge()?;
        self.keep();
        Ok(())
    }

    /// What is to be done now.
    pub fn work(&mut self) -> Result<Vec<Output>, Error> {
        let mut round = Round::default();
        for id in std::mem::take(&mut self.touched) {
            let group = &mut self.groups[id as usize];
            group.round(self.now, &self.catalog, &mut round)?;
            let messages = std::mem::take(&mut round.messages);
            self.send(id, messages);
        }
        if !round.marks.is_empty() {
            self.write(round.frames, round.marks);
        }
        Ok(std::mem::take(&mut self.outputs))
    }

    fn status(&self) -> Status {
        let group = |group: &Group| {
            let raft = &group.node.raft;
            let conf = group.node.store().conf_state();
            GroupStatus {
                group: group.id,
                role: match raft.state {
                    raft::StateRole::Leader => "leader",
                    _ if conf.learners.contains(&self.config.id) => "learner",
                    raft::StateRole::Follower => "follower",
                    raft::StateRole::Candidate | raft::StateRole::PreCandidate => "candidate",
                },
                leader: raft.leader_id,
                term: raft.term,
                committed: raft.raft_log.committed,
                applied: group.applied.0,
                first: group.node.store().before().0 + 1,
                voters: conf.voters.clone(),
                learners: conf.learners.clone(),
                is_fetching: group.fetch.is_some(),
            }
        };
        Status {
            id: self.config.id,
            groups: self.groups.iter().map(group).collect(),
            journal_bytes: self.segments.total_bytes(),
            live_bytes: self.catalog.live().values().sum(),
            is_full: self.is_full,
        }
    }

    /// The replicas, as the cluster wants them.
    pub fn members(&self) -> Result<BTreeMap<u64, MemberRow>, Error> {
        self.catalog.members()
    }
}
