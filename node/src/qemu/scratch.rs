//! A run's own directory: what its command line names is put there, and nothing else.

use crate::qemu::qcow2::Qcow2;
use crate::qemu::snapshot::{Root, restore, write_empty, write_overlay};
use anyhow::{Context, Result, bail, ensure};
use heddle_proto::qemu::QemuSpec;
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::qemu::recorded;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// A run's directory, removed with it.
pub struct Scratch {
    dir: TempDir,
    files: Vec<PathBuf>,
    bases: Vec<PathBuf>,
    /// Overlays of the disks, in the manifest's order.
    pub overlays: Vec<PathBuf>,
}

/// Contents of files and disks, in the manifest's order.
#[derive(Clone, Default)]
pub struct Contents {
    /// Files read as they are.
    pub files: Vec<Arc<[u8]>>,
    /// Disks' contents at the start.
    pub disks: Vec<Arc<[u8]>>,
}

/// A stored disk must not name another file: QEMU would open it on this host.
fn check_base(path: &Path, format: &str) -> Result<()> {
    match format {
        "raw" => Ok(()),
        "qcow2" => {
            let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            ensure!(!Qcow2::open(&file)?.has_backing, "a stored disk names a file of the host");
            Ok(())
        }
        other => bail!("a stored disk is {other}; raw and qcow2 are known"),
    }
}

impl Scratch {
    /// An empty directory, with places for the files that `spec` names.
    fn new(spec: &QemuSpec) -> Result<Scratch> {
        let dir = tempfile::Builder::new().prefix("heddle-qemu-").tempdir();
        let dir = dir.context("make a scratch directory")?;
        let path = |kind: &str, number: usize| dir.path().join(format!("{kind}{number}"));
        let disks = 0..spec.disks.len();
        Ok(Scratch {
            files: (0..spec.files.len()).map(|number| path("file", number)).collect(),
            bases: disks.clone().map(|number| path("base", number)).collect(),
            overlays: disks.map(|number| path("disk", number)).collect(),
            dir,
        })
    }

    /// For a recording: the user's own files are read where they are.
    pub fn of_user(spec: &QemuSpec, files: Vec<PathBuf>, bases: Vec<PathBuf>) -> Result<Scratch> {
        let scratch = Scratch::new(spec)?;
        for (link, original) in scratch.files.iter().zip(&files).chain(scratch.bases.iter().zip(&bases)) {
            std::os::unix::fs::symlink(original, link).with_context(|| format!("link {}", link.display()))?;
        }
        scratch.power_on(spec)?;
        Ok(scratch)
    }

    /// For a replay: everything comes from the store.
    pub fn of_store(
        spec: &QemuSpec,
        contents: &Contents,
        root: Option<(&Root, &mut dyn BlockSource)>,
    ) -> Result<Scratch> {
        let scratch = Scratch::new(spec)?;
        let write = |path: &Path, bytes: &[u8]| {
            std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
        };
        for (path, bytes) in scratch.files.iter().zip(&contents.files) {
            write(path, bytes)?;
        }
        for (path, bytes) in scratch.bases.iter().zip(&contents.disks) {
            write(path, bytes)?;
        }
        for (path, disk) in scratch.bases.iter().zip(&spec.disks) {
            check_base(path, &disk.format)?;
        }
        match root {
            None => scratch.power_on(spec)?,
            Some((root, source)) => {
                restore(root, source, spec, &scratch.bases, &scratch.vm_state(), &scratch.overlays)?;
            }
        }
        Ok(scratch)
    }

    fn power_on(&self, spec: &QemuSpec) -> Result<()> {
        write_empty(&self.vm_state())?;
        for (number, disk) in spec.disks.iter().enumerate() {
            let (overlay, base) = (&self.overlays[number], &self.bases[number]);
            write_overlay(overlay, disk.guest_bytes, base, &disk.format, None)?;
        }
        Ok(())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The file for VM states.
    pub fn vm_state(&self) -> PathBuf {
        self.path().join("vm-state")
    }

    /// The recorded part of the command line, relative to this directory: a guest can see
    /// a file's name (multiboot passes it on), so it must be the same everywhere.
    pub fn arguments(&self, spec: &QemuSpec) -> Result<Vec<String>> {
        let name = |path: &PathBuf| PathBuf::from(path.file_name().unwrap_or_default());
        let files: Vec<PathBuf> = self.files.iter().map(name).collect();
        let overlays: Vec<PathBuf> = self.overlays.iter().map(name).collect();
        Ok(recorded::arguments(spec, &files, &overlays, Path::new("."))?)
    }
}
