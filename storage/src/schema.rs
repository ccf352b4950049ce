//! The catalog's rows: keys, values, and where a value says that bytes lie.
//!
//! ```text
//! key = group u16 (big-endian) | kind | rest          value
//!   a                                                 GroupRow: applied index and members
//!   r recording                                       RecordingRow
//!   c recording first-event                           a page of chunks, from that event on
//!   w recording first-event                           the same, written anew and not adopted yet
//!   s recording icount                                SnapshotRow
//!   b hash                                            BlockRow, with its first owner
//!   o hash owner                                      a further owner of the block
//!   q owner page                                      hashes of the blocks it owns
//!   l recording                                       the last entry that made it own a block
//!                                                     or, in group 0, placed it
//! of group 0 alone:
//!   m key                                             Location of a coordinator's value
//!   e                                                 the coordinator's epoch
//!   p recording                                       the shard it was placed on
//!   n replica                                         MemberRow
//! of no group (0xffff): v version of these rows, k number of the newest checkpoint
//! ```
//! Values have at most 4 KiB, since larger ones can make sled 0.34 panic when it opens.

use crate::error::Error;
use crate::journal::Location;
use heddle_proto::event::KINDS;
use heddle_proto::{ChunkHeader, Hash, RecordingId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Rows of another version are thrown away, and made anew from the journal.
pub const VERSION: u32 = 3;
/// Largest value of a row.
pub const VALUE_BYTES_MAX: usize = 4 << 10;
/// The group of rows that belong to none.
pub const NO_GROUP: u32 = 0xffff;
/// Bytes of a chunk in a page.
const CHUNK_BYTES: usize = 80;
/// Chunks in a page, at most.
const PAGE_CHUNKS: usize = 50;
/// Bytes of the chunks of a page, at most one chunk more.
const PAGE_BYTES: u64 = 4 << 20;
/// Hashes in a page of an owner, at most.
const PAGE_HASHES: usize = 120;

/// How far a recording is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordingState {
    /// It may grow.
    Recording,
    /// Complete.
    Sealed,
    /// Ended by the loss of its recorder: the durable prefix stands.
    Cut,
    /// Gone; stays until no block is owned by it any more.
    Deleted,
}

/// How far a group is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRow {
    /// The last entry that the rows follow.
    pub applied: u64,
    /// Its term.
    pub term: u64,
    /// The members, as raft-rs encodes them.
    pub conf: Vec<u8>,
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
    /// First event of the page that the next chunk goes to.
    pub page: u64,
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
            page: 0,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ChunkRow {
    pub at: Location,
    pub id: Hash,
    pub first_event: u64,
    pub events: u32,
    pub first_icount: u64,
    pub last_icount: u64,
}

impl ChunkRow {
    /// The event behind its last one.
    pub fn end_event(&self) -> u64 {
        self.first_event.saturating_add(u64::from(self.events))
    }

    /// Appends it to a page.
    pub fn encode(&self, page: &mut Vec<u8>) {
        page.extend_from_slice(&self.at.segment.to_le_bytes());
        for word in [self.at.offset, self.at.bytes, self.at.crc, self.events] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        for word in [self.first_event, self.first_icount, self.last_icount] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        page.extend_from_slice(&self.id.0);
    }

    fn decode(bytes: &[u8; CHUNK_BYTES]) -> ChunkRow {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let at = Location { segment: u64_at(0), offset: u32_at(8), bytes: u32_at(12), crc: u32_at(16) };
        ChunkRow {
            at,
            events: u32_at(20),
            first_event: u64_at(24),
            first_icount: u64_at(32),
            last_icount: u64_at(40),
            id: Hash(bytes[48..80].try_into().expect("32 bytes")),
        }
    }
}

/// The chunks of a page.
pub fn chunks_of(page: &[u8]) -> impl DoubleEndedIterator<Item = ChunkRow> {
    page.chunks_exact(CHUNK_BYTES).map(|bytes| ChunkRow::decode(bytes.try_into().expect("exact chunks")))
}

