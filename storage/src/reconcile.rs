//! The reconciler: what a deleted recording referred to is let go, in every shard.
//!
//! Deletion is committed first, as the recording's state; only then is an owner dropped from
//! the blocks of a shard, and only when it is dropped from all is the recording forgotten.
//! Each step can be made again, so whoever leads goes on where another has stopped; one that
//! comes late is refused if the id is in use again (see `peers`).

use crate::group::NotDone;
use crate::schema::{Key, RecordingRow, RecordingState};
use crate::service::StoreService;
use heddle_proto::RecordingId;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;

/// Deletions that were left unfinished are looked for so often.
const EVERY: Duration = Duration::from_secs(15);
/// A recording that owns blocks and was not opened in this time never will be.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

impl StoreService {
    /// Lets go what a deleted recording refers to, and forgets it.
    pub(crate) async fn reconcile(&self, id: RecordingId) -> Result<(), Status> {
        for shard in 1..=self.shards {
            self.peers.drop_owner(shard, id).await.map_err(|e| Status::unavailable(e.to_string()))?;
        }
        self.peers.forget(id).await.map_err(|e| Status::unavailable(e.to_string()))
    }

    /// Finishes what was left unfinished, for ever.
    pub(crate) async fn reconcile_all(self) {
        let mut strangers: HashMap<RecordingId, Instant> = HashMap::new();
        loop {
            tokio::time::sleep(EVERY).await;
            let Some(status) = self.replica.status().await else { return };
            for group in status.groups.iter().filter(|group| group.role == "leader" && group.group > 0) {
                if let Err(status) = self.reconcile_group(group.group, &mut strangers).await {
                    tracing::debug!(%status, group = group.group, "the reconciler tries again");
                }
            }
        }
    }

    async fn reconcile_group(
        &self,
        group: u32,
        strangers: &mut HashMap<RecordingId, Instant>,
    ) -> Result<(), Status> {
        let internal = |error: crate::error::Error| Status::internal(error.to_string());
        let recordings = self.catalog.recordings(group).map_err(internal)?;
        let deleted = recordings.iter().filter(|(_, row)| row.state == RecordingState::Deleted);
        for (id, _) in deleted {
            self.reconcile(*id).await?;
        }
        // Owners that no shard knows: an upload whose recording was never opened.
        let mut owners = BTreeSet::new();
        let span = Key::span_of(group, b'q', &[]);
        let visit = |key: &[u8], _: &[u8]| {
            owners.insert(Key::id_of(key));
            Ok(())
        };
        self.catalog.visit(span, visit).map_err(internal)?;
        for owner in owners {
            let shard = self.catalog.get::<u32>(&Key::placed(owner)).map_err(internal)?;
            let is_known = match shard {
                Some(shard) => {
                    let row = self.catalog.get::<RecordingRow>(&Key::recording(shard, owner));
                    row.map_err(internal)?.is_some()
                }
                None => false,
            };
            if is_known {
                strangers.remove(&owner);
            } else if strangers.entry(owner).or_insert_with(Instant::now).elapsed() > ABANDONED {
                // Committed as deleted first, so that it can't be opened meanwhile.
                self.peers.abandon(owner).await.map_err(|e| Status::unavailable(e.to_string()))?;
                strangers.remove(&owner);
            }
        }
        Ok(())
    }

    /// Whether a read of this group can be answered here.
    pub(crate) async fn read_index(&self, group: u32) -> Result<(), Status> {
        let patience = Instant::now() + crate::service::READ_PATIENCE;
        loop {
            match self.replica.read_index(group).await {
                Ok(()) => return Ok(()),
                Err(NotDone::Retry) if Instant::now() < patience => {}
                Err(other) => return Err(self.not_done(other)),
            }
        }
    }
}
