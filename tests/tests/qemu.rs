//! Real QEMU on the cluster: recorded, streamed live, replayed in spans, hunted.
//!
//! Guests: Debian's Linux with typed input and a disk (`tests/linux-guest` makes it), and
//! the self-test guests that `heddle doctor` uses.
#![allow(clippy::unwrap_used)]

use heddle_proto::{Body, CheckpointKind, ClockKind, Event, Manifest, QemuEvent, Role};
use heddle_replay_engine::guest;
use heddle_replay_engine::qemu::log::{Decoder, Dialect, HEADER_BYTES, Located, encode};
use heddle_replay_engine::qemu::roles::{by_rule, is_pinned};
use heddle_tests::{Processes, Said, copy, count, leave_out, root, run, until};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const X86: &str = "qemu-system-x86_64";
const RISCV: &str = "qemu-system-riscv64";

/// A directory with the guests' files.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tick.elf"), guest::TICK_ELF).unwrap();
        std::fs::write(dir.path().join("tick-riscv.elf"), guest::TICK_RISCV_ELF).unwrap();
        std::fs::write(dir.path().join("disk.img"), vec![7u8; 4 << 20]).unwrap();
        Files(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn tick(&self) -> Vec<String> {
        let line = format!("{X86} -M pc -m 16 -nographic -nic none -kernel {}", self.path("tick.elf"));
        line.split(' ').map(String::from).collect()
    }
}

fn linux(files: &Files, append: &str) -> Vec<String> {
    let guests = root().join("target/guests");
    assert!(guests.join("initrd").exists(), "tests/linux-guest has not been run: run ./test");
    let mut line: Vec<String> =
        [X86, "-M", "pc", "-m", "256", "-nographic", "-nic", "none"].map(String::from).into();
    let disk = format!("file={},if=virtio,format=raw", files.path("disk.img"));
    let (kernel, initrd) = (guests.join("vmlinuz"), guests.join("initrd"));
    for part in ["-kernel", kernel.to_str().unwrap(), "-initrd", initrd.to_str().unwrap(), "-drive", &disk] {
        line.push(part.into());
    }
    line.extend(["-append".into(), format!("console=ttyS0 panic=-1 {append}")]);
    line
}

/// `heddle record qemu`, ready to be started.
fn recorder(p: &Processes, name: &str, options: &[&str], line: &[String]) -> Command {
    let mut command = p.command();
    command.args(["record", "qemu", "--name", name]).args(options).arg("--").args(line);
    command
}

async fn record(p: &Processes, name: &str, options: &[&str], line: &[String], typed: &'static [u8]) -> Said {
    let mut command = recorder(p, name, options, line);
    tokio::task::spawn_blocking(move || run(&mut command, typed)).await.unwrap()
}

async fn replay(p: &Processes, name: &str, more: &[&str]) -> Value {
    let said = p.heddle(&[&["replay", name, "--timeout", "120", "-o", "json"], more].concat()).await;
    assert!([0, 3].contains(&said.code), "{} {}", said.out, said.err);
    said.json()
}

async fn events_of(p: &Processes, name: &str) -> Vec<Event> {
    let row = p.row(name).await.unwrap();
    let id = Manifest::decode(&row.manifest).unwrap().id;
    heddle_cli::commands::recordings::events(&p.client.store, id).await.unwrap()
}

