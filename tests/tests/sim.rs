//! The simulated cluster: seeds that must find nothing, and planted faults that must be found.
#![allow(clippy::unwrap_used)]

use heddle_storage::apply::Planted;
use heddle_tests::count;
use heddle_tests::sim::run;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs seeds on two threads until `stop` says so of an outcome; what was found, and seen.
fn seeds(
    count: u64,
    planted: Planted,
    stop_at_first: bool,
) -> (BTreeMap<u64, String>, BTreeMap<String, u64>) {
    let next = AtomicU64::new(0);
    let (found, seen) = (Mutex::new(BTreeMap::new()), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count || (stop_at_first && !found.lock().unwrap().is_empty()) {
                        return;
                    }
                    let outcome = run(seed, planted);
                    for (what, n) in outcome.seen {
                        *seen.lock().unwrap().entry(what.to_string()).or_default() += n;
                    }
                    if let Some(what) = outcome.violation {
                        found.lock().unwrap().insert(seed, what);
                    }
                }
            });
        }
    });
    (found.into_inner().unwrap(), seen.into_inner().unwrap())
}

#[test]
fn nothing_promised_is_lost_under_any_seed() {
    let count = count(200, 4000);
    let (found, seen) = seeds(count, Planted::None, false);
    let shown: Vec<String> =
        found.iter().take(5).map(|(seed, what)| format!("seed {seed}: {what}")).collect();
    let again = "one alone: cargo run --release -p heddle-tests --bin sim -- --seeds 1 --from SEED";
    assert!(found.is_empty(), "{} of {count} seeds: {}; {again}", found.len(), shown.join("\n"));
    println!("{count} seeds: {seen:?}");
    // A run in which nothing goes wrong shows nothing.
    for what in [
        "crashes",
        "failed disks",
        "full disks",
        "partitions",
        "replicas added",
        "replicas removed",
        "strikes of rot",
        "bytes mended",
        "replicas replaced",
    ] {
        assert!(seen.get(what).is_some_and(|n| *n > 0), "no {what}");
    }
    assert!(seen["looks at a snapshot on its way"] > 0);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 1000..1006 {
        let (one, two) = (run(seed, Planted::None), run(seed, Planted::None));
        assert_eq!(one, two, "seed {seed}");
        assert!(one.answered > 50, "seed {seed}: {} operations", one.answered);
    }
}

#[test]
fn every_planted_fault_is_found() {
    for planted in [
        Planted::AckBeforeFsync,
        Planted::VoteNotPersisted,
        Planted::CommitOfOldTerm,
        Planted::SnapshotOverNewerLog,
        Planted::ReferenceDroppedEarly,
        Planted::DamageTakenForTail,
    ] {
        let (found, _) = seeds(400, planted, true);
        let (seed, what) = found.first_key_value().unwrap_or_else(|| panic!("{planted:?} was not found"));
        println!("{planted:?}: seed {seed}: {what}");
    }
}
