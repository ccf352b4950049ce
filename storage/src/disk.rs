//! The file system as the journal sees it: few operations, so that a simulated one can
//! take its place and forget, tear and refuse.

use crate::error::{Error, IoContext};
use rustix::fs::OFlags;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes written at a time when a file is filled with zeros.
const ZEROS: usize = 1 << 20;
/// What direct writes are aligned to, in the file and in memory.
const ALIGNMENT: usize = 4 << 10;

/// A directory of files.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// For messages.
    fn path(&self, name: &str) -> PathBuf;
    /// The names of all files.
    fn list(&self) -> Result<Vec<String>, Error>;
    /// Makes a file of `bytes` zeros, durably.
    fn create(&self, name: &str, bytes: u64) -> Result<(), Error>;
    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> Result<Arc<dyn DiskFile>, Error>;
    /// Renames a file, durably.
    fn rename(&self, from: &str, to: &str) -> Result<(), Error>;
    /// Removes a file.
    fn remove(&self, name: &str) -> Result<(), Error>;
    /// Bytes that can still be written.
    fn free_bytes(&self) -> Result<u64, Error>;
}

/// An open file.
pub trait DiskFile: Send + Sync + std::fmt::Debug {
    /// Its length.
    fn len(&self) -> io::Result<u64>;
    /// Whether it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Fills `into` from `at` on.
    fn read(&self, into: &mut [u8], at: u64) -> io::Result<()>;
    /// Writes all parts, one behind the other, from `at` on.
    fn write(&self, parts: &[IoSlice<'_>], at: u64) -> io::Result<()>;
    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of a real file system.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// Opens the directory, or makes it.
    pub fn open(path: &Path) -> Result<Directory, Error> {
        fs::create_dir_all(path).at("create", path)?;
        Ok(Directory(path.to_path_buf()))
    }

    fn sync(&self) -> Result<(), Error> {
        File::open(&self.0).and_then(|dir| dir.sync_all()).at("sync", &self.0)
    }
}

impl Disk for Directory {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn list(&self) -> Result<Vec<String>, Error> {
        let names = fs::read_dir(&self.0).at("list", &self.0)?;
        names.map(|entry| Ok(entry.at("list", &self.0)?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn create(&self, name: &str, bytes: u64) -> Result<(), Error> {
        let path = self.path(name);
        let part = path.with_extension("part");
        let fill = || {
            File::create(&part)?;
            let file = RealFile::open(&part)?;
            let mut zeros = Aligned::default();
            let zeros = zeros.gather(&[IoSlice::new(&vec![0; ZEROS])]);
            for at in (0..bytes).step_by(ZEROS) {
                let n = (bytes - at).min(ZEROS as u64) as usize;
                file.write_aligned(&zeros[..n], at)?;
            }
            file.file.sync_all()
        };
        if let Err(error) = fill() {
            let _ = fs::remove_file(&part);
            return Err(error).at("fill with zeros", &part);
        }
        fs::rename(&part, &path).at("put in place", &path)?;
        self.sync()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn DiskFile>, Error> {
        let path = self.path(name);
        Ok(Arc::new(RealFile::open(&path).at("open", &path)?))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        let path = self.path(to);
        fs::rename(self.path(from), &path).at("put in place", &path)?;
        self.sync()
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path(name);
        fs::remove_file(&path).at("remove", &path)
    }

    fn free_bytes(&self) -> Result<u64, Error> {
        let stat = rustix::fs::statvfs(&self.0).map_err(io::Error::from).at("look at", &self.0)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// A file that is written past the page cache, if the file system allows it, and read
/// through it. A segment that is written once and seldom read needs no copy in memory: the
/// copying of zeros into fresh pages alone was half of all CPU time under load.
#[derive(Debug)]
struct RealFile {
    file: File,
    direct: Option<File>,
    buffer: Mutex<Aligned>,
}

/// Bytes whose first lies at a multiple of 4 KiB in memory, as direct writes need it.
#[derive(Debug, Default)]
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    /// The parts one behind the other.
    fn gather(&mut self, parts: &[IoSlice<'_>]) -> &[u8] {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if self.bytes.len() < len + ALIGNMENT {
            self.bytes = vec![0; len + ALIGNMENT];
            let address = self.bytes.as_ptr() as usize;
            self.start = address.next_multiple_of(ALIGNMENT) - address;
        }
        let mut at = self.start;
        for part in parts {
            self.bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        &self.bytes[self.start..at]
    }
}

impl RealFile {
    fn open(path: &Path) -> io::Result<RealFile> {
        let options = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            options
        };
        let file = options().open(path)?;
        // Not every file system has it; tmpfs long had not.
        let direct = options().custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok();
        Ok(RealFile { file, direct, buffer: Mutex::default() })
    }

    /// Writes bytes that lie aligned in memory; directly, if they are in the file, too.
    fn write_aligned(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let is_aligned = bytes.len() % ALIGNMENT == 0 && at % ALIGNMENT as u64 == 0;
        match &self.direct {
            Some(direct) if is_aligned => direct.write_all_at(bytes, at),
            _ => self.file.write_all_at(bytes, at),
        }
    }
}

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }

    fn write(&self, parts: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_aligned(buffer.gather(parts), at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
