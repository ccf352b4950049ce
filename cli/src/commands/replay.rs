//! `heddle replay`: a job on the cluster, or whole in this process for its console.

use super::get::away;
use super::recordings::{self, Recording};
use super::replay_range;
use crate::args::{Format, Replay};
use crate::cluster::Cluster;
use crate::exit::{DIVERGED, INCOMPATIBLE, OK, TIMEOUT, UNEXPECTED, coded};
use crate::output;
use crate::progress::Progress;
use anyhow::Result;
use heddle_node::blocks::BlockCache;
use heddle_node::qemu::span::QemuSpan;
use heddle_node::replay::{Control, Replayed, Span};
use heddle_proto::verdict::{TaskResult, on_hart};
use heddle_proto::{Outcome, Verdict, v1};
use heddle_storage::channel::is_transient;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a replay that is given up has to end what it began.
const LEAVING: Duration = Duration::from_secs(5);

/// Replays; exit 0 on match, 3 on divergence.
pub async fn run(cluster: &Cluster, command: Replay, format: Format) -> Result<u8> {
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    if command.from.is_some() || command.to.is_some() {
        return replay_range::run(cluster, &recording, &command, format).await;
    }
    if command.console {
        return with_console(cluster, &recording, &command, format).await;
    }
    let request = v1::SubmitRequest {
        id: new_job_id("replay"),
        kind: "replay".into(),
        recording: recording.id().to_vec().into(),
        spans: command.spans,
        against: command.against.clone().unwrap_or_default(),
        ..Default::default()
    };
    let began = Instant::now();
    let job = run_job(cluster, request, command.timeout, format).await?;
    let seconds = began.elapsed().as_secs_f64();
    let value = summary(&job, seconds)?;
    print(&value, &command.recording, format)?;
    Ok(if job.outcome == "match" { OK } else { DIVERGED })
}

/// A job id that is made by its client, so that a retry is the same job.
pub fn new_job_id(kind: &str) -> String {
    format!("{kind}-{:010x}", rand::random::<u64>() >> 24)
}

/// Submits a job and waits for its end.
pub async fn run_job(
    cluster: &Cluster,
    request: v1::SubmitRequest,
    timeout: Option<u64>,
    format: Format,
) -> Result<v1::JobRow> {
    let limit = Duration::from_secs(timeout.unwrap_or(u64::from(u32::MAX)));
    let id = request.id.clone();
    match tokio::time::timeout(limit, wait_job(cluster, request, format)).await {
        Ok(done) => done,
        Err(_) => Err(coded(TIMEOUT, format!("job {id} has not ended in {} s; it goes on", limit.as_secs()))),
    }
}

