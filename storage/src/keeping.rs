//! When the keeper is given what to do, and what follows from what it has done.

use crate::core::{Core, Output};
use crate::error::Error;
use crate::group::Group;
use crate::install::{Fetch, View};
use crate::keeper::{Checkpoint, Job, Kept};
use crate::schema::GroupRow;
use protobuf::Message as _;
use raft::eraftpb::ConfState;
use std::collections::{BTreeMap, BTreeSet};

/// A segment whose live part is below a half of it is worth moving.
const LIVE_PART: u64 = 2;
/// Bytes that one pass moves, in segments.
const MOVED_SEGMENTS: u64 = 4;
/// A checkpoint is written after so many times its own size, at least.
const CHECKPOINT_RATIO: u64 = 24;

/// On a full disk a checkpoint is tried every so many ticks.
const FULL_TICKS: u64 = 100;

impl Core {
    /// Hands the keeper a job, if one is due.
    pub(crate) fn keep(&mut self) {
        if self.is_keeping {
            return;
        }
        let (rows, bytes) = self.catalog.waiting();
        let is_old = self.now - self.last_flush >= self.config.flush_ticks && rows > 0;
        let due = self.config.checkpoint_bytes.max(CHECKPOINT_RATIO * self.checkpoint_size);
        let is_checkpoint = (self.since_checkpoint >= due || self.is_full)
            && (!self.is_full || self.frees_room())
            && !self.groups.iter().any(|group| group.fetch.as_ref().is_some_and(Fetch::is_installing));
        let views: Vec<u32> = std::mem::take(&mut self.views_asked)
            .into_iter()
            .filter(|id| !self.views.contains_key(id))
            .collect();
        let is_due = rows >= self.config.flush_rows || bytes > 8 << 20 || is_old;
        if !is_due && !is_checkpoint && views.is_empty() {
            return;
        }
        let Some(changes) = self.catalog.freeze() else { return };
        self.is_keeping = true;
        self.last_flush = self.now;
        let views = views.into_iter().map(|id| (id, self.groups[id as usize].row())).collect();
        let mut job = Job { changes, views, victims: BTreeSet::new(), checkpoint: None };
        if is_checkpoint {
            let rows: Vec<(u32, GroupRow)> =
                self.groups.iter().map(|group| (group.id, group.row())).collect();
            let current = self.newest_segment;
            let first_behind = |group: &Group| group.node.store().segment_from(group.applied.0 + 1);
            let scan_from = self.groups.iter().filter_map(first_behind).fold(current, u64::min);
            let first_kept = |group: &Group| group.node.store().segment_from(0);
            let below = self.groups.iter().filter_map(first_kept).fold(scan_from, u64::min);
            let live = self.catalog.live();
            // What is fetched has no row yet; what is sent has rows elsewhere.
            let is_fetching = self.groups.iter().any(|group| group.fetch.is_some());
            let may_recycle = self.views.is_empty() && job.views.is_empty() && !is_fetching;
            // On a full disk nothing is moved: what is dead is given up, and that is room.
            if !self.is_moved && !self.is_full {
                job.victims = self.victims(below, &live);
                self.is_moved = true;
            }
            if job.victims.is_empty() {
                self.checkpoint_number += 1;
                let number = self.checkpoint_number;
                self.is_moved = false;
                self.since_checkpoint = 0;
                job.checkpoint =
                    Some(Checkpoint { number, groups: rows, scan_from, below, may_recycle, live });
            }
        }
        self.outputs.push(Output::Keep(job));
    }

    /// Whether a checkpoint would make room on a full disk, and has room itself.
    fn frees_room(&self) -> bool {
        let live = self.catalog.live();
        let current = self.newest_segment;
        let numbers = self.segments.numbers().into_iter();
        let is_dead = |number: &u64| *number < current && live.get(number).copied().unwrap_or(0) == 0;
        self.now % FULL_TICKS == 0
            && self.checkpoint_size < self.segments.segment_bytes() / 8
            && numbers.filter(is_dead).count() > 0
    }

    /// Segments that are mostly dead, the emptiest first.
    fn victims(&self, below: u64, live: &BTreeMap<u64, u64>) -> BTreeSet<u64> {
        let whole = self.segments.segment_bytes();
        let numbers = self.segments.numbers().into_iter().filter(|number| *number < below);
        let mut mostly_dead: Vec<(u64, u64)> = numbers
            .map(|number| (live.get(&number).copied().unwrap_or(0), number))
            .filter(|(bytes, _)| *bytes > 0 && *bytes < whole / LIVE_PART)
            .collect();
        mostly_dead.sort_unstable();
        let mut bytes = 0;
        let within = |(live, _): &(u64, u64)| {
            bytes += live;
            bytes <= MOVED_SEGMENTS * whole
        };
        mostly_dead.into_iter().take_while(within).map(|(_, number)| number).collect()
    }

    pub(crate) fn take_kept(&mut self, kept: Kept) -> Result<(), Error> {
        self.is_keeping = false;
        self.since_checkpoint += if kept.checkpoint.is_some() { 0 } else { kept.bytes };
        for (id, row, rows) in kept.views {
            let mut conf = ConfState::default();
            let _ = conf.merge_from_bytes(&row.conf);
            let group = &mut self.groups[id as usize];
            group.node.mut_store().set_offer(Some((row.applied, row.term, conf.clone())));
            let view = View {
                index: row.applied,
                term: row.term,
                conf,
                rows: rows.into(),
                used: self.now,
                pulled: 0,
            };
            self.views.insert(id, view);
        }
        if !kept.moved_rows.is_empty() {
            let mut rows = self.catalog.begin();
            for key in &kept.moved_rows {
                rows.relocate(key, &kept.moved)?;
            }
        }
        if let Some(groups) = kept.checkpoint {
            self.checkpoint_size = kept.bytes;
            let retain = self.config.retain_bytes / self.groups.len() as u64;
            for (id, row) in groups {
                let group = &mut self.groups[id as usize];
                let slowest = slowest_follower(group);
                let log = group.node.mut_store();
                // Followers that lag a little are sent entries; the others, a snapshot.
                let mut to = row.applied.min(slowest);
                if log.bytes_behind(to) > retain {
                    to = row.applied;
                }
                // Who is being sent a snapshot goes on from its index.
                if let Some(view) = self.views.get(&id) {
                    to = to.min(view.index);
                }
                log.truncate(to);
            }
        }
        Ok(())
    }
}

/// The index that all followers heard of lately have.
fn slowest_follower(group: &Group) -> u64 {
    if !group.leads() {
        return u64::MAX;
    }
    let active = group.node.raft.prs().iter().filter(|(_, progress)| progress.recent_active);
    active.map(|(_, progress)| progress.matched).min().unwrap_or(u64::MAX)
}
