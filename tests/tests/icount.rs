//! The built-in machine beside QEMU's `virt`, to the instruction.
//!
//! QEMU records a Linux boot; its log says at which icount each byte was printed and where the
//! guest was switched off. The built-in machine runs the same files with the same device tree,
//! seed and rules, and must do the same at the same icounts, from the reset vector to poweroff:
//! half a billion instructions with their page faults, timer and UART interrupts.
//!
//! icounts here are QEMU's: without the instructions that could not be done (see
//! `Machine::faults`), with what it counts and does not execute. `tests/riscv-guest` makes kernel and initramfs.
#![allow(clippy::unwrap_used)]

use heddle_proto::manifest::{MachineSpec, Sleep};
use heddle_proto::{Body, CheckpointKind, QemuEvent};
use heddle_replay_engine::bare::Bare;
use heddle_replay_engine::guest;
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::qemu::log::{Decoder, Dialect, HEADER_BYTES, Located};
use heddle_tests::{Embedded, root, run, skip};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;

/// Programs that fault, sleep and print through the UART's interrupts. `no4lvl`: the built-in
/// machine has Sv39 alone.
const APPEND: &str = "console=ttyS0 no4lvl cryptomgr.notests rdinit=/bin/busybox -- sh -c \
\"B=/bin/busybox; $B mkdir -p /proc; $B mount -t proc proc /proc; $B cat /proc/cpuinfo /proc/interrupts; \
$B seq 1 2000 | $B sha256sum; $B sleep 1; $B poweroff -f\"";
/// QEMU's hart without what the built-in one has not.
const CPU: &str = "rv64,h=off,v=off,zbc=off,zba=on,zbb=on,zbs=on,sstc=on,debug=off,pmu-num=0,\
Zfh=off,Zfhmin=off,Zihintpause=on,svinval=off,svnapot=off,svpbmt=off,marchid=0,mimpid=0";
/// Both machines' wall clock at power-on, 2026-01-01.
const EPOCH_NS: i64 = 1_767_225_600_000_000_000;
const MEMORY: u64 = 256 << 20;
/// What the device tree says; the firmware's own lies behind it.
const MEMORY_OF_LINUX: &str = "248M";
/// QEMU counts a block of instructions when it enters it: up to so many more than are executed,
/// where one ends in the middle.
const OF_A_BLOCK: u64 = 8;

