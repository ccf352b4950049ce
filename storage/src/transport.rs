//! Raft's messages between replicas: two streams a peer, so that votes and
//! heartbeats never wait behind bulk.

use crate::catalog::Catalog;
use crate::channel::{MESSAGE_BYTES_MAX, connect};
use crate::core::{Envelope, Input};
use crate::error::{Error, IoContext};
use crate::install::{Page, PageRow};
use crate::journal::{DATA_BYTES_MAX, Segments};
use crate::mend;
use crate::replica::Handle;
use crate::schema::{Key, MemberRow, VALUE_BYTES_MAX, Wish};
use crate::server::write_synced;
use bytes::Bytes;
use heddle_proto::v1;
use heddle_proto::v1::raft_transport_client::RaftTransportClient;
use heddle_proto::v1::raft_transport_server::RaftTransport;
use heddle_proto::v1::{GroupMessage, RaftAck, RaftBatch};
use protobuf::Message as _;
use raft::eraftpb::{EntryType, Message, MessageType};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
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

type Streams = [mpsc::Sender<(u32, Envelope)>; 2];

/// The ways out to all peers. Clones share them.
#[derive(Clone)]
pub struct Outbound(Arc<Shared>);

struct Shared {
    cluster: u64,
    me: u64,
    incarnation: u64,
    replica: Handle,
    runtime: tokio::runtime::Handle,
    /// Addresses that this replica was started with: they win over those of shard 0.
    configured: BTreeMap<u64, String>,
    addresses: Arc<Addresses>,
    streams: Mutex<HashMap<u64, (String, Streams)>>,
}

/// The replicas' addresses, as far as this one knows.
#[derive(Debug, Default)]
pub struct Addresses(RwLock<BTreeMap<u64, String>>);

impl Addresses {
    /// All of them.
    pub fn all(&self) -> BTreeMap<u64, String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One replica's.
    pub fn get(&self, id: u64) -> Option<String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }
}

impl Outbound {
    /// The ways out of replica `me`. Needs a tokio runtime.
    pub fn new(
        cluster: u64,
        (me, incarnation): (u64, u64),
        configured: BTreeMap<u64, String>,
        replica: Handle,
    ) -> Outbound {
        let addresses = Arc::new(Addresses(RwLock::new(configured.clone())));
        let outbound = Outbound(Arc::new(Shared {
            cluster,
            me,
            incarnation,
            replica,
            runtime: tokio::runtime::Handle::current(),
            configured,
            addresses,
            streams: Mutex::default(),
        }));
        outbound.update(&BTreeMap::new());
        outbound
    }

    /// Follows the members of shard 0.
    pub fn update(&self, members: &BTreeMap<u64, MemberRow>) {
        let mut wanted = self.0.configured.clone();
        for (id, row) in members {
            if row.wish == Wish::Removed {
                wanted.remove(id);
            } else {
                wanted.entry(*id).or_insert_with(|| row.address.clone());
            }
        }
        let mut streams = self.0.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|id, (address, _)| wanted.get(id) == Some(address));
        for (id, address) in wanted.iter().filter(|(id, _)| **id != self.0.me) {
            if !streams.contains_key(id) {
                let started = [0, 1].map(|_| self.start(*id, address.clone()));
                streams.insert(*id, (address.clone(), started));
            }
        }
        *self.0.addresses.0.write().unwrap_or_else(PoisonError::into_inner) = wanted;
    }

    fn start(&self, id: u64, address: String) -> mpsc::Sender<(u32, Envelope)> {
        let (sender, messages) = mpsc::channel(QUEUE);
        let shared = &self.0;
        let from = (shared.cluster, shared.me, shared.incarnation);
        shared.runtime.spawn(send_to(from, id, address, messages, shared.replica.clone()));
        sender
    }

    /// The cluster's id and this replica's.
    pub fn identity(&self) -> (u64, u64) {
        (self.0.cluster, self.0.me)
    }

    /// Addresses that this replica was started with.
    pub fn configured(&self) -> BTreeMap<u64, String> {
        self.0.configured.clone()
    }

    /// All addresses, kept up to date.
    pub fn addresses(&self) -> Arc<Addresses> {
        self.0.addresses.clone()
    }

    /// Where its tasks run.
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.0.runtime
    }

    /// Sends a message; what finds no room is dropped.
    pub fn send(&self, to: u64, envelope: Envelope) {
        // Empty appends too: one that overtook entries would be refused as a gap.
        let (group, is_bulk) = match &envelope {
            Envelope::Raft { group, message } => (*group, message.get_msg_type() == MessageType::MsgAppend),
            Envelope::Pull { group, .. } => (*group, false),
            Envelope::Page(page) => (page.group, true),
        };
        let streams = self.0.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, streams)) = streams.get(&to) {
            let _ = streams[usize::from(is_bulk)].try_send((group, envelope));
        }
    }
}

