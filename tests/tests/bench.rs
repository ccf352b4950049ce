//! `heddle bench machine`, as small as it goes: every row is there, and none is an error. The rows
//! of Linux need the files that `tests/riscv-guest` makes.
#![allow(clippy::unwrap_used)]

use heddle_tests::{program, root, run, skip};
use serde_json::Value;
use std::process::Command;

#[test]
fn the_bench_of_the_machine_measures_all_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Command::new(program());
    bench.args([
        "bench",
        "machine",
        "-o",
        "json",
        "--iterations",
        "300",
        "--runs",
        "1",
        "--idle-seconds",
        "1",
    ]);
    // Not there: it goes without Linux.
    bench.arg("--guest").arg(dir.path());
    let said = run(&mut bench, b"").expect(0);
    assert!(said.err.contains("tests/riscv-guest makes it"), "{}", said.err);
    let bench = said.json();
    let rows = bench["rows"].as_array().unwrap();
    let named = |name: &str| -> Vec<&Value> {
        rows.iter().filter(|row| row["name"].as_str().is_some_and(|found| found.starts_with(name))).collect()
    };
    for name in
        ["compute guest, recorded, CPU", "compute guest, replayed", "snapshot of 4096", "idle guest, "]
    {
        let found = named(name);
        assert!(
            !found.is_empty() && found.iter().all(|row| row["ours"].as_f64() > Some(0.0)),
            "{name}: {bench}"
        );
    }
    // These have a target; whether they keep it is for a machine that does nothing else.
    for name in ["idle guest, --sleep off, replayed", "idle guest, --sleep on, replayed"] {
        let found = named(name);
        assert!(found.len() == 1 && found[0]["target"] == "<= 0.05", "{name}: {bench}");
        assert!(found[0]["holds"].is_boolean(), "{name}: {bench}");
    }
    for name in ["Linux boot, recorded", "Linux boot, state"] {
        let found = named(name);
        assert!(!found.is_empty() && found.iter().all(|row| row["reason"].is_string()), "{name}: {bench}");
    }
    // QEMU may be missing; but where it is, it has come to the same.
    let speed: Vec<&Value> = rows.iter().filter(|row| row["name"] == "compute guest").collect();
    assert_eq!(speed.len(), 3, "{bench}");
    let reasons = speed.iter().filter_map(|row| row["reason"].as_str());
    assert_eq!(reasons.filter(|why| why.contains("error")).count(), 0, "{bench}");
}

#[test]
fn the_bench_boots_linux_and_seeks_in_it() {
    let files = root().join("target/guests/riscv");
    if !files.join("stamp").exists() {
        return skip(format_args!("{} is not there: tests/riscv-guest makes it", files.display()));
    }
    let mut bench = Command::new(program());
    bench.args(["bench", "machine", "-o", "json", "--runs", "1", "--part", "boot", "--part", "seek"]);
    bench.arg("--guest").arg(files);
    let bench = run(&mut bench, b"").expect(0).json();
    for name in ["Linux boot, recorded, its files stored", "Linux boot, state at a random icount"] {
        let row = bench["rows"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
        // Without QEMU there is no peer of the first.
        let is_told = row["ours"].as_f64() > Some(0.0) || row["reason"].is_string();
        assert!(is_told && !row["reason"].as_str().unwrap_or_default().contains("error"), "{row}");
    }
}
