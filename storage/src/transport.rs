//! Raft's messages between replicas: two streams a peer, so that votes and
//! heartbeats never wait behind bulk.

use crate::channel::{MESSAGE_BYTES_MAX, connect};
use crate::replica::{GROUP, Handle, Input};
use heddle_proto::v1::raft_transport_client::RaftTransportClient;
use heddle_proto::v1::raft_transport_server::RaftTransport;
use heddle_proto::v1::{GroupMessage, RaftAck, RaftBatch};
use protobuf::Message as _;
use raft::eraftpb::{EntryType, Message, MessageType};
use std::collections::{BTreeMap, HashMap};
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
    pub fn start(cluster: u64, me: u64, peers: &BTreeMap<u64, String>, replica: &Handle) -> Outbound {
        let start = |(id, address): (&u64, &String)| {
            let streams = [0, 1].map(|_| {
                let (sender, messages) = mpsc::channel(QUEUE);
                tokio::spawn(send_to(cluster, me, *id, address.clone(), messages, replica.clone()));
                sender
            });
            (*id, streams)
        };
        Outbound { peers: peers.iter().filter(|(id, _)| **id != me).map(start).collect() }
    }

    /// Sends messages; what finds no room is dropped.
    pub fn send(&self, messages: Vec<Message>) {
        for message in messages {
            let is_bulk = message.get_msg_type() == MessageType::MsgAppend && !message.entries.is_empty();
            if let Some(streams) = self.peers.get(&message.to) {
                let _ = streams[usize::from(is_bulk)].try_send(message);
            }
        }
    }
}

async fn send_to(
    cluster: u64,
    me: u64,
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
                let mut batch = RaftBatch { cluster, from: me, to: peer, messages: vec![] };
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
            for message in batch.messages {
                let message = check(&message, batch.from, self.me)?;
                self.replica.send(Input::Message(Box::new(message)));
            }
        }
        Ok(Response::new(RaftAck {}))
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
    let ordered = decoded.entries.iter().zip(decoded.index + 1..).all(|(entry, index)| entry.index == index);
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
    );
    if is_local {
        return Err(bad("this type never travels"));
    }
    Ok(decoded)
}
