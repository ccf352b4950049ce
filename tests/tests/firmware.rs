//! Real firmware that nobody here wrote: Debian's OpenSBI and U-Boot.
#![allow(clippy::unwrap_used)]

use heddle_tests::{Embedded, run};
use std::path::Path;

const OPENSBI: &str = "/usr/lib/riscv64-linux-gnu/opensbi/generic";
const UBOOT: &str = "/usr/lib/u-boot/qemu-riscv64_smode/u-boot.bin";
const TYPED: &[u8] =
    b"\nversion\nsetenv loom warp\nprintenv loom\nmd.l 0x80200000 2\nsleep 1\nvirtio info\npoweroff\n";

fn boots(firmware: &str) {
    let bios = format!("{OPENSBI}/{firmware}");
    assert!(Path::new(&bios).exists() && Path::new(UBOOT).exists(), "apt install opensbi u-boot-qemu");
    let embedded = Embedded::default();
    let disk = embedded.path().with_extension("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let mut record = embedded.command();
    record.args([
        "record", "builtin", "--name", "uboot", "--bios", &bios, "--kernel", UBOOT, "--prompt", "=> ",
    ]);
    record.arg("--drive").arg(&disk).args(["--label", "kind=firmware"]);
    let recorded = run(&mut record, TYPED).expect(0);
    for text in [
        "OpenSBI v1.1",
        "U-Boot 2023.01",
        "=> version",
        "loom=warp",
        "80200000:",
        "Capacity: 1.0 MB",
        "poweroff ...",
    ] {
        assert!(recorded.out.contains(text), "{text:?} is not on the console:\n{}", recorded.out);
    }
    let replayed = embedded.heddle(&["replay", "uboot", "--console"]).expect(0);
    assert_eq!(replayed.out, recorded.out, "the console of the replay is another");
    for spans in ["1", "4"] {
        let verdict = embedded.heddle(&["replay", "uboot", "--spans", spans, "-o", "json"]).expect(0).json();
        assert_eq!(verdict["verdict"], "match");
        assert_eq!(verdict["role_mismatches"], 0);
        assert!(verdict["role_checked"].as_u64().unwrap() > 100);
        assert_eq!(verdict["spans"].as_array().unwrap().len().to_string(), spans);
    }
    let typed = embedded.heddle(&["events", "uboot", "--kind", "char", "-o", "json"]).expect(0).json();
    assert!(typed.as_array().unwrap().len() >= 8, "what was typed is recorded as async char events");
    let listed = embedded.heddle(&["get", "recordings", "-l", "kind=firmware", "-o", "name"]).expect(0);
    assert_eq!(listed.out, "uboot\n");
}

#[test]
fn uboot_under_fw_jump_takes_commands_and_replays() {
    boots("fw_jump.bin");
}

#[test]
fn uboot_under_fw_dynamic_takes_commands_and_replays() {
    boots("fw_dynamic.elf");
}
