//! `heddle record qemu`: this process is the node that runs the user's QEMU.

use super::record::{labels, open_terminal, outbox_of};
use crate::args::{Format, RecordQemu};
use crate::cluster::Cluster;
use crate::exit::{INCOMPATIBLE, USAGE, coded, of_guest};
use crate::output;
use anyhow::Result;
use heddle_node::qemu::record::{QemuRequest, record};
use heddle_node::record::Watermarks;
use heddle_replay_engine::qemu::command::Refused;
use serde_json::json;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Records, with this terminal as the guest's console. QEMU's exit code is ours.
pub async fn run(cluster: &Cluster, command: RecordQemu, format: Format) -> Result<u8> {
    let outbox_dir = outbox_of(cluster, &command.common).await?;
    let is_quiet = output::is_for_programs(format);
    // Refused before the terminal changes hands or anything is stored.
    let given = command.command.clone();
    let by_rule = command.roles == "by-rule";
    let planned = tokio::task::spawn_blocking(move || heddle_node::qemu::record::plan(&given, by_rule))
        .await?
        .map_err(|error| match error.downcast_ref::<Refused>() {
            Some(_) => coded(USAGE, format!("{error:#}")),
            None => coded(INCOMPATIBLE, format!("{error:#}")),
        })?;
    let has_e1000 = planned.plan.arguments.iter().any(|argument| argument.contains("e1000"));
    if !is_quiet && command.snapshot_every > 0 && has_e1000 {
        eprintln!(
            "heddle: with an e1000, snapshots taken while recording can make a replay from power-on \
             stall; with a virtio-net-pci that was not seen"
        );
    }
    if !is_quiet {
        planned.plan.notes.iter().for_each(|note| eprintln!("heddle: {note}"));
    }
    let request = QemuRequest {
        name: command.common.name.clone(),
        labels: labels(&command.common.labels)?,
        planned,
        snapshot_every: command.snapshot_every,
        last_snapshot: !command.no_last_snapshot,
        outbox_dir: outbox_dir.clone(),
        outbox_bytes: command.common.outbox_bytes,
    };
    let (terminal, console) = open_terminal(&command.common, &outbox_dir, format)?;
    let watermarks = Watermarks::default();
    let began = Instant::now();
    let coordinator = Some(cluster.file.coordinator.clone());
    let recorded = record(&cluster.store, coordinator, request, console, watermarks.clone(), |_, _| {}).await;
    terminal.close();
    let recorded = recorded?;
    let is_kept = command.keep_if == "always" || recorded.exit_code != 0 || recorded.is_cut;
    if !is_kept {
        cluster.store.delete(recorded.id).await?;
    }
    let summary = json!({
        "recording": recorded.name,
        "id": recorded.id,
        "instructions": recorded.end.icount,
        "events": recorded.end.event,
        "committed_events": watermarks.committed.load(Ordering::Relaxed),
        "digest": recorded.digest,
        "snapshots": recorded.snapshots,
        "exit_code": recorded.exit_code,
        "cut": recorded.is_cut,
        "qemu_cpu_seconds": recorded.qemu_cpu_seconds,
        "kept": is_kept,
        "seconds": began.elapsed().as_secs_f64(),
    });
    if !recorded.said.is_empty() {
        eprintln!("{}", recorded.said);
    }
    match format {
        Format::Json | Format::Yaml => output::value(format, &summary)?,
        Format::Name => output::line(recorded.name)?,
        Format::Table | Format::Wide => eprintln!(
            "recorded {}: {} instructions, {} events, {} snapshots, {:.1} s{}",
            recorded.name,
            output::grouped(recorded.end.icount),
            output::grouped(recorded.end.event),
            recorded.snapshots,
            began.elapsed().as_secs_f64(),
            if !is_kept {
                "; not kept, as it went well"
            } else if recorded.is_cut {
                "; QEMU did not end cleanly, so it is sealed as cut"
            } else {
                ""
            },
        ),
    }
    Ok(of_guest(recorded.exit_code))
}
