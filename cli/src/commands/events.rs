//! `heddle events`: a recording's events, readable.

use super::recordings;
use crate::args::{Events, Format};
use crate::cluster::Cluster;
use crate::exit::{OK, USAGE, coded};
use crate::output;
use anyhow::Result;
use heddle_proto::event::KIND_NAMES;
use serde_json::json;
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
    let events = recordings::events(&cluster.store, recording.id()).await?;
    let selected = events.iter().enumerate().filter(|(_, event)| {
        code.is_none_or(|code| usize::from(event.body.code()) == code)
            && command.role.as_ref().is_none_or(|role| *role == event.role.to_string())
            && (command.from..=command.to).contains(&event.icount)
    });
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
            let rows = selected.map(|(index, event)| {
                json!({
                    "event": index,
                    "icount": event.icount,
                    "role": event.role,
                    "kind": KIND_NAMES[usize::from(event.body.code())],
                    "body": event.body,
                })
            });
            output::value(format, &rows.collect::<Vec<_>>().into())?;
        }
    }
    Ok(OK)
}
