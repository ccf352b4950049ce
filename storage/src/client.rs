//! The store's client: finds the leader, retries what is safe, checks what it gets.

use crate::channel::{MESSAGE_BYTES_MAX, connect, is_transient};
use crate::service::{BLOCK_BYTES_MAX, LEADER_KEY, compress_block};
use bytes::Bytes;
use heddle_proto::compress::decompress;
use heddle_proto::v1::log_store_client::LogStoreClient;
use heddle_proto::{Chunk, Hash, RecordingId, v1};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A client of one replica.
pub type Client = LogStoreClient<Channel>;

/// How long a request is retried while no leader is there.
const PATIENCE: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_millis(50);
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Raw bytes of blocks put together into one request.
const BLOCKS_BYTES: usize = 1 << 20;

/// What a caller can do something about.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum StoreError {
    /// A newer writer or coordinator has taken over: stop.
    #[error("{0}")]
    Fenced(String),
    /// Something else is committed: stop.
    #[error("{0}")]
    Conflict(String),
    /// Send from this event on.
    #[error("events before are missing: the store has {0}")]
    Gap(u64),
    /// The recording has ended.
    #[error("the recording has ended")]
    Sealed,
    /// Not there.
    #[error("{0}")]
    NotFound(String),
    /// The request is bad.
    #[error("the store refuses: {0}")]
    Invalid(String),
    /// Stored bytes are damaged.
    #[error("stored bytes are damaged: {0}")]
    Corrupt(String),
    /// No majority answers.
    #[error("no majority of the store answers ({0})")]
    Unavailable(String),
}

impl From<Status> for StoreError {
    fn from(status: Status) -> StoreError {
        let message = status.message().to_string();
        match status.code() {
            Code::Aborted => StoreError::Fenced(message),
            Code::AlreadyExists => StoreError::Conflict(message),
            Code::OutOfRange => StoreError::Gap(message.parse().unwrap_or(0)),
            Code::FailedPrecondition => StoreError::Sealed,
            Code::NotFound => StoreError::NotFound(message),
            Code::InvalidArgument => StoreError::Invalid(message),
            Code::DataLoss => StoreError::Corrupt(message),
            _ => StoreError::Unavailable(message),
        }
    }
}

/// A client of the whole store. Clones share connections and the leader's address.
#[derive(Clone)]
pub struct StoreClient {
    addresses: Arc<Vec<String>>,
    channels: Arc<Mutex<HashMap<String, Channel>>>,
    leader: Arc<Mutex<usize>>,
    patience: Duration,
}

impl StoreClient {
    /// A client of the replicas at these addresses.
    pub fn new(addresses: Vec<String>) -> StoreClient {
        assert!(!addresses.is_empty(), "a cluster has replicas");
        StoreClient {
            addresses: Arc::new(addresses),
            channels: Arc::default(),
            leader: Arc::default(),
            patience: PATIENCE,
        }
    }

    /// The same client with another patience.
    pub fn with_patience(&self, patience: Duration) -> StoreClient {
        StoreClient { patience, ..self.clone() }
    }

