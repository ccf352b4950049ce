//! Debian's Linux on the built-in machine: typed at, written to disk, on a network, replayed.
//!
//! `tests/riscv-guest` makes the guest's files. Where they can't be had, this says so and
//! is skipped.
#![allow(clippy::unwrap_used)]

use heddle_tests::lan::Neighbour;
use heddle_tests::{Embedded, Processes, root, run, skip};
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

/// Each line is typed once the shell asks for one. Unmounting drops the file's pages, so that
/// what is read afterwards comes from the disk.
const TYPED: &str = "\
mount /dev/vda /mnt && cat /mnt/hello
seq 3000 > /mnt/woven && sync && umount /mnt
time sleep 2
mount /dev/vda /mnt && sha256sum /mnt/woven
";
/// `seq 3000 | sha256sum`.
const WOVEN: &str = "2e57c67a8bbe706a08d6638ec67da02b67b3743ae7d35948cbcf8d1f45cae0a5  /mnt/woven";
const PROMPT: &str = "heddle# ";
const APPEND: &str = "console=ttyS0 quiet cryptomgr.notests";
const SNAPSHOT_EVERY: u64 = 100_000_000;

/// Adds the arguments that record the guest; `false`, and why, if its files are not there.
/// `initrd` is one of the two: `initrd.gz` is the same, to be unpacked by the guest.
fn boot(command: &mut Command, initrd: &str, append: &str, more: &[&str]) -> bool {
    let files = root().join("target/guests/riscv");
    if !files.join("stamp").exists() {
        skip(format_args!("{} is not there: tests/riscv-guest makes it", files.display()));
        return false;
    }
    command.args(["record", "builtin", "--name", "linux", "--memory", "256M", "--prompt", PROMPT]);
    command.args(["--append", append, "--snapshot-every", &SNAPSHOT_EVERY.to_string()]);
    let options =
        [("bios", "fw_dynamic.bin"), ("kernel", "Image"), ("initrd", initrd), ("drive", "disk.img")];
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
    let seconds = |line: &str| -> Option<f64> {
        line.trim().strip_prefix("real\t0m ")?.strip_suffix('s')?.parse().ok()
    };
    let slept = console.lines().find_map(seconds);
    assert!(slept.is_some_and(|seconds| seconds >= 2.0), "it slept for {slept:?} seconds:\n{console}");
}

fn expect_match(replayed: &Value, spans: usize) {
    assert_eq!(replayed["verdict"], "match", "{replayed}");
    assert_eq!(replayed["role_mismatches"], 0, "{replayed}");
    assert!(replayed["role_checked"].as_u64().unwrap() > 1000, "{replayed}");
    assert_eq!(replayed["spans"].as_array().unwrap().len(), spans, "{replayed}");
}

/// How many spans to ask for to have one from every snapshot. The planner spreads its borders
/// evenly and takes the snapshot nearest to each: of so many, each snapshot has one near.
fn all_spans(recording: &Value) -> String {
    (4 * (recording["snapshots"].as_array().unwrap().len() + 1)).to_string()
}

/// From power-on and from every snapshot, each to the next one's digest, and no snapshot is
/// missing. `recording` is what `heddle describe` says of it.
fn expect_spans(replayed: &Value, recording: &Value) {
    let places = |of: &Value, key: &str| -> Vec<u64> {
        of.as_array().unwrap().iter().map(|row| row[key].as_u64().unwrap()).collect()
    };
    let end = recording["committed_icount"].as_u64().unwrap();
    let mut borders: Vec<u64> = (0..end).step_by(SNAPSHOT_EVERY as usize).collect();
    assert_eq!(places(&recording["snapshots"], "icount"), borders[1..], "{recording}");
    assert_eq!(places(&replayed["spans"], "from"), borders, "{replayed}");
    expect_match(replayed, borders.len());
    borders.push(end);
    assert_eq!(places(&replayed["spans"], "to"), borders[1..], "{replayed}");
    let mut spans = replayed["spans"].as_array().unwrap().iter();
    assert!(spans.all(|span| span["verdict"] == "match" && span["digest"].is_string()), "{replayed}");
}

