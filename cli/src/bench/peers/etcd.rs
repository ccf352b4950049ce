//! etcd: puts to its leader, over one HTTP/2 connection.
//!
//! Only the messages and fields that a put and the search for the leader need, by hand: the
//! client crate brings a compiler of its own.

use super::members::{MEMBERS, Members, free_addresses, until_ready};
use super::{Load, MESSAGE_BYTES_MAX, Measured, STALL, Timing};
use anyhow::{Context, Result};
use bytes::Bytes;
use prost::Message;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

/// What the figures were taken with, for the report.
pub const ETCD_SETTINGS: &str = "3 members; an answer means synced (fsync) by a majority, as is its default; \
    --quota-backend-bytes 8 GiB, --max-request-bytes 8 MiB, else defaults; \
    puts to the leader over one HTTP/2 connection, 4,096 keys in turn";

/// Keys in turn: a small index. Their old values stay, compaction being off by default.
const KEYS: usize = 4096;
/// Bytes of values, old ones included, at which it refuses puts: the most that etcd advises.
const QUOTA_BYTES: u64 = 8 << 30;

const PUT: &str = "/etcdserverpb.KV/Put";
const STATUS: &str = "/etcdserverpb.Maintenance/Status";

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    /// 0: it knows of none.
    #[prost(uint64, tag = "4")]
    leader: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResponseHeader {
    /// Of the member that answers.
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

/// Three members that run.
///
/// - Each keeps the last 100,000 entries in memory besides its database, so all three hold
///   what was put: a minute at 80 MB/s is some 15 GB. Start anew for a new load.
/// - Past the quota a run ends in an error.
pub struct Etcd {
    members: Members,
    channels: Vec<Channel>,
}

impl Etcd {
    /// Starts them with their data in `dir` and waits for a leader.
    pub async fn start(dir: &Path) -> Result<Etcd> {
        let mut members = Members::in_dir(dir)?;
        let addresses = free_addresses(2 * MEMBERS)?;
        let (clients, peers) = addresses.split_at(MEMBERS);
        let all: Vec<String> =
            peers.iter().enumerate().map(|(i, peer)| format!("etcd-{}=http://{peer}", i + 1)).collect();
        // So that members of two clusters that got each other's ports would not mix.
        let token = format!("heddle-bench-{}-{}", std::process::id(), peers[0].port());
        for (i, (client, peer)) in clients.iter().zip(peers).enumerate() {
            let name = format!("etcd-{}", i + 1);
            let data = members.path(&name).display().to_string();
            let arguments = arguments(&name, &data, client, peer, &all.join(","), &token);
            members.start(&name, "etcd", &arguments)?;
        }
        let channels = clients.iter().map(channel).collect::<Result<Vec<_>>>()?;
        members.wait(async || leader(&channels).await).await.context("start etcd")?;
        Ok(Etcd { members, channels })
    }

    /// Puts, a window at a time, to the one that leads now.
    pub async fn run(&self, load: &Load) -> Result<Measured> {
        let leader =
            until_ready(async || leader(&self.channels).await).await.context("find etcd's leader")?;
        let payloads: Arc<[Bytes]> = load.payloads()?.into();
        let next = Arc::new(AtomicUsize::new(0));
        let timing = load.start()?;
        let mut putters = JoinSet::new();
        for _ in 0..load.window {
            putters.spawn(put_until_over(client(&leader), payloads.clone(), next.clone(), timing));
        }
        let mut latencies_ms = vec![];
        while let Some(putter) = putters.join_next().await {
            latencies_ms.extend(putter.context("join a putter")?.context("put to etcd")?);
        }
        Measured::new(load, latencies_ms)
    }

    /// The process ids of the members.
    pub fn pids(&self) -> Vec<u32> {
        self.members.pids()
    }

    /// Ends the members, after which their directory can go.
    pub async fn stop(self) {
        self.members.stop().await;
    }
}

fn arguments(
    name: &str,
    data: &str,
    client: &SocketAddr,
    peer: &SocketAddr,
    all: &str,
    token: &str,
) -> Vec<String> {
    let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
    let (quota, message) = (QUOTA_BYTES.to_string(), MESSAGE_BYTES_MAX.to_string());
    let pairs: [(&str, &str); 13] = [
        ("--name", name),
        ("--data-dir", data),
        ("--listen-client-urls", &client),
        ("--advertise-client-urls", &client),
        ("--listen-peer-urls", &peer),
        ("--initial-advertise-peer-urls", &peer),
        ("--initial-cluster", all),
        ("--initial-cluster-token", token),
        ("--initial-cluster-state", "new"),
        ("--quota-backend-bytes", &quota),
        ("--max-request-bytes", &message),
        ("--logger", "zap"),
        ("--log-outputs", "stderr"),
    ];
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_string(), value.to_string()]).collect()
}

fn channel(address: &SocketAddr) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).context("address etcd")?;
    let endpoint = endpoint
        .connect_timeout(Duration::from_secs(2))
        .timeout(STALL)
        .tcp_nodelay(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20);
    Ok(endpoint.connect_lazy())
}

fn client(channel: &Channel) -> Grpc<Channel> {
    Grpc::new(channel.clone())
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
}

async fn call<Q, A>(client: &mut Grpc<Channel>, path: &'static str, request: Q) -> Result<A>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    client.ready().await.context("reach etcd")?;
    let codec = ProstCodec::<Q, A>::default();
    let answer = client.unary(Request::new(request), PathAndQuery::from_static(path), codec).await?;
    Ok(answer.into_inner())
}

/// The channel to the leader, if all members answer.
async fn leader(channels: &[Channel]) -> Result<Channel> {
    let mut leader = None;
    for channel in channels {
        let status: StatusResponse = call(&mut client(channel), STATUS, StatusRequest {}).await?;
        let member = status.header.unwrap_or_default().member_id;
        if member != 0 && member == status.leader {
            leader = Some(channel.clone());
        }
    }
    leader.context("no member leads")
}

/// One operation of the window after the other; the latencies of those that count.
async fn put_until_over(
    mut client: Grpc<Channel>,
    payloads: Arc<[Bytes]>,
    next: Arc<AtomicUsize>,
    timing: Timing,
) -> Result<Vec<f64>> {
    let mut latencies_ms = vec![];
    loop {
        let sent = Instant::now();
        if timing.is_over(sent) {
            return Ok(latencies_ms);
        }
        let number = next.fetch_add(1, Ordering::Relaxed);
        let key = Bytes::from(format!("bench/{:04}", number % KEYS));
        let value = payloads[number % payloads.len()].clone();
        call::<_, PutResponse>(&mut client, PUT, PutRequest { key, value }).await?;
        timing.take(sent, Instant::now(), &mut latencies_ms);
    }
}