async fn wait_job(cluster: &Cluster, request: v1::SubmitRequest, format: Format) -> Result<v1::JobRow> {
    let mut coordinator = cluster.coordinator.clone();
    let patience = Instant::now() + Duration::from_secs(30);
    // A coordinator that is being replaced is waited for; the job's id makes that safe.
    loop {
        match coordinator.submit(request.clone()).await {
            Ok(_) => break,
            Err(status) if is_transient(&status) && Instant::now() < patience => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(status) => return Err(away(status)),
        }
    }
    let mut progress = Progress::new(&request.kind, 0);
    let mut patience = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(stream) = coordinator.watch(v1::WatchRequest { id: request.id.clone() }).await {
            let mut rows = stream.into_inner();
            while let Ok(Some(row)) = rows.message().await {
                let done = row.tasks.iter().filter(|t| t.state == "done").count();
                if format == Format::Table || format == Format::Wide {
                    progress.at(done as u64, &format!("{}: {done} of {} spans", row.phase, row.tasks.len()));
                }
                if row.state == "failed" {
                    let why: Value = serde_json::from_slice(&row.result).unwrap_or_default();
                    return Err(coded(
                        UNEXPECTED,
                        format!("job {}: {}", row.id, why["error"].as_str().unwrap_or("failed")),
                    ));
                }
                if row.state != "running" {
                    return Ok(row);
                }
            }
            // A long span says nothing for long: patience begins when the stream breaks.
            patience = Instant::now() + Duration::from_secs(60);
        }
        if Instant::now() > patience {
            return Err(coded(crate::exit::NO_QUORUM, "the coordinator has gone; the job is kept"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn verdict_of(task: &v1::TaskRow) -> Option<Verdict> {
    match serde_json::from_slice(&task.verdict).ok()? {
        TaskResult::Replay(verdict) => Some(verdict),
        TaskResult::Lockstep { .. } | TaskResult::Index { .. } => None,
    }
}

/// A task, for people and programs.
pub fn task_value(task: &v1::TaskRow) -> Value {
    let verdict = verdict_of(task);
    json!({
        "from": task.from_icount,
        "to": task.to_icount,
        "node": task.node,
        "attempt": task.attempt,
        "state": task.state,
        "verdict": verdict.as_ref().map(outcome_name),
        "divergence": verdict.as_ref().and_then(|v| v.divergence().cloned()),
        "role_checked": verdict.as_ref().map(|v| v.role_checked),
        "role_mismatches": verdict.as_ref().map(|v| v.role_mismatches),
        "digest": verdict.as_ref().and_then(|v| v.digest),
        "seconds": task.elapsed_us as f64 / 1e6,
    })
}

/// The outcome as it is printed.
pub(super) fn outcome_name(verdict: &Verdict) -> &'static str {
    match verdict.outcome {
        Outcome::Match => "match",
        Outcome::Diverged(_) => "diverged",
    }
}

/// What a replay job came to, in one shape.
pub fn summary(job: &v1::JobRow, seconds: f64) -> Result<Value> {
    let verdicts: Vec<Verdict> = job.tasks.iter().filter_map(verdict_of).collect();
    let sum = |field: fn(&Verdict) -> u64| verdicts.iter().map(field).sum::<u64>();
    let mut checkpoints: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    for (kind, roles) in verdicts.iter().flat_map(|verdict| &verdict.checkpoints) {
        for (role, count) in roles {
            *checkpoints.entry(kind.clone()).or_default().entry(role.clone()).or_default() += count;
        }
    }
    let divergence = verdicts.iter().find_map(|verdict| verdict.divergence());
    Ok(json!({
        "verdict": job.outcome,
        "divergence": divergence,
        "instructions": sum(|v| v.instructions),
        "events": sum(|v| v.events),
        "role_checked": sum(|v| v.role_checked),
        "role_mismatches": sum(|v| v.role_mismatches),
        "checkpoints": checkpoints,
        "digest": verdicts.last().and_then(|v| v.digest),
        "coverage": verdicts.first().map(|v| v.coverage.clone()),
        "proof": if verdicts.len() == 1 { "whole" } else { "spans" },
        "seconds": seconds,
        "job": job.id,
        "spans": job.tasks.iter().map(task_value).collect::<Vec<_>>(),
    }))
}

/// Prints a [`summary`].
pub(super) fn print(value: &Value, name: &str, format: Format) -> Result<()> {
    match format {
        Format::Json | Format::Yaml => output::value(format, value),
        Format::Name => output::line(value["verdict"].as_str().unwrap_or_default().into()),
        Format::Table | Format::Wide => {
            let number = |key: &str| output::grouped(value[key].as_u64().unwrap_or(0));
            let mut text = format!(
                "{name}: {}  {} instructions, {} events, {} roles checked, {} mismatches, {:.2} s",
                value["verdict"].as_str().unwrap_or_default(),
                number("instructions"),
                number("events"),
                number("role_checked"),
                number("role_mismatches"),
                value["seconds"].as_f64().unwrap_or(0.0),
            );
            if let Ok(divergence) =
                serde_json::from_value::<heddle_proto::Divergence>(value["divergence"].clone())
            {
                text.push_str(&format!(
                    "\n DIVERGED, {}, at {}\n   expected  {}\n   found     {}\n   pc        {:#x}{}\n   last good {}",
                    divergence.kind,
                    divergence.position,
                    divergence.expected,
                    divergence.found,
                    divergence.pc,
                    on_hart(divergence.hart),
                    divergence.last_good
                ));
            }
            output::line(text)
        }
    }
}

/// Replays whole in this process, for so many seconds at most.
async fn replay_within(
    seconds: Option<u64>,
    cluster: &Cluster,
    recording: &Recording,
    command: &Replay,
) -> Result<Replayed> {
    let control = Control::default();
    let cancel = control.cancel.clone();
    let limit = Duration::from_secs(seconds.unwrap_or(u64::from(u32::MAX)));
    let mut replay = Box::pin(replay_here(cluster, recording, command, control));
    if let Ok(done) = tokio::time::timeout(limit, replay.as_mut()).await {
        return done;
    }
    cancel.store(true, Ordering::Relaxed);
    // A QEMU is ended by the thread that follows it, so that thread must hear of it first.
    let _ = tokio::time::timeout(LEAVING, replay.as_mut()).await;
    Err(coded(TIMEOUT, format!("the replay has not ended in {} s", limit.as_secs())))
}

/// Replays whole in this process.
async fn replay_here(
    cluster: &Cluster,
    recording: &Recording,
    command: &Replay,
    control: Control,
) -> Result<Replayed> {
    let name = command.against.as_deref().unwrap_or(&recording.manifest.build);
    let blocks = BlockCache::new(cluster.store.clone());
    let bounds = v1::SpanBounds::default();
    if recording.manifest.qemu().is_some() {
        let offered = crate::serve::offered(&command.qemu).await;
        let build = offered.into_iter().find(|build| build.name == name);
        let build = build.ok_or_else(|| {
            coded(INCOMPATIBLE, format!("{name} is not on this machine; --qemu names another QEMU"))
        })?;
        let span = QemuSpan::fetch(&cluster.store, &blocks, recording.id(), bounds).await?;
        tokio::task::spawn_blocking(move || heddle_node::qemu::replay::replay(&span, &build, &control))
            .await?
    } else {
        let build = name
            .parse()
            .map_err(|error: heddle_replay_engine::builds::UnknownBuild| anyhow::Error::new(error))?;
        let span = Span::fetch(&cluster.store, &blocks, recording.id(), bounds).await?;
        heddle_node::replay::replay(span, build, control).await
    }
}

/// Replays whole in this process and prints the console.
async fn with_console(
    cluster: &Cluster,
    recording: &Recording,
    command: &Replay,
    format: Format,
) -> Result<u8> {
    if recording.manifest.builtin().is_some() {
        recordings::refuse_qemu(&command.qemu, &command.recording)?;
    }
    let began = Instant::now();
    let replayed = replay_within(command.timeout, cluster, recording, command).await?;
    match format {
        Format::Json | Format::Yaml => std::io::stderr().lock().write_all(&replayed.console)?,
        _ => std::io::stdout().lock().write_all(&replayed.console)?,
    }
    let TaskResult::Replay(verdict) = &replayed.result else { return Ok(UNEXPECTED) };
    let row = v1::JobRow {
        outcome: outcome_name(verdict).into(),
        tasks: vec![v1::TaskRow {
            to_icount: verdict.to.icount,
            state: "done".into(),
            node: "this process".into(),
            attempt: 1,
            verdict: serde_json::to_vec(&replayed.result)?.into(),
            elapsed_us: began.elapsed().as_micros() as u64,
            ..Default::default()
        }],
        ..Default::default()
    };
    let value = summary(&row, began.elapsed().as_secs_f64())?;
    match format {
        // The console has standard output; the verdict must not be mixed into it.
        Format::Table | Format::Wide | Format::Name => eprintln!(
            "{}: {}",
            command.recording,
            verdict.divergence().map_or_else(|| "match".to_string(), ToString::to_string)
        ),
        Format::Json | Format::Yaml => output::value(format, &value)?,
    }
    Ok(if verdict.is_match() { OK } else { DIVERGED })
}
