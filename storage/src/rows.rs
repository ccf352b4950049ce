//! Where rows are kept: sled, or memory for simulations.

use crate::error::{Error, IoContext};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Cap of sled's cache.
const CACHE_BYTES: u64 = 64 << 20;

/// A key and its value.
pub type Row = (Vec<u8>, Vec<u8>);

/// Ordered rows. What was applied is durable once `sync` has returned, and may be before.
pub trait Rows: Send + Sync + std::fmt::Debug {
    /// A value.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error>;
    /// The first rows from `from` to `to`, both included.
    fn range(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Row>, Error>;
    /// The last row from `from` to `to`, both included.
    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Row>, Error>;
    /// Puts and removes, all or none.
    fn apply(&self, changes: &BTreeMap<Vec<u8>, Option<Vec<u8>>>) -> Result<(), Error>;
    /// Makes it durable.
    fn sync(&self) -> Result<(), Error>;
}

/// Rows in sled.
#[derive(Debug)]
pub struct SledRows {
    tree: sled::Db,
    path: PathBuf,
}

impl SledRows {
    /// Opens the rows in `dir`; what sled can't read is thrown away, to be rebuilt.
    pub fn open(dir: &Path) -> Result<SledRows, Error> {
        fs::create_dir_all(dir).at("create", dir)?;
        let open = || sled::Config::default().path(dir).cache_capacity(CACHE_BYTES).open();
        let path = dir.to_path_buf();
        // sled 0.34 panics at some files that it can't read, and calls others I/O errors.
        let why = match std::panic::catch_unwind(open) {
            Ok(Ok(tree)) => return Ok(SledRows { tree, path }),
            Ok(Err(sled::Error::Io(error))) if error.raw_os_error().is_some() => {
                return Err(Error::Catalog(sled::Error::Io(error)));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "sled panicked".to_string(),
        };
        tracing::warn!(path = %dir.display(), why, "the catalog can't be read: rebuilding it");
        fs::remove_dir_all(dir).at("remove", dir)?;
        fs::create_dir_all(dir).at("create", dir)?;
        Ok(SledRows { tree: open()?, path })
    }
}

impl Rows for SledRows {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.tree.get(key)?.map(|value| value.to_vec()))
    }

    fn range(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Row>, Error> {
        let rows = self.tree.range(from..=to).take(limit);
        rows.map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec())).map_err(Error::from)).collect()
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Row>, Error> {
        let row = self.tree.range(from..=to).next_back().transpose()?;
        Ok(row.map(|(key, value)| (key.to_vec(), value.to_vec())))
    }

    fn apply(&self, changes: &BTreeMap<Vec<u8>, Option<Vec<u8>>>) -> Result<(), Error> {
        let mut batch = sled::Batch::default();
        for (key, value) in changes {
            match value {
                Some(value) => batch.insert(&key[..], &value[..]),
                None => batch.remove(&key[..]),
            }
        }
        Ok(self.tree.apply_batch(batch)?)
    }

    /// sled's own flush is not durable: its file is synced too.
    fn sync(&self) -> Result<(), Error> {
        self.tree.flush()?;
        let file = self.path.join("db");
        File::open(&file).and_then(|file| file.sync_data()).at("sync", &file)
    }
}

/// Rows in memory. A simulated crash goes back to what was synced, or to what came after.
#[derive(Debug, Default)]
pub struct MemRows {
    now: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
    synced: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl MemRows {
    /// What a power cut leaves: the synced state.
    pub fn cut(&self) {
        *lock(&self.now) = lock(&self.synced).clone();
    }

    /// A copy, as somebody would keep one of the directory.
    pub fn copy(&self) -> MemRows {
        let now = lock(&self.now).clone();
        MemRows { now: Mutex::new(now.clone()), synced: Mutex::new(now) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rows for MemRows {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(lock(&self.now).get(key).cloned())
    }

    fn range(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Row>, Error> {
        let now = lock(&self.now);
        let rows = now.range(from.to_vec()..=to.to_vec()).take(limit);
        Ok(rows.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Row>, Error> {
        let now = lock(&self.now);
        let row = now.range(from.to_vec()..=to.to_vec()).next_back();
        Ok(row.map(|(key, value)| (key.clone(), value.clone())))
    }

    fn apply(&self, changes: &BTreeMap<Vec<u8>, Option<Vec<u8>>>) -> Result<(), Error> {
        let mut now = lock(&self.now);
        for (key, value) in changes {
            match value {
                Some(value) => now.insert(key.clone(), value.clone()),
                None => now.remove(key),
            };
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        *lock(&self.synced) = lock(&self.now).clone();
        Ok(())
    }
}
