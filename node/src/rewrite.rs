//! Writing a sealed recording's chunks anew.
//!
//! A live stream is cut into small chunks, since nobody wants to wait for large ones.
//! Once it is sealed, the same events are written as large chunks, which take a third
//! of the room. Each is read back and compared before it is sent.

use anyhow::{Context, Result, ensure};
use heddle_proto::{Chunk, ChunkBuilder, Event, Hash, RecordingId, v1};
use heddle_storage::{StoreClient, StoreError};

/// A large chunk, by [`ChunkBuilder::bytes`]: half a million events without data.
const LARGE_BYTES: usize = 4 << 20;
/// Events that are read at a time.
const WINDOW_EVENTS: u64 = 1 << 19;

/// Writes the chunks of a sealed recording anew, if that makes fewer of them.
pub async fn rewrite(store: &StoreClient, id: RecordingId, epoch: u64) -> Result<()> {
    let row = store.get(id).await?;
    let old = Hash::from_slice(&row.last_chunk)?;
    let mut larger = Larger { builder: ChunkBuilder::resume(id, 0, old), events: vec![] };
    if row.chunks <= 1 {
        return Ok(());
    }
    let mut last = old;
    let (mut from, end) = (0, row.committed_events);
    while from < end {
        let chunks = store.read(id, from, (from + WINDOW_EVENTS).min(end)).await?;
        let next = chunks.last().context("the log ends early")?.header.end_event();
        let step = move || larger.take(&chunks, from, next == end).map(|made| (larger, made));
        let made;
        (larger, made) = tokio::task::spawn_blocking(step).await.context("make larger chunks")??;
        from = next;
        last = made.last().map_or(last, Chunk::id);
        append(store, id, epoch, true, made).await?;
    }
    store.adopt(id, epoch, old, last).await?;
    Ok(())
}

/// Makes larger chunks of small ones.
struct Larger {
    builder: ChunkBuilder,
    /// What the builder holds, to compare.
    events: Vec<Event>,
}

impl Larger {
    fn take(&mut self, chunks: &[Chunk], from: u64, is_last: bool) -> Result<Vec<Chunk>> {
        let mut made = vec![];
        for chunk in chunks {
            let known = from.saturating_sub(chunk.header.first_event) as usize;
            for event in chunk.events()?.into_iter().skip(known) {
                // A checkpoint and its async events stay together.
                if self.builder.bytes() >= LARGE_BYTES && !event.body.is_async() {
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
    };
    let requests: Vec<v1::AppendRequest> = chunks.into_iter().map(request).collect();
    if !requests.is_empty() {
        let mut replies = store.leader()?.append(tokio_stream::iter(requests)).await?.into_inner();
        while replies.message().await?.is_some() {}
    }
    Ok(())
}
