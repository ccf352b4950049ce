//! The node's side of the tap's ring. `tap/tap.rs` has its layout.
//!
//! The ring is a file that QEMU maps. The node reads it as a file, which is the same
//! memory: what QEMU wrote before it was killed is there, and what a dead node did not
//! take can be taken by the next.

use anyhow::{Context, Result, ensure};
use heddle_proto::Position;
use heddle_proto::qemu::RoleSource;
use heddle_replay_engine::qemu::log::{Dialect, HEADER_BYTES};
use heddle_replay_engine::qemu::roles::Thread;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The tap itself, compiled with this program.
const TAP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libheddle_tap.so"));
const MAGIC: &[u8; 4] = b"HDLT";
const VERSION: u32 = 1;
const PAGE: u64 = 4096;
/// Room for a log's bytes: seconds of the busiest guest, so that the node is never in its way.
const BYTES: u64 = 32 << 20;
/// Room for marks, eight bytes each.
const MARKS: u64 = 1 << 20;
const MODE: u64 = 8;
const STAGE: u64 = 12;
const BYTES_AT: u64 = 24;
const MARKS_AT: u64 = 32;
const NODE_AT: u64 = 40;
const WRITTEN: u64 = 64;
const MARKS_WRITTEN: u64 = 72;
const TAKEN: u64 = 128;
const MARKS_TAKEN: u64 = 136;
/// Where the node stands: offset, and behind the marks icount, event and dialect.
const POSITION: u64 = 144;
const DIALECT: u64 = 160;
/// Not zero: no marks come, and roles go by rule.
const BY_RULE: u64 = 168;
const PROGRAM: u64 = 256;

/// What the tap is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Take the log's bytes.
    Record = 1,
    /// Watch them being read.
    Replay = 2,
}

/// How far the tap has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It was never loaded: a static or set-uid program.
    Nothing = 0,
    /// It was loaded.
    Loaded = 1,
    /// The log is open.
    Open = 2,
    /// The log was closed: QEMU ended cleanly.
    Closed = 3,
}

/// A ring.
#[derive(Debug)]
pub struct Ring {
    file: File,
    path: PathBuf,
    taken: u64,
    marks_taken: u64,
}

