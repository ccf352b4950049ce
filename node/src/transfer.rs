//! Recordings out of a store into a file, and back into any store.

use crate::blocks::BlockCache;
use crate::container::{Container, SnapshotEntry, Summary, Writer, blocks_of};
use crate::rewrite::{append, window_of};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use heddle_proto::{Hash, Manifest, RecordingId, v1};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_storage::{StoreClient, StoreError};
use std::io::Write;

/// Blocks asked for, or sent, at a time.
const BLOCKS: usize = 64;
/// Chunks sent at a time: large ones are of a few hundred KiB.
const CHUNKS: usize = 8;

/// What went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Events.
    pub events: u64,
    /// Blocks.
    pub blocks: u64,
    /// It was there already, and nothing was done.
    pub was_there: bool,
}

/// Writes a recording to `out`, with all that a replay of it needs.
pub async fn export(store: &StoreClient, id: RecordingId, out: impl Write) -> Result<Moved> {
    let row = store.get(id).await?;
    ensure!(row.state != "recording", "it is being recorded; end the recording first");
    let manifest = Manifest::decode(&row.manifest)?;
    let snapshots = row.snapshots.iter().map(|snapshot| {
        Ok(SnapshotEntry {
            icount: snapshot.icount,
            event: snapshot.event,
            root: Hash::from_slice(&snapshot.root)?,
            digest: Hash::from_slice(&snapshot.digest)?,
        })
    });
    let summary = Summary {
        is_cut: row.state == "cut",
        events: row.committed_events,
        icount: row.committed_icount,
        anchor: Hash::from_slice(&row.rewritten_from)?,
        snapshots: snapshots.collect::<Result<_>>()?,
    };
    let mut writer = Writer::new(out, &row.manifest, &summary)?;
    let mut cache = BlockCache::new(store.clone());
    let entries = summary.snapshots.clone();
    let named = tokio::task::spawn_blocking(move || blocks_of(&manifest, &entries, &mut cache)).await??;
    for part in named.chunks(BLOCKS) {
        for (hash, block) in part.iter().zip(store.get_blocks(part).await?) {
            writer.block(*hash, &block)?;
        }
    }
    let (mut from, end, window) = (0, row.committed_events, window_of(&row));
    while from < end {
        let chunks = store.read(id, from, (from + window).min(end)).await?;
        for chunk in &chunks {
            writer.chunk(chunk)?;
        }
        from = chunks.last().context("the log ends early")?.header.end_event();
    }
    let now = store.get(id).await?;
    ensure!(now.last_chunk == row.last_chunk, "its chunks were written anew meanwhile; export it again");
    writer.finish()?;
    Ok(Moved { events: end, blocks: named.len() as u64, was_there: false })
}

/// Stores what a verified container holds, under the same id. Tried again, it goes on
/// where it stopped.
pub async fn import(store: &StoreClient, mut container: Container) -> Result<Moved> {
    let (id, summary) = (container.id, container.summary.clone());
    let hashes = container.block_hashes();
    let moved = Moved { events: summary.events, blocks: hashes.len() as u64, was_there: false };
    match store.get(id).await {
        Ok(row) if row.state != "recording" => {
            let is_same = row.committed_events == summary.events && row.manifest == container.manifest;
            ensure!(is_same, "another recording of this id is in the store: {}", id.short());
            return Ok(Moved { was_there: true, ..moved });
        }
        Ok(_) | Err(StoreError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let token = container.hash.0[..16].to_vec();
    let opened = match store.open(id, &token, &container.manifest, false).await {
        Err(StoreError::Fenced(_)) => bail!("it is being recorded in this store"),
        opened => opened?,
    };
    for part in hashes.chunks(BLOCKS) {
        let blocks = container.blocks(part).map_err(|error| anyhow::anyhow!(error))?;
        let blocks = part.iter().copied().zip(blocks.into_iter().map(Bytes::from)).collect();
        store.put_blocks(id, blocks).await?;
    }
    let (mut last, mut batch) = (Hash::ZERO, vec![]);
    for chunk in container.chunks() {
        let chunk = chunk?;
        last = chunk.id();
        // What an earlier try has stored is there.
        if chunk.header.end_event() > opened.committed_events {
            batch.push(chunk);
        }
        if batch.len() >= CHUNKS {
            append(store, id, opened.epoch, false, std::mem::take(&mut batch)).await?;
        }
    }
    append(store, id, opened.epoch, false, batch).await?;
    for snapshot in &summary.snapshots {
        let row = v1::SnapshotRow {
            icount: snapshot.icount,
            event: snapshot.event,
            root: snapshot.root.to_vec().into(),
            digest: snapshot.digest.to_vec().into(),
        };
        store.add_snapshot(id, opened.epoch, row).await?;
    }
    store.seal(id, opened.epoch, summary.events, last, summary.is_cut).await?;
    Ok(moved)
}
