//! `heddle run`: bare programs, how they end, and what is said when they can't.
#![allow(clippy::unwrap_used)]

use heddle_replay_engine::machine::fdt::rng_seed;
use heddle_tests::{Embedded, Said, run, skip};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// `tohost` and `fromhost` as RISC-V's own suites have them: on a page of their own.
const HTIF: &str = "
    .section .tohost, \"aw\"
    .balign 4096
    .globl tohost, fromhost
    tohost: .dword 0
    .balign 64
    fromhost: .dword 0
";
/// Prints the byte in a0, through HTIF.
const PUT: &str = "
    put:
        li t0, 0x0101
        slli t0, t0, 48
        or t0, t0, a0
        la t1, tohost
        sd t0, 0(t1)
        la t1, fromhost
    1:  ld t2, 0(t1)
        beqz t2, 1b
        sd zero, 0(t1)
        ret
";

/// Assembles programs, where the assembler is.
struct Assembler(TempDir);

impl Assembler {
    fn new() -> Option<Assembler> {
        if Command::new("riscv64-unknown-elf-gcc").arg("--version").output().is_err() {
            skip("riscv64-unknown-elf-gcc is not installed");
            return None;
        }
        Some(Assembler(TempDir::new().unwrap()))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An ELF of `code` from `_start` on, its text at `at`.
    fn elf(&self, name: &str, at: u64, code: &str) -> PathBuf {
        let (source, script, elf) =
            (self.file(&format!("{name}.S")), self.file(&format!("{name}.ld")), self.file(name));
        let sections = ".text : { *(.text) } .data : { *(.data) } .tohost : { *(.tohost) }";
        std::fs::write(&script, format!("SECTIONS {{ . = {at:#x}; {sections} }}")).unwrap();
        std::fs::write(&source, format!(".text\n.globl _start\n_start:\n{code}\n")).unwrap();
        let mut gcc = Command::new("riscv64-unknown-elf-gcc");
        gcc.args(["-march=rv64imac_zicsr", "-mabi=lp64", "-mcmodel=medany", "-nostdlib", "-static"]);
        gcc.arg("-Wl,--build-id=none").arg("-T").arg(&script).arg("-o").arg(&elf).arg(&source);
        run(&mut gcc, b"").expect(0);
        elf
    }
}

fn heddle(elf: &Path, more: &[&str], typed: &[u8]) -> Said {
    run(Embedded::default().command().arg("run").arg(elf).args(more), typed)
}

const BASE: u64 = 0x8000_0000;

/// Ends by this store to the test finisher.
fn finisher(value: u64) -> String {
    format!("li t0, 0x100000\nli t1, {value:#x}\nsw t1, 0(t0)\nj .")
}

/// Ends by this store to `tohost`.
fn htif(value: u64) -> String {
    format!("la t0, tohost\nli t1, {value:#x}\nsd t1, 0(t0)\nj .\n{HTIF}")
}

#[test]
fn the_exit_code_is_the_guests() {
    let Some(assembler) = Assembler::new() else { return };
    let halves = format!("la t0, tohost\nli t1, 7\nsw t1, 0(t0)\nsw zero, 4(t0)\nj .\n{HTIF}");
    let lower = format!("la t0, tohost\nli t1, 9\n1: sw t1, 0(t0)\nj 1b\n{HTIF}");
    // In machine mode on hart 0, with a device tree: its magic is at a1.
    let entry = format!(
        "csrr t0, mhartid\nor t0, t0, a0\nbnez t0, 1f\nlw t1, 0(a1)\nli t2, 0xffffffffedfe0dd0\nbne t1, t2, 1f
        {}\n1: {}\n{HTIF}",
        "la t0, tohost\nli t1, 1\nsd t1, 0(t0)\nj .", "la t0, tohost\nli t1, 3\nsd t1, 0(t0)\nj ."
    );
    let cases = [
        ("pass", finisher(0x5555), 0, ""),
        ("fail", finisher(0x2a_3333), 42, ""),
        ("large", finisher(0x1234_3333), 0x34, "exit code is 4660; ours is 52"),
        ("reset", finisher(0x7777), 0, "reset"),
        ("tohost-pass", htif(1), 0, ""),
        ("tohost-fail", htif(5 << 1 | 1), 5, ""),
        ("tohost-large", htif(300 << 1 | 1), 44, "exit code is 300; ours is 44"),
        ("tohost-no-low-byte", htif(256 << 1 | 1), 1, "exit code is 256; ours is 1"),
        ("tohost-larger", htif(70_000 << 1 | 1), 255, "exit code is 70000; ours is 255"),
        ("tohost-halves", halves, 3, ""),
        ("tohost-lower-half", lower, 4, ""),
        ("entry", entry, 0, ""),
        ("unknown-device", htif(7 << 56 | 2), 1, "no command 0 of device 7"),
    ];
    for (name, code, expected, said) in cases {
        let ended = heddle(&assembler.elf(name, BASE, &code), &["--max-instructions", "100000"], b"");
        let ended = ended.expect(expected);
        assert!(ended.err.contains(said), "{name}: {}", ended.err);
        assert_eq!(ended.err.is_empty(), said.is_empty(), "{name}: {}", ended.err);
    }
}

#[test]
fn recorded_it_ends_with_the_same_exit_code() {
    let Some(assembler) = Assembler::new() else { return };
    let embedded = Embedded::default();
    let cases = [
        ("finisher", finisher(0x2a_3333), 42, 42),
        ("finisher-large", finisher(0x1234_3333), 0x34, 0x1234),
        ("tohost", htif(5 << 1 | 1), 5, 5),
        ("tohost-large", htif(300 << 1 | 1), 44, 300),
        ("tohost-no-low-byte", htif(256 << 1 | 1), 1, 256),
        ("tohost-larger", htif(70_000 << 1 | 1), 255, 0xffff),
    ];
    for (name, code, ours, guests) in cases {
        let elf = assembler.elf(name, BASE, &code);
        heddle(&elf, &[], b"").expect(ours);
        let record = ["record", "builtin", "--name", name, "--kernel", elf.to_str().unwrap(), "-o", "json"];
        let recorded = embedded.heddle(&record).expect(ours).json();
        assert_eq!(recorded["exit_code"], guests, "{name}: {recorded}");
    }
}

#[test]
fn a_recording_without_a_name_is_called_by_its_id() {
    let Some(assembler) = Assembler::new() else { return };
    let (embedded, elf) = (Embedded::default(), assembler.elf("nameless", BASE, &finisher(0x5555)));
    let record = ["record", "builtin", "--kernel", elf.to_str().unwrap()];
    let first = embedded.heddle(&[&record[..], &["-o", "json"]].concat()).expect(0).json();
    let name = first["recording"].as_str().unwrap();
    assert_eq!(name, format!("builtin-{}", &first["id"].as_str().unwrap()[..8]));
    let second = embedded.heddle(&record).expect(0);
    assert!(second.err.contains("recorded builtin-") && !second.err.contains(name), "{}", second.err);
    assert_eq!(embedded.heddle(&["replay", name, "-o", "json"]).expect(0).json()["verdict"], "match");
}

#[test]
fn a_test_has_accessed_and_dirty_to_itself() {
    let Some(assembler) = Assembler::new() else { return };
    // The exit code is menvcfg.ADUE.
    let bit = "csrr t0, 0x30a\nsrli t0, t0, 61\nandi t0, t0, 1";
    let htif = format!("{bit}\nslli t0, t0, 1\nori t0, t0, 1\nla t1, tohost\nsd t0, 0(t1)\nj .\n{HTIF}");
    heddle(&assembler.elf("software", BASE, &htif), &[], b"").expect(0);
    let finisher =
        format!("{bit}\nslli t0, t0, 16\nli t1, 0x3333\nor t1, t1, t0\nli t2, 0x100000\nsw t1, 0(t2)\nj .");
    heddle(&assembler.elf("hardware", BASE, &finisher), &[], b"").expect(1);
    let results = ".data\nbegin_signature: .dword 0\nend_signature:";
    heddle(&assembler.elf("results", BASE, &format!("{finisher}\n{results}")), &[], b"").expect(0);
}

#[test]
fn what_a_test_leaves_is_written_granule_by_granule() {
    let Some(assembler) = Assembler::new() else { return };
    let results = ".data\n.balign 16\n.globl begin_signature, end_signature
        begin_signature: .dword 0\n.word 0\nend_signature:";
    let code = |tohost: u64| {
        format!(
            "la t0, begin_signature\nli t1, 0x1122334455667788\nsd t1, 0(t0)\nli t1, 0xa1b2c3d4\nsw t1, 8(t0)
            la t0, tohost\nli t1, {tohost}\nsd t1, 0(t0)\nj .\n{HTIF}\n{results}"
        )
    };
    let file = assembler.file("signature");
    let cases: [(&[&str], &str); 4] = [
        (&["4"], "55667788\n11223344\na1b2c3d4\n"),
        (&["8"], "1122334455667788\n00000000a1b2c3d4\n"),
        (&["16"], "00000000a1b2c3d41122334455667788\n"),
        (&[], "00000000a1b2c3d41122334455667788\n"),
    ];
    for (granularity, expected) in cases {
        let mut more = vec!["--signature", file.to_str().unwrap()];
        if let [bytes] = granularity {
            more.extend(["--signature-granularity", *bytes]);
        }
        heddle(&assembler.elf("passes", BASE, &code(1)), &more, b"").expect(0);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), expected, "{granularity:?}");
    }
    // A test that fails leaves one, too; one that has none is refused before it runs.
    std::fs::remove_file(&file).unwrap();
    let more = ["--signature", file.to_str().unwrap(), "--signature-granularity", "4"];
    heddle(&assembler.elf("fails", BASE, &code(7)), &more, b"").expect(3);
    assert!(std::fs::read_to_string(&file).unwrap().starts_with("55667788\n"));
    let none = heddle(&assembler.elf("none", BASE, "j ."), &more, b"").expect(2);
    assert!(none.err.contains("begin_signature"), "{}", none.err);
    let odd = ["--signature", file.to_str().unwrap(), "--signature-granularity", "5"];
    assert!(heddle(&assembler.elf("odd", BASE, &code(1)), &odd, b"").expect(2).err.contains("4, 8 or 16"));
}