/// Writes the tap's library to `dir`; its path.
pub fn write_tap(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("libheddle_tap.so");
    std::fs::write(&path, TAP).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

impl Ring {
    /// A new ring.
    pub fn create(path: &Path, mode: Mode, dialect: Dialect) -> Result<Ring> {
        let what = || format!("create {}", path.display());
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).open(path).with_context(what)?;
        let bytes = if mode == Mode::Record { BYTES } else { 0 };
        file.set_len(PAGE + bytes + MARKS * 8).with_context(what)?;
        let mut head = [0; 48];
        head[..4].copy_from_slice(MAGIC);
        head[4..8].copy_from_slice(&VERSION.to_ne_bytes());
        head[MODE as usize..][..4].copy_from_slice(&(mode as u32).to_ne_bytes());
        head[BYTES_AT as usize..][..8].copy_from_slice(&bytes.to_ne_bytes());
        head[MARKS_AT as usize..][..8].copy_from_slice(&MARKS.to_ne_bytes());
        head[NODE_AT as usize..][..8].copy_from_slice(&u64::from(std::process::id()).to_ne_bytes());
        file.write_all_at(&head, 0).with_context(what)?;
        let number: u64 = if dialect == Dialect::Qemu10 { 10 } else { 7 };
        file.write_all_at(&number.to_ne_bytes(), DIALECT).with_context(what)?;
        Ok(Ring { file, path: path.into(), taken: 0, marks_taken: 0 })
    }

    /// A ring that a dead node left behind.
    pub fn open(path: &Path) -> Result<Ring> {
        let what = || format!("open {}", path.display());
        let file = OpenOptions::new().read(true).write(true).open(path).with_context(what)?;
        let mut head = [0; 8];
        file.read_exact_at(&mut head, 0).with_context(what)?;
        let version = u32::from_ne_bytes(head[4..].try_into().expect("4 bytes"));
        ensure!(&head[..4] == MAGIC && version == VERSION, "{} is not a ring of version 1", path.display());
        let mut ring = Ring { file, path: path.into(), taken: 0, marks_taken: 0 };
        (ring.taken, ring.marks_taken) = (ring.number(TAKEN)?, ring.number(MARKS_TAKEN)?);
        let (bytes, marks) = (ring.number(BYTES_AT)?, ring.number(MARKS_AT)?);
        ensure!(bytes == BYTES && marks == MARKS, "{} has other bounds", path.display());
        Ok(ring)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn number(&self, at: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at).with_context(|| format!("read {}", self.path.display()))?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn set(&self, at: u64, value: u64) -> Result<()> {
        let bytes = value.to_ne_bytes();
        self.file.write_all_at(&bytes, at).with_context(|| format!("write {}", self.path.display()))
    }

    /// How far the tap has come.
    pub fn stage(&self) -> Result<Stage> {
        let mut bytes = [0; 4];
        self.file.read_exact_at(&mut bytes, STAGE).context("read the ring")?;
        Ok(match u32::from_ne_bytes(bytes) {
            0 => Stage::Nothing,
            1 => Stage::Loaded,
            2 => Stage::Open,
            _ => Stage::Closed,
        })
    }

    /// The program that loaded the tap last: behind a wrapper script, the real one.
    pub fn program(&self) -> Result<PathBuf> {
        let mut bytes = [0; 1024];
        self.file.read_exact_at(&mut bytes, PROGRAM).context("read the ring")?;
        let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Ok(PathBuf::from(String::from_utf8_lossy(&bytes[..len]).into_owned()))
    }

    /// Offset in the log up to which it was written, or read.
    pub fn offset(&self) -> Result<u64> {
        self.number(WRITTEN)
    }

    /// Offset up to which its bytes were taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Bytes of the log that were not read yet, and are not given back yet.
    pub fn read(&mut self, from: u64) -> Result<Vec<u8>> {
        if self.taken == 0 {
            // The place of the header, where a log's first byte is not.
            self.taken = self.number(TAKEN)?;
        }
        let (from, end) = (from.max(self.taken), self.offset()?);
        ensure!(end.saturating_sub(self.taken) <= BYTES, "{} is damaged", self.path.display());
        let mut bytes = vec![0; end.saturating_sub(from) as usize];
        let mut done = 0;
        while done < bytes.len() {
            let at = (from + done as u64) % BYTES;
            let len = (bytes.len() - done).min((BYTES - at) as usize);
            self.file.read_exact_at(&mut bytes[done..done + len], PAGE + at).context("read the ring")?;
            done += len;
        }
        Ok(bytes)
    }

    /// Writes what a QEMU without the tap has logged, as the tap would; how much there was
    /// room for.
    pub fn push(&mut self, bytes: &[u8]) -> Result<usize> {
        let written = self.offset()?.max(HEADER_BYTES);
        let used = written.checked_sub(self.taken.max(HEADER_BYTES)).filter(|used| *used <= BYTES);
        // There is no log so long that its offsets come to an end.
        let used = used.filter(|_| written.checked_add(BYTES).is_some());
        let room = BYTES - used.with_context(|| format!("{} is damaged", self.path.display()))?;
        let bytes = &bytes[..bytes.len().min(room as usize)];
        let mut done = 0;
        while done < bytes.len() {
            let at = (written + done as u64) % BYTES;
            let len = (bytes.len() - done).min((BYTES - at) as usize);
            self.file.write_all_at(&bytes[done..done + len], PAGE + at).context("write the ring")?;
            done += len;
        }
        self.set(WRITTEN, written + done as u64)?;
        Ok(done)
    }

    /// Notes that no marks will come.
    pub fn set_by_rule(&self) -> Result<()> {
        self.set(BY_RULE, 1)
    }

    /// Where its events' roles come from.
    pub fn roles(&self) -> Result<RoleSource> {
        Ok(if self.number(BY_RULE)? == 0 { RoleSource::Tap } else { RoleSource::ByRule })
    }

    /// Notes that such a QEMU has closed its log.
    pub fn close(&self) -> Result<()> {
        let stage = (Stage::Closed as u32).to_ne_bytes();
        self.file.write_all_at(&stage, STAGE).context("write the ring")
    }

    /// Gives room back: everything before `offset` is kept elsewhere. There the log
    /// stands at this position.
    pub fn give_back(&mut self, offset: u64, position: Position) -> Result<()> {
        self.taken = offset;
        // One write: whoever recovers finds all of it or nothing.
        let numbers = [offset, self.marks_taken, position.icount, position.event];
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        self.file.write_all_at(&bytes, TAKEN).with_context(|| format!("write {}", self.path.display()))
    }

    /// The position in the log where [`Ring::taken`] is.
    pub fn position(&self) -> Result<Position> {
        Ok(Position { icount: self.number(POSITION)?, event: self.number(POSITION + 8)? })
    }

    /// The log's dialect.
    pub fn dialect(&self) -> Result<Dialect> {
        Ok(if self.number(DIALECT)? == 10 { Dialect::Qemu10 } else { Dialect::Qemu7 })
    }

    /// Marks that were not taken yet: from this offset on, this thread.
    pub fn take_marks(&mut self) -> Result<Vec<(u64, Thread)>> {
        let (marks, taken) = self.marks_since(self.marks_taken)?;
        self.marks_taken = taken;
        self.set(MARKS_TAKEN, taken)?;
        Ok(marks)
    }

    /// All marks that are still there, for a recovery: those taken may be needed again.
    pub fn all_marks(&self) -> Result<Vec<(u64, Thread)>> {
        let written = self.number(MARKS_WRITTEN)?;
        Ok(self.marks_since(written.saturating_sub(MARKS))?.0)
    }

    fn marks_since(&self, from: u64) -> Result<(Vec<(u64, Thread)>, u64)> {
        let written = self.number(MARKS_WRITTEN)?;
        ensure!(written.saturating_sub(from) <= MARKS, "{} is damaged", self.path.display());
        // QEMU maps it: the number may have changed since the ring was opened.
        let bytes = self.number(BYTES_AT)?;
        ensure!(bytes == 0 || bytes == BYTES, "{} has other bounds", self.path.display());
        let base = PAGE + bytes;
        let mut marks = Vec::with_capacity(written.saturating_sub(from) as usize);
        let mut at = from;
        while at < written {
            let slot = at % MARKS;
            let len = (written - at).min(MARKS - slot);
            let mut bytes = vec![0; len as usize * 8];
            self.file.read_exact_at(&mut bytes, base + slot * 8).context("read the ring")?;
            marks.extend(bytes.chunks_exact(8).map(|mark| {
                let mark = u64::from_ne_bytes(mark.try_into().expect("8 bytes"));
                (mark >> 8, Thread::of_code(mark as u8))
            }));
            at += len;
        }
        Ok((marks, written))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_at_the_end_of_all_numbers_are_refused() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("ring");
        let mut ring = Ring::create(&path, Mode::Record, Dialect::Qemu7)?;
        for (written, is_sound) in
            [(u64::MAX - BYTES, true), (u64::MAX - BYTES + 1, false), (u64::MAX, false)]
        {
            ring.set(WRITTEN, written)?;
            ring.give_back(written, Position::default())?;
            let pushed = Ring::open(&path)?.push(b"warp").map_err(|error| error.to_string());
            let expected = if is_sound { Ok(4) } else { Err(format!("{} is damaged", path.display())) };
            assert_eq!(pushed, expected, "{written:#x}");
        }
        Ok(())
    }
}
