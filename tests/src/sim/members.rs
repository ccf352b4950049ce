//! Changes of the simulated cluster's members: a fourth replica comes, one is drained or goes,
//! and one that rot has stopped is replaced.

use super::replica::SimReplica;
use super::world::World;
use bytes::Bytes;
use heddle_storage::command::{Command, Proposal};
use heddle_storage::core::Input;
use heddle_storage::schema::Wish;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::oneshot;

impl World {
    /// A fourth replica comes, or one that is not needed goes; by an entry of shard 0.
    pub(super) fn change_members(&mut self, rng: &mut ChaCha8Rng) {
        let Some(leader) = self.leader_of_members() else { return };
        let (id, wish) = if self.replicas.len() == 3 {
            self.see("replicas added");
            self.add_replica(rng);
            (4, Wish::Member)
        } else if rng.gen_bool(0.5) {
            (rng.gen_range(1..=3), Wish::Drained)
        } else if rng.gen_bool(0.5) || self.rot.is_some() {
            // Where one may rot away, no other goes.
            (4, Wish::Member)
        } else {
            // Only one of the first three ever goes.
            (2, Wish::Removed)
        };
        if wish == Wish::Removed {
            self.see("replicas removed");
        }
        self.propose_member(leader, id, wish, rng);
    }

    /// A replica has stopped and says that it is to be replaced: it never comes back.
    pub(super) fn lose(&mut self, index: usize) {
        self.see("replicas stopped by rot");
        self.replicas[index].running = None;
        self.removed.push(index as u64 + 1);
    }

    /// Does what an operator does then: a new replica under a new id, and the old one's removal.
    /// Each is asked for until its row is there.
    pub(super) fn replace(&mut self, lost: u64, rng: &mut ChaCha8Rng) {
        let Some(leader) = self.leader_of_members() else { return };
        let known = self.rot.as_ref().and_then(|rot| rot.replacement);
        let new = known.unwrap_or_else(|| {
            self.see("replicas replaced");
            self.add_replica(rng)
        });
        if let Some(rot) = &mut self.rot {
            rot.replacement = Some(new);
        }
        let leading = self.replicas[leader].running.as_ref();
        let members = leading.and_then(|running| running.core.members().ok()).unwrap_or_default();
        for (id, wish) in [(new, Wish::Member), (lost, Wish::Removed)] {
            if members.get(&id).is_none_or(|row| row.wish != wish) {
                self.propose_member(leader, id, wish, rng);
            }
        }
    }

    fn leader_of_members(&self) -> Option<usize> {
        let leads = |r: &SimReplica| r.running.as_ref().is_some_and(|r| r.core.groups()[0].leads());
        self.replicas.iter().position(leads)
    }

    /// Starts one more, with an empty disk; its id.
    fn add_replica(&mut self, rng: &mut ChaCha8Rng) -> u64 {
        let index = self.replicas.len();
        let id = index as u64 + 1;
        self.replicas.push(SimReplica::new(id, vec![]));
        self.start(index, rng);
        id
    }

    fn propose_member(&mut self, leader: usize, id: u64, wish: Wish, rng: &mut ChaCha8Rng) {
        let command = Command::Member { id, address: format!("http://replica-{id}"), wish };
        let (reply, _) = oneshot::channel();
        self.input(leader, Input::Propose(0, Proposal { command, bulk: Bytes::new() }, reply));
        self.after(leader, rng);
    }
}