#[test]
fn what_the_guest_prints_is_on_standard_output() {
    let Some(assembler) = Assembler::new() else { return };
    let end = "la t0, tohost\nli t1, 1\nsd t1, 0(t0)\nj .";
    let code = format!(
        "li t0, 0x10000000\nli a0, 'u'\nsb a0, 0(t0)\nli a0, 'a'\ncall put\nli a0, 'b'\ncall put
        la t0, block\nla t1, text\nsd t1, 16(t0)\nla t1, tohost\nsd t0, 0(t1)\nla t1, fromhost
        1: ld t2, 0(t1)\nbeqz t2, 1b\n{end}\n{PUT}{HTIF}
        .data\n.balign 64\nblock: .dword 64, 1, 0, 4\ntext: .ascii \"call\""
    );
    let elf = assembler.elf("prints", BASE, &code);
    assert_eq!(heddle(&elf, &[], b"").expect(0).out, "uabcall");
    // Recorded, it ends at the same place, and so does its replay.
    let embedded = Embedded::default();
    let path = elf.to_str().unwrap();
    let recorded = embedded.heddle(&["record", "builtin", "--name", "bare", "--kernel", path]).expect(0);
    assert!(recorded.out.contains("uabcall"), "{}", recorded.out);
    let replayed = embedded.heddle(&["replay", "bare", "-o", "json"]).expect(0).json();
    assert_eq!(replayed["verdict"], "match");
    // What is typed comes back, until its line ends.
    let echo = "li t0, 0x10000000\n1: lbu t1, 5(t0)\nandi t1, t1, 1\nbeqz t1, 1b\nlbu t2, 0(t0)\nsb t2, 0(t0)
        li t3, 10\nbne t2, t3, 1b\nli t0, 0x100000\nli t1, 0x5555\nsw t1, 0(t0)\nj .";
    let echoed = heddle(&assembler.elf("echo", BASE, echo), &["--console"], b"typed\n").expect(0);
    assert_eq!(echoed.out, "typed\n");
}

