//! What must hold at every moment, and at the end.

use super::client::block;
use super::world::World;
use crate::linear::check;
use crate::recording_model::RecordingModel;
use heddle_proto::compress::decompress;
use heddle_proto::{Hash, RecordingId};
use heddle_storage::core::Core;
use heddle_storage::journal::Location;
use heddle_storage::placement::{block_shard, placement};
use heddle_storage::schema::{BlockRow, Key, RecordingRow, RecordingState, Wish, relocated};
use raft::eraftpb::{Message, MessageType};
use raft::{StateRole, Storage as _};
use std::collections::BTreeMap;

/// What was seen so far.
#[derive(Default)]
pub struct Checks {
    leaders: BTreeMap<(u32, u64), u64>,
    /// Term of every committed entry.
    committed: BTreeMap<(u32, u64), u64>,
    commit: BTreeMap<(u64, u64, u32), u64>,
    /// Hash of a group's rows at an applied index.
    states: BTreeMap<(u32, u64), Hash>,
    applied: BTreeMap<(u64, u64, u32), u64>,
    led: BTreeMap<(u64, u64, u32), Option<u64>>,
    /// Whom a replica has voted for in a term of a group.
    votes: BTreeMap<(u64, u32, u64), u64>,
    /// Life of a replica, and index and term of two entries of a group that it had made
    /// durable: one that it knew to be committed, and the last.
    durable: BTreeMap<(u64, u32), (u64, [(u64, u64); 2])>,
    looks: u64,
}

/// A group's rows, without where bytes lie.
fn state_of(core: &Core, group: u32) -> Hash {
    let mut bytes = vec![];
    let own = Key::group(group).0;
    let visited = core.catalog().visit(Key::span_of_group(group), |key, value| {
        if key != own {
            bytes.extend_from_slice(key);
            bytes.extend(relocated(key, value, |at| Location { segment: 0, offset: 0, ..at })?);
        }
        Ok(())
    });
    visited.map_or(Hash::ZERO, |()| Hash::of(&bytes))
}

impl Checks {
    /// Hears what a replica says: in one term it votes once, whatever its disk has forgotten.
    pub fn hear(&mut self, id: u64, group: u32, message: &Message) -> Option<String> {
        let candidate = match message.get_msg_type() {
            MessageType::MsgRequestVote => id,
            MessageType::MsgRequestVoteResponse if !message.reject => message.to,
            _ => return None,
        };
        let first = *self.votes.entry((id, group, message.term)).or_insert(candidate);
        let (term, is_other) = (message.term, first != candidate);
        is_other.then(|| {
            format!("replica {id} voted for {first} and {candidate} in term {term} of group {group}")
        })
    }

    /// Looks at a replica that has just done something.
    pub fn look(&mut self, world: &mut World, index: usize) {
        self.looks += 1;
        let mut found = vec![];
        let replica = &world.replicas[index];
        let Some(running) = &replica.running else { return };
        for group in running.core.groups() {
            let raft = &group.node.raft;
            if raft.state == StateRole::Leader {
                let leader = *self.leaders.entry((group.id, raft.term)).or_insert(replica.id);
                if leader != replica.id {
                    found.push(format!(
                        "replicas {leader} and {} both lead group {} in term {}",
                        replica.id, group.id, raft.term
                    ));
                }
            }
            let commit = raft.raft_log.committed;
            let key = (replica.id, replica.life, group.id);
            let before = self.commit.insert(key, commit).unwrap_or(group.node.store().before().0);
            for entry in before + 1..=commit {
                let Ok(term) = group.node.store().term(entry) else { continue };
                let known = *self.committed.entry((group.id, entry)).or_insert(term);
                if known != term {
                    found.push(format!(
                        "entry {entry} of group {} was committed in term {known}, and by replica {} in {term}",
                        group.id, replica.id
                    ));
                }
            }
            let log = &raft.raft_log;
            let durable = [log.persisted.min(commit), log.persisted];
            let durable = durable.map(|index| (index, log.term(index).unwrap_or(0)));
            let (life, old) =
                self.durable.insert((replica.id, group.id), (replica.life, durable)).unwrap_or_default();
            if life > 0 && life != replica.life {
                let store = group.node.store();
                let is_gone = |(index, term): &(u64, u64)| {
                    self.committed.get(&(group.id, *index)) == Some(term)
                        && *index > store.before().0
                        && store.term(*index).ok() != Some(*term)
                };
                found.extend(old.iter().filter(|&entry| is_gone(entry)).map(|(index, term)| {
                    format!(
                        "replica {} forgot the synced entry {index} of group {}, of term {term}",
                        replica.id, group.id
                    )
                }));
            }
            // A leader counts replicas for entries of its own term alone (Raft, 5.4.2).
            let led = self.led.insert(key, (raft.state == StateRole::Leader).then_some(raft.term));
            if led == Some(Some(raft.term)) && raft.state == StateRole::Leader && commit > before {
                let term = group.node.store().term(commit);
                if term.as_ref().is_ok_and(|term| *term != raft.term) {
                    found.push(format!(
                        "replica {} committed entry {commit} of group {}, of term {term:?}, in term {}",
                        replica.id, group.id, raft.term
                    ));
                }
            }
            if raft.state == StateRole::Leader && commit > before {
                found.extend(bytes_are_held(world, group.id, commit));
            }
            let (applied, _) = group.applied;
            let last = self.applied.insert(key, applied);
            // A hash over all rows costs: one change in a few is enough, and other replicas'
            // looks fall on the same index often.
            if last != Some(applied) && (applied % 4 == 0 || self.looks % 16 == 0) {
                let state = state_of(&running.core, group.id);
                let known = *self.states.entry((group.id, applied)).or_insert(state);
                if known != state {
                    found.push(format!("two states of group {} at applied index {applied}", group.id));
                }
            }
            if group.fetch.is_some() {
                *world.seen.entry("looks at a snapshot on its way").or_default() += 1;
            }
        }
        found.into_iter().for_each(|what| world.violation(what));
    }

