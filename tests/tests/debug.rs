//! A real gdb on a recording of the built-in machine, forwards and backwards; states; parts.
#![allow(clippy::unwrap_used)]

use heddle_replay_engine::BUILTIN;
use heddle_tests::Processes;
use heddle_tests::gdb::{Session, icounts, values};
use serde_json::{Value, json};

const NAME: &str = "guest";
/// Instructions before the guest's own first one.
const RESET_VECTOR: u64 = 6;
/// Somewhere in the guest's first rounds, past its beginning.
const AT: u64 = 30_000_123;

/// A cluster that has recorded the bundled guest.
async fn recorded() -> Processes {
    let p = Processes::start(1, 10_000).await;
    p.heddle(&["record", "builtin", "--name", NAME, "--snapshot-every", "20000000"]).await.expect(0);
    p
}

fn debug(p: &Processes, at: u64, more: &[&str]) -> Session {
    Session::start(p.command(), NAME, at, more)
}

async fn state(p: &Processes, at: u64, more: &[&str]) -> Value {
    let at = at.to_string();
    p.heddle(&[&["state", NAME, "--at", &at, "-o", "json"], more].concat()).await.expect(0).json()
}

/// The value of a register of a state.
fn register<'a>(state: &'a Value, group: &str, name: &str) -> &'a str {
    let registers = state[group].as_array().unwrap();
    let found = registers.iter().find(|register| register["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {state}"))["value"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn gdb_steps_forwards_and_back_to_where_it_was() {
    let p = recorded().await;
    let session = debug(&p, AT, &[]);
    let said = session
        .gdb(&[
            "monitor icount",
            "p/x $pc",
            "p/x $sp",
            "stepi",
            "stepi",
            "stepi",
            "p/x $pc",
            "monitor icount",
            "reverse-stepi",
            "reverse-stepi",
            "reverse-stepi",
            "p/x $pc",
            "p/x $sp",
            "monitor icount",
            "x/4i $pc",
            "info registers ra",
        ])
        .await;
    assert_eq!(icounts(&said), [AT, AT + 3, AT], "{said}");
    let values = values(&said);
    assert_eq!(values.len(), 5, "{said}");
    assert_eq!((values[0], values[1]), (values[3], values[4]), "{said}");
    assert_eq!(values[0], session.pc(), "{said}");
    assert_eq!(
        said.lines().filter(|line| line.contains("0x8000") && line.contains(":\t")).count(),
        4,
        "{said}"
    );
    let state = state(&p, AT, &[]).await;
    assert_eq!(register(&state, "registers", "sp"), values[1]);
    let ra = register(&state, "registers", "ra");
    assert!(said.lines().any(|line| line.starts_with("ra ") && line.contains(ra)), "{ra}: {said}");
    // The next gdb finds the session where the last has left it, and can't change the replay.
    let said = session
        .gdb(&[
            "monitor where",
            "set var $a0 = 1",
            "set var *(long*)0x80001000 = 1",
            "stepi",
            "monitor icount",
        ])
        .await;
    assert!(said.contains(&format!("icount {AT}, event ")), "{said}");
    assert!(said.contains("Cannot access memory at address 0x80001000"), "{said}");
    assert_eq!(icounts(&said), [AT + 1], "{said}");
    drop(session);
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gdb_runs_to_breakpoints_and_back_through_the_same_ones() {
    let p = recorded().await;
    let trap_entry = register(&state(&p, AT, &[]).await, "csrs", "mtvec").to_string();
    let session = debug(&p, AT, &["--listen", "127.0.0.1:0"]);
    let stop = format!("break *{trap_entry}");
    let said = session
        .gdb(&[
            &stop,
            "continue",
            "p/x $pc",
            "monitor icount",
            "continue",
            "p/x $pc",
            "monitor icount",
            "reverse-continue",
            "p/x $pc",
            "monitor icount",
            "delete",
            "hbreak *0x80000000",
            "reverse-continue",
            "monitor icount",
        ])
        .await;
    let at = icounts(&said);
    assert_eq!(at.len(), 4, "{said}");
    assert!(AT < at[0] && at[0] < at[1], "{said}");
    assert_eq!((at[2], at[3]), (at[0], RESET_VECTOR), "{said}");
    assert!(values(&said).iter().all(|pc| *pc == trap_entry), "{said}");
    // The handler makes room on the stack, then saves ra there: watched from both sides. gdb
    // itself goes over an access in the way it goes.
    let said = session
        .gdb(&[
            &stop,
            "continue",
            "monitor icount",
            "delete",
            "stepi",
            "awatch -l *(unsigned long*)$sp",
            "continue",
            "monitor icount",
            "reverse-continue",
            "monitor icount",
        ])
        .await;
    let at = icounts(&said);
    assert_eq!(at[1..], [at[0] + 2, at[0] + 1], "{said}");
    // The end, and the way back from it.
    let end = p.row(NAME).await.unwrap().committed_icount;
    let said = session
        .gdb(&["continue", "monitor icount", "monitor where", "reverse-stepi", "monitor icount"])
        .await;
    assert_eq!(icounts(&said), [end, end - 1], "{said}");
    assert!(said.contains("the guest ends here, with exit code 0"), "{said}");
    drop(session);
    p.cluster.stop().await;
}

/// Each hart counts to 4096, with a `pause` every time; the first one then switches off. The
/// reset vector leaves the hart's number in a0.
const TAKING_TURNS: [u32; 11] = [
    0x0000_0293, //  0  li t0, 0
    0x0012_8293, //  4  addi t0, t0, 1
    0x0100_000f, //  8  pause
    0x0000_1337, //  c  lui t1, 1
    0xfe62_9ae3, // 10  bne t0, t1, 0x4
    0x0005_1063, // 14  bnez a0, 0x14
    0x0010_0337, // 18  lui t1, 256
    0x0000_53b7, // 1c  lui t2, 5
    0x5553_839b, // 20  addiw t2, t2, 1365
    0x0073_2023, // 24  sw t2, 0(t1)
    0x0000_006f, // 28  j 0x28
];

/// An ELF of one segment at the beginning of RAM, and of no sections.
fn elf(code: &[u32]) -> Vec<u8> {
    const BASE: u64 = 0x8000_0000;
    let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    let len = bytes.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let halves = |of: &[u16]| of.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<u8>>();
    let words = |of: &[u32]| of.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let longs = |of: &[u64]| of.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<u8>>();
    // Executable, RISC-V, version 1, entry, the segments' place; then sizes and counts.
    elf.extend([halves(&[2, 243]), words(&[1]), longs(&[BASE, 64, 0]), words(&[0])].concat());
    elf.extend(halves(&[64, 56, 1, 0, 0, 0]));
    // To load, readable and executable; where in the file, where in memory, and how much.
    elf.extend([words(&[1, 5]), longs(&[120, BASE, BASE, len, len, 4]), bytes].concat());
    elf
}

#[tokio::test(flavor = "multi_thread")]
async fn gdb_sees_each_hart_as_a_thread() {
    let p = Processes::start(1, 10_000).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), elf(&TAKING_TURNS)).unwrap();
    let kernel = file.path().to_str().unwrap();
    p.heddle(&["record", "builtin", "--name", NAME, "--kernel", kernel, "--harts", "3"]).await.expect(0);
    let session = debug(&p, 1000, &[]);
    let mut steps = vec!["break *0x80000008"];
    for _ in 0..3 {
        steps.extend(["continue", "p/x $a0"]);
    }
    steps.extend(["p/x $pc", "monitor icount", "stepi", "p/x $pc", "monitor icount"]);
    steps.extend(["reverse-stepi", "p/x $pc", "monitor icount", "monitor where", "delete"]);
    for thread in ["thread 1", "thread 2", "thread 3"] {
        steps.extend([thread, "p/x $a0"]);
    }
    let said = session.gdb(&steps).await;
    let mut found = values(&said);
    assert_eq!(found.len(), 9, "{said}");
    // Whoever's turn it is stops, though gdb steps over the breakpoint with one thread alone.
    found[..3].sort_unstable();
    assert_eq!(found[..3], ["0x0", "0x1", "0x2"], "{said}");
    // The hart that is stepped is shown, though it is another's turn then.
    assert_eq!(found[3..6], ["0x80000008", "0x8000000c", "0x80000008"], "{said}");
    found[6..].sort_unstable();
    assert_eq!(found[6..], ["0x0", "0x1", "0x2"], "{said}");
    let at = icounts(&said);
    assert_eq!(at[1..], [at[0] + 1, at[0]], "{said}");
    assert!(said.contains(": pc 0x80000008 on hart "), "{said}");
    drop(session);
    each_hart_has_its_state(&p).await;
    p.cluster.stop().await;
}

