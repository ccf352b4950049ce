//! `heddle hunt`: the first divergence, and the card that says all about it.

use super::recordings::{self, Recording};
use super::replay::{new_job_id, run_job, task_value};
use crate::args::{Format, Hunt};
use crate::cluster::Cluster;
use crate::exit::{DIVERGED, OK, USAGE, coded};
use crate::output;
use anyhow::Result;
use heddle_node::blocks::put_image;
use heddle_proto::v1;
use heddle_proto::verdict::{SideB, on_hart};
use serde_json::{Value, json};
use std::time::Instant;

/// Hunts; exit 0 if nothing diverges, 3 if something does.
pub async fn run(cluster: &Cluster, command: Hunt, format: Format) -> Result<u8> {
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    let request = v1::SubmitRequest {
        id: new_job_id("hunt"),
        kind: "hunt".into(),
        recording: recording.id().to_vec().into(),
        spans: 0,
        against: command.against.clone().unwrap_or_default(),
        side_b: side_b(cluster, &recording, &command).await?,
        ..Default::default()
    };
    let began = Instant::now();
    let job = run_job(cluster, request, command.timeout, format).await?;
    let mut value = card(&job, began.elapsed().as_secs_f64());
    // What happened between the last good check and the first bad one.
    if let (Some(from), Some(to)) =
        (value["interval"]["from"]["event"].as_u64(), value["interval"]["to"]["event"].as_u64())
    {
        let events = recordings::events(&cluster.store, recording.id()).await?;
        let inside =
            events.iter().enumerate().skip(from as usize).take((to + 1).saturating_sub(from) as usize);
        value["events"] = inside
            .map(|(index, event)| json!({ "event": index, "icount": event.icount, "role": event.role, "what": event.body.to_string() }))
            .collect();
    }
    match format {
        Format::Json | Format::Yaml => output::value(format, &value)?,
        _ => output::line(text(&value, &command.recording))?,
    }
    Ok(if job.outcome == "match" { OK } else { DIVERGED })
}

/// What the user puts in on the other side.
async fn side_b(cluster: &Cluster, recording: &Recording, command: &Hunt) -> Result<bytes::Bytes> {
    let mut side = SideB::default();
    for given in &command.with {
        let spec = recording.manifest.qemu();
        let spec = spec.ok_or_else(|| coded(USAGE, "--with is for recordings of QEMU"))?;
        let (name, path) = given
            .split_once('=')
            .ok_or_else(|| coded(USAGE, format!("--with {given}: expected NAME=FILE")))?;
        let bytes = std::fs::read(path).map_err(|error| coded(USAGE, format!("read {path}: {error}")))?;
        let image = put_image(&cluster.store, recording.manifest.id, name, &bytes.into()).await?;
        if let Some(number) = spec.files.iter().position(|file| file.name == name) {
            side.files.push((number, image));
        } else if let Some(number) = spec.disks.iter().position(|disk| disk.image.name == name) {
            side.disks.push((number, image));
        } else {
            let names = spec.files.iter().chain(spec.disks.iter().map(|disk| &disk.image));
            let names: Vec<&str> = names.map(|image| image.name.as_str()).collect();
            return Err(coded(
                USAGE,
                format!("--with {given}: the recording's files are {}", names.join(", ")),
            ));
        }
    }
    if let Some(log) = &command.log {
        side.log = Some(recordings::find(&cluster.store, log).await?.id());
    }
    Ok(if side.is_empty() { bytes::Bytes::new() } else { serde_json::to_vec(&side)?.into() })
}

/// The card, for programs.
pub fn card(job: &v1::JobRow, seconds: f64) -> Value {
    let mut value: Value = serde_json::from_slice(&job.result).unwrap_or_default();
    let spans: Vec<Value> = job.tasks.iter().filter(|t| t.what == "spans").map(task_value).collect();
    value["outcome"] = json!(job.outcome);
    value["against"] = json!(job.against);
    value["job"] = json!(job.id);
    value["seconds"] = json!(seconds);
    value["spans"] = json!(spans);
    value
}

