//! The file system as the journal sees it: few operations, so that a simulated one can
//! take its place and forget, tear and refuse.

use crate::error::{Error, IoContext};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes written at a time when a file is filled with zeros.
const ZEROS: usize = 1 << 20;

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
            let mut file = File::create(&part)?;
            let zeros = vec![0; ZEROS];
            let mut left = bytes as usize;
            while left > 0 {
                let n = left.min(ZEROS);
                file.write_all(&zeros[..n])?;
                left -= n;
            }
            file.sync_all()
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
        let file = OpenOptions::new().read(true).write(true).open(&path).at("open", &path)?;
        Ok(Arc::new(RealFile(file)))
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

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        self.0.read_exact_at(into, at)
    }

    fn write(&self, parts: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        // One call with all parts, without gathering them in a buffer first.
        let mut parts: Vec<IoSlice<'_>> = parts.to_vec();
        let mut parts = &mut parts[..];
        let mut at = at;
        while !parts.is_empty() {
            let most = parts.len().min(1024);
            let written = rustix::io::pwritev(&self.0, &parts[..most], at)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at += written as u64;
            IoSlice::advance_slices(&mut parts, written);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
