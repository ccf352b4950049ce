//! `heddle record builtin`: this process is the node that runs the guest.

use crate::args::{Format, RecordBuiltin};
use crate::cluster::Cluster;
use crate::exit::{OK, USAGE, coded};
use crate::output;
use anyhow::{Context, Result};
use bytes::Bytes;
use heddle_node::record::{Console, NamedFile, RecordRequest, Watermarks, record};
use heddle_proto::manifest::{Positions, Sleep};
use heddle_replay_engine::guest;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio::sync::mpsc;

/// Instructions between checks.
const CHECK_EVERY: u64 = 1_000_000;
/// Instructions between digests.
const DIGEST_EVERY: u64 = 10_000_000;
/// RAM of the bundled guest.
const BUNDLED_MEMORY: u64 = 16 << 20;
/// Exit code of a recording that Ctrl-C ended, as shells have it.
const INTERRUPTED: u16 = 130;

/// Records, with this terminal as the guest's console. The guest's exit code is ours.
pub async fn run(cluster: &Cluster, command: RecordBuiltin, format: Format) -> Result<u8> {
    let outbox_dir = command.outbox.clone().unwrap_or_else(|| cluster.outbox_dir.clone());
    for said in heddle_node::record::recover(&cluster.store, &outbox_dir).await {
        eprintln!("heddle: {said}");
    }
    let outbox_shown = outbox_dir.display().to_string();
    let request = request(&command, outbox_dir)?;
    let is_quiet = format == Format::Json || format == Format::Yaml || format == Format::Name;
    let (stop_sender, stop) = mpsc::unbounded_channel();
    let (input_sender, input) = mpsc::channel(16);
    let (prompt_sender, prompts) = std::sync::mpsc::channel();
    let watcher = Watcher {
        until: command.until.clone().unwrap_or_default().into_bytes(),
        prompt: command.prompt.clone().unwrap_or_default().into_bytes(),
        recent: vec![],
        stop: stop_sender.clone(),
        prompts: prompt_sender,
        is_quiet,
    };
    let raw = Arc::new(std::io::stdin().is_terminal().then(RawTerminal::enter).flatten());
    let (interrupt_sender, interrupted) = mpsc::unbounded_channel();
    let waits = command.prompt.is_some();
    std::thread::Builder::new()
        .name("console".into())
        .spawn(move || read_console(&input_sender, &interrupt_sender, waits.then_some(prompts)))
        .context("start the console thread")?;
    let interrupt = tokio::spawn(end_on_interrupts(interrupted, stop_sender, outbox_shown, raw.clone()));
    let watermarks = Watermarks::default();
    let mut watcher = watcher;
    let console = Console { input, output: Box::new(move |bytes| watcher.print(bytes)), stop };
    let began = Instant::now();
    let coordinator = Some(cluster.file.coordinator.clone());
    let recorded = record(&cluster.store, coordinator, request, console, watermarks.clone(), |_| {}).await;
    interrupt.abort();
    if let Some(raw) = &*raw {
        raw.leave();
    }
    let recorded = recorded?;
    let summary = json!({
        "recording": command.name,
        "id": recorded.id,
        "instructions": recorded.end.icount,
        "events": recorded.end.event,
        "committed_events": watermarks.committed.load(Ordering::Relaxed),
        "digest": recorded.digest,
        "exit_code": recorded.exit_code,
        "seconds": began.elapsed().as_secs_f64(),
    });
    match format {
        Format::Json | Format::Yaml => output::value(format, &summary)?,
        Format::Name => output::line(command.name.clone())?,
        Format::Table | Format::Wide => eprintln!(
            "recorded {}: {} instructions, {} events, {:.1} s",
            command.name,
            output::grouped(recorded.end.icount),
            output::grouped(recorded.end.event),
            began.elapsed().as_secs_f64()
        ),
    }
    // The low byte, as a process's exit status has no more.
    Ok(if recorded.exit_code == 0 { OK } else { recorded.exit_code.to_le_bytes()[0].max(1) })
}

/// The first Ctrl-C ends the guest, and what it did is still delivered. The second
/// leaves at once: the store may be away for long.
async fn end_on_interrupts(
    mut keys: mpsc::UnboundedReceiver<()>,
    stop: mpsc::UnboundedSender<u16>,
    outbox: String,
    raw: Arc<Option<RawTerminal>>,
) {
    for is_second in [false, true] {
        tokio::select! {
            () = crate::serve::asked_to_stop() => {}
            Some(()) = keys.recv() => {}
        }
        if !is_second {
            let _ = stop.send(INTERRUPTED);
            continue;
        }
        if let Some(raw) = &*raw {
            raw.leave();
        }
        eprintln!("heddle: left; what the store has not taken is in {outbox}");
        std::process::exit(i32::from(INTERRUPTED));
    }
}

