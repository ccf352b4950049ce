//! A recording on its way into the store: what the built-in machine's and QEMU's share.

use crate::chunker::Chunker;
use crate::outbox::Outbox;
use crate::record::Watermarks;
use crate::rewrite::compact;
use crate::upload::Uploader;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use heddle_proto::v1::coordinator_client::CoordinatorClient;
use heddle_proto::{ChunkBuilder, Hash, Manifest, RecordingId, v1};
use heddle_replay_engine::Snapshot;
use heddle_storage::{StoreClient, StoreError, channel};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Bytes of snapshots that may wait for the store; beyond it the guest pauses.
const SNAPSHOT_BYTES_MAX: u64 = 256 << 20;
/// How often the recorder tells the coordinator that it lives.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);
/// How far the thread that stores snapshots stands back for the guest's.
const NICE: i32 = 10;
const DRAIN_POLL: Duration = Duration::from_millis(2);

/// A snapshot to be stored.
#[derive(Clone)]
pub struct NewSnapshot {
    /// Its blocks.
    pub blocks: Vec<(Hash, Bytes)>,
    /// What the catalog says of it.
    pub row: v1::SnapshotRow,
}

impl From<Snapshot> for NewSnapshot {
    fn from(snapshot: Snapshot) -> NewSnapshot {
        let row = v1::SnapshotRow {
            icount: snapshot.position.icount,
            event: snapshot.position.event,
            root: snapshot.root.to_vec().into(),
            digest: snapshot.digest.to_vec().into(),
        };
        let blocks = snapshot.blocks.into_iter().map(|(hash, bytes)| (hash, Bytes::from(bytes))).collect();
        NewSnapshot { blocks, row }
    }
}

impl NewSnapshot {
    /// Stores it, as of the recording `id`, by its writer of this epoch: first its blocks, so that
    /// no row names what is not there.
    pub async fn store(self, store: &StoreClient, id: RecordingId, epoch: u64) -> Result<(), StoreError> {
        store.put_blocks(id, self.blocks).await?;
        store.add_snapshot(id, epoch, self.row).await
    }

    fn bytes(&self) -> u64 {
        self.blocks.iter().map(|(_, bytes)| bytes.len() as u64).sum()
    }
}

/// Takes snapshots on their way to the store, in the order taken.
#[derive(Clone)]
pub struct SnapshotQueue {
    sender: mpsc::UnboundedSender<NewSnapshot>,
    waiting_bytes: Arc<AtomicU64>,
}

/// A [`SnapshotQueue`]'s other end.
pub(crate) struct WaitingSnapshots {
    receiver: mpsc::UnboundedReceiver<NewSnapshot>,
    bytes: Arc<AtomicU64>,
}

impl WaitingSnapshots {
    /// The next one and its bytes, which count until [`WaitingSnapshots::done`]; `None`, when
    /// there will be no more.
    pub(crate) async fn next(&mut self) -> Option<(NewSnapshot, u64)> {
        let snapshot = self.receiver.recv().await?;
        let bytes = snapshot.bytes();
        Some((snapshot, bytes))
    }

