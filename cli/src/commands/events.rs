//! `heddle events`: a recording's events, readable.

use super::recordings;
use crate::args::{Events, Format};
use crate::cluster::Cluster;
use crate::exit::{OK, USAGE, coded};
use crate::output;
use anyhow::Result;
use heddle_proto::event::KIND_NAMES;
use heddle_proto::{Chunk, Event, RecordingId};
use serde_json::{Value, json};
use std::io::Write;

/// Prints events, filtered.
pub async fn run(cluster: &Cluster, command: Events, format: Format) -> Result<u8> {
    let code = match &command.kind {
        None => None,
        Some(kind) => {
            let at = KIND_NAMES.iter().position(|name| name == kind);
            Some(at.ok_or_else(|| {
                coded(USAGE, format!("no kind {kind:?}; kinds are {}", KIND_NAMES.join(", ")))
            })?)
        }
    };
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    let is_selected = |event: &Event| {
        code.is_none_or(|code| usize::from(event.body.code()) == code)
            && command.role.as_ref().is_none_or(|role| *role == event.role.to_string())
            && (command.from..=command.to).contains(&event.icount)
    };
    if command.follow {
        return follow(cluster, recording.id(), is_selected, format).await;
    }
    let events = recordings::events(&cluster.store, recording.id()).await?;
    let selected = events.iter().enumerate().filter(|(_, event)| is_selected(event));
    match format {
        Format::Table | Format::Wide | Format::Name => {
            let mut out = std::io::stdout().lock();
            for (index, event) in selected {
                match writeln!(out, "{index:>8} {event}") {
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => break,
                    done => done?,
                }
            }
        }
        Format::Json | Format::Yaml => {
            let rows = selected.map(|(index, event)| row(index as u64, event));
            output::value(format, &rows.collect::<Vec<_>>().into())?;
        }
    }
    Ok(OK)
}

fn row(index: u64, event: &Event) -> Value {
    json!({
        "event": index,
        "icount": event.icount,
        "role": event.role,
        "kind": KIND_NAMES[usize::from(event.body.code())],
        "body": event.body,
    })
}

/// Prints events as they are committed; as JSON, one a line.
async fn follow(
    cluster: &Cluster,
    id: RecordingId,
    is_selected: impl Fn(&Event) -> bool,
    format: Format,
) -> Result<u8> {
    let mut failed = None;
    let take = |chunk: Chunk| {
        let print = || {
            let events = chunk.events()?;
            let mut out = std::io::stdout().lock();
            for (index, event) in (chunk.header.first_event..).zip(&events).filter(|(_, e)| is_selected(e)) {
                match format {
                    Format::Json | Format::Yaml => writeln!(out, "{}", row(index, event))?,
                    _ => writeln!(out, "{index:>8} {event}")?,
                }
            }
            out.flush()?;
            anyhow::Ok(())
        };
        failed = print().err();
        failed.is_none()
    };
    cluster.store.follow(id, 0, take).await?;
    let is_closed = |error: &anyhow::Error| {
        error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    match failed {
        Some(error) if !is_closed(&error) => Err(error),
        _ => Ok(OK),
    }
}