fn request(command: &RecordBuiltin, outbox_dir: std::path::PathBuf) -> Result<RecordRequest> {
    let file = |path: &Option<std::path::PathBuf>| path.as_deref().map(read_file).transpose();
    let is_bundled = command.bios.is_none() && command.kernel.is_none();
    let mut drives = command.drives.iter().map(|path| read_file(path)).collect::<Result<Vec<_>>>()?;
    let kernel = if is_bundled {
        drives.insert(0, ("loom.disk".into(), Bytes::from(guest::disk())));
        Some(("loom.elf".into(), Bytes::from_static(guest::LOOM_ELF)))
    } else {
        file(&command.kernel)?
    };
    if command.snapshot_every % DIGEST_EVERY != 0 {
        return Err(coded(USAGE, format!("--snapshot-every must be a multiple of {DIGEST_EVERY}")));
    }
    let labels = command.labels.iter().map(|label| {
        let pair = label.split_once('=').map(|(k, v)| (k.to_string(), v.to_string()));
        pair.ok_or_else(|| coded(USAGE, format!("--label {label}: expected KEY=VALUE")))
    });
    Ok(RecordRequest {
        name: command.name.clone(),
        labels: labels.collect::<Result<BTreeMap<_, _>>>()?,
        memory_bytes: if is_bundled { BUNDLED_MEMORY } else { command.memory },
        shift: command.shift,
        sleep: if command.sleep == "off" { Sleep::Off } else { Sleep::On },
        bios: file(&command.bios)?,
        kernel,
        initrd: file(&command.initrd)?,
        append: command.append.clone(),
        drives,
        positions: Positions {
            check_every: CHECK_EVERY,
            digest_every: DIGEST_EVERY,
            snapshot_every: command.snapshot_every,
            snapshots_at: vec![],
        },
        outbox_dir,
        outbox_bytes: command.outbox_bytes,
    })
}

fn read_file(path: &Path) -> Result<NamedFile> {
    let bytes = std::fs::read(path).map_err(|e| coded(USAGE, format!("read {}: {e}", path.display())))?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok((name, Bytes::from(bytes)))
}

/// Prints the console, and looks for the texts that were asked for.
struct Watcher {
    until: Vec<u8>,
    prompt: Vec<u8>,
    recent: Vec<u8>,
    stop: mpsc::UnboundedSender<u16>,
    prompts: std::sync::mpsc::Sender<()>,
    is_quiet: bool,
}

impl Watcher {
    fn print(&mut self, bytes: &[u8]) {
        if !self.is_quiet {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }
        for byte in bytes {
            self.recent.push(*byte);
            if !self.until.is_empty() && self.recent.ends_with(&self.until) {
                let _ = self.stop.send(0);
            }
            if !self.prompt.is_empty() && self.recent.ends_with(&self.prompt) {
                let _ = self.prompts.send(());
            }
        }
        let keep = self.until.len().max(self.prompt.len());
        let drop = self.recent.len().saturating_sub(keep);
        self.recent.drain(..drop);
    }
}

/// Standard input to the guest: as it comes, or line by line, each after a prompt.
fn read_console(
    input: &mpsc::Sender<Vec<u8>>,
    interrupt: &mpsc::UnboundedSender<()>,
    prompts: Option<std::sync::mpsc::Receiver<()>>,
) {
    let is_terminal = std::io::stdin().is_terminal();
    let mut buffer = [0; 256];
    let mut pending: Vec<u8> = vec![];
    while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
        let bytes = &buffer[..count];
        if is_terminal && bytes.contains(&3) {
            let _ = interrupt.send(());
            continue;
        }
        let Some(prompts) = &prompts else {
            if input.blocking_send(bytes.to_vec()).is_err() {
                return;
            }
            continue;
        };
        pending.extend_from_slice(bytes);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if prompts.recv().is_err() || input.blocking_send(line).is_err() {
                return;
            }
        }
    }
}

/// The terminal passes keys as they are typed, and gets its ways back at the end.
struct RawTerminal(rustix::termios::Termios);

impl RawTerminal {
    fn enter() -> Option<RawTerminal> {
        let before = rustix::termios::tcgetattr(std::io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes = before.output_modes;
        rustix::termios::tcsetattr(std::io::stdin(), rustix::termios::OptionalActions::Now, &raw).ok()?;
        Some(RawTerminal(before))
    }
}

impl RawTerminal {
    fn leave(&self) {
        let now = rustix::termios::OptionalActions::Now;
        let _ = rustix::termios::tcsetattr(std::io::stdin(), now, &self.0);
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.leave();
    }
}