/// Of a recording of [`TAKING_TURNS`] on three harts.
async fn each_hart_has_its_state(p: &Processes) {
    let current = state(p, 1000, &[]).await;
    let turn = current["turn"].as_u64().unwrap();
    assert_eq!(current["hart"], turn);
    for hart in 0..3usize {
        let number = hart.to_string();
        let shown = state(p, 1000, &["--hart", &number]).await;
        assert_eq!((&shown["hart"], &shown["turn"]), (&json!(hart), &json!(turn)));
        assert_eq!((&shown["digest"], &shown["leaves"]), (&current["digest"], &current["leaves"]));
        assert_eq!(register(&shown, "registers", "a0"), format!("{hart:#x}"));
        let place = &shown["harts"][hart];
        assert_eq!((&place["pc"], &place["mode"]), (&shown["pc"], &shown["mode"]));
        let leaf = &shown["leaves"][format!("hart-{hart}")]["value"];
        assert_eq!((&leaf["pc"], &leaf["x"][10]), (&shown["pc"], &json!(format!("{hart:#x}"))));
        if hart as u64 == turn {
            assert_eq!(shown["registers"], current["registers"]);
        }
        // Whoever it is runs in machine mode.
        let code = ["--hart", &number, "--memory", "0x80000000:8", "--virtual"];
        assert_eq!(state(p, 1000, &code).await["memory"]["bytes"], "9302000093821200");
        let table = p.heddle(&["state", NAME, "--at", "1000", "--hart", &number]).await.expect(0).out;
        assert!(table.contains(&format!(", machine mode on hart {hart}\n")), "{table}");
        assert!(
            table.contains(&format!("  hart {turn}  pc ")) && table.contains(", has the turn"),
            "{table}"
        );
    }
    let refused = p.heddle(&["state", NAME, "--at", "1000", "--hart", "3"]).await.expect(2).err;
    assert!(refused.contains("--hart 3: the recording's machine has 3 harts, numbers 0 to 2"), "{refused}");
}

