//! Debian's Linux on the built-in machine: typed at, written to disk, replayed.
//!
//! `tests/riscv-guest` makes the guest's files. Where they can't be had, this says so and
//! is skipped.
#![allow(clippy::unwrap_used)]

use heddle_tests::{Embedded, Processes, root, run, skip};
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

/// Each line is typed once the shell asks for one. Unmounting drops the file's pages, so that
/// what is read afterwards comes from the disk.
const TYPED: &str = "\
mount /dev/vda /mnt && cat /mnt/hello
seq 3000 > /mnt/woven && sync && umount /mnt
mount /dev/vda /mnt && sha256sum /mnt/woven
";
/// `seq 3000 | sha256sum`.
const WOVEN: &str = "2e57c67a8bbe706a08d6638ec67da02b67b3743ae7d35948cbcf8d1f45cae0a5  /mnt/woven";
const PROMPT: &str = "heddle# ";
const SNAPSHOT_EVERY: u64 = 100_000_000;

/// Adds the arguments that record the guest; `false`, and why, if its files are not there.
fn boot(command: &mut Command, more: &[&str]) -> bool {
    let files = root().join("target/guests/riscv");
    if !files.join("stamp").exists() {
        skip(format_args!("{} is not there: tests/riscv-guest makes it", files.display()));
        return false;
    }
    command.args(["record", "builtin", "--name", "linux", "--memory", "256M", "--prompt", PROMPT]);
    command.args([
        "--append",
        "console=ttyS0 quiet cryptomgr.notests",
        "--snapshot-every",
        &SNAPSHOT_EVERY.to_string(),
    ]);
    let options =
        [("bios", "fw_dynamic.bin"), ("kernel", "Image"), ("initrd", "initrd"), ("drive", "disk.img")];
    for (option, file) in options {
        command.arg(format!("--{option}")).arg(files.join(file));
    }
    command.args(more);
    true
}

fn expect_console(console: &str, ending: &str) {
    for text in ["OpenSBI v1.6", "heddle: ready", "warp and weft", WOVEN, ending] {
        assert!(console.contains(text), "{text:?} is not on the console:\n{console}");
    }
}

fn expect_match(replayed: &Value, spans: usize) {
    assert_eq!(replayed["verdict"], "match", "{replayed}");
    assert_eq!(replayed["role_mismatches"], 0, "{replayed}");
    assert!(replayed["role_checked"].as_u64().unwrap() > 1000, "{replayed}");
    assert_eq!(replayed["spans"].as_array().unwrap().len(), spans, "{replayed}");
}

/// From power-on and from every snapshot, each to the next one's digest. Behind the last one
/// there may be too little for a span of its own.
fn expect_spans(replayed: &Value, every: usize) {
    let count = replayed["spans"].as_array().unwrap().len();
    assert!((every..=every + 1).contains(&count), "{replayed}");
    expect_match(replayed, count);
}

#[test]
fn linux_boots_takes_commands_writes_its_disk_and_replays() {
    let embedded = Embedded::default();
    let disk = root().join("target/guests/riscv/disk.img");
    let before = std::fs::read(&disk).ok();
    let mut record = embedded.command();
    if !boot(&mut record, &["--label", "kind=linux"]) {
        return;
    }
    let recorded = run(&mut record, format!("{TYPED}poweroff -f\n").as_bytes()).expect(0);
    expect_console(&recorded.out, "reboot: Power down");
    assert!(std::fs::read(&disk).ok() == before, "the drive's file was written");

    let replayed = embedded.heddle(&["replay", "linux", "--console"]).expect(0);
    assert!(replayed.out == recorded.out, "the console of the replay is another:\n{}", replayed.out);
    let whole = embedded.heddle(&["replay", "linux", "-o", "json"]).expect(0).json();
    expect_match(&whole, 1);
    assert!(whole["instructions"].as_u64().unwrap() > 400_000_000, "{whole}");

    let events = |kind| {
        let said = embedded.heddle(&["events", "linux", "--kind", kind, "-o", "json"]).expect(0);
        said.json().as_array().unwrap().len()
    };
    assert!(events("char") >= 4, "what was typed is recorded");
    assert!(events("block") >= 20, "requests of the disk are recorded");
}

/// What is printed is not what is typed, which is echoed.
const TYPED_TO_FOUR: &str = "\
nproc && cat /sys/devices/system/cpu/online
for n in 1 2 3 4; do (i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo woven-$((n*11))) & done; wait
echo processors-$(grep -c ^processor /proc/cpuinfo)
poweroff -f
";

#[test]
fn linux_boots_on_four_harts_and_replays_whole_and_in_spans() {
    let embedded = Embedded::default();
    let mut record = embedded.command();
    if !boot(&mut record, &["--harts", "4"]) {
        return;
    }
    let recorded = run(&mut record, TYPED_TO_FOUR.as_bytes()).expect(0);
    let lines: BTreeSet<&str> = recorded.out.lines().map(str::trim).collect();
    for line in ["4", "0-3", "woven-11", "woven-22", "woven-33", "woven-44", "processors-4"] {
        assert!(lines.contains(line), "{line:?} is not on the console:\n{}", recorded.out);
    }
    let whole = embedded.heddle(&["replay", "linux", "-o", "json"]).expect(0).json();
    expect_match(&whole, 1);
    let every = (whole["instructions"].as_u64().unwrap() / SNAPSHOT_EVERY) as usize;
    let spans = (every + 1).to_string();
    expect_spans(
        &embedded.heddle(&["replay", "linux", "--spans", &spans, "-o", "json"]).expect(0).json(),
        every,
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn linux_recorded_until_a_text_replays_in_spans_on_two_nodes() {
    let p = Processes::start(2, 20_000).await;
    let mut record = p.command();
    // The sum as it is printed: what is typed is echoed, so that a typed text would end it too.
    if !boot(&mut record, &["--until", WOVEN]) {
        return p.cluster.stop().await;
    }
    let recorded =
        tokio::task::spawn_blocking(move || run(&mut record, TYPED.as_bytes())).await.unwrap().expect(0);
    expect_console(&recorded.out, PROMPT);
    assert!(!recorded.out.contains("Power down"), "it went on after the text:\n{}", recorded.out);
    let row = p.row("linux").await.unwrap();
    assert!(row.state == "sealed" && row.snapshots.len() >= 4, "{} snapshots", row.snapshots.len());

    let spans = (row.snapshots.len() + 1).to_string();
    let replayed = p.heddle(&["replay", "linux", "--spans", &spans, "-o", "json"]).await.expect(0).json();
    expect_spans(&replayed, row.snapshots.len());
    let spans = replayed["spans"].as_array().unwrap();
    let nodes: BTreeSet<&str> = spans.iter().map(|span| span["node"].as_str().unwrap()).collect();
    assert_eq!(nodes.len(), 2, "{replayed}");
    assert!(spans.iter().all(|span| span["digest"].is_string()), "{replayed}");
    p.cluster.stop().await;
}
