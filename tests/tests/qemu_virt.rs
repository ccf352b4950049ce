//! The built-in machine beside QEMU's `virt`: the same images print the same.
//!
//! What honestly differs is listed below, each with its reason; any other line that only one
//! of them prints fails. `tests/riscv-guest` makes the images. Where they or QEMU can't be had,
//! this says so and is skipped.
#![allow(clippy::unwrap_used)]

use heddle_tests::{Embedded, root, run, skip};
use std::process::Command;

/// The initramfs's own script, without the line that starts a shell and waits for it.
const APPEND: &str = "console=ttyS0 cryptomgr.notests rdinit=/bin/busybox -- sh -c \
\"/bin/busybox sed /cttyhack/d /init > /run.sh; exec /bin/busybox sh /run.sh\"";
const IMAGES: [(&str, &str); 3] = [("bios", "fw_dynamic.bin"), ("kernel", "Image"), ("initrd", "initrd")];
/// OpenSBI's banner, the kernel's messages and the script's: fewer lines would be no comparison.
const LINES_MIN: usize = 200;

/// How lines begin that need not be there, or need not be the same, and why.
const DIFFERS: [(&str, &str); 18] = [
    ("Experimental SBI Extensions", "QEMU's hart has debug triggers"),
    ("Boot HART Base ISA", "QEMU's default hart has the hypervisor extension"),
    ("Boot HART ISA Extensions", "and more extensions"),
    ("Boot HART MHPM Info", "and programmable event counters"),
    ("Boot HART Debug Triggers", "and debug triggers"),
    ("Boot HART MIDELEG", "and a guest's interrupts"),
    ("Boot HART MEDELEG", "and a guest's exceptions"),
    ("random: crng init done", "QEMU's device tree has a seed from its host"),
    ("NODE_DATA(0)", "the device trees have other sizes"),
    ("Memory: ", "and so there is another amount of memory"),
    ("Falling back to deprecated", "QEMU 7.2's device tree has no riscv,isa-extensions"),
    ("riscv: base ISA extensions", "the hypervisor extension"),
    ("node 0 deferred pages", "a time"),
    ("audit: type=2000", "a time"),
    ("riscv-plic:", "QEMU 7.2 counts source 0"),
    ("pci", "there is no PCI host bridge"),
    ("goldfish_rtc", "a time"),
    ("riscv-pmu-sbi", "programmable event counters"),
];

/// Lines without their times and without those that may differ.
fn comparable(console: &str) -> Vec<String> {
    let text = |line: &str| {
        let line = line.trim_end();
        let behind_time = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
        match behind_time {
            Some((time, text)) if time.trim().parse::<f64>().is_ok() => text.to_string(),
            _ => line.to_string(),
        }
    };
    let may_differ = |line: &String| DIFFERS.iter().any(|(begin, _)| line.starts_with(begin));
    console.lines().map(text).filter(|line| !may_differ(line)).collect()
}

#[test]
fn the_same_images_print_what_they_print_on_qemu() {
    let files = root().join("target/guests/riscv");
    let has_qemu = Command::new("qemu-system-riscv64").arg("--version").output().is_ok();
    if !files.join("stamp").exists() || !has_qemu {
        return skip(format_args!("qemu-system-riscv64 or {} is not there", files.display()));
    }
    let mut qemu = Command::new("qemu-system-riscv64");
    qemu.args(["-M", "virt", "-m", "256M", "-icount", "shift=3,sleep=off", "-no-reboot"]);
    qemu.args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-append", APPEND]);
    let embedded = Embedded::default();
    let mut ours = embedded.command();
    ours.args(["record", "builtin", "--name", "linux", "--memory", "256M", "--append", APPEND]);
    for (option, file) in IMAGES {
        qemu.arg(format!("-{option}")).arg(files.join(file));
        ours.arg(format!("--{option}")).arg(files.join(file));
    }
    let (theirs, ours) = (run(&mut qemu, b"").expect(0).out, run(&mut ours, b"").expect(0).out);
    let (theirs, ours) = (comparable(&theirs), comparable(&ours));
    let only = |of: &[String], other: &[String]| {
        let lines = of.iter().filter(|line| !other.contains(line)).cloned();
        lines.collect::<Vec<_>>().join("\n")
    };
    assert!(
        ours == theirs,
        "only here:\n{}\n\nonly on QEMU:\n{}\n(or in another order)",
        only(&ours, &theirs),
        only(&theirs, &ours)
    );
    assert!(ours.len() >= LINES_MIN && ours.iter().any(|line| line == "reboot: Power down"), "{ours:?}");
}
