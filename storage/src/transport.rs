//! Raft's messages between replicas: two streams a peer, so that votes and
//! heartbeats never wait behind bulk.

use crate::channel::{MESSAGE_BYTES_MAX, connect};
use crate::error::{Error, IoContext};
use crate::replica::{GROUP, Handle, Input};
use crate::server::write_synced;
use heddle_proto::v1::raft_transport_client::RaftTransportClient;
use heddle_proto::v1::raft_transport_server::RaftTransport;
use heddle_proto::v1::{GroupMessage, RaftAck, RaftBatch};
use protobuf::Message as _;
use raft::eraftpb::{EntryType, Message, MessageType};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Messages that wait for a peer; beyond it they are dropped, and Raft sends again.
const QUEUE: usize = 256;
/// A batch is closed once it is this long.
const BATCH_BYTES: usize = 1 << 20;
/// Pause before a broken stream is opened anew.
const RECONNECT: Duration = Duration::from_millis(100);

/// The ways out to all peers.
pub struct Outbound {
    peers: HashMap<u64, [mpsc::Sender<Message>; 2]>,
}

impl Outbound {
    /// Starts the sending tasks of replica `me`.
    pub fn start(
        cluster: u64,
        (me, incarnation): (u64, u64),
        peers: &BTreeMap<u64, String>,
        replica: &Handle,
    ) -> Outbound {
        let start = |(id, address): (&u64, &String)| {
            let streams = [0, 1].map(|_| {
                let (sender, messages) = mpsc::channel(QUEUE);
                tokio::spawn(send_to(
                    (cluster, me, incarnation),
                    *id,
                    address.clone(),
                    messages,
                    replica.clone(),
                ));
                sender
            });
            (*id, streams)
        };
        Outbound { peers: peers.iter().filter(|(id, _)| **id != me).map(start).collect() }
    }

    /// Sends messages; what finds no room is dropped.
    pub fn send(&self, messages: Vec<Message>) {
        for message in messages {
            // Empty ones too: one that overtook entries would be refused as a gap.
            let is_bulk = message.get_msg_type() == MessageType::MsgAppend;
            if let Some(streams) = self.peers.get(&message.to) {
                let _ = streams[usize::from(is_bulk)].try_send(message);
            }
        }
    }
}

async fn send_to(
    (cluster, me, incarnation): (u64, u64, u64),
    peer: u64,
    address: String,
    mut messages: mpsc::Receiver<Message>,
    replica: Handle,
) {
    let Ok(channel) = connect(&address) else {
        tracing::error!(address, "not an address");
        return;
    };
    let mut client = RaftTransportClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
    loop {
        let (sender, batches) = mpsc::channel::<RaftBatch>(4);
        let stream = client.stream(ReceiverStream::new(batches));
        let pump = async {
            while let Some(first) = messages.recv().await {
                let mut batch = RaftBatch { cluster, from: me, to: peer, messages: vec![], incarnation };
                let mut bytes = 0;
                let mut next = Some(first);
                while let Some(message) = next {
                    if let Ok(encoded) = message.write_to_bytes() {
                        bytes += encoded.len();
                        batch.messages.push(GroupMessage { group: GROUP, raft: encoded.into() });
                    }
                    next = if bytes < BATCH_BYTES { messages.try_recv().ok() } else { None };
                }
                if sender.send(batch).await.is_err() {
                    return true;
                }
            }
            false
        };
        // The stream's answer comes only when it has broken.
        let goes_on = tokio::select! {
            _ = stream => true,
            goes_on = pump => goes_on,
        };
        if !goes_on {
            return;
        }
        replica.send(Input::Unreachable(peer));
        tokio::time::sleep(RECONNECT).await;
        while messages.try_recv().is_ok() {}
    }
}

/// The receiving end.
pub struct TransportService {
    /// The cluster's id.
    pub cluster: u64,
    /// This replica's id.
    pub me: u64,
    /// Where messages go.
    pub replica: Handle,
    /// Who is who.
    pub known: Arc<KnownPeers>,
}

