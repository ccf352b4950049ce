//! The gRPC service: checks requests, proposes commands, answers reads.

use crate::apply::{Outcome, Refusal};
use crate::catalog::{BlockRow, Catalog, Key, RecordingRow, RecordingState};
use crate::command::{BULK_BYTES_MAX, Command};
use crate::error::Error;
use crate::journal::{DATA_BYTES_MAX, JournalReader};
use crate::replica::{Answer, Handle, Input, NotDone};
use bytes::Bytes;
use heddle_proto::compress::{compress, decompress};
use heddle_proto::manifest::MANIFEST_BYTES_MAX;
use heddle_proto::v1::log_store_server::LogStore;
use heddle_proto::{Chunk, Hash, RecordingId, v1};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Bytes that may be in the process between arrival and answer, over all writers.
const BUDGET_BYTES: usize = 128 << 20;
/// Bytes one writer may have in flight: the credit that the store grants.
const CREDIT_BYTES: u64 = 16 << 20;
/// Chunks one append stream may have in flight.
const IN_FLIGHT: usize = 256;
/// Largest block, decompressed.
pub const BLOCK_BYTES_MAX: usize = 1 << 20;
/// A read that lost its leader is asked again for so long.
const READ_PATIENCE: Duration = Duration::from_secs(5);
/// The metadata key that names the leader's address.
pub const LEADER_KEY: &str = "heddle-leader";

/// The store as seen by clients of this replica.
#[derive(Clone)]
pub struct StoreService {
    /// The Raft loop.
    pub replica: Handle,
    /// Rows.
    pub catalog: Catalog,
    /// Bytes.
    pub journal: JournalReader,
    /// Addresses by replica.
    pub peers: Arc<BTreeMap<u64, String>>,
    /// The byte budget.
    pub budget: Arc<Semaphore>,
}

type ReplyStream<T> = ReceiverStream<Result<T, Status>>;