/// Whether a page takes no more.
pub fn is_page_full(page: &[u8]) -> bool {
    // A page travels whole, with the bytes it names.
    let length = |chunk: &[u8]| u64::from(u32::from_le_bytes(chunk[12..16].try_into().expect("4 bytes")));
    let bytes: u64 = page.chunks_exact(CHUNK_BYTES).map(length).sum();
    page.len() >= CHUNK_BYTES * PAGE_CHUNKS || bytes >= PAGE_BYTES
}

/// Whether an owner's page takes no more.
pub fn is_hashes_full(page: &[u8]) -> bool {
    page.len() >= 32 * PAGE_HASHES
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
    /// One of those who refer to it; further ones have rows of their own.
    pub owner: RecordingId,
}

/// A replica, as the cluster wants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRow {
    /// Where it listens.
    pub address: String,
    /// What it is to be.
    pub wish: Wish,
}

/// What a replica is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// It votes in every group.
    Member,
    /// It votes, and leads none.
    Drained,
    /// It is out of every group, for good: its id never comes back.
    Removed,
}

/// A row's key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub Vec<u8>);

impl Key {
    fn of(group: u32, kind: u8, rest: &[&[u8]]) -> Key {
        let mut key = Vec::with_capacity(3 + rest.iter().map(|part| part.len()).sum::<usize>());
        key.extend_from_slice(&(group as u16).to_be_bytes());
        key.push(kind);
        rest.iter().for_each(|part| key.extend_from_slice(part));
        Key(key)
    }
    /// How far a group is.
    pub fn group(group: u32) -> Key {
        Key::of(group, b'a', &[])
    }
    /// A recording.
    pub fn recording(group: u32, id: RecordingId) -> Key {
        Key::of(group, b'r', &[&id.0])
    }
    /// A page of chunks, by its first event. `kind` is `c`, or `w` for those written anew.
    pub fn page(group: u32, kind: u8, id: RecordingId, first_event: u64) -> Key {
        Key::of(group, kind, &[&id.0, &first_event.to_be_bytes()])
    }
    /// A snapshot, by its icount.
    pub fn snapshot(group: u32, id: RecordingId, icount: u64) -> Key {
        Key::of(group, b's', &[&id.0, &icount.to_be_bytes()])
    }
    /// A block.
    pub fn block(group: u32, hash: Hash) -> Key {
        Key::of(group, b'b', &[&hash.0])
    }
    /// A further owner of a block.
    pub fn owner(group: u32, hash: Hash, owner: RecordingId) -> Key {
        Key::of(group, b'o', &[&hash.0, &owner.0])
    }
    /// A page of the hashes that an owner refers to.
    pub fn owned(group: u32, owner: RecordingId, page: u32) -> Key {
        Key::of(group, b'q', &[&owner.0, &page.to_be_bytes()])
    }
    /// The last entry that counted on a recording's blocks or place being here.
    pub fn last(group: u32, id: RecordingId) -> Key {
        Key::of(group, b'l', &[&id.0])
    }
    /// A coordinator's value.
    pub fn meta(key: &str) -> Key {
        Key::of(0, b'm', &[key.as_bytes()])
    }
    /// The coordinator's epoch.
    pub fn epoch() -> Key {
        Key::of(0, b'e', &[])
    }
    /// The shard of a recording.
    pub fn placed(id: RecordingId) -> Key {
        Key::of(0, b'p', &[&id.0])
    }
    /// A replica.
    pub fn member(id: u64) -> Key {
        Key::of(0, b'n', &[&id.to_be_bytes()])
    }
    /// The rows' version.
    pub fn version() -> Key {
        Key::of(NO_GROUP, b'v', &[])
    }
    /// The number of the newest checkpoint.
    pub fn checkpoint() -> Key {
        Key::of(NO_GROUP, b'k', &[])
    }

