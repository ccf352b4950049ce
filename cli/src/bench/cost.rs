//! What something costs: CPU and wall seconds of this process, its children, the cluster's parts.

use anyhow::{Context, Result, ensure};
use rustix::time::{ClockId, clock_gettime};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Kernel clock ticks a second, in which `/proc` counts CPU time.
const TICKS: f64 = 100.0;

/// What something took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Seconds that a CPU ran.
    pub cpu: f64,
    /// Seconds that passed.
    pub wall: f64,
}

/// User and system seconds of a process, or of its children that have ended.
fn cpu_of(process: &str, children: bool) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let at = if children { 13 } else { 11 };
    let tick = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (tick(at) + tick(at + 1)) / TICKS
}

/// CPU seconds of this process's children that run: the cluster's parts.
pub fn cpu_of_parts() -> f64 {
    let own = std::process::id().to_string();
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0.0 };
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    ids.filter(|id| id.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)) == Some(own.as_str())
        })
        .map(|id| cpu_of(&id, false) + cpu_of(&id, true))
        .sum()
}

/// Runs a command to its end; its cost and its standard output.
pub fn timed(command: &mut Command) -> Result<(Cost, Vec<u8>)> {
    let (before, began) = (cpu_of("self", true), Instant::now());
    let done = command.stdin(Stdio::null()).output().context("start it")?;
    ensure!(
        done.status.success(),
        "{:?} ended with {}: {}",
        command.get_program(),
        done.status,
        String::from_utf8_lossy(&done.stderr)
    );
    let cost = Cost { cpu: cpu_of("self", true) - before, wall: began.elapsed().as_secs_f64() };
    Ok((cost, done.stdout))
}

/// Of several runs, the one in the middle by wall time.
pub fn median(mut runs: Vec<Cost>) -> Cost {
    runs.sort_by(|a, b| a.wall.total_cmp(&b.wall));
    runs.get(runs.len() / 2).copied().unwrap_or_default()
}

/// Of several pairs of values that were measured one after the other, the one whose ratio is in
/// the middle: a host that is slow for a minute is slow for both.
pub fn middle_pair(mut pairs: Vec<(f64, f64)>) -> (f64, f64) {
    pairs.sort_by(|a, b| (a.0 * b.1).total_cmp(&(b.0 * a.1)));
    pairs.get(pairs.len() / 2).copied().unwrap_or_default()
}

/// The value in the middle; of none, zero.
pub fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Measures what goes on in this process.
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    began: Instant,
    cpu: f64,
}

impl Meter {
    /// From now on.
    pub fn start() -> Meter {
        Meter { began: Instant::now(), cpu: own_cpu() }
    }

    /// What was spent since, on all threads.
    pub fn cost(&self) -> Cost {
        Cost { cpu: own_cpu() - self.cpu, wall: self.began.elapsed().as_secs_f64() }
    }
}

/// CPU seconds of this process, finer than `/proc` has them.
fn own_cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pair_in_the_middle_is_so_by_its_ratio() {
        let slow_host = (30.0, 29.0);
        let pairs = vec![(11.0, 10.0), slow_host, (9.0, 10.0), (10.0, 10.0), (24.0, 20.0)];
        assert_eq!(middle_pair(pairs), slow_host);
        assert_eq!(middle_pair(vec![]), (0.0, 0.0));
    }
}