impl StoreService {
    /// A full byte budget.
    pub fn new_budget() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(BUDGET_BYTES))
    }

    async fn propose(&self, command: Command, bulk: &[u8]) -> Result<Outcome, Status> {
        let _permit = self.reserve(bulk.len()).await?;
        let data = command.encode(bulk);
        if data.len() > DATA_BYTES_MAX {
            let what = format!("the request has {} bytes; at most {DATA_BYTES_MAX}", data.len());
            return Err(Status::invalid_argument(what));
        }
        let answer = self.replica.propose(data).await;
        self.outcome(answer)
    }

    async fn reserve(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Status> {
        let permits = u32::try_from(bytes.max(1)).unwrap_or(u32::MAX);
        let permit = self.budget.clone().acquire_many_owned(permits).await;
        permit.map_err(|_| Status::unavailable("the store is stopping"))
    }

    fn outcome(&self, answer: Answer) -> Result<Outcome, Status> {
        match answer {
            Ok(Outcome::Refused(refusal)) => Err(refusal_status(refusal)),
            Ok(outcome) => Ok(outcome),
            Err(not_done) => Err(self.not_done(not_done)),
        }
    }

    fn not_done(&self, not_done: NotDone) -> Status {
        match not_done {
            NotDone::NotLeader(leader) => {
                let mut status = Status::unavailable("this replica is not the leader");
                if let Some(address) = self.peers.get(&leader).and_then(|a| a.parse().ok()) {
                    status.metadata_mut().insert(LEADER_KEY, address);
                }
                status
            }
            NotDone::Retry => Status::unavailable("leadership is changing: ask again"),
            NotDone::Stopped => Status::unavailable("this replica has stopped"),
        }
    }

    /// Waits until all that was committed is applied here.
    async fn read_index(&self) -> Result<(), Status> {
        let patience = tokio::time::Instant::now() + READ_PATIENCE;
        loop {
            match self.replica.read_index().await {
                Ok(()) => return Ok(()),
                Err(NotDone::Retry) if tokio::time::Instant::now() < patience => {}
                Err(other) => return Err(self.not_done(other)),
            }
        }
    }

    fn row(&self, id: RecordingId) -> Result<v1::RecordingRow, Status> {
        let row = self.catalog.get(&Key::recording(id)).map_err(internal)?;
        let row: RecordingRow = row.ok_or_else(|| Status::not_found(format!("no recording {id}")))?;
        self.describe(id, row)
    }

    fn describe(&self, id: RecordingId, row: RecordingRow) -> Result<v1::RecordingRow, Status> {
        let snapshots = self.catalog.snapshots(id).map_err(internal)?;
        Ok(v1::RecordingRow {
            recording: id.to_vec().into(),
            manifest: self.journal.read(row.manifest).map_err(internal)?,
            state: match row.state {
                RecordingState::Recording => "recording",
                RecordingState::Sealed => "sealed",
                RecordingState::Cut => "cut",
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

    fn block(&self, hash: Hash) -> Result<v1::Block, Status> {
        let row: Option<BlockRow> = self.catalog.get(&Key::block(hash)).map_err(internal)?;
        let row = row.ok_or_else(|| Status::not_found(format!("no block {hash}")))?;
        let data = self.journal.read(row.at).map_err(internal)?;
        Ok(v1::Block { hash: hash.to_vec().into(), data })
    }
}

fn internal(error: Error) -> Status {
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
        Refusal::Invalid(what) => Status::invalid_argument(what),
    }
}

fn recording_id(bytes: &[u8]) -> Result<RecordingId, Status> {
    RecordingId::from_slice(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn hash(bytes: &[u8]) -> Result<Hash, Status> {
    Hash::from_slice(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

#[tonic::async_trait]
impl LogStore for StoreService {
    type AppendStream = ReplyStream<v1::AppendReply>;
    type ReadStream = ReplyStream<v1::ReadReply>;
    type GetBlocksStream = ReplyStream<v1::Block>;

    async fn open(&self, request: Request<v1::OpenRequest>) -> Result<Response<v1::OpenReply>, Status> {
        let request = request.into_inner();
        let recording = recording_id(&request.recording)?;
        if request.manifest.len() > MANIFEST_BYTES_MAX || request.token.len() > 64 {
            return Err(Status::invalid_argument("manifest or token is too long"));
        }
        let command = Command::Open { recording, token: request.token.to_vec(), fence: request.fence };
        match self.propose(command, &request.manifest).await? {
            Outcome::Opened { epoch, events, last_chunk } => Ok(Response::new(v1::OpenReply {
                epoch,
                committed_events: events,
                last_chunk: last_chunk.to_vec().into(),
            })),
            _ => Err(Status::internal("open has another outcome")),
        }
    }

    async fn append(
        &self,
        request: Request<Streaming<v1::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let mut requests = request.into_inner();
        let (replies, stream) = mpsc::channel(IN_FLIGHT);
        let (sender, mut proposed) =
            mpsc::channel::<(oneshot::Receiver<Answer>, OwnedSemaphorePermit)>(IN_FLIGHT);
        let service = self.clone();
        let failed = replies.clone();
        tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                let step = async {
                    let request = request?;
                    let recording = recording_id(&request.recording)?;
                    let permit = service.reserve(request.chunk.len()).await?;
                    // Header, length and payload hash, before anything is proposed.
                    let chunk = Chunk::parse(request.chunk)
                        .map_err(|error| Status::invalid_argument(error.to_string()))?;
                    let epoch = request.epoch;
                    let command = match request.rewrites {
                        false => Command::Append { recording, epoch },
                        true => Command::Rewrite { recording, epoch },
                    };
                    let data = command.encode(&chunk.bytes);
                    let (answer, receiver) = oneshot::channel();
                    service.replica.send(Input::Propose(data, answer));
                    Ok::<_, Status>((receiver, permit))
                };
                match step.await {
                    Ok(pending) => {
                        if sender.send(pending).await.is_err() {
                            return;
                        }
                    }
                    Err(status) => {
                        let _ = failed.send(Err(status)).await;
                        return;
                    }
                }
            }
        });
        let service = self.clone();
        tokio::spawn(async move {
            while let Some((answer, permit)) = proposed.recv().await {
                let answer = answer.await.unwrap_or(Err(NotDone::Stopped));
                drop(permit);
                let reply = service.outcome(answer).map(|outcome| match outcome {
                    Outcome::Committed { events } => {
                        v1::AppendReply { committed_events: events, credit_bytes: CREDIT_BYTES }
                    }
                    _ => v1::AppendReply::default(),
                });
                let is_error = reply.is_err();
                if replies.send(reply).await.is_err() || is_error {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn seal(&self, request: Request<v1::SealRequest>) -> Result<Response<v1::SealReply>, Status> {
        let r = request.into_inner();
        let command = Command::Seal {
            recording: recording_id(&r.recording)?,
            epoch: r.epoch,
            events: r.events,
            last_chunk: hash(&r.last_chunk)?,
            cut: r.cut,
        };
        match self.propose(command, &[]).await? {
            Outcome::Committed { events } => Ok(Response::new(v1::SealReply { committed_events: events })),
            _ => Err(Status::internal("seal has another outcome")),
        }
    }

    async fn adopt(&self, request: Request<v1::AdoptRequest>) -> Result<Response<v1::AdoptReply>, Status> {
        let r = request.into_inner();
        let (recording, epoch) = (recording_id(&r.recording)?, r.epoch);
        let command = Command::Adopt { recording, epoch, old: hash(&r.old)?, new: hash(&r.new)? };
        self.propose(command, &[]).await?;
        Ok(Response::new(v1::AdoptReply {}))
    }

    async fn add_snapshot(
        &self,
        request: Request<v1::AddSnapshotRequest>,
    ) -> Result<Response<v1::AddSnapshotReply>, Status> {
        let r = request.into_inner();
        let row = r.snapshot.ok_or_else(|| Status::invalid_argument("no snapshot given"))?;
        let command = Command::AddSnapshot {
            recording: recording_id(&r.recording)?,
            epoch: r.epoch,
            icount: row.icount,
            event: row.event,
            root: hash(&row.root)?,
            digest: hash(&row.digest)?,
        };
        self.propose(command, &[]).await?;
        Ok(Response::new(v1::AddSnapshotReply {}))
    }

    async fn delete(&self, request: Request<v1::DeleteRequest>) -> Result<Response<v1::DeleteReply>, Status> {
        let recording = recording_id(&request.into_inner().recording)?;
        self.propose(Command::Delete { recording }, &[]).await?;
        Ok(Response::new(v1::DeleteReply {}))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListReply>, Status> {
        self.read_index().await?;
        let rows = self.catalog.recordings().map_err(internal)?;
        let recordings: Result<Vec<_>, Status> =
            rows.into_iter().map(|(id, row)| self.describe(id, row)).collect();
        Ok(Response::new(v1::ListReply { recordings: recordings? }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::RecordingRow>, Status> {
        self.read_index().await?;
        Ok(Response::new(self.row(recording_id(&request.into_inner().recording)?)?))
    }

    async fn read(&self, request: Request<v1::ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let r = request.into_inner();
        let id = recording_id(&r.recording)?;
        self.read_index().await?;
        self.row(id)?;
        let (replies, stream) = mpsc::channel(4);
        let service = self.clone();
        tokio::task::spawn_blocking(move || {
            let mut from = r.from_event;
            let to = if r.to_event == 0 { u64::MAX } else { r.to_event };
            while from < to {
                let rows = match service.catalog.chunks_from(id, from, 64) {
                    Ok(rows) => rows,
                    Err(error) => return drop(replies.blocking_send(Err(internal(error)))),
                };
                let before = from;
                for (first, row) in rows.into_iter().filter(|(first, _)| *first < to) {
                    let end = first + u64::from(row.events);
                    if end <= from {
                        continue;
                    }
                    from = end;
                    let chunk = service.journal.read(row.at).map_err(internal).and_then(|bytes| {
                        Chunk::parse(bytes).map_err(|error| {
                            Status::data_loss(format!("chunk at event {first} of {id}: {error}"))
                        })
                    });
                    let reply = chunk.map(|chunk| v1::ReadReply { chunk: chunk.bytes });
                    let is_error = reply.is_err();
                    if replies.blocking_send(reply).is_err() || is_error {
                        return;
                    }
                }
                if from == before {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn missing_blocks(
        &self,
        request: Request<v1::BlockHashes>,
    ) -> Result<Response<v1::BlockHashes>, Status> {
        let mut missing = vec![];
        for bytes in request.into_inner().hashes {
            let key = Key::block(hash(&bytes)?);
            if self.catalog.get::<BlockRow>(&key).map_err(internal)?.is_none() {
                missing.push(bytes);
            }
        }
        Ok(Response::new(v1::BlockHashes { hashes: missing }))
    }

    async fn put_blocks(
        &self,
        request: Request<v1::PutBlocksRequest>,
    ) -> Result<Response<v1::PutBlocksReply>, Status> {
        let blocks = request.into_inner().blocks;
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
        self.propose(Command::PutBlocks { blocks: rows }, &bulk).await?;
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
        let all_here = hashes
            .iter()
            .all(|hash| self.catalog.get::<BlockRow>(&Key::block(*hash)).is_ok_and(|row| row.is_some()));
        if !all_here {
            self.read_index().await?;
        }
        let (replies, stream) = mpsc::channel(64);
        let service = self.clone();
        tokio::task::spawn_blocking(move || {
            for hash in hashes {
                let block = service.block(hash);
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
        match self.propose(Command::MetaAcquire { holder }, &[]).await? {
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
        self.propose(command, &bulk).await?;
        Ok(Response::new(v1::MetaWriteReply {}))
    }

    async fn meta_scan(
        &self,
        request: Request<v1::MetaScanRequest>,
    ) -> Result<Response<v1::MetaScanReply>, Status> {
        self.read_index().await?;
        let rows = self.catalog.meta(&request.into_inner().prefix).map_err(internal)?;
        let rows: Result<Vec<_>, Status> = rows
            .into_iter()
            .map(|(key, at)| Ok(v1::MetaRow { key, value: self.journal.read(at).map_err(internal)? }))
            .collect();
        Ok(Response::new(v1::MetaScanReply { rows: rows? }))
    }

    async fn replicas(&self, _: Request<v1::ReplicasRequest>) -> Result<Response<v1::ReplicasReply>, Status> {
        let status = self.replica.status().await.ok_or_else(|| self.not_done(NotDone::Stopped))?;
        let address = |id: &u64| self.peers.get(id).cloned().unwrap_or_default();
        let me = v1::ReplicaRow {
            id: status.id,
            address: address(&status.id),
            role: status.role.into(),
            term: status.term,
            committed: status.committed,
            applied: status.applied,
            journal_bytes: status.journal_bytes,
        };
        let peers = self.peers.iter().filter(|(id, _)| **id != status.id);
        let peers = peers.map(|(id, address)| v1::ReplicaRow {
            id: *id,
            address: address.clone(),
            ..Default::default()
        });
        Ok(Response::new(v1::ReplicasReply { me: Some(me), leader: status.leader, peers: peers.collect() }))
    }
}

/// The fastest: a snapshot's pages wait for it.
const BLOCK_LEVEL: i32 = 1;

/// Compresses a block for the wire and the store.
pub fn compress_block(bytes: &[u8]) -> Bytes {
    Bytes::from(compress(bytes, BLOCK_LEVEL))
}
