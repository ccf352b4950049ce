//! Membership: every group's leader moves it, step by step, to what shard 0 says is wanted.
//!
//! A new replica is a learner first, and votes once it has what the leader has. A change of
//! several voters is one joint change. No step depends on the one who began it: whoever
//! leads goes on from what the group's own members are.

use crate::command::{Command, Proposal};
use crate::core::Core;
use crate::error::Error;
use crate::group::Group;
use crate::schema::{MemberRow, Wish};
use bytes::Bytes;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2};
use std::collections::BTreeMap;
use tokio::sync::oneshot;

/// Members are looked at every so many ticks: not a multiple of the election's, at whose
/// end Raft forgets which followers it has heard of.
const EVERY: u64 = 23;
/// A learner that lags by no more entries may vote.
const CLOSE: u64 = 64;
/// A leader stays for so many ticks before it is moved for balance.
const SETTLED: u64 = 60;

impl Core {
    pub(crate) fn converge(&mut self) -> Result<(), Error> {
        if self.now % EVERY != 0 {
            return Ok(());
        }
        let members = self.catalog.members()?;
        if members.is_empty() {
            return Ok(());
        }
        for id in 0..self.groups.len() {
            let (now, is_full) = (self.now, self.is_full);
            let group = &mut self.groups[id];
            if group.leads() {
                converge(group, &members, now, is_full);
                self.touched.insert(id as u32);
            }
        }
        Ok(())
    }

    /// The addresses that the replicas were started with become rows, by the first leader.
    pub fn propose_members(&mut self, addresses: &BTreeMap<u64, String>) -> Result<(), Error> {
        let Some(group) = self.groups.first_mut().filter(|group| group.leads()) else { return Ok(()) };
        // A new leader's rows may lag behind its log, which has the row, and what it is told since.
        if group.applied.1 != group.node.raft.term {
            return Ok(());
        }
        let known = self.catalog.members()?;
        for id in group.node.store().conf_state().voters.clone() {
            if known.contains_key(&id) {
                continue;
            }
            let Some(address) = addresses.get(&id).cloned() else { continue };
            let command = Command::Member { id, address, wish: Wish::Member };
            let (reply, _) = oneshot::channel();
            group.propose(Proposal { command, bulk: Bytes::new() }, reply);
            self.touched.insert(0);
        }
        Ok(())
    }
}

fn change(kind: ConfChangeType, node: u64) -> ConfChangeSingle {
    ConfChangeSingle { change_type: kind, node_id: node, ..ConfChangeSingle::default() }
}

fn converge(group: &mut Group, members: &BTreeMap<u64, MemberRow>, now: u64, is_full: bool) {
    let me = group.node.raft.id;
    let conf = group.node.store().conf_state().clone();
    if group.node.raft.has_pending_conf() || !conf.voters_outgoing.is_empty() {
        return;
    }
    let is_wanted = |id: &u64| members.get(id).is_some_and(|row| row.wish != Wish::Removed);
    // One without a row is not known yet, and stays.
    let is_removed = |id: &u64| members.get(id).is_some_and(|row| row.wish == Wish::Removed);
    let is_known = |id: &u64| conf.voters.contains(id) || conf.learners.contains(id);
    let last = group.node.raft.raft_log.last_index();
    let is_close = |id: &u64| {
        let progress = group.node.raft.prs().get(*id);
        progress.is_some_and(|progress| progress.recent_active && progress.matched + CLOSE >= last)
    };
    let new: Vec<u64> = members.keys().filter(|id| is_wanted(id) && !is_known(id)).copied().collect();
    let ready: Vec<u64> = conf.learners.iter().filter(|id| is_wanted(id) && is_close(id)).copied().collect();
    let going: Vec<u64> =
        conf.voters.iter().chain(&conf.learners).filter(|id| is_removed(id) && **id != me).copied().collect();
    // Who leaves goes with who comes; alone, only while a voter stays.
    let is_coming = conf.learners.iter().any(|id| is_wanted(id) && !ready.contains(id)) || !new.is_empty();
    let mut changes: Vec<ConfChangeSingle> =
        new.iter().map(|id| change(ConfChangeType::AddLearnerNode, *id)).collect();
    changes.extend(ready.iter().map(|id| change(ConfChangeType::AddNode, *id)));
    if !is_coming {
        changes.extend(going.iter().map(|id| change(ConfChangeType::RemoveNode, *id)));
    }
    if !changes.is_empty() {
        let mut joint = ConfChangeV2::default();
        joint.set_changes(changes.into());
        group.propose_change(joint);
        return;
    }
    // Leaders are spread: each group has one replica of the voters that it goes to.
    let mut fit: Vec<u64> = conf
        .voters
        .iter()
        .filter(|id| members.get(id).is_none_or(|row| row.wish == Wish::Member))
        .copied()
        .collect();
    fit.sort_unstable();
    let is_settled = group.led_since.is_some_and(|since| now - since >= SETTLED);
    let must_go = !fit.contains(&me) || is_full;
    let others: Vec<u64> = fit.iter().filter(|id| **id != me && is_close(id)).copied().collect();
    let preferred = fit.get(group.id as usize % fit.len().max(1)).copied();
    let target = match preferred {
        Some(target) if target != me && is_close(&target) && (is_settled || must_go) => Some(target),
        _ if must_go => others.get(now as usize / EVERY as usize % others.len().max(1)).copied(),
        _ => None,
    };
    if let Some(target) = target {
        group.node.transfer_leader(target);
    }
}