#[test]
fn a_timer_wakes_an_idle_guest_and_nothing_else_does() {
    let Some(assembler) = Assembler::new() else { return };
    let forever = heddle(&assembler.elf("idle", BASE, "wfi\nj ."), &[], b"").expect(1);
    assert!(forever.err.contains("waits for ever"), "{}", forever.err);
    // An hour from now, by the CLINT: idle time is jumped over.
    let timer = "li t0, 0x2004000\nli t1, 36000000000\nsd t1, 0(t0)\nli t1, 128\ncsrw mie, t1\nwfi
        li t0, 0x100000\nli t1, 0x5555\nsw t1, 0(t0)\nj .";
    heddle(&assembler.elf("timer", BASE, timer), &[], b"").expect(0);
    let spins =
        heddle(&assembler.elf("spins", BASE, "j ."), &["--max-instructions", "5000000"], b"").expect(8);
    assert!(spins.err.contains("5000000 instructions"), "{}", spins.err);
}

#[test]
fn an_hour_of_sleep_is_recorded_and_replayed_in_a_few_instructions() {
    let Some(assembler) = Assembler::new() else { return };
    // By its clock the hour has passed, or it fails. Whoever waited for that would take an hour.
    let code = format!(
        "li t0, 0x2004000\nli t1, 36000000000\nsd t1, 0(t0)\nli t2, 128\ncsrw mie, t2\nwfi
        li t0, 0x200bff8\nld t2, 0(t0)\nbltu t2, t1, 1f\n{}\n1: {}",
        finisher(0x5555),
        finisher(0x1_3333)
    );
    let (embedded, elf) = (Embedded::default(), assembler.elf("sleeper", BASE, &code));
    let record = ["record", "builtin", "--name", "sleeper", "--sleep", "off", "-o", "json", "--kernel"];
    let recorded = embedded.heddle(&[&record[..], &[elf.to_str().unwrap()]].concat()).expect(0).json();
    let replayed = embedded.heddle(&["replay", "sleeper", "-o", "json"]).expect(0).json();
    assert_eq!(replayed["verdict"], "match", "{replayed}");
    for said in [recorded, replayed] {
        assert!(said["instructions"].as_u64().unwrap() < 100, "{said}");
        assert!(said["events"].as_u64().unwrap() < 100, "{said}");
    }
}

