//! The gRPC service: checks requests, proposes commands, answers reads.

use crate::apply::{ADDRESS_BYTES_MAX, Outcome, Refusal, TOKEN_BYTES_MAX};
use crate::catalog::Catalog;
use crate::client::StoreClient;
use crate::command::{BULK_BYTES_MAX, Command, Proposal};
use crate::error::Error;
use crate::group::{Answer, NotDone};
use crate::mend::Reader;
use crate::placement::block_shard;
use crate::replica::Handle;
use crate::schema::{BlockRow, Key, RecordingRow, RecordingState, Wish};
use crate::transport::Addresses;
use bytes::Bytes;
use heddle_proto::compress::{compress, decompress};
use heddle_proto::manifest::MANIFEST_BYTES_MAX;
use heddle_proto::v1::log_store_server::LogStore;
use heddle_proto::{Hash, RecordingId, v1};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Bytes that may be in the process between arrival and answer, over all writers.
const BUDGET_BYTES: usize = 128 << 20;
/// Largest block, decompressed.
pub const BLOCK_BYTES_MAX: usize = 1 << 20;
/// A read that lost its leader is asked again for so long.
pub(crate) const READ_PATIENCE: Duration = Duration::from_secs(5);
/// The metadata key that names the leader's address.
pub const LEADER_KEY: &str = "heddle-leader";
/// Largest command without its bulk.
const HEAD_BYTES_MAX: usize = 512 << 10;
/// A deletion waits so long for its blocks to be let go, less than a client for an answer; the
/// rest is done behind it.
const DELETE_PATIENCE: Duration = Duration::from_secs(4);

/// The store as seen by clients of this replica.
#[derive(Clone)]
pub struct StoreService {
    /// This replica.
    pub me: u64,
    /// The cluster's id.
    pub cluster: u64,
    /// How many shards hold recordings and blocks.
    pub shards: u32,
    /// The Raft loop.
    pub replica: Handle,
    /// Rows.
    pub catalog: Catalog,
    /// Bytes.
    pub reader: Reader,
    /// Addresses by replica.
    pub addresses: Arc<Addresses>,
    /// A client of the store itself, for what another shard's leader must do.
    pub peers: StoreClient,
    /// The byte budget.
    pub budget: Arc<Semaphore>,
}

pub(crate) type ReplyStream<T> = ReceiverStream<Result<T, Status>>;

