//! `heddle record builtin`: this process is the node that runs the guest.

use super::console::{Terminal, TerminalOptions};
use crate::args::{Format, RecordBuiltin, RecordCommon};
use crate::cluster::Cluster;
use crate::exit::{OK, USAGE, coded, of_guest};
use crate::output;
use anyhow::{Context, Result};
use bytes::Bytes;
use heddle_node::blocks::IMAGE_BYTES_MAX;
use heddle_node::record::{BadRequest, Console, NamedFile, RecordRequest, Watermarks, record};
use heddle_proto::manifest::{MachineSpec, Positions, Sleep};
use heddle_replay_engine::guest;
use heddle_replay_engine::machine::loader::{self, Images};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Instructions between checks.
const CHECK_EVERY: u64 = 1_000_000;
/// Instructions between digests, at most: a tenth of a second of replaying. Each hashes what was
/// written since the last one, and a guest writes to the same pages again and again.
const DIGEST_EVERY: u64 = 100_000_000;
/// Instructions between snapshots are a multiple of so many, and so are those between digests.
const POSITION_GRAIN: u64 = 10_000_000;
/// RAM of the bundled guest.
const BUNDLED_MEMORY: u64 = 16 << 20;
/// RAM of other guests, unless told otherwise.
const DEFAULT_MEMORY: u64 = 128 << 20;
/// What an image of QEMU's own format begins with.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Records, with this terminal as the guest's console. The guest's exit code is ours.
pub async fn run(cluster: &Cluster, command: RecordBuiltin, format: Format) -> Result<u8> {
    let outbox_dir = outbox_of(cluster, &command.common).await?;
    let request = request(&command, outbox_dir.clone())?;
    let (terminal, console) = open_terminal(&command.common, &outbox_dir, format)?;
    let watermarks = Watermarks::default();
    let began = Instant::now();
    let coordinator = Some(cluster.file.coordinator.clone());
    let recorded = record(&cluster.store, coordinator, request, console, watermarks.clone(), |_| {}).await;
    terminal.close();
    let recorded = recorded?;
    let summary = json!({
        "recording": recorded.name,
        "id": recorded.id,
        "instructions": recorded.end.icount,
        "events": recorded.end.event,
        "committed_events": watermarks.committed.load(Ordering::Relaxed),
        "digest": recorded.digest,
        "exit_code": recorded.exit_code,
        "seconds": began.elapsed().as_secs_f64(),
    });
    match format {
        Format::Json | Format::Yaml => output::value(format, &summary)?,
        Format::Name => output::line(recorded.name)?,
        Format::Table | Format::Wide => eprintln!(
            "recorded {}: {} instructions, {} events, {:.1} s",
            recorded.name,
            output::grouped(recorded.end.icount),
            output::grouped(recorded.end.event),
            began.elapsed().as_secs_f64()
        ),
    }
    Ok(of_guest(recorded.exit_code))
}

/// The outbox's directory, with what a dead recorder left there delivered.
pub async fn outbox_of(cluster: &Cluster, common: &RecordCommon) -> Result<PathBuf> {
    let dir = common.outbox.clone().unwrap_or_else(|| cluster.outbox_dir.clone());
    let dir = std::path::absolute(&dir).with_context(|| format!("find {}", dir.display()))?;
    for said in heddle_node::record::recover(&cluster.store, &dir).await {
        eprintln!("heddle: {said}");
    }
    Ok(dir)
}

/// This terminal as the guest's console.
pub fn open_terminal(
    common: &RecordCommon,
    outbox_dir: &Path,
    format: Format,
) -> Result<(Terminal, Console)> {
    Terminal::open(TerminalOptions {
        until: common.until.clone(),
        prompt: common.prompt.clone(),
        is_quiet: output::is_for_programs(format),
        outbox: outbox_dir.display().to_string(),
    })
}