#[test]
fn as_many_harts_run_as_are_asked_for() {
    let Some(assembler) = Assembler::new() else { return };
    // Each counts itself; the first one waits for three.
    let code = format!(
        "csrr t0, mhartid\nbne t0, a0, 3f\nla t1, count\nli t2, 1\namoadd.w zero, t2, (t1)\nbeqz a0, 2f
        1: wfi\nj 1b\n2: .word 0x0100000f\nlw t3, 0(t1)\nli t4, 3\nbne t3, t4, 2b\n{}\n3: {}
        .data\n.balign 4\ncount: .word 0",
        finisher(0x5555),
        finisher(0x1_3333)
    );
    let elf = assembler.elf("harts", BASE, &code);
    heddle(&elf, &["--harts", "3"], b"").expect(0);
    let limit = ["--max-instructions", "100000"];
    let alone = heddle(&elf, &limit, b"").expect(8);
    assert!(!alone.err.contains(" on hart"), "{}", alone.err);
    let two = heddle(&elf, &[&limit[..], &["--harts", "2"]].concat(), b"").expect(8);
    assert!(two.err.contains(" on hart 0"), "{}", two.err);
    for wrong in ["0", "9"] {
        heddle(&elf, &["--harts", wrong], b"").expect(2);
    }
    let embedded = Embedded::default();
    let path = elf.to_str().unwrap();
    let record = ["record", "builtin", "--name", "three", "--harts", "3"];
    let bundled = embedded.heddle(&record).expect(2);
    assert!(bundled.err.contains("the bundled guest has one"), "{}", bundled.err);
    embedded.heddle(&[&record[..], &["--kernel", path]].concat()).expect(0);
    assert_eq!(embedded.heddle(&["replay", "three", "-o", "json"]).expect(0).json()["verdict"], "match");
    assert_eq!(embedded.heddle(&["get", "recordings", "three", "-o", "json"]).expect(0).json()["harts"], 3);
    // Six instructions of the reset vector each. Who waits has passed its turn on; the first one's comes again and again.
    let state = embedded.heddle(&["state", "three", "--at", "46", "-o", "json"]).expect(0).json();
    assert_eq!(state["hart"], 0, "{state}");
    let harts = state["harts"].as_array().unwrap();
    let waits: Vec<bool> = harts.iter().map(|hart| hart["waits"].as_bool().unwrap()).collect();
    assert_eq!(waits, [false, true, true], "{state}");
    let (waiting, turn) = (&state["leaves"]["hart-2"], &state["leaves"]["turn"]);
    assert!(waiting["hash"].is_string() && turn["hash"].is_string(), "{state}");
    assert_eq!(waiting["value"]["is_idle"], true, "{state}");
    assert_eq!(turn["value"]["hart"], 0, "{state}");
    let second = ["state", "three", "--at", "46", "--hart", "2", "-o", "json"];
    let second = embedded.heddle(&second).expect(0).json();
    assert_eq!((&second["pc"], &second["turn"]), (&harts[2]["pc"], &state["hart"]), "{second}");
    let refused = embedded.heddle(&["state", "three", "--at", "46", "--hart", "3"]).expect(2);
    assert!(refused.err.contains("has 3 harts, numbers 0 to 2"), "{}", refused.err);
}

