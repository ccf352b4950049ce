//! `heddle index`: snapshots of a recording, made afterwards by a replay.

use super::recordings;
use super::replay::{new_job_id, run_job};
use crate::args::{Format, Index};
use crate::cluster::Cluster;
use crate::exit::OK;
use crate::output;
use anyhow::Result;
use heddle_proto::v1;
use serde_json::{Value, json};
use std::time::Instant;

/// Indexes a recording.
pub async fn run(cluster: &Cluster, command: Index, format: Format) -> Result<u8> {
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    let request = v1::SubmitRequest {
        id: new_job_id("index"),
        kind: "index".into(),
        recording: recording.id().to_vec().into(),
        snapshots: command.snapshots,
        ..Default::default()
    };
    let began = Instant::now();
    let job = run_job(cluster, request, command.timeout, format).await?;
    let result: Value = serde_json::from_slice(&job.result).unwrap_or_default();
    let value = json!({
        "recording": command.recording,
        "snapshots": result["snapshots"],
        "seconds": began.elapsed().as_secs_f64(),
        "job": job.id,
    });
    match format {
        Format::Json | Format::Yaml => output::value(format, &value)?,
        _ => {
            let places: Vec<String> = result["snapshots"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|icount| output::grouped(icount.as_u64().unwrap_or(0)))
                .collect();
            let seconds = began.elapsed().as_secs_f64();
            let count = places.len();
            if places.is_empty() {
                let why = "it has those already, or is too short for any";
                output::line(format!("{}: no new snapshots: {why}", command.recording))?;
                return Ok(OK);
            }
            output::line(format!(
                "{}: {count} snapshots in {seconds:.1} s, at {}",
                command.recording,
                places.join(" ")
            ))?;
        }
    }
    Ok(OK)
}
