//! The catalog: rows that say where things lie in the journal, and a layer in memory
//! for those that are not written yet.
//!
//! Never the truth: it can be deleted and is rebuilt from the journal. Applying writes to
//! memory alone; the rows of many entries, with the applied indexes they follow, go to
//! disk in one batch, off the path of acknowledgements.

use crate::error::Error;
use crate::journal::Location;
use crate::rows::{Row, Rows};
use crate::schema::{
    BlockRow, ChunkRow, GroupRow, Key, MemberRow, RecordingRow, SnapshotRow, chunks_of, decode, encode,
    locations, relocated,
};
use heddle_proto::{Hash, RecordingId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::Notify;

/// Rows that are read from disk at a time.
const STEP: usize = 512;

/// Rows by key; `None` is a removed one.
pub type Changes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

#[derive(Debug, Default)]
struct Overlay {
    active: Changes,
    /// On its way to disk.
    frozen: Option<Arc<Changes>>,
    /// About so many bytes are in `active`.
    bytes: usize,
    /// Bytes that rows point at, by segment.
    live: BTreeMap<u64, u64>,
}

impl Overlay {
    fn get(&self, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        self.active.get(key).or_else(|| self.frozen.as_ref().and_then(|frozen| frozen.get(key)))
    }
}

/// The rows. Clones share them.
#[derive(Clone, Debug)]
pub struct Catalog {
    rows: Arc<dyn Rows>,
    overlay: Arc<RwLock<Overlay>>,
    changed: Arc<Notify>,
}

impl Catalog {
    /// A catalog over stored rows.
    pub fn new(rows: Arc<dyn Rows>) -> Catalog {
        Catalog { rows, overlay: Arc::default(), changed: Arc::default() }
    }

    /// The rows on disk.
    pub fn rows(&self) -> &Arc<dyn Rows> {
        &self.rows
    }

    fn read(&self) -> RwLockReadGuard<'_, Overlay> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins changes. Readers wait until it is dropped.
    pub fn begin(&self) -> Txn<'_> {
        Txn { rows: &self.rows, overlay: self.overlay.write().unwrap_or_else(PoisonError::into_inner) }
    }

    /// A row.
    pub fn get<T: DeserializeOwned>(&self, key: &Key) -> Result<Option<T>, Error> {
        get_in(&*self.rows, &self.read(), &key.0)?.map(|value| decode(&key.0, &value)).transpose()
    }

    /// A value, as bytes.
    pub fn raw(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        get_in(&*self.rows, &self.read(), key)
    }

    /// Wakes who waits for rows to change.
    pub fn changed(&self) -> &Notify {
        &self.changed
    }

    /// The rows from `from` to `to`, both included, at most about `limit`, and where to go on.
    pub fn range(&self, from: &[u8], to: &[u8], limit: usize) -> Result<(Vec<Row>, Option<Vec<u8>>), Error> {
        range_in(&*self.rows, &self.read(), from, to, limit)
    }

    /// Gives every row of a span to `visit`; those that change meanwhile as they are then.
    pub fn visit(
        &self,
        (from, to): (Vec<u8>, Vec<u8>),
        mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut next = Some(from);
        while let Some(from) = next {
            let (rows, then) = self.range(&from, &to, STEP)?;
            for (key, value) in &rows {
                visit(key, value)?;
            }
            next = then;
        }
        Ok(())
    }

    /// How far a group is.
    pub fn group(&self, group: u32) -> Result<GroupRow, Error> {
        Ok(self.get(&Key::group(group))?.unwrap_or_default())
    }

    /// All recordings of a group.
    pub fn recordings(&self, group: u32) -> Result<Vec<(RecordingId, RecordingRow)>, Error> {
        let mut rows = vec![];
        self.visit(Key::span_of(group, b'r', &[]), |key, value| {
            rows.push((Key::id_of(key), decode(key, value)?));
            Ok(())
        })?;
        Ok(rows)
    }

    /// A recording's snapshots, by icount.
    pub fn snapshots(&self, group: u32, id: RecordingId) -> Result<Vec<SnapshotRow>, Error> {
        let mut rows = vec![];
        self.visit(Key::span_of(group, b's', &id.0), |key, value| {
            rows.push(decode(key, value)?);
            Ok(())
        })?;
        Ok(rows)
    }

    /// The chunks of the page that holds `event`, from that event on, and the page's key;
    /// none behind the end.
    pub fn chunks_at(
        &self,
        group: u32,
        id: RecordingId,
        event: u64,
    ) -> Result<(Vec<u8>, Vec<ChunkRow>), Error> {
        let first = Key::page(group, b'c', id, 0).0;
        let page = last_in(&*self.rows, &self.read(), &first, &Key::page(group, b'c', id, event).0)?;
        let (key, page) = page.unwrap_or_default();
        let chunks = chunks_of(&page).filter(|chunk| chunk.end_event() > event).collect();
        Ok((key, chunks))
    }

    /// The first event of the chunk that holds the last event at or before an icount.
    pub fn event_at(&self, group: u32, id: RecordingId, icount: u64) -> Result<u64, Error> {
        // Pages are ordered by icount as by event: halve the events until one chunk is left.
        let row: Option<RecordingRow> = self.get(&Key::recording(group, id))?;
        let (mut low, mut high) = (0, row.map_or(0, |row| row.chain.events));
        while low < high {
            let middle = low + (high - low) / 2;
            let (_, page) = self.chunks_at(group, id, middle)?;
            let Some(chunk) = page.first() else { break };
            if chunk.last_icount < icount {
                low = chunk.end_event();
            } else if chunk.first_icount > icount && chunk.first_event > low {
                high = chunk.first_event;
            } else if chunk.first_event > low {
                // It has the icount; an earlier one may have it, too.
                high = chunk.first_event;
            } else {
                return Ok(chunk.first_event);
            }
        }
        Ok(low)
    }

    /// The coordinator's rows whose keys begin with `prefix`.
    pub fn meta(&self, prefix: &str) -> Result<Vec<(String, Location)>, Error> {
        let mut rows = vec![];
        self.visit(Key::meta(prefix).span(), |key, value| {
            let name = String::from_utf8_lossy(Key::rest(key)).into_owned();
            rows.push((name, decode(key, value)?));
            Ok(())
        })?;
        Ok(rows)
    }

    /// All replicas that the cluster knows of, removed ones included.
    pub fn members(&self) -> Result<BTreeMap<u64, MemberRow>, Error> {
        let mut rows = BTreeMap::new();
        self.visit(Key::span_of(0, b'n', &[]), |key, value| {
            let id = Key::rest(key).try_into().map_or(0, u64::from_be_bytes);
            rows.insert(id, decode(key, value)?);
            Ok(())
        })?;
        Ok(rows)
    }

    /// Whether somebody refers to a block.
    pub fn owns(&self, group: u32, hash: Hash, owner: RecordingId) -> Result<bool, Error> {
        let Some(row) = self.get::<BlockRow>(&Key::block(group, hash))? else { return Ok(false) };
        let further = Key::owner(group, hash, owner);
        Ok(row.owner == owner || get_in(&*self.rows, &self.read(), &further.0)?.is_some())
    }

    /// Bytes that rows point at, by segment.
    pub fn live(&self) -> BTreeMap<u64, u64> {
        self.read().live.clone()
    }

    /// Counts the live bytes of all rows anew.
    pub fn count_live(&self) -> Result<(), Error> {
        let mut live: BTreeMap<u64, u64> = BTreeMap::new();
        self.visit((vec![], vec![0xff; 8]), |key, value| {
            for at in locations(key, value)? {
                *live.entry(at.segment).or_default() += u64::from(at.bytes);
            }
            Ok(())
        })?;
        self.begin().overlay.live = live;
        Ok(())
    }

    /// Rows and bytes that wait in memory.
    pub fn waiting(&self) -> (usize, usize) {
        let overlay = self.read();
        (overlay.active.len(), overlay.bytes)
    }

    /// Takes what waits in memory, to be written; `None` if the last is not written yet.
    pub fn freeze(&self) -> Option<Arc<Changes>> {
        let mut overlay = self.overlay.write().unwrap_or_else(PoisonError::into_inner);
        if overlay.frozen.is_some() {
            return None;
        }
        overlay.bytes = 0;
        let frozen = Arc::new(std::mem::take(&mut overlay.active));
        overlay.frozen = Some(frozen.clone());
        Some(frozen)
    }

    /// What was frozen is on disk.
    pub fn thaw(&self) {
        self.overlay.write().unwrap_or_else(PoisonError::into_inner).frozen = None;
    }
}

