//! The built-in machine beside QEMU's `virt`, to the instruction.
//!
//! QEMU records a guest; its log says at which icount each byte was printed, and where the guest
//! switched off. The built-in machine runs the same files with the same device tree, and must
//! do the same at the same icounts.
#![allow(clippy::unwrap_used)]

use heddle_proto::manifest::{MachineSpec, Sleep};
use heddle_proto::{Body, QemuEvent};
use heddle_replay_engine::bare::{Bare, Pause};
use heddle_replay_engine::guest;
use heddle_replay_engine::machine::loader::{self, Images};
use heddle_replay_engine::qemu::log::{Decoder, Dialect, HEADER_BYTES, Located};
use heddle_tests::{root, run};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

const EPOCH_NS: i64 = 1_767_225_600_000_000_000;

fn log(path: &Path) -> Vec<Located> {
    let mut decoder = Decoder::new(Dialect::Qemu7, HEADER_BYTES, 0);
    decoder.push(&std::fs::read(path).unwrap()[HEADER_BYTES as usize..]);
    let mut events: Vec<Located> = std::iter::from_fn(|| decoder.next_event()).collect();
    events.extend(decoder.finish());
    events
}

#[test]
fn explore() {
    let dir = std::env::var("X").unwrap();
    let dir = Path::new(&dir);
    let name = std::env::var("N").unwrap();
    let guest = root().join("target/guests/riscv");
    let bios = std::env::var("BIOS").unwrap_or(guest.join("fw_dynamic.bin").display().to_string());
    let read = |p: &Path| -> Option<Arc<[u8]>> { Some(Arc::from(std::fs::read(p).unwrap())) };
    let images = Images {
        bios: read(Path::new(&bios)),
        kernel: read(&guest.join("Image")),
        initrd: read(&guest.join("initrd")),
        dtb: read(&dir.join(format!("{name}.dtb"))),
        drives: vec![],
    };
    let spec = MachineSpec {
        memory_bytes: 256 << 20,
        shift: std::env::var("SH").unwrap().parse().unwrap(),
        sleep: Sleep::Off,
        kernel: None,
        drives: vec![],
        ..guest::spec()
    };
    let mut bare = Bare::new(loader::build(&spec, &images).unwrap(), EPOCH_NS);
    if let Ok(span) = std::env::var("TRACE") {
        let (from, to) = span.split_once(':').unwrap();
        let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
        while bare.machine().icount() - bare.machine().faults() < from {
            bare.run(from + bare.machine().faults());
        }
        while bare.machine().icount() - bare.machine().faults() < to {
            let mut len = bare.machine().console_len();
            let at = bare.machine().icount();
            let before = bare.machine().hart().pc;
            bare.run(at + 1);
            let m = bare.machine();
            let h = m.hart();
            if m.console_len() != len {
                len = m.console_len();
                println!("trap char q {}", m.icount() - m.faults());
            }
            if h.scause >> 63 != 0 && h.sepc == before && h.pc & !63 == h.stvec & !63 {
                println!("trap int q {} {:x} from {before:#x}", m.icount() - m.faults(), h.scause);
            }
            if std::env::var("PCS").is_ok() {
                println!("pc q {} {:#x} {:x?}", m.icount() - m.faults(), h.pc, &h.x[..32]);
            }
            if h.pc == h.stvec || h.pc == h.mtvec {
                println!(
                    "trap q {} cause {:x} from {before:#x} tval {:#x} faults {}",
                    at + 1 - m.faults(),
                    h.scause,
                    h.stval,
                    m.faults()
                );
            }
        }
        return;
    }
    let mut printed = 0;
    let mut wrong = 0;
    for event in log(&dir.join(format!("{name}.rr"))) {
        let what = match &event.body {
            Body::Qemu(QemuEvent::CharWrite { .. }) => "char",
            Body::Qemu(QemuEvent::Shutdown { .. }) => "shutdown",
            _ => continue,
        };
        let q = event.icount;
        // Where QEMU's count is `q`.
        let mut to = |q: u64| loop {
            let until = q + bare.machine().faults();
            if bare.machine().icount() >= until {
                break;
            }
            if bare.run(until) != Pause::Budget {
                break;
            }
        };
        to(q - 1);
        to(q);
        let m = bare.machine();
        let have = m.console_len();
        if what == "char" {
            printed += 1;
        }
        if printed < 20 {
            println!("{what} {printed} at {q} have {have} icount {} pc {:#x}", m.icount(), m.hart().pc);
        }
        if have != printed || m.shutdown().is_some() != (what == "shutdown") {
            println!(
                "{what} {printed} at {q}: have {have}, pc {:#x}, icount {}, faults {}, off {:?}",
                m.hart().pc,
                m.icount(),
                m.faults(),
                m.shutdown()
            );
            wrong += 1;
            if wrong > 20 {
                break;
            }
        }
    }
    let m = bare.machine();
    println!("end: icount {} faults {} diff {}", m.icount(), m.faults(), m.icount() - m.faults());
    assert_eq!(wrong, 0);
}
