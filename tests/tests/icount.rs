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
    if let Ok(upto) = std::env::var("TRACE") {
        let upto: u64 = upto.parse().unwrap();
        while bare.machine().icount() < upto {
            let m = bare.machine();
            let pc = m.hart().pc;
            let mut bits = [0; 4];
            m.peek(pc, &mut bits);
            let bits = u32::from_le_bytes(bits);
            let is_time = bits & 0x7f == 0x73 && bits >> 20 == 0xc01 && bits >> 12 & 7 != 0;
            let at = m.icount();
            bare.run(at + 1);
            let m = bare.machine();
            if is_time {
                println!("time at {at} faults {} pc {pc:#x} rd x{} = {}", m.faults(), bits >> 7 & 31, m.hart().x[(bits >> 7 & 31) as usize]);
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