/// A message for the wire, and about how many bytes it has. Entries' data travels beside
/// Raft's message, so that it is copied once.
pub fn encode(group: u32, envelope: Envelope) -> Option<(GroupMessage, usize)> {
    let mut out = GroupMessage { group, ..GroupMessage::default() };
    let bytes = match envelope {
        Envelope::Raft { mut message, .. } => {
            let entries = message.mut_entries().iter_mut();
            out.entries = entries.map(|entry| std::mem::take(&mut entry.data)).collect();
            out.raft = message.write_to_bytes().ok()?.into();
            out.raft.len() + out.entries.iter().map(Bytes::len).sum::<usize>()
        }
        Envelope::Pull { index, from, .. } => {
            out.pull = Some(v1::Pull { index, from });
            16
        }
        Envelope::Page(page) => {
            let rows: Vec<v1::PageRow> = page
                .rows
                .into_iter()
                .map(|row| v1::PageRow { key: row.key.into(), value: row.value.into(), parts: row.parts })
                .collect();
            let bytes = rows.iter().flat_map(|row| &row.parts).map(Bytes::len).sum::<usize>();
            out.page = Some(v1::Page { index: page.index, from: page.from, rows, total: page.total });
            bytes
        }
    };
    Some((out, bytes))
}

async fn send_to(
    (cluster, me, incarnation): (u64, u64, u64),
    peer: u64,
    address: String,
    mut messages: mpsc::Receiver<(u32, Envelope)>,
    replica: Handle,
) {
    let channel = match connect(&address) {
        Ok(channel) => channel,
        Err(error) => return tracing::error!(peer, "cannot be reached: {error}"),
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
                while let Some((group, envelope)) = next {
                    if let Some((encoded, length)) = encode(group, envelope) {
                        bytes += length;
                        batch.messages.push(encoded);
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
    /// Rows.
    pub catalog: Catalog,
    /// Bytes.
    pub segments: Segments,
    /// How many groups there are.
    pub groups: u32,
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
                let envelope = decode(message, batch.from, self.me, self.groups)?;
                self.replica.send(Input::Message(batch.from, envelope));
            }
        }
        Ok(Response::new(RaftAck {}))
    }

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<v1::FetchReply>, Status> {
        let request = request.into_inner();
        if request.cluster != self.cluster {
            return Err(Status::invalid_argument("this is another cluster"));
        }
        let internal = |error: Error| Status::data_loss(error.to_string());
        let parts = mend::parts(&self.catalog, &self.segments, &request.key).map_err(internal)?;
        let parts = parts.ok_or_else(|| Status::not_found("no such row"))?;
        Ok(Response::new(v1::FetchReply { parts }))
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

/// Decodes a message of peer `from` and checks all that raft-rs would panic on.
pub fn decode(message: GroupMessage, from: u64, to: u64, groups: u32) -> Result<Envelope, Status> {
    let bad = |what: &str| Status::invalid_argument(format!("raft message: {what}"));
    let group = message.group;
    if group >= groups {
        return Err(bad("unknown group"));
    }
    if let Some(pull) = message.pull {
        return Ok(Envelope::Pull { group, index: pull.index, from: pull.from });
    }
    if let Some(page) = message.page {
        let row = |row: v1::PageRow| {
            let is_short = row.value.len() <= VALUE_BYTES_MAX
                && row.parts.iter().all(|part| part.len() <= DATA_BYTES_MAX);
            let is_of_group = Key::group_of(&row.key) == group && is_short;
            let (key, value) = (row.key.to_vec(), row.value.to_vec());
            is_of_group.then_some(PageRow { key, value, parts: row.parts })
        };
        let rows: Option<Vec<PageRow>> = page.rows.into_iter().map(row).collect();
        let rows = rows.ok_or_else(|| bad("a row of another group, or too long"))?;
        return Ok(Envelope::Page(Page {
            group,
            index: page.index,
            from: page.from,
            rows,
            total: page.total,
        }));
    }
    let mut decoded = Message::parse_from_bytes(&message.raft).map_err(|e| bad(&e.to_string()))?;
    if decoded.entries.len() != message.entries.len() {
        return Err(bad("entries and their data differ in number"));
    }
    for (entry, data) in decoded.mut_entries().iter_mut().zip(message.entries) {
        entry.data = data;
    }
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
    if decoded.entries.iter().any(|entry| entry.data.len() > DATA_BYTES_MAX) {
        return Err(bad("an entry is too long"));
    }
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
            | MessageType::MsgPropose
    );
    let is_read = decoded.get_msg_type() == MessageType::MsgReadIndex;
    if is_read && decoded.entries.len() != 1 {
        return Err(bad("a read index has one entry"));
    }
    if is_local {
        return Err(bad("this type never travels"));
    }
    Ok(Envelope::Raft { group, message: Box::new(decoded) })
}