    /// So many bytes wait no longer.
    pub(crate) fn done(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl SnapshotQueue {
    /// An empty queue, and where its snapshots come out.
    pub(crate) fn new() -> (SnapshotQueue, WaitingSnapshots) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let waiting_bytes: Arc<AtomicU64> = Arc::default();
        let waiting = WaitingSnapshots { receiver, bytes: waiting_bytes.clone() };
        (SnapshotQueue { sender, waiting_bytes }, waiting)
    }

    /// Takes a snapshot.
    pub fn push(&self, snapshot: NewSnapshot) {
        self.waiting_bytes.fetch_add(snapshot.bytes(), Ordering::Relaxed);
        // Where nobody stores any more, the recording is at its end: `Live::refused` says why.
        let _ = self.sender.send(snapshot);
    }

    /// Whether the guest must pause, for those that wait to be stored.
    pub fn is_full(&self) -> bool {
        !self.sender.is_closed() && self.waiting_bytes.load(Ordering::Relaxed) > SNAPSHOT_BYTES_MAX
    }
}

/// An open recording.
pub struct Live {
    store: StoreClient,
    id: RecordingId,
    epoch: u64,
    /// Where events go.
    pub chunker: Chunker,
    /// Where snapshots go; taken by whoever makes them, dropped at the end.
    pub snapshots: Option<SnapshotQueue>,
    uploads: JoinHandle<StoreError>,
    /// None, once it has come to its end.
    snapshot_uploads: Option<JoinHandle<Result<()>>>,
    life: Option<JoinHandle<()>>,
}

impl Live {
    /// Opens the recording and begins to deliver.
    pub async fn open(
        store: &StoreClient,
        manifest: &Manifest,
        outbox_dir: &Path,
        outbox_bytes: u64,
        watermarks: &Watermarks,
    ) -> Result<Live> {
        let token: [u8; 16] = rand::random();
        let id = manifest.id;
        let opened = store.open(id, &token, &manifest.encode(), false).await.context("open the recording")?;
        let outbox = Outbox::create(outbox_dir, id, token, outbox_bytes)?;
        let chunker = Chunker::new(ChunkBuilder::new(id), outbox);
        let uploader = Uploader {
            store: store.clone(),
            recording: id,
            epoch: opened.epoch,
            chunker: chunker.clone(),
            committed: watermarks.committed.clone(),
        };
        let (queue, waiting) = SnapshotQueue::new();
        let (apart, epoch) = (store.apart(), opened.epoch);
        let uploading = in_background(move || upload_snapshots(apart, id, epoch, waiting));
        Ok(Live {
            store: store.clone(),
            id,
            epoch: opened.epoch,
            chunker,
            snapshots: Some(queue),
            uploads: tokio::spawn(async move { uploader.run().await }),
            snapshot_uploads: Some(tokio::spawn(uploading)),
            life: None,
        })
    }

    /// Tells the coordinator that this recorder lives; `fenced` is called when it was replaced.
    pub fn show_life(&mut self, coordinator: String, fenced: impl Fn() + Send + 'static) {
        let (id, epoch) = (self.id, self.epoch);
        self.life = Some(tokio::spawn(async move {
            let Ok(channel) = channel::connect(&coordinator) else { return };
            let mut client = CoordinatorClient::new(channel);
            loop {
                let request = v1::RecordingRequest { recording: id.to_vec().into(), epoch, ended: false };
                if let Ok(reply) = client.recording(request).await
                    && reply.into_inner().fenced
                {
                    fenced();
                }
                tokio::time::sleep(SIGN_OF_LIFE).await;
            }
        }));
    }

    /// Ends when the store takes no more of this recording, with the reason.
    pub async fn refused(&mut self) -> String {
        let error = tokio::select! {
            error = &mut self.uploads => error.map_or_else(anyhow::Error::from, anyhow::Error::from),
            error = refusal(&mut self.snapshot_uploads) => error,
        };
        let kept = self.chunker.with_outbox(|outbox| outbox.path().display().to_string());
        let kept = kept.unwrap_or_default();
        format!(
            "the store takes no more of this recording ({error:#}); what it did not take is kept in {kept}"
        )
    }