#[test]
fn linux_boots_takes_commands_writes_its_disk_and_replays() {
    let embedded = Embedded::default();
    let disk = root().join("target/guests/riscv/disk.img");
    let before = std::fs::read(&disk).ok();
    let mut record = embedded.command();
    if !boot(&mut record, "initrd.gz", APPEND, &["--label", "kind=linux"]) {
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

/// After `TYPED`, with the disk mounted: all harts write it at once. What is printed is not
/// what is typed, which is echoed.
const TYPED_TO_FOUR: &str = "\
nproc && cat /sys/devices/system/cpu/online
for n in 1 2 3 4; do (i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; seq ${n}000 > /mnt/weft-$n; echo woven-$((n*11))) & done; wait
sync && umount /mnt && mount /dev/vda /mnt && cat /mnt/weft-? | sha256sum
echo processors-$(grep -c ^processor /proc/cpuinfo)
poweroff -f
";
/// `for n in 1 2 3 4; do seq ${n}000; done | sha256sum`.
const WEFT: &str = "f2b053b6632d9734c8b0477706f646f1a719d1a65babe5c306181944be67115c  -";

#[test]
fn linux_writes_its_disk_from_four_harts_and_replays_whole_and_in_spans() {
    let embedded = Embedded::default();
    let mut record = embedded.command();
    if !boot(&mut record, "initrd", APPEND, &["--harts", "4"]) {
        return;
    }
    let recorded = run(&mut record, format!("{TYPED}{TYPED_TO_FOUR}").as_bytes()).expect(0);
    expect_console(&recorded.out, "reboot: Power down");
    let lines: BTreeSet<&str> = recorded.out.lines().map(str::trim).collect();
    for line in ["4", "0-3", "woven-11", "woven-22", "woven-33", "woven-44", WEFT, "processors-4"] {
        assert!(lines.contains(line), "{line:?} is not on the console:\n{}", recorded.out);
    }
    expect_match(&embedded.heddle(&["replay", "linux", "-o", "json"]).expect(0).json(), 1);
    let recording = embedded.heddle(&["describe", "recording", "linux", "-o", "json"]).expect(0).json();
    let spans = all_spans(&recording);
    let replayed = embedded.heddle(&["replay", "linux", "--spans", &spans, "-o", "json"]).expect(0).json();
    expect_spans(&replayed, &recording);
}

/// Typed at the virtio console, whose shell it is.
const TYPED_AT_HVC0: &str = "\
tty
ip link set eth0 up && ip addr add 10.0.0.2/24 dev eth0
ping -c 3 -i 0.1 10.0.0.1
head -c 16 /dev/hwrng | hexdump -C
poweroff -f
";

#[test]
fn linux_pings_draws_entropy_on_a_virtio_console_and_replays_without_them() {
    let embedded = Embedded::default();
    let (card, peer) = (embedded.path().with_extension("card"), embedded.path().with_extension("peer"));
    let netdev = format!("unix:{},peer={}", card.display(), peer.display());
    let devices = ["--netdev", &netdev, "--rng", "--virtio-console"];
    let mut record = embedded.command();
    // The last console named is the shell's.
    if !boot(&mut record, "initrd.gz", &format!("{APPEND} console=hvc0"), &devices) {
        return;
    }
    let neighbour = Neighbour::new(peer);
    let recorded = run(&mut record, TYPED_AT_HVC0.as_bytes()).expect(0);
    let frames = neighbour.leave();
    assert!(!card.exists(), "the card's socket goes with the recording");
    for text in ["/dev/hvc0", "3 packets received", "reboot: Power down"] {
        assert!(recorded.out.contains(text), "{text:?} is not on the console:\n{}", recorded.out);
    }

    let recording = embedded.heddle(&["describe", "recording", "linux", "-o", "json"]).expect(0).json();
    let spans = all_spans(&recording);
    let replayed = embedded.heddle(&["replay", "linux", "--spans", &spans, "-o", "json"]).expect(0).json();
    expect_spans(&replayed, &recording);

    let logged = |kind: &str, body: &str| -> Vec<Vec<u8>> {
        let said = embedded.heddle(&["events", "linux", "--kind", kind, "-o", "json"]).expect(0).json();
        let data = |event: &Value| serde_json::from_value(event["body"]["Qemu"][body]["data"].clone());
        said.as_array().unwrap().iter().map(|event| data(event).unwrap()).collect()
    };
    assert!(frames.len() >= 4, "an answer to ARP and three to ping: {frames:?}");
    assert_eq!(logged("net", "Net"), frames);
    assert_eq!(String::from_utf8(logged("char-read", "CharRead").concat()).unwrap(), TYPED_AT_HVC0);
    let dumped = recorded.out.lines().find_map(|line| line.strip_prefix("00000000  ")).unwrap();
    let digits = dumped.split_whitespace().take(16);
    let drawn: Vec<u8> = digits.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let is_logged =
        logged("random", "Random").iter().any(|given| given.windows(16).any(|part| part == drawn));
    assert!(is_logged, "what the guest drew is not in the log: {dumped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn linux_recorded_until_a_text_replays_in_spans_on_two_nodes() {
    let p = Processes::start(2, 20_000).await;
    let mut record = p.command();
    // The sum as it is printed: what is typed is echoed, so that a typed text would end it too.
    // Without real time: the sleep is jumped over.
    if !boot(&mut record, "initrd", APPEND, &["--sleep", "off", "--until", WOVEN]) {
        return p.cluster.stop().await;
    }
    let recorded =
        tokio::task::spawn_blocking(move || run(&mut record, TYPED.as_bytes())).await.unwrap().expect(0);
    expect_console(&recorded.out, PROMPT);
    assert!(!recorded.out.contains("Power down"), "it went on after the text:\n{}", recorded.out);
    let recording = p.heddle(&["describe", "recording", "linux", "-o", "json"]).await.expect(0).json();
    assert_eq!(recording["state"], "sealed");

    let spans = all_spans(&recording);
    let replayed = p.heddle(&["replay", "linux", "--spans", &spans, "-o", "json"]).await.expect(0).json();
    expect_spans(&replayed, &recording);
    let spans = replayed["spans"].as_array().unwrap();
    let nodes: BTreeSet<&str> = spans.iter().map(|span| span["node"].as_str().unwrap()).collect();
    assert_eq!(nodes.len(), 2, "{replayed}");
    p.cluster.stop().await;
}
