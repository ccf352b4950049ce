//! `heddle debug` of the built-in machine: a gdb server over a session of ours.

use super::recordings::Recording;
use crate::args::{Debug, Format};
use crate::cluster::Cluster;
use crate::exit::{OK, USAGE, coded};
use crate::output;
use anyhow::{Context, Result, anyhow};
use heddle_node::blocks::BlockCache;
use heddle_node::debugger::Recorded;
use heddle_node::gdb::{self, Door};
use heddle_proto::verdict::on_hart;
use heddle_replay_engine::debugger::Session;
use serde_json::json;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Stops a replay at an icount and serves gdb until Ctrl-C, or until a gdb says `kill`.
pub async fn run(cluster: &Cluster, recording: &Recording, command: Debug, format: Format) -> Result<u8> {
    let blocks = BlockCache::new(cluster.store.clone());
    let origin = Recorded::fetch(&cluster.store, &blocks, recording.id()).await?;
    let scratch = tempfile::Builder::new()
        .prefix("heddle-debug-")
        .tempdir()
        .context("make a directory for gdb's socket")?;
    let (door, address) = open_door(command.listen.as_deref(), scratch.path())?;
    let at = command.at;
    let (ready, told) = tokio::sync::oneshot::channel();
    let mut session = tokio::task::spawn_blocking(move || -> Result<()> {
        let mut session = Session::new(Box::new(origin)).map_err(|error| anyhow!(error))?;
        session.goto(at).map_err(|error| anyhow!(error))?;
        session.settle();
        let pc = session.machine().hart().pc;
        let instruction = session.machine().instruction_at(pc);
        let hart = session.machine().named_hart();
        let said = (session.icount(), pc, hart, instruction, session.ending());
        let _ = ready.send(said);
        gdb::serve(&door, session)
    });
    let Ok((icount, pc, hart, instruction, ending)) = told.await else {
        session.await.context("the session's thread")??;
        return Ok(OK);
    };
    let said = ending.filter(|_| icount < at).unwrap_or_default();
    match format {
        Format::Json | Format::Yaml => {
            let mut value = json!({
                "recording": command.recording, "icount": icount, "pc": pc, "instruction": instruction,
                "socket": address, "said": said,
            });
            if let Some(hart) = hart {
                value["hart"] = json!(hart);
            }
            output::value(format, &value)?;
        }
        _ => {
            if !said.is_empty() {
                output::line(said)?;
            }
            output::line(format!(
                "{} stands at icount {}: pc {pc:#x}{}  {instruction}\n  gdb-multiarch -ex 'target remote {address}'\n  reverse-stepi, reverse-continue, watch and monitor where work; Ctrl-C here ends the session",
                command.recording,
                output::grouped(icount),
                on_hart(hart),
            ))?;
        }
    }
    // Who waits for a gdb, or for a replay, does not hear: the process ends without that thread.
    tokio::select! {
        () = crate::serve::asked_to_stop() => {}
        done = &mut session => done.context("the session's thread")??,
    }
    Ok(OK)
}

/// Where gdb comes in, and what it is told to reach that.
fn open_door(listen: Option<&str>, scratch: &Path) -> Result<(Door, String)> {
    match listen {
        Some(address) => {
            let listener = TcpListener::bind(address)
                .map_err(|error| coded(USAGE, format!("--listen {address}: {error}")))?;
            let address = listener.local_addr().context("where gdb is waited for")?.to_string();
            Ok((Door::Tcp(listener), address))
        }
        None => {
            let path = scratch.join("gdb");
            let listener = UnixListener::bind(&path).context("listen for gdb")?;
            Ok((Door::Unix(listener), path.display().to_string()))
        }
    }
}
