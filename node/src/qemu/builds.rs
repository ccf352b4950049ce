//! The QEMU builds that a node offers: found once, named by version and content.

use crate::qemu::ring::{Mode, Ring, write_tap};
use anyhow::{Context, Result, ensure};
use heddle_proto::Hash;
use heddle_proto::qemu::RoleSource;
use heddle_replay_engine::qemu::log::Dialect;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Programs that are looked for on the path when a configuration names none.
const PROGRAMS: [&str; 3] = ["qemu-system-x86_64", "qemu-system-riscv64", "qemu-system-aarch64"];
/// Kinds of files that QEMU loads unasked, and the largest that is one.
const FIRMWARE: [&str; 4] = ["bin", "rom", "elf", "img"];
const FIRMWARE_BYTES_MAX: u64 = 4 << 20;
/// The beginning of a QEMU build's name.
pub const PREFIX: &str = "qemu-";

/// A QEMU on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuBuild {
    /// `qemu-ARCH-VERSION-HASH`, the same on every machine with the same program and the
    /// same firmware beside it.
    pub name: String,
    /// What is started: a wrapper script maybe.
    pub program: PathBuf,
    /// The real program.
    pub binary: PathBuf,
    /// The real program's file name.
    pub binary_name: String,
    /// `x86_64`, `riscv64`, ...
    pub arch: String,
    /// `7.2.22`.
    pub version: String,
    /// Whether it loads the tap. A static, musl or set-uid build does not: its threads
    /// are told apart by rule.
    pub is_tapped: bool,
}

impl QemuBuild {
    /// Looks at a program. It is started once, to say its version and which real
    /// program a wrapper script ends in.
    pub fn probe(program: &Path) -> Result<QemuBuild> {
        let program = find(program)?;
        let dir = tempfile::tempdir().context("make a scratch directory")?;
        let ring_path = dir.path().join("ring");
        let ring = Ring::create(&ring_path, Mode::Replay, Dialect::Qemu7)?;
        let output = Command::new(&program)
            .arg("--version")
            .env("LD_PRELOAD", write_tap(dir.path())?)
            .env("HEDDLE_TAP_RING", &ring_path)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("start {}", program.display()))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = said
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("QEMU emulator version "))
            .and_then(|rest| rest.split_whitespace().next())
            .with_context(|| format!("{} --version does not speak like QEMU: {said:?}", program.display()))?;
        let mut binary = ring.program()?;
        let is_tapped = !binary.as_os_str().is_empty();
        if !is_tapped {
            let mut magic = [0; 4];
            let read = File::open(&program).and_then(|mut file| file.read_exact(&mut magic));
            ensure!(
                read.is_ok() && magic == *b"\x7fELF",
                "{} does not load the tap, and is not a program itself: name the real one behind it",
                program.display()
            );
            binary = program.clone();
        }
        let binary_name = binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A wrapper's name says the architecture that the user means.
        let arch = binary_name.strip_prefix("qemu-system-").unwrap_or("unknown").to_string();
        let bytes = std::fs::read(&binary).with_context(|| format!("read {}", binary.display()))?;
        let hash = Hash::of(&[Hash::of(&bytes).0, firmware(&program)?.0].concat());
        let short = &hash.to_string()[..12];
        Ok(QemuBuild {
            name: format!("{PREFIX}{arch}-{version}-{short}"),
            program,
            binary,
            binary_name,
            arch,
            version: version.to_string(),
            is_tapped,
        })
    }

    /// Where the roles of its recordings' events come from.
    pub fn roles(&self) -> RoleSource {
        if self.is_tapped { RoleSource::Tap } else { RoleSource::ByRule }
    }

    /// The dialect of its logs.
    pub fn dialect(&self) -> Result<Dialect> {
        Dialect::of_version(&self.version).with_context(|| {
            format!("QEMU {} writes a log that is not known here; 7.2 and 10.0 are", self.version)
        })
    }

    /// The machine type with its version that `name` stands for; empty: the default.
    pub fn machine_type(&self, name: &str) -> Result<String> {
        let output = Command::new(&self.binary)
            .args(["-machine", "help"])
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("start {}", self.binary.display()))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = said.lines().find_map(|line| {
            let first = line.split_whitespace().next()?;
            let is_wanted = if name.is_empty() { line.contains("(default)") } else { first == name };
            let alias = line.split_once("(alias of ").and_then(|(_, rest)| rest.split(')').next());
            is_wanted.then(|| alias.unwrap_or(first).to_string())
        });
        found.with_context(|| format!("{} has no machine type {name:?}", self.binary_name))
    }
}

/// A hash over the firmware that a program takes when the command line names none: a
/// replay with another one is another machine. Of whatever architecture, since a program
/// does not say which are its own; without images that are only taken when named.
fn firmware(program: &Path) -> Result<Hash> {
    let output = Command::new(program)
        .args(["-L", "help"])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", program.display()))?;
    ensure!(output.status.success(), "{} -L help fails: its firmware can't be pinned", program.display());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut hashes = vec![];
    for dir in said.lines() {
        let Ok(entries) = std::fs::read_dir(dir) else { continue };
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths {
            let kind = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            let bytes = std::fs::metadata(&path).map_or(u64::MAX, |found| found.len());
            if FIRMWARE.contains(&kind) && bytes <= FIRMWARE_BYTES_MAX {
                let content = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                hashes.extend(path.file_name().unwrap_or_default().as_encoded_bytes());
                hashes.extend(Hash::of(&content).0);
            }
        }
    }
    Ok(Hash::of(&hashes))
}

fn find(program: &Path) -> Result<PathBuf> {
    if program.components().count() > 1 {
        return std::fs::canonicalize(program).with_context(|| format!("find {}", program.display()));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file()).with_context(|| {
        format!("{} is not on the PATH; on Debian: apt install qemu-system", program.display())
    })
}

/// The builds of a configuration: those it names, or the usual ones that are installed.
/// What can't be used is said.
pub fn offered(named: &[PathBuf]) -> (Vec<QemuBuild>, Vec<String>) {
    let (mut builds, mut said) = (vec![], vec![]);
    for program in named {
        match QemuBuild::probe(program) {
            Ok(build) => builds.push(build),
            Err(error) => said.push(format!("{} is not offered: {error:#}", program.display())),
        }
    }
    if named.is_empty() {
        builds.extend(PROGRAMS.iter().filter_map(|program| QemuBuild::probe(Path::new(program)).ok()));
    }
    (builds, said)
}