impl StoreService {
    /// A full byte budget.
    pub fn new_budget() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(BUDGET_BYTES))
    }

    pub(crate) async fn propose(&self, group: u32, command: Command, bulk: Bytes) -> Result<Outcome, Status> {
        let _permit = self.reserve(bulk.len()).await?;
        if bulk.len() > BULK_BYTES_MAX {
            let what = format!("the request has {} bytes; at most {BULK_BYTES_MAX}", bulk.len());
            return Err(Status::invalid_argument(what));
        }
        let head = command.bytes();
        if head > HEAD_BYTES_MAX {
            let what = format!("the request's names and keys have {head} bytes; at most {HEAD_BYTES_MAX}");
            return Err(Status::invalid_argument(what));
        }
        let answer = self.replica.propose(group, Proposal { command, bulk }).await;
        self.outcome(answer)
    }

    /// In a cluster's first moments the replicas it was started with have no rows yet; the
    /// leader proposes those now and then. One that is told what to be before gets its row
    /// here: with that applied, no proposal of the leader's can follow what it is told.
    async fn know_founder(&self, id: u64) -> Result<(), Status> {
        self.read_index(0).await?;
        if self.catalog.members().map_err(internal)?.contains_key(&id) {
            return Ok(());
        }
        let status = self.replica.status().await.ok_or_else(|| self.not_done(NotDone::Stopped))?;
        let votes = status.groups.first().is_some_and(|meta| meta.voters.contains(&id));
        let Some(address) = self.addresses.get(id).filter(|_| votes) else { return Ok(()) };
        self.propose(0, Command::Member { id, address, wish: Wish::Member }, Bytes::new()).await?;
        Ok(())
    }

    pub(crate) async fn reserve(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Status> {
        let permits = u32::try_from(bytes.max(1)).unwrap_or(u32::MAX);
        let permit = self.budget.clone().acquire_many_owned(permits).await;
        permit.map_err(|_| Status::unavailable("the store is stopping"))
    }

    pub(crate) fn outcome(&self, answer: Answer) -> Result<Outcome, Status> {
        match answer {
            Ok(Outcome::Refused(refusal)) => Err(refusal_status(refusal)),
            Ok(outcome) => Ok(outcome),
            Err(not_done) => Err(self.not_done(not_done)),
        }
    }

    pub(crate) fn not_done(&self, not_done: NotDone) -> Status {
        match not_done {
            NotDone::NotLeader(leader) => {
                let mut status = Status::unavailable("this replica is not the leader");
                if let Some(address) = self.addresses.get(leader).and_then(|a| a.parse().ok()) {
                    status.metadata_mut().insert(LEADER_KEY, address);
                }
                status
            }
            NotDone::Retry => Status::unavailable("leadership is changing: ask again"),
            NotDone::Full => Status::resource_exhausted(
                "the store's disk has no room for more: free some, or delete recordings",
            ),
            NotDone::Stopped => Status::unavailable("this replica has stopped"),
        }
    }

    /// A group's number as a request has it.
    pub(crate) fn shard(&self, shard: u32) -> Result<u32, Status> {
        let is_one = (1..=self.shards).contains(&shard);
        is_one.then_some(shard).ok_or_else(|| {
            Status::invalid_argument(format!("there is no shard {shard}; there are {}", self.shards))
        })
    }

    pub(crate) fn recording_row(&self, shard: u32, id: RecordingId) -> Result<RecordingRow, Status> {
        let row = self.catalog.get::<RecordingRow>(&Key::recording(shard, id)).map_err(internal)?;
        row.filter(|row| row.state != RecordingState::Deleted)
            .ok_or_else(|| Status::not_found(format!("no recording {id}")))
    }

    async fn describe(
        &self,
        shard: u32,
        id: RecordingId,
        row: RecordingRow,
    ) -> Result<v1::RecordingRow, Status> {
        let snapshots = self.catalog.snapshots(shard, id).map_err(internal)?;
        let key = Key::recording(shard, id);
        Ok(v1::RecordingRow {
            recording: id.to_vec().into(),
            manifest: self.reader.read(&key.0, row.manifest).await.map_err(internal)?,
            state: match row.state {
                RecordingState::Recording => "recording",
                RecordingState::Sealed => "sealed",
                RecordingState::Cut => "cut",
                RecordingState::Deleted => "deleted",
            }
            .into(),
            committed_events: row.chain.events,
            committed_icount: row.chain.icount,
            chunks: row.chain.chunks,
            bytes_stored: row.chain.bytes_stored,
            bytes_raw: row.chain.bytes_raw,
            epoch: row.epoch,
            snapshots: snapshots
                .into_iter()
                .map(|snapshot| v1::SnapshotRow {
                    icount: snapshot.icount,
                    event: snapshot.event,
                    root: snapshot.root.to_vec().into(),
                    digest: snapshot.digest.to_vec().into(),
                })
                .collect(),
            last_chunk: row.chain.last_chunk.to_vec().into(),
            rewritten_from: row.rewritten_from.to_vec().into(),
            counts: row.chain.counts,
        })
    }

    pub(crate) async fn block(&self, hash: Hash) -> Result<v1::Block, Status> {
        let shard = block_shard(hash, self.shards);
        let key = Key::block(shard, hash);
        let row: Option<BlockRow> = self.catalog.get(&key).map_err(internal)?;
        let row = row.ok_or_else(|| Status::not_found(format!("no block {hash}")))?;
        let data = self.reader.read(&key.0, row.at).await.map_err(internal)?;
        Ok(v1::Block { hash: hash.to_vec().into(), data })
    }
}

pub(crate) fn internal(error: Error) -> Status {
    tracing::error!(%error, "a read failed");
    Status::data_loss(error.to_string())
}

