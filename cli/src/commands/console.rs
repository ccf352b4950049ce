//! This terminal as a guest's console.

use anyhow::{Context, Result};
use heddle_node::record::Console;
use std::io::{IsTerminal, Read, Write};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Exit code of a recording that Ctrl-C ended, as shells have it.
const INTERRUPTED: u16 = 130;

/// What the terminal is to look for, and say.
pub struct TerminalOptions {
    /// End once this was printed.
    pub until: Option<String>,
    /// Type a line only once this was printed.
    pub prompt: Option<String>,
    /// Print nothing of the console.
    pub is_quiet: bool,
    /// Where the rest of the recording lies if the user leaves at once.
    pub outbox: String,
}

/// The terminal while it is a console.
pub struct Terminal {
    raw: Arc<Option<RawTerminal>>,
    interrupt: tokio::task::JoinHandle<()>,
}

impl Terminal {
    /// Connects standard input and output.
    pub fn open(options: TerminalOptions) -> Result<(Terminal, Console)> {
        let (stop_sender, stop) = mpsc::unbounded_channel();
        let (input_sender, input) = mpsc::channel(16);
        let (prompt_sender, prompts) = std::sync::mpsc::channel();
        let waits = options.prompt.is_some();
        let mut watcher = Watcher {
            until: options.until.unwrap_or_default().into_bytes(),
            prompt: options.prompt.unwrap_or_default().into_bytes(),
            recent: vec![],
            stop: stop_sender.clone(),
            prompts: prompt_sender,
            is_quiet: options.is_quiet,
        };
        let raw = Arc::new(std::io::stdin().is_terminal().then(RawTerminal::enter).flatten());
        let (interrupt_sender, interrupted) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || read_console(&input_sender, &interrupt_sender, waits.then_some(prompts)))
            .context("start the console thread")?;
        let ending = end_on_interrupts(interrupted, stop_sender, options.outbox, raw.clone());
        let interrupt = tokio::spawn(ending);
        let console = Console { input, output: Box::new(move |bytes| watcher.print(bytes)), stop };
        Ok((Terminal { raw, interrupt }, console))
    }

    /// Gives the terminal back.
    pub fn close(self) {
        self.interrupt.abort();
        if let Some(raw) = &*self.raw {
            raw.leave();
        }
    }
}

/// Signals that come this close together are one.
const SAME_WISH: std::time::Duration = std::time::Duration::from_millis(500);

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
            // `timeout` signals its child and then the child's group: that is one wish.
            tokio::time::sleep(SAME_WISH).await;
            continue;
        }
        if let Some(raw) = &*raw {
            raw.leave();
        }
        eprintln!("heddle: left; what the store has not taken is in {outbox}");
        std::process::exit(i32::from(INTERRUPTED));
    }
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
        while let Some(end) = pending.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if prompts.recv().is_err() || input.blocking_send(line).is_err() {
                return;
            }
        }
    }
    // A last line may have no end.
    if let Some(prompts) = &prompts
        && !pending.is_empty()
        && prompts.recv().is_ok()
    {
        let _ = input.blocking_send(pending);
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
