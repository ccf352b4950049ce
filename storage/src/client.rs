//! The store's client: finds the leader, retries what is safe, checks what it gets.

mod blocks;
mod cluster;

use crate::channel::{MESSAGE_BYTES_MAX, connect, is_transient};
use crate::service::LEADER_KEY;
use bytes::Bytes;
use heddle_proto::v1::log_store_client::LogStoreClient;
use heddle_proto::{Chunk, Hash, RecordingId, v1};
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A client of one replica.
pub type Client = LogStoreClient<Channel>;

/// How long a request is retried while no leader is there.
const PATIENCE: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_millis(50);
/// How long one attempt may take, at most and at least: who has little patience must come to
/// ask another replica before it is over.
const ATTEMPT: Duration = Duration::from_secs(5);
const ATTEMPT_MIN: Duration = Duration::from_millis(500);
/// Attempts that patience has time for.
const ATTEMPTS: u32 = 3;
const _: () = assert!(PATIENCE.as_millis() >= ATTEMPT.as_millis() * ATTEMPTS as u128);
/// Raw bytes of blocks put together into one request.
const BLOCKS_BYTES: usize = 1 << 20;
/// Requests that carry blocks, at a time.
const UPLOADS: usize = 4;
/// Routes whose leader a client remembers.
const LEADERS_MAX: usize = 16 << 10;

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
    /// The disk has no room for more.
    #[error("{0}")]
    Full(String),
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
            Code::ResourceExhausted => StoreError::Full(message),
            _ => StoreError::Unavailable(message),
        }
    }
}

/// Who leads what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// A shard by its number; 0 is the coordinator's.
    Shard(u32),
    /// The shard that a recording was placed on.
    Recording(RecordingId),
}

impl From<RecordingId> for Route {
    fn from(id: RecordingId) -> Route {
        Route::Recording(id)
    }
}

/// A client of the whole store. Clones share connections and what they know of leaders.
#[derive(Clone)]
pub struct StoreClient {
    addresses: Arc<RwLock<Vec<String>>>,
    channels: Arc<Mutex<HashMap<String, Channel>>>,
    leaders: Arc<Mutex<HashMap<Route, usize>>>,
    shards: Arc<AtomicU32>,
    patience: Duration,
}

impl StoreClient {
    /// A client of the replicas at these addresses.
    pub fn new(addresses: Vec<String>) -> StoreClient {
        assert!(!addresses.is_empty(), "a cluster has replicas");
        StoreClient {
            addresses: Arc::new(RwLock::new(addresses)),
            channels: Arc::default(),
            leaders: Arc::default(),
            shards: Arc::default(),
            patience: PATIENCE,
        }
    }

    /// The same client with another patience.
    pub fn with_patience(&self, patience: Duration) -> StoreClient {
        StoreClient { patience, ..self.clone() }
    }

    /// The same client over connections of its own, whose work is done on the runtime that
    /// first uses them.
    pub fn apart(&self) -> StoreClient {
        StoreClient { channels: Arc::default(), ..self.clone() }
    }

