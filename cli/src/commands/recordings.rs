//! Finding recordings by name or id, and reading their logs.

use crate::args::{Describe, Kind};
use crate::exit::{CORRUPT, INCOMPATIBLE, NOTHING, OK, USAGE, coded};
use anyhow::Result;
use heddle_proto::manifest::ManifestError;
use heddle_proto::{Event, Hash, Manifest, RecordingId, v1};
use heddle_storage::StoreClient;
use std::path::PathBuf;

/// A recording as listed.
pub struct Recording {
    /// Its row.
    pub row: v1::RecordingRow,
    /// Its manifest.
    pub manifest: Manifest,
}

impl Recording {
    /// From its row.
    pub fn of(row: v1::RecordingRow) -> Result<Recording> {
        let manifest = Manifest::decode(&row.manifest).map_err(|error| {
            let code = if matches!(error, ManifestError::Version(_)) { INCOMPATIBLE } else { CORRUPT };
            coded(code, error.to_string())
        })?;
        Ok(Recording { row, manifest })
    }

    /// Its id.
    pub fn id(&self) -> RecordingId {
        self.manifest.id
    }
}

/// All recordings, oldest first.
pub async fn all(store: &StoreClient) -> Result<Vec<Recording>> {
    let rows = store.list().await?;
    let count = rows.len();
    let (mut list, mut first_error) = (Vec::with_capacity(count), None);
    for row in rows {
        match Recording::of(row) {
            Ok(recording) => list.push(recording),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    // One that can't be read must not hide the others.
    match first_error {
        Some(error) if list.is_empty() => return Err(error),
        Some(error) => {
            eprintln!("heddle: {} of {count} recordings are left out: {error:#}", count - list.len())
        }
        None => {}
    }
    list.sort_by_key(|recording| (recording.manifest.created_unix_ms, recording.id()));
    Ok(list)
}

/// The newest recording of this name, or the one whose id begins with it.
pub async fn find(store: &StoreClient, name: &str) -> Result<Recording> {
    let list = all(store).await?;
    let by_name = list.iter().rposition(|recording| recording.manifest.name == name);
    let by_id = || {
        let is_id = name.len() >= 4 && name.chars().all(|c| c.is_ascii_hexdigit());
        list.iter().position(|recording| is_id && recording.id().to_string().starts_with(name))
    };
    let at = by_name.or_else(by_id);
    at.and_then(|at| list.into_iter().nth(at))
        .ok_or_else(|| coded(NOTHING, format!("no recording {name:?}; `heddle get recordings` lists them")))
}

/// Refuses `--qemu` for a recording of the built-in machine, which no QEMU replays.
pub fn refuse_qemu(given: &[PathBuf], name: &str) -> Result<()> {
    if given.is_empty() {
        return Ok(());
    }
    let text = format!("--qemu is for recordings of QEMU; {name} is of the built-in machine");
    Err(coded(USAGE, text))
}

/// Deletes a recording. Its blocks may be another's, too, and stay.
pub async fn delete(store: &StoreClient, command: Describe) -> Result<u8> {
    if command.kind != Kind::Recordings {
        return Err(coded(USAGE, "only recordings can be deleted"));
    }
    let recording = find(store, &command.name).await?;
    store.delete(recording.id()).await?;
    eprintln!("deleted {} ({})", recording.manifest.name, recording.id().short());
    Ok(OK)
}

/// All events of a recording, with the chain of chunks checked.
pub async fn events(store: &StoreClient, id: RecordingId) -> Result<Vec<Event>> {
    let (anchor, chunks) = loop {
        let row = store.get(id).await?;
        let chunks = store.read(id, 0, 0).await?;
        // Not if they were written anew meanwhile: the anchor belongs to the chunks.
        if store.get(id).await?.rewritten_from == row.rewritten_from {
            break (Hash::from_slice(&row.rewritten_from).unwrap_or(Hash::ZERO), chunks);
        }
    };
    let mut events = vec![];
    let mut before = None;
    for chunk in &chunks {
        let at = chunk.header.first_event;
        let damaged = |error| coded(CORRUPT, format!("chunk at event {at} of {id}: {error}"));
        chunk.check_follows(before, anchor).map_err(damaged)?;
        events.extend(chunk.events().map_err(damaged)?);
        before = Some(&chunk.header);
    }
    Ok(events)
}
