//! Runs simulated clusters: `cargo run --release -p heddle-tests --bin sim -- --seeds 1000`.
#![forbid(unsafe_code)]

use heddle_storage::apply::Planted;
use heddle_tests::sim::run;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const USAGE: &str = "sim [--seeds N] [--from SEED] [--planted ack-before-fsync|vote-not-persisted|\
commit-of-old-term|snapshot-over-newer-log|reference-dropped-early|damage-taken-for-tail] [--threads N]";

fn planted_of(name: &str) -> Option<Planted> {
    Some(match name {
        "ack-before-fsync" => Planted::AckBeforeFsync,
        "vote-not-persisted" => Planted::VoteNotPersisted,
        "commit-of-old-term" => Planted::CommitOfOldTerm,
        "snapshot-over-newer-log" => Planted::SnapshotOverNewerLog,
        "reference-dropped-early" => Planted::ReferenceDroppedEarly,
        "damage-taken-for-tail" => Planted::DamageTakenForTail,
        _ => return None,
    })
}

fn main() -> std::process::ExitCode {
    let (mut seeds, mut from, mut planted, mut threads) = (100, 0, Planted::None, 2);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().unwrap_or_default();
        let number = value.parse::<u64>();
        match (name.as_str(), number) {
            ("--seeds", Ok(n)) => seeds = n,
            ("--from", Ok(n)) => from = n,
            ("--threads", Ok(n)) => threads = n.clamp(1, 64),
            ("--planted", _) if planted_of(&value).is_some() => {
                planted = planted_of(&value).unwrap_or_default();
            }
            _ => {
                eprintln!("{USAGE}");
                return std::process::ExitCode::from(2);
            }
        }
    }
    // A panic is reported with its seed, as what was found.
    if seeds > 1 {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let began = Instant::now();
    let next = AtomicU64::new(from);
    let (answered, failed) = (AtomicU64::new(0), Mutex::new(vec![]));
    let seen: Mutex<BTreeMap<&str, u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + seeds {
                        return;
                    }
                    let outcome = run(seed, planted);
                    answered.fetch_add(outcome.answered, Ordering::Relaxed);
                    if let Ok(mut seen) = seen.lock() {
                        outcome.seen.iter().for_each(|(what, n)| *seen.entry(what).or_default() += n);
                    }
                    if let Some(what) = outcome.violation {
                        println!("seed {seed}: {what}");
                        if let Ok(mut failed) = failed.lock() {
                            failed.push(seed);
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    println!(
        "{seeds} seeds, {} operations answered, {} failed, {:.1} s",
        answered.into_inner(),
        failed.len(),
        began.elapsed().as_secs_f64()
    );
    for (what, n) in seen.into_inner().unwrap_or_default() {
        println!("  {n} {what}");
    }
    std::process::ExitCode::from(u8::from(!failed.is_empty()))
}
