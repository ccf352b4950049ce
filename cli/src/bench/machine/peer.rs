//! The peer: QEMU's riscv64 `virt` machine with the same guest.

use super::engine::Guest;
use crate::bench::cost::{Cost, timed};
use anyhow::{Context, Result};
use heddle_node::record::NamedFile;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program.
pub const PROGRAM: &str = "qemu-system-riscv64";

/// Runs a guest on QEMU, with `-icount` if told so: what the process took, its start included,
/// and what the guest has printed.
pub fn run(guest: &Guest, dir: &Path, icount: Option<&str>) -> Result<(Cost, String)> {
    let mut command = Command::new(PROGRAM);
    command.args(["-M", "virt", "-nographic", "-nic", "none", "-m"]);
    command.arg(format!("{}M", guest.memory_bytes >> 20));
    if let Some(icount) = icount {
        command.args(["-icount", icount]);
    }
    command.arg("-bios").arg(write(dir, &guest.bios)?);
    if let Some(kernel) = &guest.kernel {
        command.arg("-kernel").arg(write(dir, kernel)?);
        command.args(["-append", guest.append.as_str()]);
    }
    if let Some(initrd) = &guest.initrd {
        command.arg("-initrd").arg(write(dir, initrd)?);
    }
    let (cost, out) = timed(&mut command).with_context(|| format!("run the {} on QEMU", guest.name))?;
    Ok((cost, String::from_utf8_lossy(&out).into_owned()))
}

/// A file of the guest where QEMU reads it.
fn write(dir: &Path, (name, bytes): &NamedFile) -> Result<PathBuf> {
    let path = dir.join(name);
    std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