    /// Delivers the rest and seals. Whoever made snapshots has dropped its queue. `done` is
    /// called when nothing is left to deliver; the store's own tidying comes after that.
    pub async fn seal(mut self, is_cut: bool, done: impl FnOnce()) -> Result<()> {
        self.snapshots = None;
        self.chunker.flush(true);
        let chunker = self.chunker.clone();
        let drained = async move {
            while !chunker.with_outbox(|outbox| outbox.is_empty()).unwrap_or(true) {
                tokio::time::sleep(DRAIN_POLL).await;
            }
        };
        tokio::select! {
            () = drained => {}
            why = self.refused() => bail!(why),
        }
        if let Some(uploads) = &mut self.snapshot_uploads {
            let stored = uploads.await;
            self.snapshot_uploads = None;
            stored.context("upload snapshots")??;
        }
        let row = self.store.get(self.id).await?;
        self.store
            .seal(self.id, self.epoch, row.committed_events, Hash::from_slice(&row.last_chunk)?, is_cut)
            .await
            .context("seal the recording")?;
        if let Some(outbox) = self.chunker.take_outbox() {
            outbox.remove()?;
        }
        done();
        compact(&self.store, self.id, self.epoch).await;
        Ok(())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.uploads.abort();
        let tasks = [
            self.snapshot_uploads.as_ref().map(JoinHandle::abort_handle),
            self.life.as_ref().map(JoinHandle::abort_handle),
        ];
        tasks.into_iter().flatten().for_each(|task| task.abort());
    }
}

/// Why the task came to its end, if that was an error; otherwise never.
async fn refusal(task: &mut Option<JoinHandle<Result<()>>>) -> anyhow::Error {
    if let Some(running) = task {
        let ended = running.await;
        *task = None;
        if let Err(error) = ended.map_err(anyhow::Error::from).flatten() {
            return error;
        }
    }
    std::future::pending().await
}

/// Runs a task on one thread of its own, which stands back for the guest's. That one is never
/// idle: the runtime's threads, which compressed a snapshot's pages all at once, took its core
/// for as long. (It stands back when the guest has ended, too: on a busy host the last snapshots
/// take longer for it.) Dropping what this gives ends the task.
fn in_background<F>(task: impl FnOnce() -> F + Send + 'static) -> impl Future<Output = Result<()>> + Send
where
    F: Future<Output = Result<()>>,
{
    let (mut sender, receiver) = oneshot::channel();
    let spawned = thread::Builder::new().name("snapshots".into()).spawn(move || {
        // Made here: a runtime may not be dropped within another.
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(sender.send(Err(error.into()))),
        };
        // Linux has it for each thread. Where it can't be had, all is as with the others.
        let _ = rustix::process::nice(NICE);
        runtime.block_on(async {
            tokio::select! {
                () = sender.closed() => {}
                done = task() => {
                    let _ = sender.send(done);
                }
            }
        });
    });
    async {
        spawned.context("start the thread of snapshots")?;
        receiver.await.context("the thread of snapshots has ended")?
    }
}

/// Stores snapshots in the order taken: a snapshot's blocks include none of earlier ones.
async fn upload_snapshots(
    store: StoreClient,
    id: RecordingId,
    epoch: u64,
    mut snapshots: WaitingSnapshots,
) -> Result<()> {
    while let Some((snapshot, bytes)) = snapshots.next().await {
        loop {
            match snapshot.clone().store(&store, id, epoch).await {
                Ok(()) => break,
                Err(StoreError::Unavailable(_)) => {}
                Err(error) => return Err(error).context("store a snapshot"),
            }
        }
        snapshots.done(bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_waits_for_snapshots_only_while_somebody_stores_them() {
        let (queue, waiting) = SnapshotQueue::new();
        let data = Bytes::from(vec![0; SNAPSHOT_BYTES_MAX as usize]);
        let large = NewSnapshot { blocks: vec![(Hash::ZERO, data)], row: v1::SnapshotRow::default() };
        queue.push(large.clone());
        assert!(!queue.is_full());
        queue.push(large.clone());
        assert!(queue.is_full());
        drop(waiting);
        assert!(!queue.is_full());
        queue.push(large);
        assert!(!queue.is_full());
    }

    #[tokio::test]
    async fn a_task_in_the_background_stands_back_and_ends_with_who_waits_for_it() -> Result<()> {
        let here = rustix::process::nice(0)?;
        let there = Arc::new(AtomicU64::new(0));
        let seen = there.clone();
        let task = move || async move {
            seen.store(rustix::process::nice(0)? as u64, Ordering::Relaxed);
            bail!("no room")
        };
        assert_eq!(in_background(task).await.map_err(|error| error.to_string()), Err("no room".into()));
        assert_eq!(there.load(Ordering::Relaxed), (here + NICE).min(19) as u64);
        assert_eq!(rustix::process::nice(0)?, here);

        let (held, ended) = oneshot::channel::<()>();
        let waits = in_background(move || async move {
            let _held = held;
            std::future::pending().await
        });
        drop(waits);
        assert!(ended.await.is_err(), "the task was dropped");
        Ok(())
    }

    #[tokio::test]
    async fn only_a_task_that_failed_refuses() {
        let mut task = Some(tokio::spawn(async { Err(anyhow::anyhow!("no room")) }));
        assert_eq!(refusal(&mut task).await.to_string(), "no room");
        let mut task = Some(tokio::spawn(async { Ok(()) }));
        while !task.as_ref().is_none_or(JoinHandle::is_finished) {
            tokio::task::yield_now().await;
        }
        tokio::select! {
            biased;
            error = refusal(&mut task) => assert!(false, "{error}"),
            () = std::future::ready(()) => {}
        }
        assert!(task.is_none());
    }
}
