//! Every format under seeded mutations of valid examples; `fuzz/` has the same checks.
#![allow(clippy::unwrap_used)]

use heddle_replay_engine::guest;
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::machine::{Exit, Nobody};
use heddle_tests::formats::mutate::mutate;
use heddle_tests::formats::{FORMATS, Format};
use heddle_tests::{count, root};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes of an input that are shown.
const SHOWN_BYTES: usize = 2048;

/// Runs one input; `None` if the check panicked, which says the input and how to run it alone.
fn run(format: &Format, what: &str, bytes: &[u8]) -> Option<bool> {
    let taken = catch_unwind(AssertUnwindSafe(|| (format.check)(bytes)));
    if taken.is_err() {
        let hex: String = bytes.iter().take(SHOWN_BYTES).map(|byte| format!("{byte:02x}")).collect();
        let more = if bytes.len() > SHOWN_BYTES { "..." } else { "" };
        println!("{} panicked at {what}: {} bytes {hex}{more}", format.name, bytes.len());
    }
    taken.ok()
}

/// Mutations of a format on two threads; how many were taken, and the seeds that panicked.
fn mutations(format: &Format, from: u64, count: u64) -> (u64, Vec<u64>) {
    let seeds = (format.seeds)();
    let (next, taken, failed) = (AtomicU64::new(from), AtomicU64::new(0), Mutex::new(vec![]));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count || failed.lock().unwrap().len() >= 5 {
                        return;
                    }
                    let bytes = mutate(&mut ChaCha8Rng::seed_from_u64(seed), &seeds);
                    match run(format, &format!("seed {seed}"), &bytes) {
                        Some(true) => _ = taken.fetch_add(1, Ordering::Relaxed),
                        Some(false) => {}
                        None => failed.lock().unwrap().push(seed),
                    }
                }
            });
        }
    });
    (taken.into_inner(), failed.into_inner().unwrap())
}

#[test]
fn what_the_encoders_make_is_taken() {
    for format in FORMATS {
        let seeds = (format.seeds)();
        assert!(!seeds.is_empty(), "{} has no example", format.name);
        for (i, seed) in seeds.iter().enumerate() {
            let taken = run(format, &format!("example {i}"), seed);
            assert_eq!(taken, Some(true), "{}: example {i} is refused", format.name);
        }
    }
}

#[test]
fn examples_of_elfs_have_the_symbols_of_an_architectural_test() {
    let format = FORMATS.iter().find(|format| format.name == "elf").unwrap();
    let mut found = 0;
    for seed in (format.seeds)().into_iter().filter(|seed| loader::signature(seed).is_some()) {
        let images = Images { kernel: Some(Arc::from(seed)), ..Images::default() };
        let mut machine = loader::build(&guest::spec(), &images).unwrap();
        while machine.run(100, &mut Nobody) == Exit::Work {}
        assert_eq!(machine.exit_code(), Some(0), "it ends by tohost");
        found += 1;
    }
    assert!(found > 0);
}

#[test]
fn no_bytes_make_a_decoder_panic() {
    let alone: Option<u64> = std::env::var("HEDDLE_SEED").ok().map(|seed| seed.parse().unwrap());
    let all = count(3_000, 200_000);
    let mut found = vec![];
    for format in FORMATS {
        let (from, count) = alone.map_or((0, all / format.cost), |seed| (seed, 1));
        let (taken, failed) = mutations(format, from, count);
        println!("{}: {count} mutations, {taken} taken", format.name);
        found.extend(failed.into_iter().map(|seed| format!("{} at seed {seed}", format.name)));
    }
    let again = "one alone: HEDDLE_SEED=N cargo test --release -p heddle-tests --test formats";
    assert!(found.is_empty(), "{}; {again}", found.join(", "));
}

#[test]
fn nothing_and_garbage_are_refused_quietly() {
    for format in FORMATS {
        for bytes in [vec![], vec![0; 100_000], vec![0xff; 100_000], vec![b'['; 10_000]] {
            let what = format!("{} times {:?}", bytes.len(), bytes.first());
            assert!(run(format, &what, &bytes).is_some(), "{}: {what}", format.name);
        }
    }
}

/// In `HEDDLE_CORPUS`, a directory seen from the workspace's root; otherwise just to see that
/// it can be done.
#[test]
fn seeds_are_written() {
    let temporary = tempfile::tempdir().unwrap();
    let given = std::env::var_os("HEDDLE_CORPUS");
    let corpus = given.map_or_else(|| temporary.path().to_path_buf(), |dir| root().join(dir));
    for format in FORMATS {
        let dir = corpus.join(format.name);
        std::fs::create_dir_all(&dir).unwrap();
        for (i, seed) in (format.seeds)().iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{i}")), seed).unwrap();
        }
        assert!(std::fs::read_dir(&dir).unwrap().count() > 0, "{}: nothing to begin with", format.name);
    }
}

#[test]
fn every_format_has_a_fuzz_target() {
    let dir = root().join("fuzz");
    let manifest = std::fs::read_to_string(dir.join("Cargo.toml")).unwrap();
    for format in FORMATS {
        let file = format!("fuzz_targets/{}.rs", format.name);
        let target = std::fs::read_to_string(dir.join(&file)).unwrap();
        assert!(target.contains(&format!("\"{}\"", format.name)), "{file} checks another format");
        assert!(manifest.contains(&format!("path = \"{file}\"")), "fuzz/Cargo.toml does not name {file}");
    }
    assert_eq!(std::fs::read_dir(dir.join("fuzz_targets")).unwrap().count(), FORMATS.len());
}
