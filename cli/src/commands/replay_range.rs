//! `heddle replay --from --to`: a part of a recording, in this process.

use super::recordings::Recording;
use super::replay::{outcome_name, print, summary};
use crate::args::{Format, Replay};
use crate::cluster::Cluster;
use crate::exit::{DIVERGED, OK, TIMEOUT, USAGE, coded};
use anyhow::Result;
use heddle_node::blocks::BlockCache;
use heddle_node::debugger::{bounds_before, replay_range};
use heddle_node::replay::{Control, Span};
use heddle_proto::v1;
use heddle_proto::verdict::{Proof, TaskResult};
use heddle_replay_engine::builds::UnknownBuild;
use serde_json::json;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Replays from the last snapshot before `--from`, and says how `--from` to `--to` went.
pub(super) async fn run(
    cluster: &Cluster,
    recording: &Recording,
    command: &Replay,
    format: Format,
) -> Result<u8> {
    if recording.manifest.builtin().is_none() {
        return Err(coded(USAGE, "--from and --to are for recordings of the built-in machine"));
    }
    let end = recording.row.committed_icount;
    let from = command.from.unwrap_or(0);
    // What the log has at its end happens only to who goes there.
    let to = command.to.filter(|to| *to < end).unwrap_or(u64::MAX);
    if from > end || from > to {
        return Err(coded(
            USAGE,
            format!("nothing lies between --from and --to; the recording ends at {end}"),
        ));
    }
    let name = command.against.as_deref().unwrap_or(&recording.manifest.build);
    let build = name.parse().map_err(|error: UnknownBuild| anyhow::Error::new(error))?;
    let began = Instant::now();
    let blocks = BlockCache::new(cluster.store.clone());
    let bounds = bounds_before(&recording.row, from);
    let span = Span::fetch(&cluster.store, &blocks, recording.id(), bounds).await?;
    let control = Control::default();
    let cancel = control.cancel.clone();
    let limit = Duration::from_secs(command.timeout.unwrap_or(u64::from(u32::MAX)));
    let replay = replay_range(span, build, from, to, control);
    let Ok(verdict) = tokio::time::timeout(limit, replay).await else {
        cancel.store(true, Ordering::Relaxed);
        return Err(coded(TIMEOUT, format!("the replay has not ended in {} s", limit.as_secs())));
    };
    let verdict = verdict?;
    let row = v1::JobRow {
        outcome: outcome_name(&verdict).into(),
        tasks: vec![v1::TaskRow {
            from_icount: verdict.from.icount,
            to_icount: verdict.to.icount,
            state: "done".into(),
            node: "this process".into(),
            attempt: 1,
            verdict: serde_json::to_vec(&TaskResult::Replay(verdict.clone()))?.into(),
            elapsed_us: began.elapsed().as_micros() as u64,
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut value = summary(&row, began.elapsed().as_secs_f64())?;
    if verdict.proof == Proof::Spans {
        value["proof"] = json!("spans");
    }
    print(&value, &command.recording, format)?;
    Ok(if verdict.is_match() { OK } else { DIVERGED })
}