    /// At the end, when all is calm: nothing that was promised is missing anywhere.
    pub fn finish(&mut self, world: &mut World) {
        let mut found = vec![];
        let shards = world.groups - 1;
        // Who was removed may never have heard of it.
        let removed = |world: &World, index: usize| {
            let running = world.replicas.iter().filter_map(|replica| replica.running.as_ref());
            running
                .filter_map(|running| running.core.members().ok())
                .any(|members| members.get(&(index as u64 + 1)).is_some_and(|row| row.wish == Wish::Removed))
        };
        for group in 0..world.groups {
            let leads = |r: &super::replica::SimReplica| {
                r.running.as_ref().is_some_and(|r| r.core.groups()[group as usize].leads())
            };
            if !world.replicas.iter().any(leads) {
                found.push(format!("group {group} has no leader after a long peace"));
            }
        }
        for index in 0..world.replicas.len() {
            if world.removed.contains(&(index as u64 + 1)) {
                continue;
            }
            let Some(running) = &world.replicas[index].running else {
                found.push(format!("replica {} did not come back", index + 1));
                continue;
            };
            let is_member = running
                .core
                .groups()
                .iter()
                .all(|group| group.node.store().conf_state().voters.contains(&(index as u64 + 1)));
            if removed(world, index) || !is_member {
                continue;
            }
            let segments = running.writer.journal.segments();
            let catalog = running.core.catalog();
            for ((id, first), chunk) in &world.promised.chunks {
                if world.promised.deleted.contains(id) {
                    continue;
                }
                let at = catalog.chunks_at(placement(*id, shards), *id, *first);
                let row =
                    at.ok().and_then(|(_, rows)| rows.into_iter().find(|row| row.first_event == *first));
                let bytes = row.map(|row| segments.read(row.at).map_err(|error| error.to_string()));
                match bytes {
                    Some(Ok(bytes)) if bytes == chunk.bytes => {}
                    other => found.push(format!(
                        "replica {} lost the acknowledged chunk at event {first} of {id}: {:?}",
                        index + 1,
                        other.map(|bytes| bytes.map(|bytes| bytes.len()))
                    )),
                }
            }
            for (owner, blocks) in &world.promised.blocks {
                let row = catalog.get::<RecordingRow>(&Key::recording(placement(*owner, shards), *owner));
                let is_there =
                    row.is_ok_and(|row| row.is_some_and(|row| row.state != RecordingState::Deleted));
                if world.promised.deleted.contains(owner) || !is_there {
                    continue;
                }
                for number in blocks {
                    let (hash, raw) = block(*number);
                    let row = catalog.get::<BlockRow>(&Key::block(block_shard(hash, shards), hash));
                    let bytes = row.ok().flatten().and_then(|row| segments.read(row.at).ok());
                    let bytes = bytes.and_then(|bytes| decompress(&bytes, 1 << 20));
                    if bytes.as_deref() != Some(&raw[..]) {
                        found.push(format!("replica {} lost block {number} of {owner}", index + 1));
                    }
                }
            }
        }
        let histories: Vec<(RecordingId, Vec<_>)> =
            std::mem::take(&mut world.promised.history).into_iter().collect();
        for (id, history) in histories {
            if let Err(stuck) = check(&RecordingModel, &history) {
                let ops: Vec<String> = stuck.iter().map(|i| format!("{:?}", history[*i])).collect();
                found.push(format!("no order explains what clients of {id} saw: {}", ops.join("; ")));
            }
        }
        found.into_iter().for_each(|what| world.violation(what));
    }
}

/// Every replica that is counted for a commit has the entry's bytes on its disk.
fn bytes_are_held(world: &World, group: u32, commit: u64) -> Option<String> {
    let mut voters = 0;
    let mut holders = 0;
    let leader = world.replicas.iter().filter_map(|r| r.running.as_ref()).find(|r| {
        let group = &r.core.groups()[group as usize];
        group.leads() && group.node.raft.raft_log.committed == commit
    })?;
    let conf = leader.core.groups()[group as usize].node.store().conf_state();
    if !conf.voters_outgoing.is_empty() {
        return None;
    }
    for id in &conf.voters {
        voters += 1;
        let replica = world.replicas.get(*id as usize - 1)?;
        let Some(running) = &replica.running else {
            // It may have said so before it went down.
            holders += 1;
            continue;
        };
        let log = running.core.groups()[group as usize].node.store();
        let is_held = commit <= log.before().0
            || log.location(commit).is_some_and(|at| {
                let name = format!("{:016x}.seg", at.segment);
                let bytes = replica.disk.durable(&name, at.offset as usize, at.bytes as usize);
                // It had them when it said so.
                let is_rotten = replica.disk.is_rotten(&name, at.offset as usize, at.bytes as usize);
                is_rotten || bytes.is_some_and(|bytes| crc32c::crc32c(&bytes) == at.crc)
            });
        holders += u32::from(is_held);
    }
    // With one voter fewer: the last of them may have come with this entry.
    (holders <= (voters - 1) / 2)
        .then(|| format!("entry {commit} of group {group} is committed, and {holders} of {voters} hold it"))
}