fn get_in(rows: &dyn Rows, overlay: &Overlay, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    match overlay.get(key) {
        Some(value) => Ok(value.clone()),
        None => rows.get(key),
    }
}

fn range_in(
    rows: &dyn Rows,
    overlay: &Overlay,
    from: &[u8],
    to: &[u8],
    limit: usize,
) -> Result<(Vec<Row>, Option<Vec<u8>>), Error> {
    let stored = rows.range(from, to, limit)?;
    let is_cut = stored.len() == limit;
    let end = if is_cut { stored.last().map_or(to, |(key, _)| &key[..]).to_vec() } else { to.to_vec() };
    let mut merged: Changes = stored.into_iter().map(|(key, value)| (key, Some(value))).collect();
    let layers = overlay.frozen.iter().map(|frozen| &**frozen).chain([&overlay.active]);
    for layer in layers {
        let changed = layer.range(from.to_vec()..=end.clone());
        merged.extend(changed.map(|(key, value)| (key.clone(), value.clone())));
    }
    let next = is_cut.then(|| [&end[..], &[0]].concat());
    Ok((merged.into_iter().filter_map(|(key, value)| Some((key, value?))).collect(), next))
}

fn last_in(rows: &dyn Rows, overlay: &Overlay, from: &[u8], to: &[u8]) -> Result<Option<Row>, Error> {
    let mut to = to.to_vec();
    loop {
        let mut newest: Option<Row> = rows.last(from, &to)?;
        let mut is_removed = false;
        let layers = overlay.frozen.iter().map(|frozen| &**frozen).chain([&overlay.active]);
        for layer in layers {
            if let Some((key, value)) = layer.range(from.to_vec()..=to.clone()).next_back()
                && newest.as_ref().is_none_or(|(found, _)| key >= found)
            {
                is_removed = value.is_none();
                newest = Some((key.clone(), value.clone().unwrap_or_default()));
            }
        }
        match newest {
            Some((key, _)) if is_removed => {
                // The key before this one: nothing lies between.
                to = key;
                match to.pop() {
                    Some(0) | None => {}
                    Some(byte) => {
                        to.push(byte - 1);
                        to.extend_from_slice(&[0xff; 8]);
                    }
                }
                if to[..] < *from {
                    return Ok(None);
                }
            }
            found => return Ok(found),
        }
    }
}

