//! The catalog: rows in sled that say where things lie in the journal.
//!
//! Never the truth: it can be deleted and is rebuilt from the journal. All rows of
//! an apply and the applied index go in one batch. Values are at most 4 KiB, since
//! larger ones can make sled 0.34 panic when it opens.
//!
//! ```text
//! a                          applied index
//! r recording                RecordingRow        c recording first-event   ChunkRow
//! s recording icount         SnapshotRow         b hash                    BlockRow
//! w recording first-event    ChunkRow, written anew and not adopted yet
//! m key                      MetaValue           e                         coordinator's epoch
//! v                          version of these rows
//! ```

use crate::error::{Error, IoContext};
use crate::journal::Location;
use heddle_proto::event::KINDS;
use heddle_proto::{ChunkHeader, Hash, RecordingId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Rows of another version are thrown away, and made anew from the journal.
const VERSION: u32 = 2;
/// Largest value of a row.
const VALUE_BYTES_MAX: usize = 4 << 10;
/// Cap of sled's cache.
const CACHE_BYTES: u64 = 64 << 20;

/// How far a recording is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordingState {
    /// It may grow.
    Recording,
    /// Complete.
    Sealed,
    /// Ended by the loss of its recorder: the durable prefix stands.
    Cut,
}

/// A recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct RecordingRow {
    pub state: RecordingState,
    pub epoch: u64,
    pub token: Vec<u8>,
    pub manifest: Location,
    pub chain: Chain,
    /// The last of the chunks that were there before, if they were written anew.
    pub rewritten_from: Hash,
    /// How far the writing of its chunks anew is.
    pub rewriting: Option<Chain>,
}

/// Chunks one behind the other: what they hold together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Chain {
    pub events: u64,
    pub icount: u64,
    pub chunks: u64,
    pub bytes_stored: u64,
    pub bytes_raw: u64,
    pub last_chunk: Hash,
    pub counts: Vec<u32>,
}

impl Chain {
    /// An empty one, whose first chunk names `anchor` as the one before.
    pub fn new(anchor: Hash) -> Chain {
        Chain {
            events: 0,
            icount: 0,
            chunks: 0,
            bytes_stored: 0,
            bytes_raw: 0,
            last_chunk: anchor,
            counts: vec![0; KINDS],
        }
    }

    /// Whether a chunk follows the last one.
    pub fn is_followed_by(&self, header: &ChunkHeader) -> bool {
        header.first_event == self.events
            && header.previous == self.last_chunk
            && header.first_icount >= self.icount
    }

    /// Adds a chunk that follows, of so many bytes.
    pub fn push(&mut self, header: &ChunkHeader, id: Hash, bytes: usize) {
        self.events = header.end_event();
        self.icount = header.last_icount;
        self.chunks += 1;
        self.bytes_stored += bytes as u64;
        self.bytes_raw += u64::from(header.raw_bytes);
        self.last_chunk = id;
        for (sum, n) in self.counts.iter_mut().zip(header.counts) {
            *sum = sum.saturating_add(n);
        }
    }
}

/// A chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ChunkRow {
    pub at: Location,
    pub id: Hash,
    pub events: u32,
    pub first_icount: u64,
    pub last_icount: u64,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SnapshotRow {
    pub icount: u64,
    pub event: u64,
    pub root: Hash,
    pub digest: Hash,
}

/// A block: zstd-compressed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct BlockRow {
    pub at: Location,
    pub raw_bytes: u32,
}

/// A coordinator's value, at its place in the journal.
pub type MetaValue = Location;

/// A row's key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Vec<u8>);

impl Key {
    /// The applied index.
    pub fn applied() -> Key {
        Key(b"a".to_vec())
    }
    /// The coordinator's epoch.
    pub fn epoch() -> Key {
        Key(b"e".to_vec())
    }
    /// A recording.
    pub fn recording(id: RecordingId) -> Key {
        Key([b"r", &id.0[..]].concat())
    }
    /// A chunk, by its first event.
    pub fn chunk(id: RecordingId, first_event: u64) -> Key {
        Key([b"c", &id.0[..], &first_event.to_be_bytes()].concat())
    }
    /// A chunk that was written anew, by its first event.
    pub fn rewritten(id: RecordingId, first_event: u64) -> Key {
        Key([b"w", &id.0[..], &first_event.to_be_bytes()].concat())
    }
    /// Where an adopted chunk goes that was [written anew](Key::rewritten).
    pub(crate) fn adopted(self) -> Key {
        Key([b"c", &self.0[1..]].concat())
    }
    /// A snapshot, by its icount.
    pub fn snapshot(id: RecordingId, icount: u64) -> Key {
        Key([b"s", &id.0[..], &icount.to_be_bytes()].concat())
    }
    /// A block.
    pub fn block(hash: Hash) -> Key {
        Key([b"b", &hash.0[..]].concat())
    }
    /// The rows' version.
    fn version() -> Key {
        Key(b"v".to_vec())
    }
    /// A coordinator's row.
    pub fn meta(key: &str) -> Key {
        Key([b"m", key.as_bytes()].concat())
    }
}

