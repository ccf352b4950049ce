//! QEMU's machine protocol, as far as it is needed: commands with one answer each.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A QEMU that answers nothing for so long is stuck: a replay holds its locks while it waits.
const ANSWER: Duration = Duration::from_secs(20);
/// The same while it saves its state.
const SAVING: Duration = Duration::from_secs(900);
const CONNECT_POLL: Duration = Duration::from_millis(2);
/// Longest answer: register dumps are a few KiB.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// A connection to a QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// The beginning of a line whose end had not come in time.
    partial: String,
    /// The last command's.
    number: u64,
    /// Events that came between answers: name and data.
    pub events: Vec<(String, Value)>,
}

impl Qmp {
    /// Connects, as soon as QEMU listens; `is_alive` ends the wait.
    pub fn connect(path: &Path, limit: Duration, mut is_alive: impl FnMut() -> bool) -> Result<Qmp> {
        let until = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if !is_alive() => bail!("QEMU ended before it could be asked anything"),
                Err(error) if Instant::now() > until => {
                    return Err(error).context("QEMU's monitor does not answer");
                }
                Err(_) => std::thread::sleep(CONNECT_POLL),
            }
        };
        stream.set_read_timeout(Some(ANSWER)).context("set a time limit")?;
        stream.set_write_timeout(Some(ANSWER)).context("set a time limit")?;
        let reader = BufReader::new(stream.try_clone().context("clone the connection")?);
        let mut qmp = Qmp { stream, reader, partial: String::new(), number: 0, events: vec![] };
        qmp.line()?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = std::mem::take(&mut self.partial);
        let read = std::io::Read::take(&mut self.reader, LINE_BYTES_MAX)
            .read_line(&mut line)
            .context("QEMU's monitor does not answer")?;
        if read == 0 {
            bail!("QEMU has closed its monitor");
        }
        serde_json::from_str(&line).context("QEMU's answer does not parse")
    }

    /// Runs a command; its answer.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        self.number += 1;
        let mut line = json!({ "execute": name, "arguments": arguments, "id": self.number }).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes()).with_context(|| format!("ask QEMU to {name}"))?;
        loop {
            let mut answer = self.line().with_context(|| format!("ask QEMU to {name}"))?;
            if let Some(event) = answer["event"].as_str() {
                self.events.push((event.to_string(), answer["data"].take()));
                continue;
            }
            // A second greeting, or an answer that came after its time.
            if answer["id"] != self.number {
                continue;
            }
            if let Some(error) = answer.get("error") {
                return Err(anyhow!(
                    "QEMU refuses {name}: {}",
                    error["desc"].as_str().unwrap_or("no reason")
                ));
            }
            return Ok(answer["return"].take());
        }
    }

    /// Runs a command of the human monitor; what it printed.
    pub fn human(&mut self, command: &str) -> Result<String> {
        let answer = self.command("human-monitor-command", json!({ "command-line": command }))?;
        Ok(answer.as_str().unwrap_or_default().trim().to_string())
    }

    /// Waits for an event; false if it does not come in time.
    pub fn wait_for(&mut self, event: &str, limit: Duration) -> Result<bool> {
        let until = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(|(name, _)| name == event) {
                self.events.remove(at);
                return Ok(true);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // A line that comes in parts is kept until it is whole.
            self.stream.set_read_timeout(Some(left)).context("set a time limit")?;
            let read = self.reader.read_line(&mut self.partial);
            self.stream.set_read_timeout(Some(ANSWER)).context("set a time limit")?;
            match read {
                Ok(0) => bail!("QEMU has closed its monitor"),
                Ok(_) if self.partial.ends_with('\n') => {
                    let mut line: Value =
                        serde_json::from_str(&self.partial).context("QEMU's answer does not parse")?;
                    self.partial.clear();
                    if let Some(name) = line["event"].as_str() {
                        self.events.push((name.to_string(), line["data"].take()));
                    }
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error).context("QEMU's monitor does not answer"),
            }
        }
    }

    /// Instructions executed so far.
    pub fn icount(&mut self) -> Result<u64> {
        let answer = self.command("query-replay", json!({}))?;
        answer["icount"].as_u64().context("QEMU says no icount")
    }

    /// `running`, `paused`, `shutdown`, ...
    pub fn status(&mut self) -> Result<String> {
        let answer = self.command("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_string())
    }

    /// Saves the VM state under `name`; false if async events are queued, with which
    /// QEMU refuses.
    pub fn try_save(&mut self, name: &str) -> Result<bool> {
        // Gigabytes are written and flushed before it answers.
        self.stream.set_read_timeout(Some(SAVING)).context("set a time limit")?;
        let said = self.human(&format!("savevm {name}"));
        self.stream.set_read_timeout(Some(ANSWER)).context("set a time limit")?;
        match said?.as_str() {
            "" => Ok(true),
            said if said.contains("Try once more later") => Ok(false),
            said => bail!("QEMU does not save its state: {said}"),
        }
    }

    /// Saves the VM state under `name`; tries again while async events are queued.
    pub fn save(&mut self, name: &str, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            if self.try_save(name)? {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("QEMU does not save its state: async events stay queued");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