fn refusal_status(refusal: Refusal) -> Status {
    match refusal {
        Refusal::Fenced { epoch } => Status::aborted(format!("FENCED: epoch {epoch} has taken over")),
        Refusal::Conflict(what) => Status::already_exists(format!("CONFLICT: {what}")),
        Refusal::Gap { events } => Status::out_of_range(events.to_string()),
        Refusal::Sealed => Status::failed_precondition("SEALED: the recording has ended"),
        Refusal::NotFound => Status::not_found("no such recording"),
        Refusal::BeingDeleted => Status::unavailable("its deletion is going on: ask again"),
        Refusal::Invalid(what) => Status::invalid_argument(what),
    }
}

pub(crate) fn recording_id(bytes: &[u8]) -> Result<RecordingId, Status> {
    RecordingId::from_slice(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

pub(crate) fn hash(bytes: &[u8]) -> Result<Hash, Status> {
    Hash::from_slice(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

#[tonic::async_trait]
impl LogStore for StoreService {
    type AppendStream = ReplyStream<v1::AppendReply>;
    type ReadStream = ReplyStream<v1::ReadReply>;
    type GetBlocksStream = ReplyStream<v1::Block>;
    type ScrubStream = ReplyStream<v1::ScrubReply>;

    async fn open(&self, request: Request<v1::OpenRequest>) -> Result<Response<v1::OpenReply>, Status> {
        let request = request.into_inner();
        let (recording, is_new) = (recording_id(&request.recording)?, !request.fence);
        if request.manifest.len() > MANIFEST_BYTES_MAX || request.token.len() > TOKEN_BYTES_MAX {
            return Err(Status::invalid_argument("manifest or token is too long"));
        }
        let shard = self.shard_of(recording, is_new).await?;
        let command = Command::Open { recording, token: request.token.to_vec(), fence: request.fence };
        match self.propose(shard, command, request.manifest).await? {
            Outcome::Opened { epoch, events, last_chunk } => {
                // The end of a deletion may have been about to take the place away: not from here on.
                if is_new && events == 0 {
                    self.have_placed(recording).await?;
                }
                let last_chunk = last_chunk.to_vec().into();
                Ok(Response::new(v1::OpenReply { epoch, committed_events: events, last_chunk }))
            }
            _ => Err(Status::internal("open has another outcome")),
        }
    }

    async fn append(
        &self,
        request: Request<Streaming<v1::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        Ok(Response::new(self.append_stream(request.into_inner())))
    }

    async fn seal(&self, request: Request<v1::SealRequest>) -> Result<Response<v1::SealReply>, Status> {
        let r = request.into_inner();
        let recording = recording_id(&r.recording)?;
        let shard = self.shard_of(recording, false).await?;
        let command = Command::Seal {
            recording,
            epoch: r.epoch,
            events: r.events,
            last_chunk: hash(&r.last_chunk)?,
            cut: r.cut,
        };
        match self.propose(shard, command, Bytes::new()).await? {
            Outcome::Committed { events } => Ok(Response::new(v1::SealReply { committed_events: events })),
            _ => Err(Status::internal("seal has another outcome")),
        }
    }

    async fn adopt(&self, request: Request<v1::AdoptRequest>) -> Result<Response<v1::AdoptReply>, Status> {
        let r = request.into_inner();
        let (recording, epoch) = (recording_id(&r.recording)?, r.epoch);
        let command = Command::Adopt { recording, epoch, old: hash(&r.old)?, new: hash(&r.new)? };
        let shard = self.shard_of(recording, false).await?;
        self.propose(shard, command, Bytes::new()).await?;
        Ok(Response::new(v1::AdoptReply {}))
    }

    async fn add_snapshot(
        &self,
        request: Request<v1::AddSnapshotRequest>,
    ) -> Result<Response<v1::AddSnapshotReply>, Status> {
        let r = request.into_inner();
        let row = r.snapshot.ok_or_else(|| Status::invalid_argument("no snapshot given"))?;
        let (recording, root) = (recording_id(&r.recording)?, hash(&row.root)?);
        let shard = self.shard_of(recording, false).await?;
        // What a recording owns stays until it is deleted, so this can't change before the entry.
        let home = block_shard(root, self.shards);
        let owns = || self.catalog.owns(home, root, recording).map_err(internal);
        if !owns()? {
            self.read_index(home).await?;
            if !owns()? {
                let what = "the snapshot's root block is not stored for this recording";
                return Err(Status::invalid_argument(what));
            }
        }
        let (icount, event, digest) = (row.icount, row.event, hash(&row.digest)?);
        let command = Command::AddSnapshot { recording, epoch: r.epoch, icount, event, root, digest };
        self.propose(shard, command, Bytes::new()).await?;
        Ok(Response::new(v1::AddSnapshotReply {}))
    }

    async fn delete(&self, request: Request<v1::DeleteRequest>) -> Result<Response<v1::DeleteReply>, Status> {
        let recording = recording_id(&request.into_inner().recording)?;
        let shard = self.shard_of(recording, false).await?;
        self.propose(shard, Command::Delete { recording }, Bytes::new()).await?;
        // Deleted it is; its blocks go now, or later by whoever leads then.
        let service = self.clone();
        let letting_go = tokio::spawn(async move { service.reconcile(recording).await });
        if let Ok(Ok(Err(status))) = tokio::time::timeout(DELETE_PATIENCE, letting_go).await {
            tracing::debug!(%status, %recording, "its blocks are let go later");
        }
        Ok(Response::new(v1::DeleteReply {}))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListReply>, Status> {
        let mut waiting = tokio::task::JoinSet::new();
        for shard in 1..=self.shards {
            let service = self.clone();
            waiting.spawn(async move { service.read_index(shard).await });
        }
        while let Some(ready) = waiting.join_next().await {
            ready.map_err(|error| Status::internal(error.to_string()))??;
        }
        let mut recordings = vec![];
        for shard in 1..=self.shards {
            for (id, row) in self.catalog.recordings(shard).map_err(internal)? {
                if row.state != RecordingState::Deleted {
                    recordings.push(self.describe(shard, id, row).await?);
                }
            }
        }
        Ok(Response::new(v1::ListReply { recordings }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::RecordingRow>, Status> {
        let id = recording_id(&request.into_inner().recording)?;
        let shard = self.shard_of(id, false).await?;
        self.read_index(shard).await?;
        let row = self.recording_row(shard, id)?;
        Ok(Response::new(self.describe(shard, id, row).await?))
    }

    async fn read(&self, request: Request<v1::ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        self.read_stream(request.into_inner()).await.map(Response::new)
    }

    async fn pin_blocks(
        &self,
        request: Request<v1::PinRequest>,
    ) -> Result<Response<v1::BlockHashes>, Status> {
        let r = request.into_inner();
        let (shard, owner) = (self.shard(r.shard)?, recording_id(&r.owner)?);
        let hashes: Result<Vec<Hash>, Status> = r.hashes.iter().map(|bytes| hash(bytes)).collect();
        let hashes = hashes?;
        if hashes.len() > PIN_MAX || hashes.iter().any(|hash| block_shard(*hash, self.shards) != shard) {
            let what = format!("at most {PIN_MAX} hashes, all of shard {shard}");
            return Err(Status::invalid_argument(what));
        }
        match self.propose(shard, Command::Pin { owner, hashes }, Bytes::new()).await? {
            Outcome::Wanted(wanted) => {
                let hashes = r.hashes.into_iter().zip(wanted).filter(|(_, wanted)| *wanted);
                Ok(Response::new(v1::BlockHashes { hashes: hashes.map(|(hash, _)| hash).collect() }))
            }
            _ => Err(Status::internal("pin has another outcome")),
        }
    }

    async fn put_blocks(
        &self,
        request: Request<v1::PutBlocksRequest>,
    ) -> Result<Response<v1::PutBlocksReply>, Status> {
        let r = request.into_inner();
        let (shard, owner, blocks) = (self.shard(r.shard)?, recording_id(&r.owner)?, r.blocks);
        let total: usize = blocks.iter().map(|block| block.data.len()).sum();
        if total > BULK_BYTES_MAX {
            return Err(Status::invalid_argument(format!(
                "{total} bytes of blocks; at most {BULK_BYTES_MAX}"
            )));
        }
        let mut rows = vec![];
        let mut bulk = Vec::with_capacity(total);
        for block in blocks {
            let name = hash(&block.hash)?;
            if block_shard(name, self.shards) != shard {
                return Err(Status::invalid_argument(format!("block {name} is not of shard {shard}")));
            }
            let raw = decompress(&block.data, BLOCK_BYTES_MAX).ok_or_else(|| {
                Status::invalid_argument(format!(
                    "block {name} does not decompress to at most {BLOCK_BYTES_MAX} bytes"
                ))
            })?;
            if Hash::of(&raw) != name {
                return Err(Status::invalid_argument(format!("block {name} has other bytes")));
            }
            rows.push((name, block.data.len() as u32, raw.len() as u32));
            bulk.extend_from_slice(&block.data);
        }
        self.propose(shard, Command::PutBlocks { owner, blocks: rows }, bulk.into()).await?;
        Ok(Response::new(v1::PutBlocksReply {}))
    }

    async fn get_blocks(
        &self,
        request: Request<v1::BlockHashes>,
    ) -> Result<Response<Self::GetBlocksStream>, Status> {
        let hashes: Result<Vec<Hash>, Status> =
            request.into_inner().hashes.iter().map(|bytes| hash(bytes)).collect();
        let hashes = hashes?;
        // A block that is not here yet may be committed and not applied.
        let mut missing = std::collections::BTreeSet::new();
        for hash in &hashes {
            let shard = block_shard(*hash, self.shards);
            if self.catalog.raw(&Key::block(shard, *hash).0).map_err(internal)?.is_none() {
                missing.insert(shard);
            }
        }
        for shard in missing {
            self.read_index(shard).await?;
        }
        let (replies, stream) = mpsc::channel(64);
        let (service, runtime) = (self.clone(), tokio::runtime::Handle::current());
        tokio::task::spawn_blocking(move || {
            for hash in hashes {
                let block = runtime.block_on(service.block(hash));
                let is_error = block.is_err();
                if replies.blocking_send(block).is_err() || is_error {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn meta_acquire(
        &self,
        request: Request<v1::MetaAcquireRequest>,
    ) -> Result<Response<v1::MetaAcquireReply>, Status> {
        let holder = request.into_inner().holder;
        match self.propose(0, Command::MetaAcquire { holder }, Bytes::new()).await? {
            Outcome::Epoch(epoch) => Ok(Response::new(v1::MetaAcquireReply { epoch })),
            _ => Err(Status::internal("acquire has another outcome")),
        }
    }

    async fn meta_write(
        &self,
        request: Request<v1::MetaWriteRequest>,
    ) -> Result<Response<v1::MetaWriteReply>, Status> {
        let r = request.into_inner();
        let mut puts = vec![];
        let mut bulk = vec![];
        for row in r.puts {
            if row.key.len() > 256 {
                return Err(Status::invalid_argument("a key is longer than 256 bytes"));
            }
            puts.push((row.key, row.value.len() as u32));
            bulk.extend_from_slice(&row.value);
        }
        if bulk.len() > BULK_BYTES_MAX {
            return Err(Status::invalid_argument("rows are too long"));
        }
        let command = Command::MetaWrite { epoch: r.epoch, puts, deletes: r.deletes };
        self.propose(0, command, bulk.into()).await?;
        Ok(Response::new(v1::MetaWriteReply {}))
    }

    async fn meta_scan(
        &self,
        request: Request<v1::MetaScanRequest>,
    ) -> Result<Response<v1::MetaScanReply>, Status> {
        self.read_index(0).await?;
        let mut rows = vec![];
        for (key, at) in self.catalog.meta(&request.into_inner().prefix).map_err(internal)? {
            let value = self.reader.read(&Key::meta(&key).0, at).await.map_err(internal)?;
            rows.push(v1::MetaRow { key, value });
        }
        Ok(Response::new(v1::MetaScanReply { rows }))
    }

    async fn replicas(&self, _: Request<v1::ReplicasRequest>) -> Result<Response<v1::ReplicasReply>, Status> {
        let status = self.replica.status().await.ok_or_else(|| self.not_done(NotDone::Stopped))?;
        let members = self.catalog.members().map_err(internal)?;
        let row = |id: u64, address: String| v1::ReplicaRow {
            id,
            address,
            wish: match members.get(&id).map(|row| row.wish) {
                Some(Wish::Removed) => "removed",
                Some(Wish::Drained) => "drained",
                Some(Wish::Member) | None => "member",
            }
            .into(),
            ..Default::default()
        };
        let addresses = self.addresses.all();
        let mut me = row(status.id, addresses.get(&status.id).cloned().unwrap_or_default());
        if let Some(meta) = status.groups.first() {
            (me.role, me.term) = (meta.role.into(), meta.term);
            (me.committed, me.applied) = (meta.committed, meta.applied);
        }
        me.journal_bytes = status.journal_bytes;
        me.live_bytes = status.live_bytes;
        me.full = status.is_full;
        let leader = status.groups.first().map_or(0, |meta| meta.leader);
        me.shards = status
            .groups
            .into_iter()
            .map(|group| v1::ShardRow {
                shard: group.group,
                role: group.role.into(),
                leader: group.leader,
                term: group.term,
                committed: group.committed,
                applied: group.applied,
                first: group.first,
                voters: group.voters,
                learners: group.learners,
                fetching: group.is_fetching,
            })
            .collect();
        let peers = addresses.into_iter().filter(|(id, _)| *id != status.id);
        let peers = peers.map(|(id, address)| row(id, address)).collect();
        let (cluster, shards) = (self.cluster, self.shards);
        Ok(Response::new(v1::ReplicasReply { me: Some(me), leader, peers, cluster, shards }))
    }

    async fn set_member(
        &self,
        request: Request<v1::SetMemberRequest>,
    ) -> Result<Response<v1::SetMemberReply>, Status> {
        let r = request.into_inner();
        let wish = match r.wish.as_str() {
            "member" => Wish::Member,
            "drained" => Wish::Drained,
            "removed" => Wish::Removed,
            other => return Err(Status::invalid_argument(format!("{other} is nothing a replica can be"))),
        };
        if r.id == 0 || r.address.len() > ADDRESS_BYTES_MAX {
            return Err(Status::invalid_argument("the id is zero, or the address too long"));
        }
        if r.address.is_empty() {
            self.know_founder(r.id).await?;
        }
        let command = Command::Member { id: r.id, address: r.address, wish };
        self.propose(0, command, Bytes::new()).await?;
        Ok(Response::new(v1::SetMemberReply {}))
    }

    async fn scrub(&self, request: Request<v1::ScrubRequest>) -> Result<Response<Self::ScrubStream>, Status> {
        let rate = request.into_inner().bytes_per_second;
        let (reports, stream) = mpsc::channel(4);
        let reader = self.reader.clone();
        tokio::spawn(async move { crate::scrub::scrub(&reader, rate, &reports).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn place(&self, request: Request<v1::PlaceRequest>) -> Result<Response<v1::PlaceReply>, Status> {
        self.place_here(request.into_inner()).await.map(Response::new)
    }

    async fn drop_owner(
        &self,
        request: Request<v1::DropOwnerRequest>,
    ) -> Result<Response<v1::DropOwnerReply>, Status> {
        self.drop_owner_here(request.into_inner()).await.map(Response::new)
    }

    async fn forget(&self, request: Request<v1::ForgetRequest>) -> Result<Response<v1::ForgetReply>, Status> {
        self.forget_here(request.into_inner()).await.map(Response::new)
    }
}

/// Hashes of one request to pin.
pub const PIN_MAX: usize = 4096;
/// A snapshot's pages wait for it: of a booting Linux's, level 1 takes half as long again and
/// makes them 5 % smaller.
const BLOCK_LEVEL: i32 = -1;

/// Compresses a block for the wire and the store.
pub fn compress_block(bytes: &[u8]) -> Bytes {
    Bytes::from(compress(bytes, BLOCK_LEVEL))
}