    /// The first and the last possible key with this one as its beginning.
    pub fn span(&self) -> (Vec<u8>, Vec<u8>) {
        let mut last = self.0.clone();
        last.extend_from_slice(&[0xff; 300]);
        (self.0.clone(), last)
    }

    /// The first and the last possible key of a group.
    pub fn span_of_group(group: u32) -> (Vec<u8>, Vec<u8>) {
        Key((group as u16).to_be_bytes().to_vec()).span()
    }

    /// All keys of a kind of a group, or those of one id.
    pub fn span_of(group: u32, kind: u8, rest: &[u8]) -> (Vec<u8>, Vec<u8>) {
        Key::of(group, kind, &[rest]).span()
    }

    /// A key's group.
    pub fn group_of(key: &[u8]) -> u32 {
        key.first_chunk::<2>().map_or(NO_GROUP, |bytes| u32::from(u16::from_be_bytes(*bytes)))
    }

    /// What follows group and kind.
    pub fn rest(key: &[u8]) -> &[u8] {
        key.get(3..).unwrap_or_default()
    }

    /// The id that follows group and kind.
    pub fn id_of(key: &[u8]) -> RecordingId {
        Key::rest(key).get(..16).and_then(|id| RecordingId::from_slice(id).ok()).unwrap_or_default()
    }
}

/// A value, decoded.
pub fn decode<T: DeserializeOwned>(key: &[u8], bytes: &[u8]) -> Result<T, Error> {
    let kind = key.get(2).copied().unwrap_or(b'?') as char;
    postcard::from_bytes(bytes).map_err(|error| Error::Row(format!("a row of kind {kind}: {error}")))
}

/// A value, encoded.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let bytes = postcard::to_stdvec(value).expect("plain data encodes to memory");
    assert!(bytes.len() <= VALUE_BYTES_MAX, "rows are small");
    bytes
}

/// Where a row says that bytes lie.
pub fn locations(key: &[u8], value: &[u8]) -> Result<Vec<Location>, Error> {
    Ok(match key.get(2) {
        Some(b'r') => {
            let row = decode::<RecordingRow>(key, value)?;
            if row.state == RecordingState::Deleted { vec![] } else { vec![row.manifest] }
        }
        Some(b'c' | b'w') => chunks_of(value).map(|chunk| chunk.at).collect(),
        Some(b'b') => vec![decode::<BlockRow>(key, value)?.at],
        Some(b'm') => vec![decode::<Location>(key, value)?],
        _ => vec![],
    })
}

/// The same row, with its bytes elsewhere.
pub fn relocated(
    key: &[u8],
    value: &[u8],
    mut place: impl FnMut(Location) -> Location,
) -> Result<Vec<u8>, Error> {
    Ok(match key.get(2) {
        Some(b'r') => {
            let mut row = decode::<RecordingRow>(key, value)?;
            if row.state != RecordingState::Deleted {
                row.manifest = place(row.manifest);
            }
            encode_again(key, &row)?
        }
        Some(b'c' | b'w') => {
            let mut page = Vec::with_capacity(value.len());
            chunks_of(value).for_each(|chunk| ChunkRow { at: place(chunk.at), ..chunk }.encode(&mut page));
            page
        }
        Some(b'b') => {
            let row = decode::<BlockRow>(key, value)?;
            encode_again(key, &BlockRow { at: place(row.at), ..row })?
        }
        Some(b'm') => encode_again(key, &place(decode(key, value)?))?,
        _ => value.to_vec(),
    })
}

/// A value that came from a peer may grow over the bound when its place gets longer numbers.
fn encode_again<T: Serialize>(key: &[u8], value: &T) -> Result<Vec<u8>, Error> {
    let bytes = postcard::to_stdvec(value).expect("plain data encodes to memory");
    if bytes.len() > VALUE_BYTES_MAX {
        let kind = key.get(2).copied().unwrap_or(b'?') as char;
        return Err(Error::Row(format!("a row of kind {kind} has {} bytes", bytes.len())));
    }
    Ok(bytes)
}