/// The leaves of a state of the bundled guest, behind its beginning.
fn check_leaves(state: &Value) {
    let leaves = &state["leaves"];
    for (name, leaf) in leaves.as_object().unwrap() {
        assert_eq!(leaf["hash"].as_str().unwrap().len(), 64, "{name}");
        let is_memory = name == "ram" || name == "disk-0";
        assert_eq!(leaf.get("value").is_none(), is_memory, "{name}");
    }
    let value = |name: &str| &leaves[name]["value"];
    let icount = state["icount"].as_i64().unwrap();
    assert_eq!(value("machine")["icount"], icount);
    let clock = value("clock");
    let virtual_ns = (icount << clock["shift"].as_u64().unwrap()) + clock["bias"].as_i64().unwrap();
    assert_eq!(state["virtual_ns"], virtual_ns);
    assert!(value("clint")["harts"][0]["mtimecmp"].as_str().unwrap().starts_with("0x"));
    assert_eq!(value("plic")["contexts"][0], json!({ "enable": [1, 10], "threshold": 0 }));
    assert!(value("plic")["pending"].is_array() && value("rtc")["irq_pending"].is_boolean());
    assert_eq!((&value("uart")["fifo"], &value("uart")["fifo_on"]), (&json!(""), &json!(true)));
    let disk = value("virtio-block-0");
    let queue = &disk["transport"]["queues"][0];
    let in_flight = disk["in_flight"].as_array().unwrap().len() as u64;
    assert_eq!((&queue["size"], &queue["is_ready"]), (&json!(8), &json!(true)));
    assert_eq!(queue["next_available"], queue["next_used"].as_u64().unwrap() + in_flight);
    assert_eq!(queue["next_available"], value("machine")["next_request"]);
    assert!(queue["next_available"].as_u64() > Some(0), "{queue}");
    assert!(queue["descriptors"].as_str().unwrap().starts_with("0x80"), "{queue}");
    assert_eq!(value("hart")["pc"], state["pc"]);
    assert_eq!(value("hart")["x"][2], register(state, "registers", "sp"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_the_replays_and_a_part_is_judged_alone() {
    let p = recorded().await;
    let row = p.row(NAME).await.unwrap();
    let end = row.committed_icount;
    // The digest at a snapshot is the recorded one.
    let snapshot = &row.snapshots[1];
    let shown = state(&p, snapshot.icount, &["--memory", "0x80000000:32"]).await;
    let digest: String = snapshot.digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(shown["digest"], digest.as_str());
    assert_eq!(shown["event"], snapshot.event);
    // The guest runs in machine mode: both kinds of address are the same there.
    let same = state(&p, snapshot.icount, &["--memory", "0x80000000:32", "--virtual"]).await;
    assert_eq!(same["memory"]["bytes"], shown["memory"]["bytes"]);
    assert_eq!(shown["memory"]["bytes"].as_str().unwrap().len(), 64);
    check_leaves(&shown);
    let table = p.heddle(&["state", NAME, "--at", "1000", "--memory", "0x80000000:16"]).await.expect(0).out;
    assert!(table.contains("at icount 1,000, event ") && table.contains("mstatus"), "{table}");
    assert!(table.contains("0000000080000000  ") && !table.contains("mtimecmp"), "{table}");
    assert!(table.contains("\n  virtual clock "), "{table}");
    let table = p.heddle(&["state", NAME, "--at", "1000", "--leaves"]).await.expect(0).out;
    for held in ["\"harts\":[{\"msip\":", "\"mtimecmp\":\"0x", "\"next_available\":", "\"fifo\":\"\""] {
        assert!(table.contains(held), "{held}: {table}");
    }
    // One hart has no number in reports, but is one.
    let alone = state(&p, 1000, &["--hart", "0"]).await;
    assert!(alone["hart"].is_null() && alone["virtual_ns"].is_i64(), "{alone}");
    assert_eq!(alone, state(&p, 1000, &[]).await);
    let refused = p.heddle(&["state", NAME, "--at", "1000", "--hart", "1"]).await.expect(2).err;
    assert!(refused.contains("has one hart, number 0"), "{refused}");
    for wrong in [["--memory", "0:16"], ["--memory", "0x80000000:0"]] {
        p.heddle(&[&["state", NAME, "--at", "1000"], &wrong[..]].concat()).await.expect(2);
    }
    let last = ["state", NAME, "--at", "1000", "--virtual", "--memory", "0xffffffffffffffff:1"];
    let refused = p.heddle(&last).await.expect(2).err;
    assert!(refused.contains("is mapped at 0xffffffffffffffff"), "{refused}");
    let outside = p.heddle(&["state", NAME, "--at", "1000", "--memory", "0:16"]).await.expect(2).err;
    assert!(outside.contains("in RAM, which is 0x80000000..0x81000000"), "{outside}");
    for command in [vec!["replay", NAME, "--console"], vec!["debug", NAME, "--at", "1000"]] {
        let refused = p.heddle(&[&command[..], &["--qemu", "any"]].concat()).await.expect(2).err;
        assert!(refused.contains("--qemu is for recordings of QEMU; guest is of the built-in"), "{refused}");
    }
    let late = p.heddle(&["replay", NAME, "--console", "--timeout", "0"]).await.expect(8);
    assert!(late.out.is_empty() && late.err.contains("has not ended in 0 s"), "{} {}", late.out, late.err);
    let past = (end + 1).to_string();
    p.heddle(&["state", NAME, "--at", &past]).await.expect(2);

    // A part, of which neither end is a snapshot.
    let (from, to) = (AT.to_string(), (AT + 25_000_000).to_string());
    let part = p.heddle(&["replay", NAME, "--from", &from, "--to", &to, "-o", "json"]).await.expect(0).json();
    assert_eq!(part["verdict"], "match");
    assert_eq!((part["instructions"].as_u64(), part["proof"].as_str()), (Some(25_000_000), Some("spans")));
    assert_eq!(part["spans"][0]["from"].as_u64(), Some(AT));
    assert_eq!(part["spans"][0]["to"].as_u64(), Some(AT + 25_000_000));
    assert_eq!(part["digest"], state(&p, AT + 25_000_000, &[]).await["digest"]);
    let rest = p.heddle(&["replay", NAME, "--from", &from, "-o", "json"]).await.expect(0).json();
    let whole = p.heddle(&["replay", NAME, "-o", "json"]).await.expect(0).json();
    assert_eq!(rest["digest"], whole["digest"]);
    assert_eq!(rest["instructions"].as_u64(), Some(end - AT));
    // Another build, in whose part nothing differs, and one with the fault in it.
    let late = format!("{BUILTIN}+flip:{}:x2:4", AT + 40_000_000);
    let within = ["replay", NAME, "--from", &from, "--to", &to, "--against", &late];
    p.heddle(&within).await.expect(0);
    p.heddle(&["replay", NAME, "--from", &from, "--against", &late]).await.expect(3);
    p.heddle(&["replay", NAME, "--from", &to, "--to", &from]).await.expect(2);
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_made_afterwards_serve_as_recorded_ones() {
    let p = Processes::start(2, 10_000).await;
    let record = ["record", "builtin", "--name", NAME, "--snapshot-every", "0", "-o", "json"];
    let done = p.heddle(&record).await.expect(0).json();
    let row = p.row(NAME).await.unwrap();
    assert!(row.snapshots.is_empty());
    // Near the end, where the last snapshot will be the nearest.
    let end = row.committed_icount;
    let at = end - end / 8;
    let from_power_on = state(&p, at, &[]).await;

    let index = ["index", NAME, "--snapshots", "3", "-o", "json"];
    let made = p.heddle(&index).await.expect(0).json();
    let snapshots = p.row(NAME).await.unwrap().snapshots;
    let places: Vec<u64> = snapshots.iter().map(|snapshot| snapshot.icount).collect();
    assert_eq!(made["snapshots"], json!(places), "{made}");
    assert_eq!(places.len(), 3, "{made}");
    for (part, icount) in (1..).zip(&places) {
        assert!((end * part / 4).abs_diff(*icount) <= 1_000_000 / 2, "{icount} of {end}");
    }

    let replay = ["replay", NAME, "--spans", "4", "-o", "json"];
    let spans = p.heddle(&replay).await.expect(0).json();
    assert_eq!((&spans["verdict"], &spans["role_mismatches"]), (&json!("match"), &json!(0)), "{spans}");
    assert_eq!((&spans["digest"], &spans["instructions"]), (&done["digest"], &done["instructions"]));
    let found = spans["spans"].as_array().unwrap();
    assert_eq!(found.len(), 4, "{spans}");
    for (span, snapshot) in found.iter().zip(&snapshots) {
        let digest: String = snapshot.digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((&span["to"], &span["digest"]), (&json!(snapshot.icount), &json!(digest)));
    }
    assert_eq!(state(&p, at, &[]).await, from_power_on);
    let from = at.to_string();
    let rest = p.heddle(&["replay", NAME, "--from", &from, "-o", "json"]).await.expect(0).json();
    assert_eq!((&rest["verdict"], &rest["digest"]), (&json!("match"), &done["digest"]));
    let session = debug(&p, places[2], &[]);
    let said = session.gdb(&["monitor icount", "reverse-stepi", "monitor icount"]).await;
    assert_eq!(icounts(&said), [places[2], places[2] - 1], "{said}");
    drop(session);

    // Again it has nothing to make; more of them are added to those.
    let again = p.heddle(&index).await.expect(0).json();
    assert_eq!(again["snapshots"], json!([]), "{again}");
    let more = p.heddle(&["index", NAME, "--snapshots", "7", "-o", "json"]).await.expect(0).json();
    assert_eq!(more["snapshots"].as_array().unwrap().len(), 4, "{more}");
    assert_eq!(p.row(NAME).await.unwrap().snapshots.len(), 7);
    p.cluster.stop().await;
}
