//! The two long streams: chunks in, with one answer for many; chunks out, as fast as they are taken.

use crate::apply::Outcome;
use crate::command::{Command, Proposal};
use crate::core::Input;
use crate::group::{Answer, NotDone};
use crate::schema::RecordingState;
use crate::service::{ReplyStream, StoreService, internal, recording_id};
use bytes::{Bytes, BytesMut};
use heddle_proto::{Chunk, RecordingId, v1};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Bytes one writer may have in flight: the credit that the store grants.
const CREDIT_BYTES: u64 = 16 << 20;
/// Chunks one append stream may have in flight.
const IN_FLIGHT: usize = 1024;
/// Further chunks in one request, and bytes of all of them.
const MORE_MAX: usize = 4095;
const MORE_BYTES_MAX: usize = 1 << 20;
/// Chunks that are read ahead of who takes them.
const READ_AHEAD: usize = 4;
/// A follower looks for what is new after so long, at the latest.
const FOLLOW: Duration = Duration::from_secs(1);

type Pending = (oneshot::Receiver<Answer>, OwnedSemaphorePermit);

impl StoreService {
    pub(crate) fn append_stream(
        &self,
        requests: Streaming<v1::AppendRequest>,
    ) -> ReplyStream<v1::AppendReply> {
        let (replies, stream) = mpsc::channel(16);
        let (sender, proposed) = mpsc::channel::<Pending>(IN_FLIGHT);
        let (service, failed) = (self.clone(), replies.clone());
        tokio::spawn(async move {
            let mut requests = requests;
            let mut place = None;
            while let Some(request) = requests.next().await {
                let step = async { service.append_one(request?, &mut place).await };
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
        tokio::spawn(self.clone().answer(proposed, replies));
        ReceiverStream::new(stream)
    }

    async fn append_one(
        &self,
        request: v1::AppendRequest,
        place: &mut Option<(RecordingId, u32)>,
    ) -> Result<Pending, Status> {
        let recording = recording_id(&request.recording)?;
        let shard = match place {
            Some((id, shard)) if *id == recording => *shard,
            _ => self.shard_of(recording, false).await?,
        };
        *place = Some((recording, shard));
        let bytes = request.chunk.len() + request.more.iter().map(Bytes::len).sum::<usize>();
        let is_too_much = request.more.len() > MORE_MAX || bytes > MORE_BYTES_MAX || request.rewrites;
        if !request.more.is_empty() && is_too_much {
            let what =
                format!("at most {MORE_MAX} chunks of {MORE_BYTES_MAX} bytes at a time, none to rewrite");
            return Err(Status::invalid_argument(what));
        }
        let permit = self.reserve(bytes).await?;
        // Header, length and payload hash, before anything is proposed.
        let parse = |bytes| Chunk::parse(bytes).map_err(|error| Status::invalid_argument(error.to_string()));
        let epoch = request.epoch;
        let first = parse(request.chunk)?;
        let (command, bulk) = if request.rewrites {
            (Command::Rewrite { recording, epoch }, first.bytes)
        } else if request.more.is_empty() {
            (Command::Append { recording, epoch }, first.bytes)
        } else {
            let mut all = BytesMut::with_capacity(bytes);
            let mut lengths = vec![first.bytes.len() as u32];
            all.extend_from_slice(&first.bytes);
            for more in request.more {
                let chunk = parse(more)?;
                lengths.push(chunk.bytes.len() as u32);
                all.extend_from_slice(&chunk.bytes);
            }
            (Command::AppendMany { recording, epoch, lengths }, all.freeze())
        };
        let (answer, receiver) = oneshot::channel();
        self.replica.send(Input::Propose(shard, Proposal { command, bulk }, answer));
        Ok((receiver, permit))
    }

    /// Answers in order; chunks that are committed together are acknowledged together.
    async fn answer(
        self,
        mut proposed: mpsc::Receiver<Pending>,
        replies: mpsc::Sender<Result<v1::AppendReply, Status>>,
    ) {
        let mut next: Option<Pending> = None;
        loop {
            let pending = match next.take() {
                Some(pending) => Some(pending),
                None => proposed.recv().await,
            };
            let Some((answer, permit)) = pending else { return };
            let mut answer = answer.await.unwrap_or(Err(NotDone::Stopped));
            drop(permit);
            while answer.as_ref().is_ok_and(|outcome| !matches!(outcome, Outcome::Refused(_))) {
                let Ok((mut later, permit)) = proposed.try_recv() else { break };
                match later.try_recv() {
                    Ok(later) => answer = later,
                    Err(oneshot::error::TryRecvError::Empty) => {
                        next = Some((later, permit));
                        break;
                    }
                    Err(oneshot::error::TryRecvError::Closed) => answer = Err(NotDone::Stopped),
                }
            }
            let reply = self.outcome(answer).map(|outcome| match outcome {
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
    }

    pub(crate) async fn read_stream(&self, r: v1::ReadRequest) -> Result<ReplyStream<v1::ReadReply>, Status> {
        let id = recording_id(&r.recording)?;
        let shard = self.shard_of(id, false).await?;
        self.read_index(shard).await?;
        self.recording_row(shard, id)?;
        let from = match r.by_icount {
            true => self.catalog.event_at(shard, id, r.from_icount).map_err(internal)?,
            false => r.from_event,
        };
        let bounds = Bounds {
            to_event: if r.to_event == 0 || r.by_icount { u64::MAX } else { r.to_event },
            to_icount: if r.to_icount == 0 || !r.by_icount { u64::MAX } else { r.to_icount },
        };
        let (replies, stream) = mpsc::channel(READ_AHEAD);
        let service = self.clone();
        tokio::spawn(async move {
            let reading = service.read_on((shard, id), from, bounds, r.follow, &replies);
            if let Err(status) = reading.await {
                let _ = replies.send(Err(status)).await;
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    async fn read_on(
        &self,
        (shard, id): (u32, RecordingId),
        mut from: u64,
        bounds: Bounds,
        follows: bool,
        replies: &mpsc::Sender<Result<v1::ReadReply, Status>>,
    ) -> Result<(), Status> {
        while from < bounds.to_event {
            // Asked for before the look, so that nothing that comes between is missed.
            let changed = self.catalog.changed().notified();
            let (key, chunks) = self.catalog.chunks_at(shard, id, from).map_err(internal)?;
            // Chunks may be written anew, with other borders, between two looks.
            if chunks.is_empty() {
                let row = self.recording_row(shard, id)?;
                if !follows || row.state != RecordingState::Recording {
                    return Ok(());
                }
                tokio::select! {
                    () = changed => {}
                    () = tokio::time::sleep(FOLLOW) => {}
                    () = replies.closed() => return Ok(()),
                }
                continue;
            }
            for row in chunks {
                if row.first_event >= bounds.to_event || row.first_icount > bounds.to_icount {
                    return Ok(());
                }
                from = row.end_event();
                let bytes = self.reader.read(&key, row.at).await.map_err(internal)?;
                let chunk = Chunk::parse(bytes).map_err(|error| {
                    Status::data_loss(format!("chunk at event {} of {id}: {error}", row.first_event))
                })?;
                if replies.send(Ok(v1::ReadReply { chunk: chunk.bytes })).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Where a read ends.
struct Bounds {
    to_event: u64,
    to_icount: u64,
}