/// Where a recording with such snapshots has its checks and digests: as many of these as there
/// may be at most, and one at each snapshot.
pub fn positions(snapshot_every: u64) -> Positions {
    let divides = |every: u64| snapshot_every % every == 0;
    let digest_every = (1..=DIGEST_EVERY / POSITION_GRAIN)
        .rev()
        .map(|grains| grains * POSITION_GRAIN)
        .find(|every| divides(*every));
    Positions {
        check_every: CHECK_EVERY,
        digest_every: digest_every.unwrap_or(POSITION_GRAIN),
        snapshot_every,
        snapshots_at: vec![],
    }
}

fn request(command: &RecordBuiltin, outbox_dir: PathBuf) -> Result<RecordRequest> {
    let file = |path: &Option<PathBuf>| path.as_deref().map(read_file).transpose();
    let (is_bundled, seed) = (is_bundled(command)?, seed(command)?);
    let mut drives = command.drives.iter().map(|path| read_drive(path)).collect::<Result<Vec<_>>>()?;
    let kernel = if is_bundled {
        drives.insert(0, ("loom.disk".into(), Bytes::from(guest::disk())));
        Some(("loom.elf".into(), Bytes::from_static(guest::LOOM_ELF)))
    } else {
        file(&command.kernel)?
    };
    if command.snapshot_every % POSITION_GRAIN != 0 {
        return Err(coded(USAGE, format!("--snapshot-every must be a multiple of {POSITION_GRAIN}")));
    }
    Ok(RecordRequest {
        name: command.common.name.clone(),
        labels: labels(&command.common.labels)?,
        harts: command.harts,
        memory_bytes: memory(command, is_bundled),
        shift: command.shift,
        sleep: if command.sleep == "off" { Sleep::Off } else { Sleep::On },
        bios: file(&command.bios)?,
        kernel,
        initrd: file(&command.initrd)?,
        dtb: file(&command.dtb)?,
        seed,
        append: command.append.clone(),
        drives,
        netdev: command.netdev.clone(),
        has_rng: command.rng,
        has_virtio_console: command.virtio_console,
        positions: positions(command.snapshot_every),
        outbox_dir,
        outbox_bytes: command.common.outbox_bytes,
    })
}

/// Whether the bundled guest is meant, which has one hart and its own memory.
fn is_bundled(command: &RecordBuiltin) -> Result<bool> {
    let is_bundled = command.bios.is_none() && command.kernel.is_none();
    if is_bundled && command.harts > 1 {
        return Err(coded(USAGE, "--harts: the bundled guest has one; give a --kernel or a --bios"));
    }
    if is_bundled && command.memory.is_some() {
        return Err(coded(USAGE, "--memory: the bundled guest has 16M; give a --kernel or a --bios"));
    }
    Ok(is_bundled)
}

/// The guest's RAM.
fn memory(command: &RecordBuiltin, is_bundled: bool) -> u64 {
    let otherwise = if is_bundled { BUNDLED_MEMORY } else { DEFAULT_MEMORY };
    command.memory.unwrap_or(otherwise)
}

/// The seed of the machine's own device tree; one that is given is taken as it is.
fn seed(command: &RecordBuiltin) -> Result<Option<u64>> {
    if let (Some(seed), Some(dtb)) = (command.seed, &command.dtb) {
        let text = format!(
            "--seed {seed}: the device tree of --dtb {} is taken as it is; give it an rng-seed of its own, \
             under /chosen, or leave out one of the two",
            dtb.display()
        );
        return Err(coded(USAGE, text));
    }
    Ok(command.seed)
}