#[tonic::async_trait]
impl RaftTransport for TransportService {
    async fn stream(&self, request: Request<Streaming<RaftBatch>>) -> Result<Response<RaftAck>, Status> {
        let mut batches = request.into_inner();
        while let Some(batch) = batches.next().await {
            let batch = batch?;
            if batch.cluster != self.cluster || batch.to != self.me {
                return Err(Status::invalid_argument(format!(
                    "this is replica {} of cluster {:x}, not {} of {:x}",
                    self.me, self.cluster, batch.to, batch.cluster
                )));
            }
            self.known.check(batch.from, batch.incarnation)?;
            for message in batch.messages {
                let message = check(&message, batch.from, self.me)?;
                self.replica.send(Input::Message(Box::new(message)));
            }
        }
        Ok(Response::new(RaftAck {}))
    }
}

/// The incarnation of each peer, as first heard, kept in a file.
pub struct KnownPeers {
    dir: PathBuf,
    incarnations: Mutex<BTreeMap<u64, u64>>,
}

impl KnownPeers {
    /// Those that this directory remembers.
    pub fn open(dir: &Path) -> Result<KnownPeers, Error> {
        let path = dir.join("peers.json");
        let incarnations = if path.exists() {
            let bytes = std::fs::read(&path).at("read", &path)?;
            let what = |e: serde_json::Error| Error::Identity { path: path.clone(), what: e.to_string() };
            serde_json::from_slice(&bytes).map_err(what)?
        } else {
            BTreeMap::new()
        };
        Ok(KnownPeers { dir: dir.to_path_buf(), incarnations: Mutex::new(incarnations) })
    }

    /// Refuses a peer that has lost its directory: it would vote on what it forgot.
    fn check(&self, peer: u64, incarnation: u64) -> Result<(), Status> {
        let mut known = self.incarnations.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&peer) {
            Some(first) if *first == incarnation => Ok(()),
            Some(_) => {
                tracing::error!(peer, "a replica came back with another directory: it is refused");
                Err(Status::failed_precondition(format!(
                    "replica {peer} came back with another directory; restore its old one"
                )))
            }
            None => {
                known.insert(peer, incarnation);
                let bytes = serde_json::to_vec(&*known).unwrap_or_default();
                write_synced(&self.dir, &self.dir.join("peers.json"), &bytes)
                    .map_err(|error| Status::unavailable(error.to_string()))
            }
        }
    }
}

/// Decodes a message and checks all that raft-rs would panic on.
fn check(message: &GroupMessage, from: u64, to: u64) -> Result<Message, Status> {
    let bad = |what: &str| Status::invalid_argument(format!("raft message: {what}"));
    if message.group != GROUP {
        return Err(bad("unknown group"));
    }
    let decoded = Message::parse_from_bytes(&message.raft).map_err(|e| bad(&e.to_string()))?;
    if decoded.from != from || decoded.to != to {
        return Err(bad("sender or receiver differ from the batch's"));
    }
    let known = |kind| {
        [EntryType::EntryNormal, EntryType::EntryConfChange, EntryType::EntryConfChangeV2].contains(&kind)
    };
    let numbered = decoded.entries.iter().enumerate();
    let ordered =
        numbered.into_iter().all(|(i, entry)| decoded.index.checked_add(i as u64 + 1) == Some(entry.index));
    let is_append = decoded.get_msg_type() == MessageType::MsgAppend;
    if !decoded.entries.iter().all(|entry| known(entry.get_entry_type())) || (is_append && !ordered) {
        return Err(bad("entries of unknown types or with gaps"));
    }
    let is_local = matches!(
        decoded.get_msg_type(),
        MessageType::MsgHup
            | MessageType::MsgBeat
            | MessageType::MsgUnreachable
            | MessageType::MsgSnapStatus
            | MessageType::MsgCheckQuorum
            | MessageType::MsgSnapshot
            | MessageType::MsgPropose
    );
    let is_read = decoded.get_msg_type() == MessageType::MsgReadIndex;
    if is_read && decoded.entries.len() != 1 {
        return Err(bad("a read index has one entry"));
    }
    if is_local {
        return Err(bad("this type never travels"));
    }
    Ok(decoded)
}
