//! What replicas ask of each other: where a recording is to be, and that what is left of a
//! deleted one goes.
//!
//! An id can be used again once its deletion is over, and whoever finishes that may be late:
//! a second replica, or one that stood still. So each command that takes something away says
//! up to which entry of its group; the index is older than the look that found the recording
//! gone, and what counts on it since then is of the next recording, which keeps it.

use crate::apply::Outcome;
use crate::command::Command;
use crate::placement::placement;
use crate::schema::{Key, RecordingRow, RecordingState};
use crate::service::{StoreService, internal, recording_id};
use bytes::Bytes;
use heddle_proto::{RecordingId, v1};
use std::time::Duration;
use tonic::{Code, Status};

/// How long shard 0 is asked to place a recording: who opens one waits for it, and must not
/// lose patience before another replica of shard 0 was asked.
const PLACE_PATIENCE: Duration = Duration::from_secs(3);

impl StoreService {
    /// The shard of a recording. One that is not placed yet is, if `is_new`.
    pub(crate) async fn shard_of(&self, id: RecordingId, is_new: bool) -> Result<u32, Status> {
        let look = || self.catalog.get::<u32>(&Key::placed(id)).map_err(internal);
        if let Some(shard) = look()? {
            return Ok(shard);
        }
        if is_new {
            return self.have_placed(id).await;
        }
        // It may be committed and not applied here.
        self.read_index(0).await?;
        look()?.ok_or_else(|| Status::not_found(format!("no recording {id}")))
    }

    /// Has shard 0 place a recording, or note that its place is counted on.
    pub(crate) async fn have_placed(&self, id: RecordingId) -> Result<u32, Status> {
        let peers = self.peers.with_patience(PLACE_PATIENCE);
        // It goes on if the caller goes away, and so finds out who does not answer.
        let placing = tokio::spawn(async move { peers.place(id).await });
        let placed = placing.await.map_err(|error| Status::internal(error.to_string()))?;
        placed.map_err(|error| Status::unavailable(error.to_string()))
    }

    pub(crate) async fn place_here(&self, request: v1::PlaceRequest) -> Result<v1::PlaceReply, Status> {
        let recording = recording_id(&request.recording)?;
        let shard = placement(recording, self.shards);
        match self.propose(0, Command::Place { recording, shard }, Bytes::new()).await? {
            Outcome::Placed(shard) => Ok(v1::PlaceReply { shard }),
            _ => Err(Status::internal("place has another outcome")),
        }
    }

    pub(crate) async fn drop_owner_here(
        &self,
        request: v1::DropOwnerRequest,
    ) -> Result<v1::DropOwnerReply, Status> {
        let (shard, owner) = (self.shard(request.shard)?, recording_id(&request.owner)?);
        let until = self.applied(shard).await?;
        // Judged by what is committed: who is not deleted keeps what it refers to.
        let home = self.shard_of(owner, false).await?;
        self.read_index(home).await?;
        let row = self.catalog.get::<RecordingRow>(&Key::recording(home, owner)).map_err(internal)?;
        if row.is_none_or(|row| row.state != RecordingState::Deleted) {
            return Err(Status::failed_precondition("the recording is not deleted"));
        }
        self.propose(shard, Command::DropOwner { owner, until }, Bytes::new()).await?;
        Ok(v1::DropOwnerReply {})
    }

    pub(crate) async fn forget_here(&self, request: v1::ForgetRequest) -> Result<v1::ForgetReply, Status> {
        let recording = recording_id(&request.recording)?;
        match request.step.as_str() {
            "recording" => {
                let shard = self.shard_of(recording, false).await?;
                self.propose(shard, Command::Forget { recording }, Bytes::new()).await?;
            }
            "abandon" => {
                let shard = self.shard_of(recording, true).await?;
                self.propose(shard, Command::Abandon { recording }, Bytes::new()).await?;
            }
            _ => self.unplace(recording).await?,
        }
        Ok(v1::ForgetReply {})
    }

    async fn unplace(&self, recording: RecordingId) -> Result<(), Status> {
        let until = self.applied(0).await?;
        let home = match self.shard_of(recording, false).await {
            Ok(home) => home,
            Err(status) if status.code() == Code::NotFound => return Ok(()),
            Err(status) => return Err(status),
        };
        self.read_index(home).await?;
        let row = self.catalog.raw(&Key::recording(home, recording).0).map_err(internal)?;
        // One that is there needs its place, deleted or not.
        if row.is_none() {
            self.propose(0, Command::Unplace { recording, until }, Bytes::new()).await?;
        }
        Ok(())
    }

    /// How far a group is: all that was committed in it when asked is applied here.
    async fn applied(&self, group: u32) -> Result<u64, Status> {
        self.read_index(group).await?;
        Ok(self.catalog.group(group).map_err(internal)?.applied)
    }
}
