//! A real gdb on what `heddle debug` serves.

use crate::run;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// A gdb that breaks down says so and ends. It asks nobody, and leaves no core.
const SETTINGS: [&str; 2] = ["maint set internal-error quit yes", "maint set internal-error corefile no"];

/// `heddle debug`, which ends with this.
pub struct Session {
    child: Child,
    /// What it has said of where it stands.
    pub said: Value,
}

impl Session {
    /// Debugs a recording from an icount on, by a `heddle` that has no arguments but its
    /// cluster's.
    pub fn start(mut heddle: Command, recording: &str, at: u64, more: &[&str]) -> Session {
        heddle.args(["debug", recording, "--at", &at.to_string(), "-o", "json"]).args(more);
        let mut child = heddle.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut text = String::new();
        while !text.trim_end().ends_with('}') {
            text.push_str(&lines.next().expect("heddle debug says where it stands").unwrap());
        }
        Session { child, said: serde_json::from_str(&text).unwrap() }
    }

    /// What a gdb prints that is told to do this, one after the other, and does not break down.
    pub async fn gdb(&self, steps: &[&str]) -> String {
        let target = format!("target remote {}", self.said["socket"].as_str().unwrap());
        let mut gdb = Command::new("gdb-multiarch");
        gdb.args(["-batch", "-nx"]);
        for setting in SETTINGS {
            gdb.args(["-iex", setting]);
        }
        for step in ["set architecture riscv:rv64", &target].iter().chain(steps).chain(&["detach"]) {
            gdb.args(["-ex", step]);
        }
        let said = tokio::task::spawn_blocking(move || run(&mut gdb, b"")).await.unwrap();
        let text = format!("{}\n{}", said.out, said.err);
        // Its exit code is the last step's: a step before that may fail, and its message is seen.
        let is_sound = said.code == 0 && !text.contains("internal-error");
        assert!(is_sound, "gdb ended with exit code {} (-1: by a signal):\n{text}", said.code);
        text
    }

    /// The pc that it has said.
    pub fn pc(&self) -> String {
        format!("{:#x}", self.said["pc"].as_u64().unwrap())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The values that gdb has printed by `p/x`.
pub fn values(said: &str) -> Vec<&str> {
    let printed = said.lines().filter(|line| line.starts_with('$'));
    printed.filter_map(|line| line.split(" = ").nth(1)).collect()
}

/// What `monitor icount` has printed.
pub fn icounts(said: &str) -> Vec<u64> {
    said.lines().filter_map(|line| line.strip_prefix("icount ")?.parse().ok()).collect()
}