/// Processes of QEMU's that belong to this test: they have its directory in their arguments.
fn qemus(of: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return vec![] };
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|id| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.starts_with("/usr/bin/qemu-system") || line.starts_with("qemu-system")
    })
    .filter(|id| {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1))
            .unwrap_or("0")
            .to_string();
        let line = std::fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(of)
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn linux_with_typed_input_and_disk_replays_whole_and_in_spans() {
    let (p, files) = (Processes::start(2, 10_000).await, Files::new());
    let options = ["--snapshot-every", "150000000", "--prompt", "type a line"];
    let said = record(&p, "linux", &options, &linux(&files, "quiet"), b"hello\n").await.expect(0);
    for part in ["guest: block 3", "guest: you typed hello", "guest: done"] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
    let row = p.row("linux").await.unwrap();
    assert!(row.state == "sealed" && row.snapshots.len() >= 4, "{} snapshots", row.snapshots.len());

    let whole = p.heddle(&["replay", "linux", "--console"]).await.expect(0);
    assert!(whole.out == said.out, "the replay printed something else");

    let spans = replay(&p, "linux", &["--spans", "4"]).await;
    assert_eq!(spans["verdict"], "match", "{spans}");
    assert_eq!(spans["role_mismatches"], 0);
    assert!(spans["role_checked"].as_u64().unwrap() > 10_000, "{spans}");
    let parts = spans["spans"].as_array().unwrap();
    let nodes: BTreeSet<&str> = parts.iter().map(|span| span["node"].as_str().unwrap()).collect();
    assert!(parts.len() >= 3 && nodes.len() == 2, "{spans}");
    assert!(parts.iter().all(|span| span["digest"].is_string()), "{spans}");
    let roles = &spans["checkpoints"];
    assert!(
        roles["ClockWarpAccount"]["vcpu"].as_u64() > Some(0)
            && roles["ClockWarpAccount"]["iothread"].is_null()
    );

    // What is unlike in two files of one name is found, or listed as an input.
    let initrd = root().join("target/guests/initrd");
    let mut bytes = std::fs::read(&initrd).unwrap();
    let at = bytes.windows(9).position(|part| part == b"guest: up").unwrap();
    bytes[at + 7] = b'U';
    let changed = files.0.path().join("initrd");
    std::fs::write(&changed, bytes).unwrap();
    let with = format!("initrd={}", changed.display());
    let hunted = p.heddle(&["hunt", "linux", "--with", &with, "--timeout", "200", "-o", "json"]).await;
    let card = hunted.expect(3).json();
    let inputs = card["finding"]["inputs"].as_array().unwrap();
    assert!(inputs[0].as_str().unwrap().starts_with("initrd: 1 bytes differ"), "{card}");
    assert!(inputs.len() > 1, "the pages that hold the changed byte are listed: {card}");
    assert!(card["finding"]["icount"].as_u64() > Some(1_000_000), "{card}");
    assert!(!card["finding"]["instruction"].as_str().unwrap().is_empty(), "{card}");
    assert_eq!(qemus(&p.cluster.dir().display().to_string()), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_the_durable_prefix_replays() {
    let (p, files) = (Processes::start(1, 1500).await, Files::new());
    let dir = p.cluster.dir().display().to_string();
    // QEMU is killed: the recorder delivers what it had logged.
    let mut child = recorder(&p, "killed", &[], &linux(&files, "quiet"));
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    p.committed("killed", 60_000_000).await;
    for id in qemus(&dir) {
        assert!(Command::new("kill").args(["-9", &id.to_string()]).status().unwrap().success());
    }
    let status = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(128 + 9));
    let row = p.row("killed").await.unwrap();
    assert_eq!(row.state, "cut");
    let value = replay(&p, "killed", &[]).await;
    assert_eq!(value["verdict"], "match", "{value}");
    assert_eq!(value["instructions"].as_u64(), Some(row.committed_icount));

    // The recorder is killed: QEMU dies with it, and the next one finds what it left.
    let mut child = recorder(&p, "left", &[], &linux(&files, "quiet"));
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    p.committed("left", 60_000_000).await;
    child.kill().unwrap();
    child.wait().unwrap();
    until("QEMU to die with its node", async || qemus(&dir).is_empty().then_some(())).await;
    let said = record(&p, "next", &[], &files.tick(), b"").await.expect(0);
    assert!(said.err.contains("sealed as cut") || said.err.contains("is kept"), "{}", said.err);
    until("the recording to be cut", async || p.row("left").await.filter(|row| row.state == "cut")).await;
    let value = replay(&p, "left", &[]).await;
    assert_eq!(value["verdict"], "match", "{value}");
}

/// A place in the middle of a log, behind the firmware, where `is_it`.
fn place(events: &[Event], is_it: impl Fn(&Event) -> bool) -> usize {
    let from = events.len() / 2;
    from + events[from..].iter().position(is_it).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_input_ends_in_the_right_verdict() {
    let (p, files) = (Processes::start(1, 10_000).await, Files::new());
    record(&p, "tick", &[], &files.tick(), b"").await.expect(0);
    let good = replay(&p, "tick", &[]).await;
    assert_eq!(good["verdict"], "match", "{good}");
    let (row, events) = (p.row("tick").await.unwrap(), events_of(&p, "tick").await);
    let store = &p.client.store;

    // The negative control: a true recording with one stored role flipped.
    let at = place(&events, |e| e.body == Body::Checkpoint(CheckpointKind::ClockWarpAccount));
    let mut wrong = events.clone();
    wrong[at].role = wrong[at].role.other();
    copy(store, &row, "role", &wrong, |e| e).await;
    let value = replay(&p, "role", &[]).await;
    assert_eq!(value["divergence"]["kind"], "wrong-role", "{value}");
    assert_eq!(value["divergence"]["position"]["event"].as_u64(), Some(at as u64));
    assert_eq!(value["divergence"]["expected"]["role"], "iothread");
    assert_eq!(value["role_mismatches"], 1);

    // Events that are not there, or at another place: QEMU waits for ever, and is stopped.
    let at = place(&events, |e| e.body == Body::Qemu(QemuEvent::Interrupt));
    let mut wrong = events.clone();
    wrong.remove(at);
    copy(store, &row, "removed", &wrong, |e| if e > at as u64 { e - 1 } else { e }).await;
    let value = replay(&p, "removed", &[]).await;
    assert_eq!(value["verdict"], "diverged", "{value}");
    assert!(value["divergence"]["position"]["icount"].as_u64() >= Some(events[at].icount), "{value}");

    let at = place(&events, |e| matches!(e.body, Body::Qemu(QemuEvent::CharWrite { .. })));
    let mut wrong = events.clone();
    let (x, y) = (wrong[at].body.clone(), wrong[at + 1].body.clone());
    (wrong[at].body, wrong[at + 1].body) = (y, x);
    if wrong[at].body != wrong[at + 1].body {
        copy(store, &row, "swapped", &wrong, |e| e).await;
        let value = replay(&p, "swapped", &[]).await;
        assert_eq!(value["verdict"], "diverged", "{value}");
    }

    // A flipped byte in a clock that the guest reads: QEMU notices nothing, the digest does.
    let is_read =
        |e: &Event| e.role == Role::Vcpu && matches!(e.body, Body::Clock { clock: ClockKind::Host, .. });
    let mut wrong = events.clone();
    for event in wrong.iter_mut().skip(events.len() / 2).filter(|event| is_read(event)) {
        if let Body::Clock { value, .. } = &mut event.body {
            *value ^= 1 << 34;
        }
    }
    copy(store, &row, "flipped", &wrong, |e| e).await;
    let value = replay(&p, "flipped", &[]).await;
    assert_eq!(value["verdict"], "diverged", "{value}");
    let diff = p.heddle(&["diff", "tick", "flipped", "-o", "json"]).await.expect(3).json();
    let first = events.iter().zip(&wrong).position(|(x, y)| x != y).unwrap();
    assert_eq!(diff["event"].as_u64(), Some(first as u64), "{diff}");
    let card = p.heddle(&["hunt", "tick", "--log", "flipped", "-o", "json"]).await.expect(3).json();
    // Its first effect: the guest's read of the clock, by a port.
    let found = card["finding"]["icount"].as_u64().unwrap();
    assert!(card["finding"]["instruction"].as_str().unwrap().starts_with("in"), "{card}");
    assert!(found >= events[first].icount, "{card}");

    // Another memory size, another kernel, another build, a path of its own.
    let with = |name: &str, change: &dyn Fn(&mut Manifest)| {
        let mut manifest = Manifest::decode(&row.manifest).unwrap();
        change(&mut manifest);
        (
            heddle_proto::v1::RecordingRow { manifest: manifest.encode().into(), ..row.clone() },
            name.to_string(),
        )
    };
    fn arguments(manifest: &mut Manifest) -> &mut Vec<String> {
        match &mut manifest.emulator {
            heddle_proto::EmulatorSpec::Qemu(spec) => &mut spec.arguments,
            heddle_proto::EmulatorSpec::Builtin { .. } => panic!("it is QEMU's"),
        }
    }
    let (other, name) = with("memory", &|m| {
        let size = arguments(m).iter().position(|argument| argument == "16").unwrap();
        arguments(m)[size] = "24".into();
    });
    copy(store, &other, &name, &events, |e| e).await;
    assert_eq!(replay(&p, "memory", &[]).await["verdict"], "diverged");
    let (other, name) = with("path", &|m| arguments(m).extend(["-initrd".into(), "/etc/shadow".into()]));
    copy(store, &other, &name, &events, |e| e).await;
    let said = p.heddle(&["replay", "path"]).await.expect(1);
    assert!(
        said.err.contains("/etc/shadow") && said.err.contains("none that a recording can have"),
        "{}",
        said.err
    );
    // A log that was cut in an event: what is left of it could not be decoded.
    let half = events.len() / 2;
    let mut wrong = events[..half].to_vec();
    wrong.push(Event { body: Body::Qemu(QemuEvent::Raw { data: vec![0, 0, 1] }), ..events[half].clone() });
    let (other, name) = with("in-an-event", &|_| {});
    let kept = heddle_proto::v1::RecordingRow { snapshots: vec![], ..other };
    copy(store, &kept, &name, &wrong, |e| e).await;
    let said = p.heddle(&["replay", "in-an-event"]).await.expect(1);
    assert!(said.err.contains(&format!("event {half} could not be decoded")), "{}", said.err);
    let (other, name) = with("build", &|m| m.build = "qemu-x86_64-7.2.99-0123456789ab".into());
    copy(store, &other, &name, &events, |e| e).await;
    let said = p.heddle(&["replay", "build"]).await.expect(6);
    assert!(said.err.contains("7.2.99"), "{}", said.err);

    // The constant of one instruction differs: found at that instruction.
    let mut image = guest::TICK_ELF.to_vec();
    let at = image.windows(4).position(|part| part == 1_664_525u32.to_le_bytes()).unwrap();
    image[at] ^= 4;
    let changed = files.0.path().join("changed.elf");
    std::fs::write(&changed, image).unwrap();
    let with = format!("tick.elf={}", changed.display());
    let card = p.heddle(&["hunt", "tick", "--with", &with, "-o", "json"]).await.expect(3).json();
    assert!(card["finding"]["instruction"].as_str().unwrap().starts_with("imul"), "{card}");
    assert!(card["finding"]["differs"][0].as_str().unwrap().starts_with("EAX"), "{card}");
    assert_eq!(qemus(&p.cluster.dir().display().to_string()), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_events_is_judged_by_its_position() {
    let (p, files) = (Processes::start(1, 10_000).await, Files::new());
    let (source, image) = (files.path("still.S"), files.path("still.elf"));
    let program = ".globl _start\n_start: li t0, 40000000\n1: addi t0, t0, -1\n bnez t0, 1b\n li t0, 0x100000\n li t1, 0x5555\n sw t1, 0(t0)\n2: j 2b\n";
    std::fs::write(&source, program).unwrap();
    let built = Command::new("riscv64-unknown-elf-gcc")
        .args([
            "-march=rv64i",
            "-mabi=lp64",
            "-nostdlib",
            "-static",
            "-Wl,-Ttext=0x80000000",
            "-o",
            &image,
            &source,
        ])
        .status();
    assert!(built.unwrap().success());
    let line = format!("{RISCV} -M virt -m 16 -nographic -bios none -kernel {image}");
    let line: Vec<String> = line.split(' ').map(String::from).collect();
    let said = record(&p, "still", &["-o", "json"], &line, b"").await.expect(0).json();
    assert!(said["instructions"].as_u64() > Some(80_000_000), "{said}");
    let value = replay(&p, "still", &[]).await;
    assert_eq!(value["verdict"], "match", "{value}");
    // All but the store that makes this QEMU exit.
    let all = said["instructions"].as_u64().unwrap();
    assert!((all - 2..=all).contains(&value["instructions"].as_u64().unwrap()), "{value} {said}");
    // Snapshots can be made afterwards, and have digests.
    let line =
        format!("{RISCV} -M virt -m 16 -nographic -bios none -kernel {}", files.path("tick-riscv.elf"));
    let line: Vec<String> = line.split(' ').map(String::from).collect();
    let said = record(&p, "rv", &[], &line, b"").await.expect(0);
    let value = replay(&p, "rv", &[]).await;
    assert_eq!(
        (value["verdict"].as_str(), value["role_mismatches"].as_u64()),
        (Some("match"), Some(0)),
        "{value}"
    );
    let again = p.heddle(&["replay", "rv", "--console"]).await.expect(0);
    assert!(again.out == said.out && said.out.contains("tick: done"), "{} {}", again.out, said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn u_boot_on_riscv64_with_typed_input_and_a_reset() {
    let p = Processes::start(1, 10_000).await;
    let line = format!(
        "{RISCV} -M virt -m 128 -nographic -nic none -bios {} -kernel {}",
        "/usr/lib/riscv64-linux-gnu/opensbi/generic/fw_jump.elf",
        "/usr/lib/u-boot/qemu-riscv64_smode/u-boot.bin"
    );
    let line: Vec<String> = line.split(' ').map(String::from).collect();
    // Longer than a UART's FIFO.
    let typed = b"echo 0123456789abcdefghijklmnopqrstuvwxyz\nreset\nversion\npoweroff\n";
    for run in 0..count(1, 10) {
        let name = format!("uboot-{run}");
        let said = record(&p, &name, &["--prompt", "=> "], &line, typed).await.expect(0);
        assert!(said.out.contains("\n0123456789abcdefghijklmnopqrstuvwxyz"), "{}", said.out);
        assert!(said.out.matches("OpenSBI v").count() == 2 && said.out.contains("U-Boot 20"), "{}", said.out);
        let whole = p.heddle(&["replay", &name, "--console"]).await.expect(0);
        assert!(whole.out == said.out, "the replay printed something else");
        let value = replay(&p, &name, &[]).await;
        assert_eq!((&value["verdict"], &value["role_mismatches"]), (&"match".into(), &0.into()), "{value}");
    }
}

/// Debian 13's version, which `./test --full` unpacks beside the installed one: behind a
/// wrapper that names its firmware.
#[tokio::test(flavor = "multi_thread")]
async fn qemu_10_replays_whole_in_spans_and_indexed() {
    if std::env::var_os("HEDDLE_FULL").is_none() {
        return leave_out("HEDDLE_FULL is not set");
    }
    let program = root().join("target/qemu10").join(X86);
    let (p, files) = (Processes::offering(2, 10_000, vec![program.clone()]).await, Files::new());
    let mut line = linux(&files, "quiet");
    line[0] = program.display().to_string();
    let options = ["--snapshot-every", "150000000", "--prompt", "type a line"];
    let said = record(&p, "ten", &options, &line, b"hello\n").await.expect(0);
    let manifest = Manifest::decode(&p.row("ten").await.unwrap().manifest).unwrap();
    assert!(manifest.qemu().unwrap().version.starts_with("10."), "{}", manifest.build);
    assert!(p.row("ten").await.unwrap().snapshots.len() >= 4);
    let whole = p.heddle(&["replay", "ten", "--console", "--qemu", &line[0]]).await.expect(0);
    assert!(whole.out == said.out, "the replay printed something else");
    let value = replay(&p, "ten", &["--spans", "4"]).await;
    assert_eq!((&value["verdict"], &value["role_mismatches"]), (&"match".into(), &0.into()), "{value}");
    assert!(value["spans"].as_array().unwrap().iter().all(|span| span["digest"].is_string()), "{value}");
    p.heddle(&["index", "ten", "--snapshots", "3"]).await.expect(0);
    let value = replay(&p, "ten", &["--spans", "8"]).await;
    assert_eq!((&value["verdict"], &value["role_mismatches"]), (&"match".into(), &0.into()), "{value}");
}

/// A set-group-id copy: the dynamic linker loads no tap into it, as into a static build.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_tap_roles_go_by_rule_when_asked() {
    use std::os::unix::fs::PermissionsExt;
    let files = Files::new();
    let program = files.0.path().join("qemu-system-riscv64");
    std::fs::copy(format!("/usr/bin/{RISCV}"), &program).unwrap();
    std::os::unix::fs::chown(&program, None, Some(1)).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o2755)).unwrap();
    let p = Processes::offering(1, 10_000, vec![program.clone()]).await;
    let line = format!(
        "{} -M virt -m 16 -nographic -bios none -kernel {}",
        program.display(),
        files.path("tick-riscv.elf")
    );
    let line: Vec<String> = line.split(' ').map(String::from).collect();
    let refused = record(&p, "refused", &[], &line, b"").await.expect(6);
    assert!(refused.err.contains("--roles by-rule"), "{}", refused.err);
    // Ended in its middle: at its own end this guest makes QEMU leave without a last state.
    record(&p, "rule", &["--roles", "by-rule", "--until", "..."], &line, b"").await.expect(0);
    let value = replay(&p, "rule", &[]).await;
    assert_eq!((&value["verdict"], &value["role_checked"]), (&"match".into(), &0.into()), "{value}");
    assert!(value["spans"][0]["digest"].is_string(), "{value}");
    let early = record(&p, "early", &["--roles", "by-rule", "--snapshot-every", "1000000"], &line, b"").await;
    assert!(early.expect(1).err.contains("heddle index"));
    let events = events_of(&p, "rule").await;
    assert!(events.len() > 100, "{} events", events.len());
    for pair in events.windows(2) {
        assert_eq!(pair[1].role, by_rule(Some(&pair[0]), &pair[1].body), "{}", pair[1]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn indexed_debugged_drawn_and_examined() {
    let (p, files) = (Processes::start(2, 10_000).await, Files::new());
    record(&p, "tick", &["--label", "suite=tick"], &files.tick(), b"").await.expect(0);
    let value = p.heddle(&["index", "tick", "--snapshots", "3", "-o", "json"]).await.expect(0).json();
    assert_eq!(value["snapshots"].as_array().unwrap().len(), 3, "{value}");
    let spans = replay(&p, "tick", &["--spans", "4"]).await;
    assert_eq!(
        (spans["verdict"].as_str(), spans["spans"].as_array().unwrap().len()),
        (Some("match"), 4),
        "{spans}"
    );

    // gdb goes forwards and back to where it was.
    let mut debug = p.command();
    debug
        .args(["debug", "tick", "--at", "9000000", "-o", "json"])
        .stdout(Stdio::piped())
        .stdin(Stdio::null());
    let mut session = debug.spawn().unwrap();
    let mut text = String::new();
    let mut lines = BufReader::new(session.stdout.take().unwrap()).lines();
    while !text.trim_end().ends_with('}') {
        text.push_str(&lines.next().unwrap().unwrap());
    }
    let value: Value = serde_json::from_str(&text).unwrap();
    let target = format!("target remote {}", value["socket"].as_str().unwrap());
    let steps = ["p/x $pc", "stepi", "stepi", "reverse-stepi", "reverse-stepi", "p/x $pc", "disconnect"];
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-ex", "set architecture i386:x86-64", "-ex", &target]);
    steps.iter().for_each(|step| {
        gdb.args(["-ex", step]);
    });
    let said = tokio::task::spawn_blocking(move || run(&mut gdb, b"")).await.unwrap();
    let pcs: Vec<&str> = said.out.lines().filter(|line| line.starts_with('$')).collect();
    let values: Vec<&str> = pcs.iter().filter_map(|line| line.split(" = ").nth(1)).collect();
    assert_eq!(values.len(), 2, "{} {}", said.out, said.err);
    assert_eq!(values[0], values[1], "{}", said.out);
    assert_eq!(values[0], format!("{:#x}", value["pc"].as_u64().unwrap()), "{}", said.out);
    session.kill().unwrap();
    session.wait().unwrap();

    for picture in ["plot.svg", "plot.png"] {
        p.heddle(&["plot", "tick", "-o", &files.path(picture)]).await.expect(0);
    }
    assert!(std::fs::read(files.path("plot.png")).unwrap().starts_with(b"\x89PNG"));
    assert!(std::fs::read_to_string(files.path("plot.svg")).unwrap().contains("clock-warp-account"));

    let mut doctor = p.command();
    doctor.env("XDG_STATE_HOME", files.0.path()).args([
        "doctor",
        "-o",
        "json",
        "/usr/bin/qemu-system-x86_64",
    ]);
    let said = tokio::task::spawn_blocking(move || run(&mut doctor, b"")).await.unwrap().expect(0).json();
    let states: Vec<&str> =
        said.as_array().unwrap().iter().map(|row| row["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["ok", "ok", "ok"], "{said}");

    // Kept only if it fails, refused by name, and deleted.
    let kept =
        record(&p, "gone", &["--keep-if", "fail", "-o", "json"], &files.tick(), b"").await.expect(0).json();
    assert_eq!((kept["kept"].as_bool(), p.row("gone").await.is_none()), (Some(false), true));
    let mut refused = files.tick();
    refused.extend(["-smp".into(), "2".into()]);
    let said = record(&p, "refused", &[], &refused, b"").await.expect(2);
    assert!(said.err.contains("-smp 2") && said.err.contains("-smp 1"), "{}", said.err);
    p.heddle(&["delete", "recording", "tick"]).await.expect(0);
    assert!(p.row("tick").await.is_none());
    assert_eq!(qemus(&p.cluster.dir().display().to_string()), Vec::<u32>::new());
}

/// The end of a guest is where QEMU's two threads race: recorded again and again.
#[tokio::test(flavor = "multi_thread")]
async fn short_recordings_match_every_time() {
    let (p, files) = (Processes::start(2, 10_000).await, Files::new());
    for round in 0..count(3, 40) {
        let name = format!("tick-{round}");
        record(&p, &name, &[], &files.tick(), b"").await.expect(0);
        let value = replay(&p, &name, &[]).await;
        assert_eq!(value["verdict"], "match", "round {round}: {value}");
    }
}

/// A log as QEMU itself writes it, without the tap.
fn plain_log(dir: &Path, program: &str, line: &[&str], image: &[u8]) -> Vec<u8> {
    let (log, kernel): (PathBuf, PathBuf) = (dir.join("log"), dir.join("guest.elf"));
    std::fs::File::create(&kernel).unwrap().write_all(image).unwrap();
    let icount = format!("shift=auto,rr=record,rrfile={}", log.display());
    let status = Command::new(program)
        .args(line)
        .args(["-nographic", "-nic", "none", "-kernel", kernel.to_str().unwrap(), "-icount", &icount])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    std::fs::read(log).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn real_logs_are_decoded_without_loss_and_follow_the_rule() {
    let dir = tempfile::tempdir().unwrap();
    let x86: &[&str] = &["-M", "pc", "-m", "16"];
    let riscv: &[&str] = &["-M", "virt", "-m", "16", "-bios", "none"];
    for (program, line, image) in [(X86, x86, guest::TICK_ELF), (RISCV, riscv, guest::TICK_RISCV_ELF)] {
        let log = plain_log(dir.path(), program, line, image);
        let events = &log[HEADER_BYTES as usize..];
        for cut in [events.len(), events.len() - 1, events.len() / 2, events.len() / 3 + 1] {
            let mut decoder = Decoder::new(Dialect::Qemu7, HEADER_BYTES, 0);
            decoder.push(&events[..cut]);
            let located = decoder.finish();
            let list: Vec<Event> = located
                .iter()
                .map(|l| Event { icount: l.icount, role: Role::Vcpu, body: l.body.clone() })
                .collect();
            let mut again = vec![];
            encode(&mut again, &mut 0, &list).unwrap();
            assert!(again == events[..cut], "{program}, cut at {cut}");
            let is_raw = |l: &&Located| matches!(l.body, Body::Qemu(QemuEvent::Raw { .. }));
            // Only a record that was cut in its middle.
            assert!(located.iter().filter(is_raw).count() <= usize::from(cut < events.len()), "{program}");
        }
    }
    // The roles that the tap saw are those of the grammar, clock reads aside: either
    // thread makes them.
    let (p, files) = (Processes::start(1, 10_000).await, Files::new());
    record(&p, "tick", &[], &files.tick(), b"").await.expect(0);
    let events = events_of(&p, "tick").await;
    let mut compared = 0;
    for pair in events.windows(2) {
        if is_pinned(&pair[1].body) && !matches!(pair[1].body, Body::Clock { .. }) {
            assert_eq!(pair[1].role, by_rule(Some(&pair[0]), &pair[1].body), "{}", pair[1]);
            compared += 1;
        }
    }
    assert!(compared > 300, "{compared}");
}