#[test]
fn a_seed_is_in_the_device_tree_and_a_replay_has_it_from_the_manifest() {
    let Some(assembler) = Assembler::new() else { return };
    let word = |at: usize| i32::from_le_bytes(rng_seed(7)[at..at + 4].try_into().unwrap());
    // Looks for the first eight bytes, through 64 KiB from the tree on.
    let code = format!(
        "li t1, {}\nli t2, {}\nli t3, 16384
        1: lw t4, 0(a1)\nlw t5, 4(a1)\naddi a1, a1, 4\nbne t4, t1, 2f\nbeq t5, t2, 3f
        2: addi t3, t3, -1\nbnez t3, 1b\n{}\n3: {}",
        word(0),
        word(4),
        finisher(0x2a_3333),
        finisher(0x5555)
    );
    let elf = assembler.elf("seeded", BASE, &code);
    heddle(&elf, &["--seed", "7"], b"").expect(0);
    heddle(&elf, &["--seed", "8"], b"").expect(42);
    heddle(&elf, &[], b"").expect(42);
    let (embedded, path) = (Embedded::default(), elf.to_str().unwrap());
    let record = ["record", "builtin", "--name", "seeded", "--seed", "7", "--kernel", path];
    embedded.heddle(&record).expect(0);
    let described = embedded.heddle(&["describe", "recording", "seeded", "-o", "json"]).expect(0).json();
    assert_eq!(described["emulator"]["builtin"]["machine"]["seed"], 7, "{described}");
    assert_eq!(embedded.heddle(&["replay", "seeded", "-o", "json"]).expect(0).json()["verdict"], "match");
}

