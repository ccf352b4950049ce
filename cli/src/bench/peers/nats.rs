//! NATS JetStream: publishing to a stream of three replicas, over one connection to its leader.

mod connection;

use super::members::{MEMBERS, Members, free_addresses, until_ready};
use super::{Load, MESSAGE_BYTES_MAX, Measured, STALL, Timing};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use connection::{Connection, Incoming, Outgoing, Said};
use serde::Deserialize;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// What the figures were taken with, for the report.
pub const NATS_SETTINGS: &str = "3 servers, one stream of 3 replicas in files; NOT DURABLE: 2.9 has no setting \
    to sync (fsync) before it acknowledges, an answer means written by a majority to the page cache; \
    max_payload 8 MiB, stream of at most 4 GiB that drops its oldest, else defaults; \
    published to the stream's leader over one TCP connection";

/// At most of the stream, dropping the oldest: a minute at 70 MB/s, and disk for three of it.
const STREAM_BYTES: u64 = 4 << 30;
/// What a server may use, so that the stream fits with its replication log.
const STORE_BYTES: u64 = 20 << 30;

const SUBJECT: &str = "bench.data";
const CREATE: &str = "$JS.API.STREAM.CREATE.BENCH";
const INFO: &str = "$JS.API.STREAM.INFO.BENCH";
/// JetStream's `err_code` for a stream that isn't there.
const STREAM_NOT_FOUND: u64 = 10_059;

/// Three servers that run, with a stream.
pub struct Nats {
    members: Members,
    clients: Vec<SocketAddr>,
}

impl Nats {
    /// Starts them with their data in `dir`, creates the stream and waits until it is replicated.
    pub async fn start(dir: &Path) -> Result<Nats> {
        let mut members = Members::in_dir(dir)?;
        let addresses = free_addresses(2 * MEMBERS)?;
        let (clients, routes) = addresses.split_at(MEMBERS);
        for (i, (client, route)) in clients.iter().zip(routes).enumerate() {
            let name = name(i);
            let file = members.path(&format!("{name}.conf"));
            let config = config(&name, &members.path(&name), client, route, routes);
            std::fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
            members.start(&name, "nats-server", &["--config".into(), file.display().to_string()])?;
        }
        let clients = clients.to_vec();
        members.wait(async || stream_leader(&clients).await).await.context("start NATS")?;
        Ok(Nats { members, clients })
    }

    /// Publishes, a window at a time, to the server that leads the stream now.
    pub async fn run(&self, load: &Load) -> Result<Measured> {
        let leader = until_ready(async || stream_leader(&self.clients).await).await;
        let leader = leader.context("find the stream's leader")?;
        let Connection { mut incoming, mut outgoing, inbox } = Connection::open(leader).await?;
        let payloads = load.payloads()?;
        let flight = Flight {
            free: Semaphore::new(load.window),
            window: u32::try_from(load.window).context("a window")?,
            is_pong_due: AtomicBool::new(false),
            timing: load.start()?,
        };
        let mut latencies_ms = vec![];
        tokio::select! {
            published = flight.publish(&mut outgoing, &inbox, &payloads) => published?,
            failed = flight.acknowledge(&mut incoming, &mut latencies_ms) => match failed? {},
        }
        Measured::new(load, latencies_ms)
    }

    /// Ends the servers, after which their directory can go.
    pub async fn stop(self) {
        self.members.stop().await;
    }
}

fn name(member: usize) -> String {
    format!("nats-{}", member + 1)
}

/// NATS reads JSON as its own format.
fn config(
    name: &str,
    store: &Path,
    client: &SocketAddr,
    route: &SocketAddr,
    routes: &[SocketAddr],
) -> String {
    let routes: Vec<String> = routes.iter().map(|route| format!("nats://{route}")).collect();
    let value = json!({
        "server_name": name,
        "listen": client.to_string(),
        "max_payload": MESSAGE_BYTES_MAX,
        "jetstream": {
            "store_dir": store.display().to_string(),
            "max_file_store": STORE_BYTES,
            "max_memory_store": 64 << 20,
        },
        "cluster": { "name": "bench", "listen": route.to_string(), "routes": routes },
    });
    format!("{value:#}")
}