/// Changes to the rows, seen at once by whoever reads after it.
pub struct Txn<'a> {
    rows: &'a Arc<dyn Rows>,
    overlay: RwLockWriteGuard<'a, Overlay>,
}

impl Txn<'_> {
    /// A value, as bytes.
    pub fn get_raw(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        get_in(&**self.rows, &self.overlay, key)
    }

    /// A row.
    pub fn get<T: DeserializeOwned>(&self, key: &Key) -> Result<Option<T>, Error> {
        self.get_raw(&key.0)?.map(|value| decode(&key.0, &value)).transpose()
    }

    /// Whether there is such a row.
    pub fn has(&self, key: &Key) -> Result<bool, Error> {
        Ok(self.get_raw(&key.0)?.is_some())
    }

    /// Puts a row.
    pub fn put<T: Serialize>(&mut self, key: &Key, value: &T) {
        self.put_raw(key.0.clone(), encode(value));
    }

    /// Puts a row.
    pub fn put_raw(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.overlay.bytes += key.len() + value.len();
        self.overlay.active.insert(key, Some(value));
    }

    /// Removes a row.
    pub fn remove(&mut self, key: Vec<u8>) {
        self.overlay.bytes += key.len();
        self.overlay.active.insert(key, None);
    }

    /// Appends to the bytes of a row, which it makes if there is none.
    pub fn extend(&mut self, key: &Key, with: impl FnOnce(&mut Vec<u8>)) -> Result<(), Error> {
        if !matches!(self.overlay.active.get(&key.0), Some(Some(_))) {
            let value = self.get_raw(&key.0)?.unwrap_or_default();
            self.put_raw(key.0.clone(), value);
        }
        if let Some(Some(value)) = self.overlay.active.get_mut(&key.0) {
            let before = value.len();
            with(value);
            let grown = value.len() - before;
            self.overlay.bytes += grown;
        }
        Ok(())
    }

    /// What `look` says of a value, which is not copied if it is in memory.
    pub fn look<T>(&self, key: &Key, look: impl FnOnce(&[u8]) -> T) -> Result<Option<T>, Error> {
        Ok(match self.overlay.get(&key.0) {
            Some(value) => value.as_deref().map(look),
            None => self.rows.get(&key.0)?.as_deref().map(look),
        })
    }

    /// All rows of a span.
    pub fn scan(&self, (from, to): (Vec<u8>, Vec<u8>)) -> Result<Vec<Row>, Error> {
        let mut found = vec![];
        let mut next = Some(from);
        while let Some(from) = next {
            let (rows, then) = range_in(&**self.rows, &self.overlay, &from, &to, STEP)?;
            found.extend(rows);
            next = then;
        }
        Ok(found)
    }

    /// The last row of a span.
    pub fn last(&self, from: &Key, to: &Key) -> Result<Option<Row>, Error> {
        last_in(&**self.rows, &self.overlay, &from.0, &to.0)
    }

    /// A row now points at these bytes.
    pub fn refer(&mut self, at: Location) {
        *self.overlay.live.entry(at.segment).or_default() += u64::from(at.bytes);
    }

    /// A row points at these bytes no longer.
    pub fn release(&mut self, at: Location) {
        if let Some(live) = self.overlay.live.get_mut(&at.segment) {
            *live = live.saturating_sub(u64::from(at.bytes));
        }
    }

    /// Removes a row, and lets go what it points at.
    pub fn drop_row(&mut self, key: Vec<u8>, value: &[u8]) -> Result<(), Error> {
        for at in locations(&key, value)? {
            self.release(at);
        }
        self.remove(key);
        Ok(())
    }

    /// Puts the rows of a whole group in the place of those it has.
    pub fn replace_group(&mut self, group: u32, rows: Vec<Row>) -> Result<(), Error> {
        for (key, value) in self.scan(Key::span_of_group(group))? {
            self.drop_row(key, &value)?;
        }
        for (key, value) in rows {
            for at in locations(&key, &value)? {
                self.refer(at);
            }
            self.put_raw(key, value);
        }
        Ok(())
    }

    /// Points a row at where its bytes were moved to, if it still points at where they were.
    pub fn relocate(&mut self, key: &[u8], moved: &BTreeMap<(u64, u32), Location>) -> Result<(), Error> {
        let Some(value) = self.get_raw(key)? else { return Ok(()) };
        let mut changes = vec![];
        let value = relocated(key, &value, |at| match moved.get(&(at.segment, at.offset)) {
            Some(to) if to.bytes == at.bytes && to.crc == at.crc => {
                changes.push((at, *to));
                *to
            }
            _ => at,
        })?;
        if changes.is_empty() {
            return Ok(());
        }
        for (from, to) in changes {
            self.release(from);
            self.refer(to);
        }
        self.put_raw(key.to_vec(), value);
        Ok(())
    }
}