/// Rows to be written together, over those that are there.
#[derive(Debug, Default)]
pub struct Changes(HashMap<Key, Option<Vec<u8>>>);

impl Changes {
    /// Puts a row.
    pub fn put<T: Serialize>(&mut self, key: Key, value: &T) {
        let bytes = postcard::to_stdvec(value).expect("plain data encodes to memory");
        assert!(bytes.len() <= VALUE_BYTES_MAX, "a catalog row of {} bytes", bytes.len());
        self.0.insert(key, Some(bytes));
    }
    /// Removes a row.
    pub fn delete(&mut self, key: Key) {
        self.0.insert(key, None);
    }
    /// Removes what this batch has put of a recording.
    pub fn delete_of(&mut self, id: RecordingId) {
        let prefixes = prefixes_of(id);
        for (key, value) in &mut self.0 {
            if prefixes.iter().any(|prefix| key.0.starts_with(prefix)) {
                *value = None;
            }
        }
    }
}

/// The beginnings of the keys of a recording's rows: itself, its chunks, its snapshots,
/// its chunks written anew.
fn prefixes_of(id: RecordingId) -> [Vec<u8>; 4] {
    [b"r", b"c", b"s", b"w"].map(|kind| [&kind[..], &id.0[..]].concat())
}

/// The rows.
#[derive(Clone, Debug)]
pub struct Catalog {
    tree: sled::Db,
    path: PathBuf,
}

impl Catalog {
    /// Opens the catalog in `dir`. One that can't be opened, or that is ahead of the
    /// journal (whose last index is `last_index`), is thrown away, to be rebuilt.
    pub fn open(dir: &Path, last_index: u64) -> Result<Catalog, Error> {
        fs::create_dir_all(dir).at("create", dir)?;
        let path = dir.to_path_buf();
        let open = || sled::Config::default().path(dir).cache_capacity(CACHE_BYTES).open();
        let usable = match open() {
            Ok(tree) => Some(Catalog { tree, path: path.clone() }),
            Err(sled::Error::Io(error)) => return Err(Error::Catalog(sled::Error::Io(error))),
            Err(_) => None,
        };
        if let Some(catalog) = usable
            && catalog.applied().is_ok_and(|applied| applied <= last_index)
            && (catalog.is_new()? || catalog.get(&Key::version()).is_ok_and(|found| found == Some(VERSION)))
        {
            return Ok(catalog);
        }
        tracing::warn!(path = %dir.display(), "the catalog does not fit the journal: rebuilding it");
        fs::remove_dir_all(dir).at("remove", dir)?;
        Ok(Catalog { tree: open()?, path })
    }

    /// A row.
    pub fn get<T: DeserializeOwned>(&self, key: &Key) -> Result<Option<T>, Error> {
        self.tree.get(&key.0)?.map(|bytes| self.decode(&bytes)).transpose()
    }

    /// A row as it will be once `changes` are written.
    pub fn get_with<T: DeserializeOwned>(&self, key: &Key, changes: &Changes) -> Result<Option<T>, Error> {
        match changes.0.get(key) {
            Some(bytes) => bytes.as_ref().map(|bytes| self.decode(bytes)).transpose(),
            None => self.get(key),
        }
    }