/// Writes the device tree that the guest would get.
pub fn dump_dtb(command: &RecordBuiltin, to: &Path) -> Result<u8> {
    let file = |path: &Option<PathBuf>| -> Result<Option<Arc<[u8]>>> {
        Ok(path.as_deref().map(read_file).transpose()?.map(|(_, bytes)| Arc::from(&bytes[..])))
    };
    let is_bundled = is_bundled(command)?;
    let spec = MachineSpec {
        harts: command.harts,
        memory_bytes: memory(command, is_bundled),
        seed: seed(command)?,
        append: command.append.clone(),
        ..guest::spec()
    };
    spec.check().map_err(BadRequest::from)?;
    let images = Images {
        bios: file(&command.bios)?,
        kernel: if is_bundled { Some(Arc::from(guest::LOOM_ELF)) } else { file(&command.kernel)? },
        initrd: file(&command.initrd)?,
        dtb: file(&command.dtb)?,
        drives: vec![],
    };
    let blob = loader::device_tree(&spec, &images).map_err(BadRequest::from)?;
    std::fs::write(to, blob).with_context(|| format!("write {}", to.display()))?;
    Ok(OK)
}

/// Labels as typed, KEY=VALUE each.
pub fn labels(given: &[String]) -> Result<BTreeMap<String, String>> {
    let labels = given.iter().map(|label| {
        let pair = label.split_once('=').map(|(k, v)| (k.to_string(), v.to_string()));
        pair.ok_or_else(|| coded(USAGE, format!("--label {label}: expected KEY=VALUE")))
    });
    labels.collect()
}

/// A disk's bytes. The guest would take those of another format for the disk's own.
fn read_drive(path: &Path) -> Result<NamedFile> {
    let (name, bytes) = read_file(path)?;
    if bytes.starts_with(QCOW2_MAGIC) {
        let text = format!(
            "{} is a qcow2 image, and --drive takes raw ones; `qemu-img convert -O raw` makes one",
            path.display()
        );
        return Err(coded(USAGE, text));
    }
    Ok((name, bytes))
}

fn read_file(path: &Path) -> Result<NamedFile> {
    let refused = |error: std::io::Error| coded(USAGE, format!("read {}: {error}", path.display()));
    // Before it is in memory.
    let bytes = std::fs::metadata(path).map_err(refused)?.len();
    if bytes > IMAGE_BYTES_MAX {
        return Err(BadRequest::Large { name: path.display().to_string(), bytes }.into());
    }
    let bytes = std::fs::read(path).map_err(refused)?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok((name, Bytes::from(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::code_of;

    #[test]
    fn a_drive_is_a_raw_image() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("disk");
        std::fs::write(&path, b"QFI raw")?;
        assert_eq!(read_drive(&path)?.1, b"QFI raw"[..]);
        std::fs::write(&path, b"QFI\xfb\0\0\0\x03")?;
        let refusal = read_drive(&path).map_err(|error| (code_of(&error), error.to_string()));
        let text = format!(
            "{} is a qcow2 image, and --drive takes raw ones; `qemu-img convert -O raw` makes one",
            path.display()
        );
        assert_eq!(refusal, Err((USAGE, text)));
        // Of holes alone.
        std::fs::File::create(&path)?.set_len(IMAGE_BYTES_MAX + 1)?;
        let refusal = read_drive(&path).map_err(|error| (code_of(&error), error.to_string()));
        let text = format!("{} has 4294967297 bytes; at most 4294967296 can be stored", path.display());
        assert_eq!(refusal, Err((USAGE, text)));
        Ok(())
    }

    #[test]
    fn digests_are_at_checks_and_one_is_at_each_snapshot() {
        for snapshot_every in (0..=60).map(|grains| grains * POSITION_GRAIN) {
            let positions = positions(snapshot_every);
            let Positions { check_every, digest_every, .. } = positions;
            assert_eq!(positions.snapshot_every, snapshot_every);
            assert_eq!(snapshot_every % digest_every, 0, "{snapshot_every}: {digest_every}");
            assert_eq!(digest_every % check_every, 0, "{snapshot_every}: {digest_every}");
            assert!((1..=DIGEST_EVERY).contains(&digest_every), "{snapshot_every}: {digest_every}");
        }
    }
}