#[test]
fn a_seed_is_for_the_machines_own_device_tree_alone() {
    let (embedded, dir) = (Embedded::default(), TempDir::new().unwrap());
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let builtin = |option: &str, value: &str, more: &[&str]| {
        embedded.heddle(&[&["record", "builtin", option, value][..], more].concat())
    };
    let (plain, seeded) = (file("plain.dtb"), file("seeded.dtb"));
    builtin("--dump-dtb", &plain, &[]).expect(0);
    builtin("--dump-dtb", &seeded, &["--seed", "7"]).expect(0);
    let has = |path: &str, bytes: &[u8]| {
        let tree = std::fs::read(path).unwrap();
        tree.windows(bytes.len()).any(|found| found == bytes)
    };
    assert!(has(&seeded, b"rng-seed") && has(&seeded, &rng_seed(7)));
    assert!(!has(&plain, b"rng-seed"));
    let both = ["--seed", "7", "--dtb", plain.as_str()];
    for (option, value) in [("--dump-dtb", file("both.dtb")), ("--name", "both".to_string())] {
        let said = builtin(option, &value, &both).expect(2).err;
        assert!(said.contains("--seed 7") && said.contains(&plain) && said.contains("/chosen"), "{said}");
    }
}

#[test]
fn the_bundled_guest_has_its_own_harts_and_memory() {
    let (embedded, dir) = (Embedded::default(), TempDir::new().unwrap());
    let tree = dir.path().join("tree.dtb");
    for option in [["--harts", "2"], ["--memory", "1G"]] {
        let record = ["record", "builtin", "--dump-dtb", tree.to_str().unwrap()];
        let said = embedded.heddle(&[&record[..], &option[..]].concat()).expect(2).err;
        assert!(said.contains(option[0]) && said.contains("the bundled guest has"), "{said}");
        assert!(!tree.exists());
    }
}

#[test]
fn a_guest_that_cannot_be_is_refused_by_its_options_and_nothing_is_recorded() {
    let (embedded, dir) = (Embedded::default(), TempDir::new().unwrap());
    let file = dir.path().join("zeros");
    std::fs::write(&file, [0; 64]).unwrap();
    let zeros = file.to_str().unwrap();
    let cases = [
        (["--bios", zeros, "--memory", "3M"], "--memory"),
        (["--bios", zeros, "--shift", "11"], "--shift"),
        (["--bios", zeros, "--dtb", zeros], "device tree"),
        (["--kernel", zeros, "--memory", "16M"], "--bios"),
    ];
    for (options, says) in cases {
        let record = ["record", "builtin", "--name", "none"];
        let said = embedded.heddle(&[&record[..], &options].concat()).expect(2).err;
        assert!(said.contains(says), "{said}");
    }
    assert_eq!(embedded.heddle(&["get", "recordings", "-o", "name"]).expect(0).out.trim(), "");
}

#[test]
fn what_cannot_run_is_refused_with_what_and_where() {
    let Some(assembler) = Assembler::new() else { return };
    let refused = |path: &Path, text: &str| {
        let said = heddle(path, &[], b"").expect(2);
        assert!(said.err.contains(text) && said.err.contains(path.to_str().unwrap()), "{}", said.err);
    };
    let text = assembler.file("text");
    std::fs::write(&text, "hello").unwrap();
    refused(&text, "begins with 68 65 6c 6c");
    refused(&assembler.file("absent"), "No such file");
    refused(&std::env::current_exe().unwrap(), "its machine, at offset 18, is ");
    refused(&assembler.elf("low", 0x1_0000, "j ."), "does not fit: it needs 0x10000");
}