    /// The replicas' addresses.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// A client of the replica at `address`.
    pub fn at(&self, address: &str) -> Result<Client, StoreError> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                let channel = connect(address).map_err(|e| StoreError::Invalid(format!("{address}: {e}")))?;
                channels.insert(address.to_string(), channel.clone());
                channel
            }
        };
        Ok(LogStoreClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// The replica that is taken for the leader.
    pub fn leader(&self) -> Result<Client, StoreError> {
        self.at(&self.addresses[self.tried()])
    }

    /// The index of the replica that is taken for the leader, to be given to
    /// [`StoreClient::redirect`] if it turns out not to be.
    pub fn tried(&self) -> usize {
        *self.leader.lock().unwrap_or_else(PoisonError::into_inner) % self.addresses.len()
    }

    /// Follows what a failed attempt at replica `tried` says of the leader. Who fails
    /// late does not knock others off the leader they have found meanwhile.
    pub fn redirect(&self, tried: usize, status: &Status) {
        let mut leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        let named = status.metadata().get(LEADER_KEY).and_then(|v| v.to_str().ok());
        let index = named.and_then(|named| self.addresses.iter().position(|a| a == named));
        match index {
            Some(named) => *leader = named,
            None if *leader == tried => *leader = (tried + 1) % self.addresses.len(),
            None => {}
        }
    }

    /// Calls the leader, again and again while there is none.
    async fn call<T, F, Fut>(&self, request: F) -> Result<T, StoreError>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let until = Instant::now() + self.patience;
        loop {
            let tried = self.tried();
            let attempt = tokio::time::timeout(ATTEMPT, request(self.at(&self.addresses[tried])?)).await;
            let status = match attempt {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::unavailable("no answer in time"),
            };
            let may_retry = is_transient(&status) || status.code() == Code::DeadlineExceeded;
            if !may_retry || Instant::now() >= until {
                return Err(status.into());
            }
            self.redirect(tried, &status);
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Opens a recording for writing, or fences its writer.
    pub async fn open(
        &self,
        id: RecordingId,
        token: &[u8],
        manifest: &[u8],
        fence: bool,
    ) -> Result<v1::OpenReply, StoreError> {
        let request = v1::OpenRequest {
            recording: id.to_vec().into(),
            token: Bytes::copy_from_slice(token),
            manifest: Bytes::copy_from_slice(manifest),
            fence,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.open(request).await }
        })
        .await
    }

    /// Fixes the end of a recording.
    pub async fn seal(
        &self,
        id: RecordingId,
        epoch: u64,
        events: u64,
        last_chunk: Hash,
        cut: bool,
    ) -> Result<(), StoreError> {
        let request = v1::SealRequest {
            recording: id.to_vec().into(),
            epoch,
            events,
            last_chunk: last_chunk.to_vec().into(),
            cut,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.seal(request).await }
        })
        .await
        .map(drop)
    }

    /// Puts the chunks that were written anew in the place of those that end with `old`.
    pub async fn adopt(&self, id: RecordingId, epoch: u64, old: Hash, new: Hash) -> Result<(), StoreError> {
        let request = v1::AdoptRequest {
            recording: id.to_vec().into(),
            epoch,
            old: old.to_vec().into(),
            new: new.to_vec().into(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.adopt(request).await }
        })
        .await
        .map(drop)
    }

    /// Registers a snapshot whose blocks are stored.
    pub async fn add_snapshot(
        &self,
        id: RecordingId,
        epoch: u64,
        snapshot: v1::SnapshotRow,
    ) -> Result<(), StoreError> {
        let request =
            v1::AddSnapshotRequest { recording: id.to_vec().into(), epoch, snapshot: Some(snapshot) };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.add_snapshot(request).await }
        })
        .await
        .map(drop)
    }

    /// Removes a recording that nobody writes any more. One that is gone already is fine.
    pub async fn delete(&self, id: RecordingId) -> Result<(), StoreError> {
        let request = v1::DeleteRequest { recording: id.to_vec().into() };
        let done = self
            .call(|mut client| {
                let request = request.clone();
                async move { client.delete(request).await }
            })
            .await;
        match done {
            Ok(_) | Err(StoreError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// All recordings.
    pub async fn list(&self) -> Result<Vec<v1::RecordingRow>, StoreError> {
        let reply = self.call(|mut client| async move { client.list(v1::ListRequest {}).await }).await?;
        Ok(reply.recordings)
    }

    /// One recording.
    pub async fn get(&self, id: RecordingId) -> Result<v1::RecordingRow, StoreError> {
        self.call(
            |mut client| async move { client.get(v1::GetRequest { recording: id.to_vec().into() }).await },
        )
        .await
    }

    /// The chunks that hold events `from..to` (`to` zero: to the end), each checked
    /// against its hash. A break in the stream is resumed where it was.
    pub async fn read(&self, id: RecordingId, from: u64, to: u64) -> Result<Vec<Chunk>, StoreError> {
        let mut chunks: Vec<Chunk> = vec![];
        let until = Instant::now() + self.patience;
        loop {
            let from_event = chunks.last().map_or(from, |chunk| chunk.header.end_event());
            if to != 0 && from_event >= to {
                return Ok(chunks);
            }
            let request = v1::ReadRequest { recording: id.to_vec().into(), from_event, to_event: to };
            let tried = self.tried();
            let attempt = async {
                let mut client = self.at(&self.addresses[tried])?;
                let mut stream =
                    client.read(request).await.map_err(|s| self.transient(tried, s))?.into_inner();
                while let Some(reply) = stream.message().await.map_err(|s| self.transient(tried, s))? {
                    let chunk = Chunk::parse(reply.chunk).map_err(|e| StoreError::Corrupt(e.to_string()))?;
                    let header = &chunk.header;
                    let follows = match chunks.last() {
                        Some(last) => {
                            header.first_event == last.header.end_event() && header.previous == last.id()
                        }
                        None => header.first_event <= from,
                    };
                    if !follows {
                        // They were written anew meanwhile, with other borders.
                        chunks.clear();
                        return Err(StoreError::Unavailable("the chunks were written anew".into()));
                    }
                    chunks.push(chunk);
                }
                Ok::<(), StoreError>(())
            };
            match attempt.await {
                Ok(()) => return Ok(chunks),
                Err(StoreError::Unavailable(_)) if Instant::now() < until => tokio::time::sleep(RETRY).await,
                Err(error) => return Err(error),
            }
        }
    }

    fn transient(&self, tried: usize, status: Status) -> StoreError {
        if is_transient(&status) {
            self.redirect(tried, &status);
            return StoreError::Unavailable(status.message().into());
        }
        status.into()
    }

    /// Stores blocks that the store lacks; the number and compressed bytes sent.
    pub async fn put_blocks(&self, blocks: Vec<(Hash, Bytes)>) -> Result<(u64, u64), StoreError> {
        let mut sent = (0, 0);
        for group in batches(blocks) {
            let hashes: Vec<Bytes> = group.iter().map(|(hash, _)| hash.to_vec().into()).collect();
            let request = v1::BlockHashes { hashes };
            let missing = self
                .call(|mut client| {
                    let request = request.clone();
                    async move { client.missing_blocks(request).await }
                })
                .await?
                .hashes;
            let blocks: Vec<v1::Block> = group
                .iter()
                .filter(|(hash, _)| missing.iter().any(|m| m[..] == hash.0))
                .map(|(hash, data)| v1::Block { hash: hash.to_vec().into(), data: compress_block(data) })
                .collect();
            if blocks.is_empty() {
                continue;
            }
            sent.0 += blocks.len() as u64;
            sent.1 += blocks.iter().map(|block| block.data.len() as u64).sum::<u64>();
            let request = v1::PutBlocksRequest { blocks };
            self.call(|mut client| {
                let request = request.clone();
                async move { client.put_blocks(request).await }
            })
            .await?;
        }
        Ok(sent)
    }

    /// Blocks by hash, in order, each checked against it.
    pub async fn get_blocks(&self, hashes: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let until = Instant::now() + self.patience;
        loop {
            match self.try_get_blocks(hashes).await {
                Err(StoreError::Unavailable(_)) if Instant::now() < until => tokio::time::sleep(RETRY).await,
                done => return done,
            }
        }
    }

    async fn try_get_blocks(&self, hashes: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let request = v1::BlockHashes { hashes: hashes.iter().map(|h| h.to_vec().into()).collect() };
        let tried = self.tried();
        let mut client = self.at(&self.addresses[tried])?;
        let stream = client.get_blocks(request).await.map_err(|s| self.transient(tried, s))?;
        let mut stream = stream.into_inner();
        let mut blocks = Vec::with_capacity(hashes.len());
        for hash in hashes {
            let block = stream.message().await.map_err(|s| self.transient(tried, s))?;
            let block =
                block.ok_or_else(|| StoreError::Unavailable("the stream of blocks ended early".into()))?;
            let raw = decompress(&block.data, BLOCK_BYTES_MAX)
                .ok_or_else(|| StoreError::Corrupt(format!("block {hash} does not decompress")))?;
            if Hash::of(&raw) != *hash {
                return Err(StoreError::Corrupt(format!("block {hash} has other bytes")));
            }
            blocks.push(Bytes::from(raw));
        }
        Ok(blocks)
    }

    /// Takes over as coordinator.
    pub async fn meta_acquire(&self, holder: &str) -> Result<u64, StoreError> {
        let reply = self
            .call(|mut client| async move {
                client.meta_acquire(v1::MetaAcquireRequest { holder: holder.into() }).await
            })
            .await?;
        Ok(reply.epoch)
    }

    /// Writes a coordinator's rows.
    pub async fn meta_write(
        &self,
        epoch: u64,
        puts: Vec<v1::MetaRow>,
        deletes: Vec<String>,
    ) -> Result<(), StoreError> {
        let request = v1::MetaWriteRequest { epoch, puts, deletes };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.meta_write(request).await }
        })
        .await
        .map(drop)
    }

    /// A coordinator's rows.
    pub async fn meta_scan(&self, prefix: &str) -> Result<Vec<v1::MetaRow>, StoreError> {
        let reply = self
            .call(|mut client| async move {
                client.meta_scan(v1::MetaScanRequest { prefix: prefix.into() }).await
            })
            .await?;
        Ok(reply.rows)
    }

    /// How each replica stands, asked one by one.
    pub async fn replicas(&self) -> Vec<v1::ReplicaRow> {
        let mut rows = vec![];
        for (i, address) in self.addresses.iter().enumerate() {
            let ask = async {
                let mut client = self.at(address).ok()?;
                client.replicas(v1::ReplicasRequest {}).await.ok()?.into_inner().me
            };
            let row = tokio::time::timeout(Duration::from_secs(1), ask).await.ok().flatten();
            rows.push(row.unwrap_or_else(|| v1::ReplicaRow {
                id: i as u64 + 1,
                address: address.clone(),
                role: "unreachable".into(),
                ..Default::default()
            }));
        }
        rows
    }
}

fn batches(blocks: Vec<(Hash, Bytes)>) -> Vec<Vec<(Hash, Bytes)>> {
    let mut groups: Vec<Vec<(Hash, Bytes)>> = vec![];
    let mut bytes = BLOCKS_BYTES;
    for block in blocks {
        if bytes >= BLOCKS_BYTES {
            groups.push(vec![]);
            bytes = 0;
        }
        bytes += block.1.len();
        groups.last_mut().expect("pushed above").push(block);
    }
    groups
}
