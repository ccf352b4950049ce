//! `heddle get` and `heddle describe`.

use super::recordings::{self, Recording};
use crate::args::{Describe, Format, Get, Kind};
use crate::cluster::Cluster;
use crate::exit::{NOTHING, OK, USAGE, coded, refused};
use crate::output::{self, Column};
use anyhow::Result;
use heddle_proto::event::KIND_NAMES;
use heddle_proto::{RecordingId, v1};
use serde_json::{Value, json};
use std::time::Duration;

const WATCH_EVERY: Duration = Duration::from_millis(500);

/// Lists things.
pub async fn run(cluster: &Cluster, command: Get, format: Format) -> Result<u8> {
    let mut last = None;
    loop {
        let rows = select(rows(cluster, command.kind).await?, &command)?;
        let is_new = last.as_ref() != Some(&rows);
        if is_new {
            print(&rows, &command, format)?;
        }
        if !command.watch {
            return Ok(OK);
        }
        last = Some(rows);
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

fn print(rows: &[Value], command: &Get, format: Format) -> Result<()> {
    if command.name.is_some() && matches!(format, Format::Json | Format::Yaml) {
        return output::value(format, &rows[0]);
    }
    output::rows(format, columns(command.kind), rows)
}

fn select(rows: Vec<Value>, command: &Get) -> Result<Vec<Value>> {
    let mut selected = vec![];
    let pairs: Vec<(&str, &str)> = match &command.selector {
        None => vec![],
        Some(selector) => selector
            .split(',')
            .map(|pair| {
                pair.split_once('=')
                    .ok_or_else(|| coded(USAGE, format!("-l {selector}: expected KEY=VALUE,...")))
            })
            .collect::<Result<_>>()?,
    };
    for row in rows {
        let has_labels = pairs.iter().all(|(key, value)| row["labels"][*key] == *value);
        let is_named = command.name.as_ref().is_none_or(|name| is_named(&row, name));
        if has_labels && is_named {
            selected.push(row);
        }
    }
    if command.selector.is_some() && selected.is_empty() {
        return Err(coded(NOTHING, "nothing here has these labels"));
    }
    if let Some(name) = &command.name {
        // Of several recordings of one name, the newest.
        let Some(newest) = selected.pop() else {
            return Err(coded(NOTHING, format!("nothing here is named {name:?}")));
        };
        selected = vec![newest];
    }
    Ok(selected)
}

fn is_named(row: &Value, name: &str) -> bool {
    row["name"] == *name || (name.len() >= 4 && row["id"].as_str().is_some_and(|id| id.starts_with(name)))
}

fn columns(kind: Kind) -> &'static [Column] {
    match kind {
        Kind::Recordings => &[
            Column("NAME", "name", false),
            Column("STATE", "state", false),
            Column("INSTRUCTIONS", "committed_icount", false),
            Column("EVENTS", "committed_events", false),
            Column("CHUNKS", "chunks", false),
            Column("BYTES", "bytes_stored", false),
            Column("SNAPSHOTS", "snapshots", false),
            Column("ID", "id", true),
            Column("BUILD", "build", true),
            Column("HARTS", "harts", true),
            Column("LABELS", "labels", true),
            Column("EPOCH", "epoch", true),
        ],
        Kind::Jobs => &[
            Column("NAME", "name", false),
            Column("KIND", "kind", false),
            Column("RECORDING", "recording", false),
            Column("STATE", "state", false),
            Column("OUTCOME", "outcome", false),
            Column("TASKS", "tasks_done", false),
            Column("AGAINST", "against", true),
            Column("PHASE", "phase", true),
        ],
        Kind::Nodes => &[
            Column("NAME", "name", false),
            Column("STATE", "state", false),
            Column("SLOTS", "slots", false),
            Column("BUSY", "busy", false),
            Column("DONE", "done", false),
            Column("ADDRESS", "address", true),
            Column("BUILDS", "builds", true),
        ],
        Kind::Replicas => &[
            Column("NAME", "name", false),
            Column("ROLE", "role", false),
            Column("TERM", "term", false),
            Column("COMMITTED", "committed", false),
            Column("APPLIED", "applied", false),
            Column("JOURNAL", "journal_bytes", false),
            Column("LIVE", "live_bytes", true),
            Column("WISH", "wish", true),
            Column("FULL", "full", true),
            Column("ADDRESS", "address", true),
        ],
        Kind::Shards => &[
            Column("SHARD", "name", false),
            Column("HOLDS", "holds", false),
            Column("LEADER", "leader", false),
            Column("VOTERS", "voters", false),
            Column("LEARNERS", "learners", false),
            Column("COMMITTED", "committed", false),
            Column("APPLIED", "applied", false),
            Column("TERM", "term", true),
            Column("FIRST", "first", true),
        ],
    }
}

async fn rows(cluster: &Cluster, kind: Kind) -> Result<Vec<Value>> {
    Ok(match kind {
        Kind::Recordings => recordings::all(&cluster.store).await?.iter().map(recording_row).collect(),
        Kind::Jobs => {
            let names = recordings::all(&cluster.store).await?;
            let jobs = cluster.coordinator.clone().jobs(v1::JobsRequest::default()).await.map_err(away)?;
            let mut jobs = jobs.into_inner().jobs;
            jobs.sort_by_key(|job| job.created_unix_ms);
            jobs.iter().map(|job| job_row(job, &names)).collect()
        }
        Kind::Nodes => {
            let nodes = cluster.coordinator.clone().nodes(v1::NodesRequest {}).await.map_err(away)?;
            let row = |node: &v1::NodeRow| {
                json!({ "name": node.name, "state": node.state, "slots": node.slots, "busy": node.busy,
                        "done": node.done, "address": node.address, "builds": node.builds })
            };
            nodes.into_inner().nodes.iter().map(row).collect()
        }
        Kind::Replicas => {
            let row = |replica: v1::ReplicaRow| {
                json!({ "name": format!("replica-{}", replica.id), "role": replica.role, "term": replica.term,
                        "committed": replica.committed, "applied": replica.applied,
                        "journal_bytes": replica.journal_bytes, "live_bytes": replica.live_bytes,
                        "wish": replica.wish, "full": replica.full, "address": replica.address })
            };
            cluster.store.replicas().await.into_iter().map(row).collect()
        }
        Kind::Shards => shards(&cluster.store.replicas().await),
    })
}

/// Each shard as its leader sees it, and how far every replica is.
fn shards(replicas: &[v1::ReplicaRow]) -> Vec<Value> {
    let count = replicas.iter().map(|replica| replica.shards.len()).max().unwrap_or(0) as u32;
    let of = |number: u32| {
        let rows = replicas.iter().filter_map(move |replica| {
            Some((replica.id, replica.shards.iter().find(|shard| shard.shard == number)?))
        });
        let rows: Vec<(u64, &v1::ShardRow)> = rows.collect();
        let leader = rows.iter().find(|(_, shard)| shard.role == "leader").or(rows.first());
        let (id, shard) = leader?;
        let applied: Vec<String> = rows.iter().map(|(id, shard)| format!("{id}:{}", shard.applied)).collect();
        let holds = if number == 0 { "members, jobs" } else { "recordings, blocks" };
        Some(json!({
            "name": number.to_string(), "holds": holds,
            "leader": if shard.role == "leader" { json!(id) } else { Value::Null },
            "term": shard.term, "committed": shard.committed, "first": shard.first,
            "voters": shard.voters, "learners": shard.learners, "applied": applied.join(" "),
        }))
    };
    (0..count).filter_map(of).collect()
}

/// What the coordinator refused.
pub fn away(status: tonic::Status) -> anyhow::Error {
    refused("the coordinator", &status)
}

fn recording_row(recording: &Recording) -> Value {
    let (row, manifest) = (&recording.row, &recording.manifest);
    json!({
        "name": manifest.name,
        "id": manifest.id,
        "state": row.state,
        "committed_icount": row.committed_icount,
        "committed_events": row.committed_events,
        "chunks": row.chunks,
        "bytes_stored": row.bytes_stored,
        "bytes_raw": row.bytes_raw,
        "snapshots": row.snapshots.len(),
        "epoch": row.epoch,
        "build": manifest.build,
        "harts": manifest.builtin().map(|(machine, _)| machine.harts),
        "labels": manifest.labels,
        "created_unix_ms": manifest.created_unix_ms,
    })
}

fn job_row(job: &v1::JobRow, names: &[Recording]) -> Value {
    let id = RecordingId::from_slice(&job.recording).unwrap_or_default();
    let name = names.iter().find(|recording| recording.id() == id);
    let done = job.tasks.iter().filter(|task| !["waiting", "leased"].contains(&task.state.as_str())).count();
    json!({
        "name": job.id,
        "kind": job.kind,
        "recording": name.map_or_else(|| id.short(), |recording| recording.manifest.name.clone()),
        "state": job.state,
        "phase": job.phase,
        "outcome": job.outcome,
        "against": job.against,
        "tasks_done": format!("{done}/{}", job.tasks.len()),
        "created_unix_ms": job.created_unix_ms,
        "ended_unix_ms": job.ended_unix_ms,
    })
}

/// Says all about one thing.
pub async fn describe(cluster: &Cluster, command: Describe, format: Format) -> Result<u8> {
    let get = Get { kind: command.kind, name: Some(command.name.clone()), selector: None, watch: false };
    let mut value = select(rows(cluster, command.kind).await?, &get)?.remove(0);
    match command.kind {
        Kind::Recordings => {
            let recording = recordings::find(&cluster.store, &command.name).await?;
            value["emulator"] = serde_json::to_value(&recording.manifest.emulator)?;
            value["events_by_kind"] = counts(&recording.row.counts);
            let snapshots = recording.row.snapshots.iter();
            value["snapshots"] = snapshots.map(|s| json!({ "icount": s.icount, "event": s.event })).collect();
        }
        Kind::Jobs => {
            let request = v1::JobsRequest { id: command.name.clone() };
            let jobs = cluster.coordinator.clone().jobs(request).await.map_err(away)?.into_inner().jobs;
            if let Some(job) = jobs.first() {
                value["tasks"] = job.tasks.iter().map(super::replay::task_value).collect();
                value["result"] = serde_json::from_slice(&job.result).unwrap_or_default();
            }
        }
        Kind::Nodes | Kind::Replicas | Kind::Shards => {}
    }
    // A table has no place for what is nested.
    let format = if matches!(format, Format::Table | Format::Wide) { Format::Yaml } else { format };
    output::value(format, &value)?;
    Ok(OK)
}

/// Events by kind name.
pub fn counts(counts: &[u32]) -> Value {
    let named = KIND_NAMES.iter().zip(counts).filter(|(_, count)| **count > 0);
    named.map(|(name, count)| (name.to_string(), json!(count))).collect::<serde_json::Map<_, _>>().into()
}
