//! The uploader: sends the outbox's chunks, in order, and lets the acknowledged go.
//!
//! Chunks are sent ahead within the store's credit. When the stream breaks, the
//! next one begins at the oldest chunk that is not acknowledged: a chunk that was
//! committed meanwhile is acknowledged again, by its id.

use crate::chunker::{Chunker, LINGER};
use heddle_proto::{RecordingId, v1};
use heddle_storage::{StoreClient, StoreError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Credit before the store has granted any.
const FIRST_CREDIT_BYTES: u64 = 1 << 20;
/// Pause before a broken stream is opened anew.
const RECONNECT: Duration = Duration::from_millis(50);
/// A stream with chunks in flight and no answer for so long is broken.
const SILENCE: Duration = Duration::from_secs(3);

/// What the uploader needs to know.
pub struct Uploader {
    /// The store.
    pub store: StoreClient,
    /// The recording.
    pub recording: RecordingId,
    /// The writer's epoch.
    pub epoch: u64,
    /// Where chunks come from.
    pub chunker: Chunker,
    /// The committed watermark, in events.
    pub committed: Arc<AtomicU64>,
}

impl Uploader {
    /// Sends for ever; ends only with an error that no retry can mend.
    pub async fn run(&self) -> StoreError {
        loop {
            // Events go to the outbox's file in time, whether or not a replica takes them.
            self.chunker.flush(false);
            let tried = self.store.tried(self.recording);
            match self.stream().await {
                Err(Broken::For(error)) => return error,
                Err(Broken::Retry(status)) => {
                    tracing::debug!(%status, "the append stream broke");
                    self.store.redirect(self.recording, tried, &status);
                }
                Ok(()) => {}
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn stream(&self) -> Result<(), Broken> {
        let mut client = self.store.leader(self.recording).map_err(Broken::For)?;
        let (sender, requests) = mpsc::channel(64);
        let response = tokio::time::timeout(SILENCE, client.append(ReceiverStream::new(requests))).await;
        let response = response.map_err(|_| Broken::Retry(Status::unavailable("no answer in time")))?;
        let mut replies = response.map_err(Broken::of)?.into_inner();
        // Sent and not acknowledged, in this stream.
        let (mut sent, mut sent_bytes, mut credit) = (0usize, 0u64, FIRST_CREDIT_BYTES);
        let mut linger = tokio::time::interval(LINGER / 2);
        let mut heard = tokio::time::Instant::now();
        loop {
            while sent_bytes < credit {
                let next = self.chunker.with_outbox(|outbox| outbox.pending(sent));
                let Some(Ok(Some(chunk))) = next else {
                    if let Some(Err(error)) = next {
                        return Err(Broken::For(StoreError::Corrupt(error.to_string())));
                    }
                    break;
                };
                if sent == 0 {
                    heard = tokio::time::Instant::now();
                }
                sent += 1;
                sent_bytes += chunk.bytes.len() as u64;
                let request = v1::AppendRequest {
                    recording: self.recording.to_vec().into(),
                    epoch: self.epoch,
                    chunk: chunk.bytes,
                    rewrites: false,
                    more: vec![],
                };
                if sender.send(request).await.is_err() {
                    break;
                }
            }
            tokio::select! {
                reply = replies.message() => {
                    let reply = reply.map_err(Broken::of)?;
                    let reply = reply.ok_or_else(|| Broken::Retry(Status::unavailable("the stream ended")))?;
                    heard = tokio::time::Instant::now();
                    credit = reply.credit_bytes.max(1);
                    let committed = reply.committed_events;
                    let freed = self.chunker.with_outbox(|o| o.acknowledge(committed));
                    let (count, bytes) = freed.unwrap_or_default();
                    sent = sent.saturating_sub(count);
                    sent_bytes = sent_bytes.saturating_sub(bytes);
                    self.committed.fetch_max(reply.committed_events, Ordering::Relaxed);
                }
                () = self.chunker.added.notified() => {}
                _ = linger.tick() => {
                    self.chunker.flush(false);
                    if sent > 0 && heard.elapsed() > SILENCE {
                        return Err(Broken::Retry(Status::unavailable("no acknowledgement in time")));
                    }
                }
            }
        }
    }
}

enum Broken {
    /// Open another stream, maybe elsewhere.
    Retry(Status),
    /// Stop.
    For(StoreError),
}

impl Broken {
    fn of(status: Status) -> Broken {
        match StoreError::from(status.clone()) {
            // A gap is mended by beginning at the oldest chunk again.
            StoreError::Unavailable(_) | StoreError::Gap(_) => Broken::Retry(status),
            error => Broken::For(error),
        }
    }
}