    /// Whether a row will be there once `changes` are written.
    pub fn has_with(&self, key: &Key, changes: &Changes) -> Result<bool, Error> {
        match changes.0.get(key) {
            Some(bytes) => Ok(bytes.is_some()),
            None => Ok(self.tree.contains_key(&key.0)?),
        }
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, Error> {
        postcard::from_bytes(bytes).map_err(|error| Error::Corrupt {
            path: self.path.clone(),
            offset: 0,
            what: format!("a row does not decode ({error}); remove this directory, it is rebuilt"),
        })
    }

    fn is_new(&self) -> Result<bool, Error> {
        Ok(self.tree.iter().keys().next().transpose()?.is_none())
    }

    /// The rows of a kind, `c` or `w`, that a recording will have once `changes` are written.
    pub(crate) fn chunk_rows_with(
        &self,
        kind: u8,
        id: RecordingId,
        changes: &Changes,
    ) -> Result<BTreeMap<Key, ChunkRow>, Error> {
        let prefix = [&[kind], &id.0[..]].concat();
        let mut rows = BTreeMap::new();
        for row in self.tree.scan_prefix(&prefix) {
            let (key, value) = row?;
            rows.insert(Key(key.to_vec()), Some(value.to_vec()));
        }
        let changed = changes.0.iter().filter(|(key, _)| key.0.starts_with(&prefix));
        rows.extend(changed.map(|(key, value)| (key.clone(), value.clone())));
        let kept = rows.into_iter().filter_map(|(key, value)| Some((key, value?)));
        kept.map(|(key, value)| Ok((key, self.decode(&value)?))).collect()
    }

    /// The index of the last entry that the rows follow.
    pub fn applied(&self) -> Result<u64, Error> {
        Ok(self.get(&Key::applied())?.unwrap_or(0))
    }

    /// Writes rows and the applied index, all or none.
    pub fn write(&self, mut changes: Changes, applied: u64) -> Result<(), Error> {
        changes.put(Key::applied(), &applied);
        changes.put(Key::version(), &VERSION);
        let mut batch = sled::Batch::default();
        for (key, value) in changes.0 {
            match value {
                Some(bytes) => batch.insert(key.0, bytes),
                None => batch.remove(key.0),
            }
        }
        Ok(self.tree.apply_batch(batch)?)
    }

    /// Makes the rows durable. sled's own flush is not: its file is synced too.
    pub fn sync(&self) -> Result<(), Error> {
        self.tree.flush()?;
        let file = self.path.join("db");
        File::open(&file).and_then(|file| file.sync_data()).at("sync", &file)
    }

    /// All recordings.
    pub fn recordings(&self) -> Result<Vec<(RecordingId, RecordingRow)>, Error> {
        let rows = self.tree.scan_prefix(b"r").map(|row| {
            let (key, value) = row?;
            let id = RecordingId::from_slice(&key[1..]).unwrap_or_default();
            Ok((id, self.decode(&value)?))
        });
        rows.collect()
    }

    /// The keys of all of a recording's rows.
    pub fn keys_of(&self, id: RecordingId) -> Result<Vec<Key>, Error> {
        let rows = prefixes_of(id).into_iter().flat_map(|prefix| self.tree.scan_prefix(prefix).keys());
        rows.map(|key| Ok(Key(key?.to_vec()))).collect()
    }

    /// A recording's snapshots, by icount.
    pub fn snapshots(&self, id: RecordingId) -> Result<Vec<SnapshotRow>, Error> {
        let prefix = [b"s", &id.0[..]].concat();
        self.tree.scan_prefix(prefix).map(|row| self.decode(&row?.1)).collect()
    }

    /// Chunks from the one that holds `event` on, at most `count`, with their first events.
    pub fn chunks_from(
        &self,
        id: RecordingId,
        event: u64,
        count: usize,
    ) -> Result<Vec<(u64, ChunkRow)>, Error> {
        let rows = self.try_chunks_from(id, event, count)?;
        // Between its two looks the chunks may have been written anew, with other borders.
        match rows.first() {
            Some((first, _)) if *first <= event => Ok(rows),
            _ => self.try_chunks_from(id, event, count),
        }
    }

    fn try_chunks_from(
        &self,
        id: RecordingId,
        event: u64,
        count: usize,
    ) -> Result<Vec<(u64, ChunkRow)>, Error> {
        let first = Key::chunk(id, 0).0;
        let from = Key::chunk(id, event).0;
        let end = Key::chunk(id, u64::MAX).0;
        let start = self
            .tree
            .range(first..=from.clone())
            .next_back()
            .transpose()?
            .map_or(from, |(key, _)| key.to_vec());
        let rows = self.tree.range(start..=end).take(count).map(|row| {
            let (key, value) = row?;
            let first = key[17..].try_into().map_or(0, u64::from_be_bytes);
            Ok((first, self.decode(&value)?))
        });
        rows.collect()
    }

    /// The coordinator's rows whose keys begin with `prefix`.
    pub fn meta(&self, prefix: &str) -> Result<Vec<(String, MetaValue)>, Error> {
        let rows = self.tree.scan_prefix(Key::meta(prefix).0).map(|row| {
            let (key, value) = row?;
            Ok((String::from_utf8_lossy(&key[1..]).into_owned(), self.decode(&value)?))
        });
        rows.collect()
    }
}