/// The card, for people.
pub fn text(card: &Value, name: &str) -> String {
    let number = |value: &Value| output::grouped(value.as_u64().unwrap_or(0));
    let empty = vec![];
    let spans = card["spans"].as_array().unwrap_or(&empty);
    let marks: Vec<&str> = spans
        .iter()
        .map(|span| match span["verdict"].as_str() {
            Some("match") => "ok",
            Some(_) => "BAD",
            None => ".",
        })
        .collect();
    let nodes: std::collections::BTreeSet<&str> =
        spans.iter().filter_map(|s| s["node"].as_str()).filter(|n| !n.is_empty()).collect();
    let mut out = format!(
        " spans           {} on {} node{}   {}   {:.1} s in all, {} instructions replayed\n",
        spans.len(),
        nodes.len(),
        if nodes.len() == 1 { "" } else { "s" },
        marks.join(" "),
        card["seconds"].as_f64().unwrap_or(0.0),
        number(&card["replayed_instructions"])
    );
    if let Some(same) = card["repeated"]["same"].as_bool() {
        let node = card["repeated"]["node"].as_str().unwrap_or_default();
        out.push_str(&match same {
            true => format!(" repeated on     {node}: wrong in the same way, so a defect, not chance\n"),
            false => format!(" repeated on     {node}: different, so non-determinism or a bad host\n"),
        });
    }
    let inputs = |of: &Value| -> Vec<String> {
        of.as_array().into_iter().flatten().filter_map(|line| line.as_str().map(String::from)).collect()
    };
    if card["outcome"] == "match" {
        out.push_str("\n no divergence");
        for line in inputs(&card["inputs"]) {
            out.push_str(&format!("\n   input     {line}"));
        }
        return out;
    }
    let (finding, interval) = (&card["finding"], &card["interval"]);
    if finding.is_null() {
        out.push_str(&format!(
            "\n DIVERGED between icount {}, event {} and icount {}, event {}\n",
            number(&interval["from"]["icount"]),
            number(&interval["from"]["event"]),
            number(&interval["to"]["icount"]),
            number(&interval["to"]["event"])
        ));
    } else {
        out.push_str(&format!(
            "\n DIVERGED at icount {}, event {}\n",
            number(&finding["icount"]),
            number(&finding["event"])
        ));
    }
    for key in ["expected", "found"] {
        if let Ok(side) = serde_json::from_value::<heddle_proto::verdict::Side>(interval[key].clone()) {
            out.push_str(&format!("   {key:<9} {side}\n"));
        }
    }
    if finding.is_null() {
        for event in card["events"].as_array().unwrap_or(&empty).iter().take(20) {
            out.push_str(&format!(
                "   event     {} at icount {} on {}: {}\n",
                event["event"],
                number(&event["icount"]),
                event["role"].as_str().unwrap_or_default(),
                event["what"].as_str().unwrap_or_default()
            ));
        }
        return out.trim_end().to_string();
    }
    let differs: Vec<&str> =
        finding["differs"].as_array().unwrap_or(&empty).iter().filter_map(Value::as_str).collect();
    out.push_str(&format!(
        "   kind      {}\n   pc        {:#x}{}  {}\n   differs   {}\n",
        finding["kind"].as_str().unwrap_or_default(),
        finding["pc"].as_u64().unwrap_or(0),
        on_hart(finding["hart"].as_u64().map(|hart| hart as u32)),
        finding["instruction"].as_str().unwrap_or_default(),
        differs.join(", ")
    ));
    for line in inputs(&finding["inputs"]) {
        out.push_str(&format!("   input     {line}\n"));
    }
    if let (Some(from), Some(to)) = (finding["masked"]["from"].as_u64(), finding["masked"]["to"].as_u64()) {
        out.push_str(&format!(
            "   masked    equal again from icount {} on ({} instructions)\n",
            output::grouped(to),
            to - from
        ));
    }
    if let Some(snapshot) = card["last_good_snapshot"].as_u64() {
        out.push_str(&format!("   last good snapshot at {}\n", output::grouped(snapshot)));
    }
    out.push_str(&format!(
        "   again     heddle hunt {name} --against {}",
        card["against"].as_str().unwrap_or_default()
    ));
    out
}