/// The address of the stream's leader, if both other replicas follow it; creates the stream.
async fn stream_leader(clients: &[SocketAddr]) -> Result<SocketAddr> {
    let any = clients.first().context("no servers")?;
    let mut connection = Connection::open(*any).await?;
    let mut stream = connection.request(INFO, b"").await?;
    if stream["error"]["err_code"] == STREAM_NOT_FOUND {
        let config = json!({
            "name": "BENCH", "subjects": ["bench.>"], "storage": "file", "num_replicas": MEMBERS,
            "retention": "limits", "discard": "old", "max_bytes": STREAM_BYTES, "max_age": 0,
            "max_msgs": -1, "max_msg_size": -1, "max_consumers": -1,
        });
        stream = connection.request(CREATE, config.to_string().as_bytes()).await?;
    }
    let (error, cluster) = (&stream["error"], &stream["cluster"]);
    ensure!(error.is_null(), "JetStream refuses: {error}");
    let others = cluster["replicas"].as_array().into_iter().flatten();
    let following = others.filter(|replica| replica["current"] == true).count();
    ensure!(following + 1 == MEMBERS, "not all replicas follow: {cluster}");
    let leader = cluster["leader"].as_str().context("the stream has no leader")?;
    let at = (0..clients.len()).find(|at| name(*at) == leader);
    Ok(clients[at.with_context(|| format!("{leader} leads, which is none of ours"))?])
}

/// JetStream's answer to a record.
#[derive(Deserialize)]
struct PubAck {
    error: Option<Value>,
    #[serde(default)]
    seq: u64,
}

/// What publishing and acknowledging share.
struct Flight {
    /// A permit for each operation that may be sent.
    free: Semaphore,
    window: u32,
    /// The side that hears the ping isn't the one that writes.
    is_pong_due: AtomicBool,
    timing: Timing,
}

impl Flight {
    /// Sends whenever the window has room, until the time is over and all are acknowledged.
    async fn publish(&self, outgoing: &mut Outgoing, inbox: &str, payloads: &[Bytes]) -> Result<()> {
        for payload in payloads.iter().cycle() {
            let permit = match self.free.try_acquire() {
                Ok(permit) => permit,
                Err(_) => {
                    // Nothing more to send for now, so what is in the buffer must not wait.
                    outgoing.flush().await?;
                    self.free.acquire().await?
                }
            };
            let sent = Instant::now();
            if self.timing.is_over(sent) {
                break;
            }
            permit.forget();
            if self.is_pong_due.swap(false, Ordering::Relaxed) {
                outgoing.pong().await?;
            }
            // The answer brings back when it was sent: the reply's subject is ours to choose.
            let reply = format!("{inbox}{}", sent.duration_since(self.timing.began()).as_nanos());
            outgoing.publish(SUBJECT, &reply, payload).await?;
        }
        outgoing.flush().await?;
        let all = timeout(STALL, self.free.acquire_many(self.window)).await;
        let _all = all.context("records that were never acknowledged")??;
        Ok(())
    }

    /// Takes acknowledgements for as long as it is polled; ends in an error only.
    async fn acknowledge(&self, incoming: &mut Incoming, latencies_ms: &mut Vec<f64>) -> Result<Infallible> {
        loop {
            let said = timeout(STALL, incoming.next()).await.context("NATS has gone silent")??;
            let (subject, body) = match said {
                Said::Message { subject, body } => (subject, body),
                Said::Ping => {
                    self.is_pong_due.store(true, Ordering::Relaxed);
                    continue;
                }
                Said::Pong => continue,
            };
            let now = Instant::now();
            let ack: PubAck = serde_json::from_slice(&body).context("read an acknowledgement")?;
            if let Some(error) = ack.error {
                bail!("JetStream refused a record: {error}");
            }
            ensure!(ack.seq > 0, "an acknowledgement without a place in the stream");
            let sent = subject.rsplit('.').next().and_then(|nanos| nanos.parse::<u64>().ok());
            let sent = Duration::from_nanos(sent.context("an acknowledgement of nothing we sent")?);
            self.timing.take(self.timing.began() + sent, now, latencies_ms);
            self.free.add_permits(1);
        }
    }
}
