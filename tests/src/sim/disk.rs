//! A simulated disk: what was not synced may be lost, in part or whole, when it is cut, and
//! what was synced may rot.

use heddle_storage::disk::{Disk, DiskFile};
use heddle_storage::error::Error;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What reaches the disk whole, or not at all.
const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct File {
    /// As readers see it.
    now: Vec<u8>,
    /// As it is on the disk.
    durable: Vec<u8>,
    /// Written since the last sync.
    written: Vec<(usize, usize)>,
    /// Bytes that have rotted, and were not written since.
    rotten: BTreeSet<usize>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Arc<Mutex<File>>>,
    free_bytes: u64,
    fails: bool,
    /// Every open file is of this life; those of an earlier one are dead.
    life: u64,
}

/// The disk. Clones are the same one.
#[derive(Clone, Debug)]
pub struct SimDisk(Arc<Mutex<State>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for SimDisk {
    fn default() -> Self {
        SimDisk(Arc::new(Mutex::new(State { free_bytes: u64::MAX, ..State::default() })))
    }
}

impl SimDisk {
    /// The power is cut: of what was not synced, sectors reach the disk or not, as it comes.
    pub fn cut(&self, rng: &mut ChaCha8Rng) {
        let mut state = lock(&self.0);
        state.life += 1;
        state.fails = false;
        for file in state.files.values_mut() {
            let old = lock(file);
            let mut durable = old.durable.clone();
            // Often nothing of it, often all, sometimes a part.
            let luck = [0.0, 1.0, 0.5][rng.gen_range(0..3)];
            for (at, len) in &old.written {
                for from in (*at..at + len).step_by(SECTOR) {
                    let to = (from + SECTOR).min(at + len);
                    if rng.gen_bool(luck) {
                        durable[from..to].copy_from_slice(&old.now[from..to]);
                    }
                }
            }
            let rotten = old.rotten.clone();
            let new = File { now: durable.clone(), durable, written: vec![], rotten };
            drop(old);
            *file = Arc::new(Mutex::new(new));
        }
    }

    /// From now on so many bytes can be written to new files.
    pub fn set_free(&self, bytes: u64) {
        lock(&self.0).free_bytes = bytes;
    }

    /// Whether no file can be made.
    pub fn is_full(&self) -> bool {
        lock(&self.0).free_bytes == 0
    }

    /// From now on writes and syncs fail, until it is cut.
    pub fn fail(&self) {
        lock(&self.0).fails = true;
    }

    /// Whether writes fail.
    pub fn is_failing(&self) -> bool {
        lock(&self.0).fails
    }

    /// From now on writes and syncs go well again.
    pub fn recover(&self) {
        lock(&self.0).fails = false;
    }

    /// All files, as they are on the disk.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let state = lock(&self.0);
        state.files.iter().map(|(name, file)| (name.clone(), lock(file).durable.clone())).collect()
    }

    /// What was written long ago changes: a bit, a byte, or all of a sector.
    pub fn rot(&self, name: &str, at: usize, rng: &mut ChaCha8Rng) {
        let state = lock(&self.0);
        let Some(file) = state.files.get(name) else { return };
        let mut file = lock(file);
        let File { now, durable, rotten, .. } = &mut *file;
        let sector = at / SECTOR * SECTOR..at / SECTOR * SECTOR + SECTOR;
        let flip: u8 = if rng.gen_bool(0.5) { 1u8 << rng.gen_range(0u32..8) } else { rng.gen_range(1..=255) };
        if rng.gen_bool(0.2) && durable[sector.clone()].iter().any(|byte| *byte != 0) {
            rotten.extend(sector.clone().filter(|at| durable[*at] != 0));
            durable[sector.clone()].fill(0);
            now[sector].fill(0);
        } else {
            rotten.insert(at);
            durable[at] ^= flip;
            now[at] = durable[at];
        }
    }

    /// Whether any of these bytes has rotted.
    pub fn is_rotten(&self, name: &str, at: usize, len: usize) -> bool {
        let state = lock(&self.0);
        state.files.get(name).is_some_and(|file| lock(file).rotten.range(at..at + len).next().is_some())
    }

    /// The bytes of a file that are on the disk.
    pub fn durable(&self, name: &str, at: usize, len: usize) -> Option<Vec<u8>> {
        let state = lock(&self.0);
        let file = lock(state.files.get(name)?);
        file.durable.get(at..at + len).map(<[u8]>::to_vec)
    }
}

fn failed() -> io::Error {
    io::Error::other("the simulated disk fails")
}

impl Disk for SimDisk {
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("sim").join(name)
    }

    fn list(&self) -> Result<Vec<String>, Error> {
        Ok(lock(&self.0).files.keys().cloned().collect())
    }

    fn create(&self, name: &str, bytes: u64) -> Result<(), Error> {
        let mut state = lock(&self.0);
        if state.fails || state.free_bytes < bytes {
            let source = if state.fails { failed() } else { io::ErrorKind::StorageFull.into() };
            return Err(Error::Io { what: "create", path: self.path(name), source });
        }
        let zeros = vec![0; bytes as usize];
        let file = File { now: zeros.clone(), durable: zeros, ..File::default() };
        state.files.insert(name.into(), Arc::new(Mutex::new(file)));
        Ok(())
    }

    fn open(&self, name: &str) -> Result<Arc<dyn DiskFile>, Error> {
        let state = lock(&self.0);
        let file = state.files.get(name).cloned();
        let missing =
            || Error::Io { what: "open", path: self.path(name), source: io::ErrorKind::NotFound.into() };
        let file = file.ok_or_else(missing)?;
        Ok(Arc::new(SimFile { disk: self.clone(), file, life: state.life }))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        let mut state = lock(&self.0);
        if let Some(file) = state.files.remove(from) {
            state.files.insert(to.into(), file);
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        lock(&self.0).files.remove(name);
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64, Error> {
        Ok(lock(&self.0).free_bytes)
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    file: Arc<Mutex<File>>,
    life: u64,
}

impl SimFile {
    fn check(&self) -> io::Result<()> {
        let state = lock(&self.disk.0);
        if state.fails || state.life != self.life { Err(failed()) } else { Ok(()) }
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.file).now.len() as u64)
    }

    fn read(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        let file = lock(&self.file);
        let bytes = file.now.get(at as usize..at as usize + into.len());
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, parts: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        self.check()?;
        let mut file = lock(&self.file);
        let mut at = at as usize;
        for part in parts {
            if at + part.len() > file.now.len() {
                return Err(io::Error::other("a write behind the segment's end"));
            }
            file.now[at..at + part.len()].copy_from_slice(part);
            file.written.push((at, part.len()));
            file.rotten.retain(|rotten| !(at..at + part.len()).contains(rotten));
            at += part.len();
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.check()?;
        let mut file = lock(&self.file);
        let File { now, durable, written, .. } = &mut *file;
        for (at, len) in written.drain(..) {
            durable[at..at + len].copy_from_slice(&now[at..at + len]);
        }
        Ok(())
    }
}