struct Files {
    dir: TempDir,
    firmware: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Files {
    fn new() -> Option<Files> {
        let guest = root().join("target/guests/riscv");
        let (gcc, qemu) = ("riscv64-unknown-elf-gcc", "qemu-system-riscv64");
        let is_there = |program: &str| Command::new(program).arg("--version").output().is_ok();
        if !guest.join("stamp").exists() || !is_there(gcc) || !is_there(qemu) {
            skip(format_args!("{gcc}, {qemu} or {} is not there", guest.display()));
            return None;
        }
        let dir = TempDir::new().unwrap();
        let firmware = dir.path().join("sbi.elf");
        let mut gcc = Command::new(gcc);
        gcc.args(["-march=rv64imac_zicsr", "-mabi=lp64", "-nostdlib", "-static", "-Wl,--build-id=none"]);
        gcc.arg("-Wl,-Ttext=0x80000000,--nmagic")
            .arg("-o")
            .arg(&firmware)
            .arg(root().join("tests/guests/sbi.S"));
        run(&mut gcc, b"").expect(0);
        Some(Files { dir, firmware, kernel: guest.join("Image"), initrd: guest.join("initrd") })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// QEMU with the built-in machine's device tree, as it would have it for this memory.
    fn qemu(&self, machine: &str) -> Command {
        let mut qemu = Command::new("qemu-system-riscv64");
        qemu.args(["-M", machine, "-cpu", CPU, "-m", "256M", "-seed", "7", "-append", APPEND]);
        qemu.args(["-display", "none", "-nodefaults", "-no-reboot"]);
        self.images(&mut qemu, "-");
        qemu.arg("-dtb").arg(self.path("ours.dtb"));
        qemu
    }

    fn images(&self, command: &mut Command, dashes: &str) {
        for (name, file) in [("bios", &self.firmware), ("kernel", &self.kernel), ("initrd", &self.initrd)] {
            command.arg(format!("{dashes}{name}")).arg(file);
        }
    }

    /// Records on QEMU, and leaves behind the device tree that its guest got.
    fn record(&self, shift: u32) -> Vec<Located> {
        let mut dump = Embedded::default().command();
        dump.args(["record", "builtin", "--memory", MEMORY_OF_LINUX, "--append", APPEND]);
        self.images(&mut dump, "--");
        run(dump.arg("--dump-dtb").arg(self.path("ours.dtb")), b"").expect(0);
        let dtb = self.path("theirs.dtb");
        run(&mut self.qemu(&format!("virt,dumpdtb={}", dtb.display())), b"").expect(0);

        let (log, console) = (self.path("log"), self.path("console"));
        let mut qemu = self.qemu("virt");
        qemu.args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        let rr = format!("shift={shift},sleep=off,rr=record,rrfile={}", log.display());
        run(qemu.args(["-icount", &rr]), b"").expect(0);
        let events = events(&log);
        // The seed is another one after the reset than when the tree was made.
        let drawn = |event: &Located| match &event.body {
            Body::Qemu(QemuEvent::Random { data, .. }) => Some(data.clone()),
            _ => None,
        };
        let seeds: Vec<Vec<u8>> = events.iter().filter_map(drawn).collect();
        let mut tree = std::fs::read(&dtb).unwrap();
        let at = tree.windows(32).position(|bytes| bytes == seeds[0]).expect("the tree has a seed");
        tree[at..at + 32].copy_from_slice(&seeds[1]);
        std::fs::write(&dtb, tree).unwrap();
        events
    }

    fn machine(&self, shift: u32) -> Bare {
        let read = |file: &Path| -> Option<Arc<[u8]>> { Some(Arc::from(std::fs::read(file).unwrap())) };
        let images = Images {
            bios: read(&self.firmware),
            kernel: read(&self.kernel),
            initrd: read(&self.initrd),
            dtb: read(&self.path("theirs.dtb")),
            drives: vec![],
        };
        let spec =
            MachineSpec { memory_bytes: MEMORY, shift, sleep: Sleep::Off, drives: vec![], ..guest::spec() };
        Bare::new(loader::build(&spec, &images).unwrap(), EPOCH_NS)
    }
}

fn events(log: &Path) -> Vec<Located> {
    let mut decoder = Decoder::new(Dialect::Qemu7, HEADER_BYTES, 0);
    decoder.push(&std::fs::read(log).unwrap()[HEADER_BYTES as usize..]);
    let mut events: Vec<Located> = std::iter::from_fn(|| decoder.next_event()).collect();
    events.extend(decoder.finish());
    events
}

/// A guest of the built-in machine, whose icount is counted as QEMU counts.
struct Twin {
    guest: Bare,
    /// What QEMU has counted and the guest did not execute: a WFI that sleeps leaves its block,
    /// of which QEMU has counted the rest. No virtual time is gained by it, since the sleep ends
    /// when it ends.
    skipped: u64,
}

impl Twin {
    fn icount(&self) -> u64 {
        self.guest.machine().icount() - self.guest.machine().faults() + self.skipped
    }

    /// Runs to where QEMU's icount is `to`.
    fn run_to(&mut self, to: u64) {
        while self.icount() < to && self.advance(to) {}
    }

    fn advance(&mut self, to: u64) -> bool {
        self.guest.advance(to + self.guest.machine().faults() - self.skipped).is_none()
    }

    /// Runs to the WFI in which QEMU sleeps behind so many instructions.
    fn sleep_at(&mut self, at: u64) {
        while !self.guest.machine().is_idle() && self.icount() < at && self.advance(at) {}
        let here = self.icount();
        let is_asleep = self.guest.machine().is_idle() && (here..=here + OF_A_BLOCK).contains(&at);
        assert!(is_asleep, "QEMU sleeps at {at}; here {}", self.place());
        self.skipped += at - here;
        // Over the time, and then what is due.
        self.advance(at + 1);
        self.advance(at);
    }

    fn place(&self) -> String {
        format!("{}, pc {:#x}", self.icount(), self.guest.machine().hart().pc)
    }
}

fn boots_as_on_qemu(files: &Files, shift: u32) {
    let events = files.record(shift);
    let mut twin = Twin { guest: files.machine(shift), skipped: 0 };
    let (mut printed, mut sleeps, mut end, mut asleep_at) = (vec![], 0, None, None);
    for Located { icount, body, .. } in &events {
        match body {
            Body::Qemu(QemuEvent::CharWrite { .. }) => {
                twin.run_to(icount - 1);
                let early = twin.guest.machine_mut().take_console();
                twin.run_to(*icount);
                let now = twin.guest.machine_mut().take_console();
                assert!(
                    early.is_empty() && now.len() == 1,
                    "byte {} is printed at {icount} on QEMU; here {early:?} before and {now:?} then, at {}, \
                     after:\n{}",
                    printed.len(),
                    twin.place(),
                    String::from_utf8_lossy(&printed)
                );
                printed.extend(now);
            }
            // Its main loop may say so twice.
            Body::Checkpoint(CheckpointKind::ClockWarpStart) if asleep_at != Some(*icount) => {
                asleep_at = Some(*icount);
                twin.sleep_at(*icount);
                sleeps += 1;
            }
            Body::Qemu(QemuEvent::Shutdown { .. }) => end = Some(*icount),
            _ => {}
        }
    }
    let end = end.expect("QEMU's guest switched it off");
    twin.run_to(end);
    let here = twin.icount();
    assert_eq!(twin.guest.machine().shutdown(), Some(0), "{}", twin.place());
    // Up to the end of the block that switched it off.
    assert!((here..=here + OF_A_BLOCK).contains(&end), "off at {here}, on QEMU at {end}");
    assert_eq!(printed, std::fs::read(files.path("console")).unwrap());
    let text = String::from_utf8_lossy(&printed);
    assert!(text.contains("reboot: Power down") && sleeps > 0, "{sleeps} sleeps:\n{text}");
    println!(
        "shift {shift}: {} bytes at QEMU's icounts, off at {here} (QEMU {end}); {} faults here, {} \
         skipped there in {sleeps} sleeps",
        printed.len(),
        twin.guest.machine().faults(),
        twin.skipped
    );
}

#[test]
fn linux_boots_as_on_qemu_to_the_instruction() {
    let Some(files) = Files::new() else { return };
    boots_as_on_qemu(&files, 0);
    boots_as_on_qemu(&files, 3);
}
