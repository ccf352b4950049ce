//! The three servers, one by one or all in one process.

use crate::args;
use crate::exit::{USAGE, coded};
use anyhow::{Context, Result, bail};
use heddle_coordinator::{Coordinator, CoordinatorConfig};
use heddle_node::qemu::builds::{self, QemuBuild};
use heddle_node::worker::{NodeConfig, Worker};
use heddle_proto::v1;
use heddle_storage::server::{Listener, serve};
use heddle_storage::tls;
use heddle_storage::{Replica, ReplicaConfig, StoreClient};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use tokio::net::TcpSocket;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// Runs one part until it is told to stop.
pub async fn run(command: args::Serve) -> Result<()> {
    match command {
        args::Serve::Storage { id, cluster_id, dir, listen, peers, shards, join, with_parent } => {
            follow_parent(with_parent)?;
            // A replica takes and gives back buffers of megabytes all the time, and the kernel
            // zeroes a huge page whole for the little that is used of it. Where it can't be had
            // otherwise, it only costs more.
            let _ = rustix::thread::disable_transparent_huge_pages(true);
            let peers = parse_peers(&peers)?;
            check_secure(peers.values().chain(&join))?;
            let listener = bind(listen)?;
            let mut config = ReplicaConfig { id, cluster: cluster_id, dir, peers, shards, joins: false };
            if let Some(url) = join {
                join_cluster(&mut config, url).await?;
            }
            let replica = Replica::start(config).context("start the replica")?;
            let ended = tokio::select! {
                served = serve(Listener::Tcp(listener), replica.services(), std::future::pending()) => served.map_err(Into::into),
                why = replica.stopped() => Err(coded(crate::exit::UNEXPECTED, format!("the replica stopped: {why}"))),
                () = asked_to_stop() => Ok(()),
            };
            replica.stop();
            ended
        }
        args::Serve::Coordinator { listen, replicas, lease_ms, with_parent } => {
            follow_parent(with_parent)?;
            check_secure(&replicas)?;
            let listener = bind(listen)?;
            let name = format!("coordinator at {listen}");
            let config = CoordinatorConfig { name, replicas, lease_ms };
            let coordinator = tokio::select! {
                started = Coordinator::start(config) => started?,
                () = asked_to_stop() => return Ok(()),
            };
            let service = coordinator.service();
            tokio::select! {
                served = serve(Listener::Tcp(listener), |router| router.add_service(service), std::future::pending()) => Ok(served?),
                why = coordinator.stopped() => bail!("the coordinator stopped: {why}"),
                () = asked_to_stop() => Ok(()),
            }
        }
        args::Serve::Node {
            name,
            listen,
            replicas,
            coordinator,
            slots,
            offer_planted,
            qemu,
            with_parent,
        } => {
            follow_parent(with_parent)?;
            check_secure(replicas.iter().chain([&coordinator]))?;
            let listener = bind(listen)?;
            let address = format!("{}://{listen}", tls::scheme());
            let worker = Worker::new(NodeConfig {
                name,
                slots,
                replicas,
                coordinator,
                address,
                offers_planted: offer_planted,
                qemu: offered(&qemu).await,
            })?;
            let service = worker.service();
            tokio::select! {
                served = serve(Listener::Tcp(listener), |router| router.add_service(service), std::future::pending()) => Ok(served?),
                () = worker.run() => bail!("the node's work ended"),
                () = asked_to_stop() => Ok(()),
            }
        }
    }
}

/// A part with credentials talks in clear with nobody.
fn check_secure<'a>(urls: impl IntoIterator<Item = &'a String>) -> Result<()> {
    let in_clear = |url: &&String| url.starts_with("http://");
    match urls.into_iter().find(in_clear) {
        Some(url) if tls::Credentials::ours().is_some() => {
            Err(coded(USAGE, format!("{url} is in clear, but --tls is given: name it by https://")))
        }
        _ => Ok(()),
    }
}

/// Learns from a replica what this one must know to join its cluster.
async fn join_cluster(config: &mut ReplicaConfig, url: String) -> Result<()> {
    let mut client = StoreClient::new(vec![url.clone()]).at(&url)?;
    let reply = client.replicas(v1::ReplicasRequest {}).await;
    let reply = reply.with_context(|| format!("ask {url} about its cluster"))?.into_inner();
    (config.cluster, config.shards, config.joins) = (reply.cluster, reply.shards, true);
    for row in reply.peers.into_iter().chain(reply.me) {
        if row.wish != "removed" {
            config.peers.entry(row.id).or_insert(row.address);
        }
    }
    Ok(())
}

/// Listens on an address that a parent may hold reserved.
fn bind(address: SocketAddr) -> Result<tokio::net::TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address).with_context(|| format!("listen on {address}"))?;
    socket.listen(BACKLOG).with_context(|| format!("listen on {address}"))
}

fn parse_peers(peers: &[String]) -> Result<BTreeMap<u64, String>> {
    let parse = |peer: &String| {
        let (id, url) = peer.split_once('=')?;
        Some((id.parse().ok().filter(|id| *id > 0)?, url.to_string()))
    };
    peers
        .iter()
        .map(|peer| parse(peer).ok_or_else(|| coded(USAGE, format!("--peer {peer}: expected ID=URL"))))
        .collect()
}

/// A part that a parent started ends with it, however the parent ends.
fn follow_parent(with_parent: bool) -> Result<()> {
    if with_parent {
        let signal = rustix::process::Signal::KILL;
        rustix::process::set_parent_process_death_signal(Some(signal)).context("follow the parent")?;
    }
    Ok(())
}

/// Ends at Ctrl-C or a polite kill.
pub async fn asked_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        }
        Err(_) => {
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}

/// The QEMU builds that a node offers; what can't be is said once.
pub async fn offered(named: &[std::path::PathBuf]) -> Vec<QemuBuild> {
    let named = named.to_vec();
    let (found, said) =
        tokio::task::spawn_blocking(move || builds::offered(&named)).await.unwrap_or_default();
    for said in said {
        tracing::warn!("{said}");
    }
    found
}