    /// The replicas' addresses.
    pub fn addresses(&self) -> Vec<String> {
        self.addresses.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A client of the replica at `address`.
    pub fn at(&self, address: &str) -> Result<Client, StoreError> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                let channel = connect(address).map_err(|e| StoreError::Invalid(e.to_string()))?;
                channels.insert(address.to_string(), channel.clone());
                channel
            }
        };
        Ok(LogStoreClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// The replica that is taken for the leader.
    pub fn leader(&self, route: impl Into<Route>) -> Result<Client, StoreError> {
        self.number(self.tried(route))
    }

    fn number(&self, index: usize) -> Result<Client, StoreError> {
        let addresses = self.addresses.read().unwrap_or_else(PoisonError::into_inner);
        let address = addresses[index % addresses.len()].clone();
        drop(addresses);
        self.at(&address)
    }

    /// The index of the replica that is taken for the leader, to be given to
    /// [`StoreClient::redirect`] if it turns out not to be.
    pub fn tried(&self, route: impl Into<Route>) -> usize {
        let leaders = self.leaders.lock().unwrap_or_else(PoisonError::into_inner);
        leaders.get(&route.into()).copied().unwrap_or(0)
    }

    /// Follows what a failed attempt at replica `tried` says of the leader. Who fails
    /// late does not knock others off the leader they have found meanwhile. Whether the
    /// leader was named, so that nothing need be waited for.
    pub fn redirect(&self, route: impl Into<Route>, tried: usize, status: &Status) -> bool {
        let named = status.metadata().get(LEADER_KEY).and_then(|v| v.to_str().ok());
        let mut addresses = self.addresses.write().unwrap_or_else(PoisonError::into_inner);
        let index = named.map(|named| match addresses.iter().position(|address| address == named) {
            Some(index) => index,
            None => {
                // A replica that was added since.
                addresses.push(named.to_string());
                addresses.len() - 1
            }
        });
        let mut leaders = self.leaders.lock().unwrap_or_else(PoisonError::into_inner);
        if leaders.len() > LEADERS_MAX {
            leaders.clear();
        }
        let leader = leaders.entry(route.into()).or_insert(tried);
        match index {
            Some(named) => *leader = named,
            None if *leader == tried => *leader = (tried + 1) % addresses.len(),
            None => {}
        }
        index.is_some_and(|named| named != tried)
    }

    /// How long one attempt may take.
    fn attempt(&self) -> Duration {
        (self.patience / ATTEMPTS).clamp(ATTEMPT_MIN, ATTEMPT)
    }

    /// The answer, if it begins in time. What is not heard of in time is asked of others.
    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let late = |_| Status::unavailable("no answer in time");
        tokio::time::timeout(self.attempt(), answer).await.map_err(late)?
    }

    /// Calls the leader, again and again while there is none.
    async fn call<T, F, Fut>(&self, route: impl Into<Route>, request: F) -> Result<T, StoreError>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let route = route.into();
        let until = Instant::now() + self.patience;
        let mut named_in_a_row = 0;
        loop {
            let tried = self.tried(route);
            let status = match self.in_time(request(self.number(tried)?)).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            if !is_transient(&status) && status.code() != Code::DeadlineExceeded {
                return Err(status.into());
            }
            // Also if it is over: the next call is not to begin with who is silent.
            let is_named = self.redirect(route, tried, &status);
            if Instant::now() >= until {
                return Err(status.into());
            }
            // Replicas that name each other in turn are not asked without a pause.
            if is_named && named_in_a_row < 2 {
                named_in_a_row += 1;
            } else {
                named_in_a_row = 0;
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// How many shards hold recordings and blocks.
    pub async fn shards(&self) -> Result<u32, StoreError> {
        let known = self.shards.load(Ordering::Relaxed);
        if known > 0 {
            return Ok(known);
        }
        let ask = |mut client: Client| async move { client.replicas(v1::ReplicasRequest {}).await };
        let shards = self.call(Route::Shard(0), ask).await?.shards;
        self.shards.store(shards, Ordering::Relaxed);
        Ok(shards.max(1))
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
        self.call(id, |mut client| {
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
        self.call(id, |mut client| {
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
        self.call(id, |mut client| {
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
        self.call(id, |mut client| {
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
            .call(id, |mut client| {
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
        let reply = self
            .call(Route::Shard(0), |mut client| async move { client.list(v1::ListRequest {}).await })
            .await?;
        Ok(reply.recordings)
    }

    /// One recording.
    pub async fn get(&self, id: RecordingId) -> Result<v1::RecordingRow, StoreError> {
        self.call(id, |mut client| async move {
            client.get(v1::GetRequest { recording: id.to_vec().into() }).await
        })
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
            let request = v1::ReadRequest {
                recording: id.to_vec().into(),
                from_event,
                to_event: to,
                ..Default::default()
            };
            let tried = self.tried(id);
            let lost = |status| self.transient(id.into(), tried, status);
            let attempt = async {
                let mut client = self.number(tried)?;
                let mut stream = self.in_time(client.read(request)).await.map_err(lost)?.into_inner();
                while let Some(reply) = stream.message().await.map_err(lost)? {
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

    /// Gives each chunk from `event` on to `take`, and waits for more until the recording has
    /// ended or `take` wants none. A break in the stream is resumed where it was.
    pub async fn follow(
        &self,
        id: RecordingId,
        event: u64,
        mut take: impl FnMut(Chunk) -> bool,
    ) -> Result<(), StoreError> {
        let mut from_event = event;
        let mut until = Instant::now() + self.patience;
        loop {
            let recording = id.to_vec().into();
            let request = v1::ReadRequest { recording, from_event, follow: true, ..Default::default() };
            let tried = self.tried(id);
            let lost = |status| self.transient(id.into(), tried, status);
            let attempt = async {
                let mut client = self.number(tried)?;
                let mut stream = self.in_time(client.read(request)).await.map_err(lost)?.into_inner();
                while let Some(reply) = stream.message().await.map_err(lost)? {
                    let chunk = Chunk::parse(reply.chunk).map_err(|e| StoreError::Corrupt(e.to_string()))?;
                    until = Instant::now() + self.patience;
                    from_event = chunk.header.end_event();
                    if !take(chunk) {
                        break;
                    }
                }
                Ok::<(), StoreError>(())
            };
            match attempt.await {
                Err(StoreError::Unavailable(_)) if Instant::now() < until => tokio::time::sleep(RETRY).await,
                done => return done,
            }
        }
    }

    fn transient(&self, route: Route, tried: usize, status: Status) -> StoreError {
        if is_transient(&status) {
            self.redirect(route, tried, &status);
            return StoreError::Unavailable(status.message().into());
        }
        status.into()
    }

    /// Takes over as coordinator.
    pub async fn meta_acquire(&self, holder: &str) -> Result<u64, StoreError> {
        let reply = self
            .call(Route::Shard(0), |mut client| async move {
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
        self.call(Route::Shard(0), |mut client| {
            let request = request.clone();
            async move { client.meta_write(request).await }
        })
        .await
        .map(drop)
    }

    /// A coordinator's rows.
    pub async fn meta_scan(&self, prefix: &str) -> Result<Vec<v1::MetaRow>, StoreError> {
        let reply = self
            .call(Route::Shard(0), |mut client| async move {
                client.meta_scan(v1::MetaScanRequest { prefix: prefix.into() }).await
            })
            .await?;
        Ok(reply.rows)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::net::TcpListener;

    /// Its connections are made, and nothing is ever said on them.
    fn silent() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        (listener, address)
    }

    #[tokio::test]
    async fn the_impatient_ask_another_replica_next() {
        let silent = [silent(), silent()];
        let addresses = silent.iter().map(|(_, address)| address.clone()).collect();
        let store = StoreClient::new(addresses).with_patience(Duration::ZERO);
        let id = RecordingId([7; 16]);
        let began = Instant::now();
        for tried in [0, 1, 0] {
            assert_eq!(store.tried(id), tried);
            assert!(matches!(store.get(id).await, Err(StoreError::Unavailable(_))));
        }
        assert!(matches!(store.read(id, 0, 0).await, Err(StoreError::Unavailable(_))));
        assert_eq!(store.tried(id), 0);
        assert!(began.elapsed() < ATTEMPT, "{:?}", began.elapsed());
    }
}
