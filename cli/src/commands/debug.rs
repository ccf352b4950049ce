//! `heddle debug`: a gdb on a replay, stopped at an icount; of QEMU its own gdbstub.

use super::{debug_builtin, recordings};
use crate::args::{Debug, Format};
use crate::cluster::Cluster;
use crate::exit::{INCOMPATIBLE, OK, UNEXPECTED, USAGE, coded};
use crate::output;
use anyhow::{Context, Result};
use heddle_node::blocks::BlockCache;
use heddle_node::debugger::bounds_from;
use heddle_node::qemu::span::QemuSpan;
use heddle_node::qemu::stepped::{Reached, Stepped};
use serde_json::json;

/// Stops a replay at an icount and serves a debugger until it leaves.
pub async fn run(cluster: &Cluster, command: Debug, format: Format) -> Result<u8> {
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    let end = recording.row.committed_icount;
    if command.at > end {
        return Err(coded(USAGE, format!("the recording ends at icount {end}")));
    }
    if recording.manifest.builtin().is_some() {
        recordings::refuse_qemu(&command.qemu, &command.recording)?;
        return debug_builtin::run(cluster, &recording, command, format).await;
    }
    if command.listen.is_some() {
        return Err(coded(USAGE, "--listen is for recordings of the built-in machine"));
    }
    let name = &recording.manifest.build;
    let build = crate::serve::offered(&command.qemu).await.into_iter().find(|build| build.name == *name);
    let build = build.ok_or_else(|| coded(INCOMPATIBLE, format!("{name} is not on this machine")))?;
    // The nearest snapshot before it; a step backwards from there goes to it.
    let before = recording.row.snapshots.iter().filter(|s| s.icount < command.at);
    let bounds = bounds_from(before.max_by_key(|snapshot| snapshot.icount));
    let blocks = BlockCache::new(cluster.store.clone());
    let span = QemuSpan::fetch(&cluster.store, &blocks, recording.id(), bounds).await?;
    let at = command.at;
    let (ready, told) = tokio::sync::oneshot::channel();
    let (leave_sender, leave) = std::sync::mpsc::channel::<()>();
    let session = tokio::task::spawn_blocking(move || -> Result<()> {
        let mut stepped = Stepped::start(&span, &build, false)?;
        // A place to go back to: reverse steps need a snapshot behind them.
        let said = stepped.human("savevm heddle-begin")?;
        if !said.is_empty() {
            return Err(coded(UNEXPECTED, format!("no place to go back to can be saved here: {said}")));
        }
        match stepped.advance(at)? {
            Reached::There => {}
            Reached::Stuck(stuck) => {
                return Err(coded(UNEXPECTED, format!("the replay is stuck at icount {stuck}")));
            }
            Reached::Ended(said) => return Err(coded(UNEXPECTED, format!("QEMU ended: {said}"))),
        }
        let socket = stepped.started().scratch.path().join("gdb");
        let said = stepped.human(&format!("gdbserver unix:{},server=on,wait=off", socket.display()))?;
        let pc = heddle_node::qemu::stepped::pc_of(&stepped.registers()?);
        let instruction = stepped.instruction().unwrap_or_default();
        let _ = ready.send((socket, said, pc, instruction));
        loop {
            if leave.recv_timeout(std::time::Duration::from_millis(50)).is_ok() {
                return Ok(());
            }
            stepped.forget_marks()?;
            if stepped.started().process.try_wait()?.is_some() {
                return Ok(());
            }
        }
    });
    let Ok((socket, said, pc, instruction)) = told.await else {
        session.await.context("the session's thread")??;
        return Ok(OK);
    };
    let value = json!({
        "recording": command.recording, "icount": at, "pc": pc, "instruction": instruction,
        "socket": socket.display().to_string(), "said": said,
    });
    match format {
        Format::Json | Format::Yaml => output::value(format, &value)?,
        _ => output::line(format!(
            "{} stands at icount {}: pc {pc:#x}  {instruction}\n  gdb -ex 'target remote {}'\n  reverse-stepi and reverse-continue work; Ctrl-C here ends the session",
            command.recording,
            output::grouped(at),
            socket.display()
        ))?,
    }
    let mut session = session;
    tokio::select! {
        () = crate::serve::asked_to_stop() => {
            let _ = leave_sender.send(());
            (&mut session).await.context("the session's thread")??;
        }
        done = &mut session => done.context("the session's thread")??,
    }
    Ok(OK)
}
