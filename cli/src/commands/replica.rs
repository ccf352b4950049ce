//! `heddle replica` and `heddle scrub`: the store's members, and the bytes they hold.

use crate::args::{Format, ReplicaCommand, Scrub};
use crate::cluster::Cluster;
use crate::exit::{CORRUPT, OK, TIMEOUT, USAGE, coded};
use crate::output::{self, Column};
use anyhow::{Context, Result};
use heddle_proto::v1;
use serde_json::json;
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Changes what a replica is to be, and waits until all shards have followed.
pub async fn run(cluster: &Cluster, command: ReplicaCommand) -> Result<u8> {
    let store = &cluster.store;
    match command {
        ReplicaCommand::Add { replica, wait } => {
            let parsed = replica.split_once('=').and_then(|(id, url)| Some((id.parse::<u64>().ok()?, url)));
            let (id, url) = parsed
                .filter(|(id, url)| *id > 0 && (url.starts_with("http://") || url.starts_with("https://")))
                .ok_or_else(|| {
                    coded(
                        USAGE,
                        format!("{replica}: expected ID=URL, as http://HOST:PORT or https://HOST:PORT"),
                    )
                })?;
            store.set_member(id, url, "member").await?;
            until(cluster, wait.timeout, "it votes in", |shard, _| shard.voters.contains(&id)).await
        }
        ReplicaCommand::Remove { id, wait } => {
            let rows = store.replicas().await;
            let others = rows.iter().filter(|row| row.id != id && row.wish != "removed").count();
            if others == 0 {
                return Err(coded(USAGE, "it is the last replica: nothing would be left"));
            }
            store.set_member(id, "", "removed").await?;
            let is_gone =
                |shard: &v1::ShardRow, _| !shard.voters.contains(&id) && !shard.learners.contains(&id);
            until(cluster, wait.timeout, "it is out of", is_gone).await
        }
        ReplicaCommand::Drain { id, wait } => {
            store.set_member(id, "", "drained").await?;
            until(cluster, wait.timeout, "another leads", |_, leader| leader != id).await
        }
        ReplicaCommand::Undrain { id } => {
            store.set_member(id, "", "member").await?;
            Ok(OK)
        }
    }
}

/// Waits until something holds of every shard, as its leader sees it.
async fn until(
    cluster: &Cluster,
    seconds: u64,
    what: &str,
    holds: impl Fn(&v1::ShardRow, u64) -> bool,
) -> Result<u8> {
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut said = None;
    loop {
        let replicas = cluster.store.replicas().await;
        let all = replicas.iter().map(|replica| replica.shards.len()).max().unwrap_or(0);
        let led =
            replicas.iter().flat_map(|replica| replica.shards.iter().map(move |shard| (replica.id, shard)));
        let led = led.filter(|(_, shard)| shard.role == "leader");
        let done = led.filter(|(leader, shard)| holds(shard, *leader)).count();
        if said != Some(done) {
            eprintln!("heddle: {what} {done} of {all} shards");
            said = Some(done);
        }
        if all > 0 && done == all {
            return Ok(OK);
        }
        if Instant::now() > until {
            let why = format!("not done after {seconds} s; it goes on, see `heddle get shards`");
            return Err(coded(TIMEOUT, why));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Scrubs all replicas, one after the other.
pub async fn scrub(cluster: &Cluster, command: Scrub, format: Format) -> Result<u8> {
    let mut rows = vec![];
    let mut is_whole = true;
    for replica in cluster.store.replicas().await {
        let request = v1::ScrubRequest { bytes_per_second: command.rate << 20 };
        let mut client = cluster.store.at(&replica.address)?;
        let reports = client.scrub(request).await.with_context(|| format!("scrub replica-{}", replica.id))?;
        let mut reports = reports.into_inner();
        let mut last = v1::ScrubReply::default();
        while let Some(report) = reports.message().await? {
            last = report;
        }
        is_whole &= last.damaged == last.mended;
        rows.push(json!({
            "name": format!("replica-{}", replica.id), "rows": last.rows, "parts": last.parts,
            "bytes": last.bytes, "damaged": last.damaged, "mended": last.mended,
        }));
    }
    let columns = [
        Column("REPLICA", "name", false),
        Column("PARTS", "parts", false),
        Column("BYTES", "bytes", false),
        Column("DAMAGED", "damaged", false),
        Column("MENDED", "mended", false),
    ];
    output::rows(format, &columns, &rows)?;
    Ok(if is_whole { OK } else { CORRUPT })
}
