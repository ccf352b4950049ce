//! Writing a sealed recording's chunks anew.
//!
//! A live stream is cut into small chunks, since nobody wants to wait for large ones.
//! Once it is sealed, the same events are written as large chunks, which take a third
//! of the room. Each is read back and compared before it is sent.

use anyhow::{Context, Result, ensure};
use heddle_proto::{Chunk, ChunkBuilder, Event, Hash, RecordingId, v1};
use heddle_storage::{StoreClient, StoreError};
use std::time::Duration;

/// A large chunk's payload before compression: over half a million events without data.
/// Far enough below what a payload may hold, with whatever the last event brings.
pub const LARGE_BYTES: usize = 3 << 19;
/// Events read at a time, if they are small.
const WINDOW_EVENTS: u64 = 1 << 19;
/// Payload bytes, before compression, read at a time.
const WINDOW_BYTES: u64 = 32 << 20;
const TRIES: u32 = 3;
/// Before the next try: a replica went away in the middle of it, maybe.
const RETRY: Duration = Duration::from_millis(500);
/// All tries together: nobody waits longer for less room.
const LIMIT: Duration = Duration::from_secs(300);

/// Writes the chunks of a sealed recording anew, if they are many. It is whole without that.
pub async fn compact(store: &StoreClient, id: RecordingId, epoch: u64) {
    let tries = async {
        for left in (0..TRIES).rev() {
            let tried = store.tried(id);
            match rewrite(store, id, epoch, LARGE_BYTES).await {
                Ok(()) => return,
                Err(error) if left > 0 => {
                    tracing::debug!("write the chunks of {id} anew: {error:#}");
                    if let Some(StoreError::Unavailable(why)) = error.downcast_ref::<StoreError>() {
                        store.redirect(id, tried, &tonic::Status::unavailable(why.clone()));
                    }
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => tracing::warn!("the recording {id} stays in small chunks: {error:#}"),
            }
        }
    };
    if tokio::time::timeout(LIMIT, tries).await.is_err() {
        tracing::warn!("the recording {id} stays in small chunks: the store was too slow");
    }
}

/// Writes chunks of at least `large_bytes` in the place of a sealed recording's. Nothing is
/// done if it has one chunk, or was written anew before.
pub async fn rewrite(store: &StoreClient, id: RecordingId, epoch: u64, large_bytes: usize) -> Result<()> {
    let row = store.get(id).await?;
    let rewritten_from = Hash::from_slice(&row.rewritten_from)?;
    if row.chunks <= 1 || rewritten_from != Hash::ZERO {
        return Ok(());
    }
    let old = Hash::from_slice(&row.last_chunk)?;
    let mut larger = Larger { builder: ChunkBuilder::resume(id, 0, old), events: vec![], large_bytes };
    let window = window_of(&row);
    let mut last = old;
    let (mut from, end) = (0, row.committed_events);
    while from < end {
        let chunks = store.read(id, from, (from + window).min(end)).await?;
        let next = chunks.last().context("the log ends early")?.header.end_event();
        let step = move || larger.take(&chunks, next == end).map(|made| (larger, made));
        let made;
        (larger, made) = tokio::task::spawn_blocking(step).await.context("make larger chunks")??;
        from = next;
        last = made.last().map_or(last, Chunk::id);
        append(store, id, epoch, true, made).await?;
    }
    store.adopt(id, epoch, old, last).await?;
    Ok(())
}

/// How many of a recording's events to read at a time.
pub(crate) fn window_of(row: &v1::RecordingRow) -> u64 {
    let each = (row.bytes_raw / row.committed_events.max(1)).max(1);
    (WINDOW_BYTES / each).clamp(1, WINDOW_EVENTS)
}

/// Makes larger chunks of small ones.
struct Larger {
    builder: ChunkBuilder,
    /// What the builder holds, to compare.
    events: Vec<Event>,
    large_bytes: usize,
}

impl Larger {
    fn take(&mut self, chunks: &[Chunk], is_last: bool) -> Result<Vec<Chunk>> {
        let mut made = vec![];
        for chunk in chunks {
            for event in chunk.events()? {
                // A checkpoint and its async events stay together.
                if self.builder.raw_bytes() >= self.large_bytes && !event.body.is_async() {
                    made.extend(self.close()?);
                }
                self.builder.push(&event);
                self.events.push(event);
            }
        }
        if is_last {
            made.extend(self.close()?);
        }
        Ok(made)
    }

    fn close(&mut self) -> Result<Option<Chunk>> {
        let Some(chunk) = self.builder.take() else { return Ok(None) };
        ensure!(chunk.events()? == self.events, "a chunk does not hold what was put into it");
        self.events.clear();
        Ok(Some(chunk))
    }
}

/// Appends chunks and waits for all acknowledgements.
pub(crate) async fn append(
    store: &StoreClient,
    id: RecordingId,
    epoch: u64,
    rewrites: bool,
    chunks: impl IntoIterator<Item = Chunk>,
) -> Result<(), StoreError> {
    let recording = id.to_vec();
    let request = |chunk: Chunk| v1::AppendRequest {
        recording: recording.clone().into(),
        epoch,
        chunk: chunk.bytes,
        rewrites,
        more: vec![],
    };
    let requests: Vec<v1::AppendRequest> = chunks.into_iter().map(request).collect();
    if !requests.is_empty() {
        let mut replies = store.leader(id)?.append(tokio_stream::iter(requests)).await?.into_inner();
        while replies.message().await?.is_some() {}
    }
    Ok(())
}
