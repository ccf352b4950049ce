//! `heddle export` and `heddle import`: a recording in one file.

use super::recordings;
use crate::args::{Export, Import};
use crate::cluster::Cluster;
use crate::exit::{CORRUPT, OK, USAGE, coded};
use anyhow::Result;
use heddle_node::container::Container;
use heddle_node::transfer;
use std::fs::File;
use std::io::{BufWriter, IsTerminal};

/// Writes a recording to standard output.
pub async fn export(cluster: &Cluster, command: Export) -> Result<u8> {
    let out = std::io::stdout();
    if out.is_terminal() {
        return Err(coded(USAGE, "it is binary: heddle export RECORDING > FILE"));
    }
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    let moved = transfer::export(&cluster.store, recording.id(), BufWriter::new(out)).await?;
    eprintln!("exported {}: {} events, {} blocks", recording.manifest.name, moved.events, moved.blocks);
    Ok(OK)
}

/// Verifies a file as a whole, then stores what it holds.
pub async fn import(cluster: &Cluster, command: Import) -> Result<u8> {
    let path = command.file.display().to_string();
    let file = File::open(&command.file).map_err(|error| coded(USAGE, format!("{path}: {error}")))?;
    let container = tokio::task::spawn_blocking(move || Container::open(file))
        .await?
        .map_err(|error| coded(CORRUPT, format!("{path}: {error:#}; nothing was imported")))?;
    let id = container.id;
    let moved = transfer::import(&cluster.store, container).await?;
    let said = if moved.was_there { "it is there already" } else { "imported" };
    eprintln!("{said}: {}, {} events, {} blocks", id.short(), moved.events, moved.blocks);
    Ok(OK)
}
