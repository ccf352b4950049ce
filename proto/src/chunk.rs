//! Chunks: runs of events, encoded by column and compressed.
//!
//! ```text
//! header, little-endian                                   payload, zstd of
//! magic "HDLC" | version u16 | codec u8 | 0 u8            4 x u32 column lengths
//! recording 16 | first event u64 | events u32 | 0 u32     kinds    one byte each: code | role << 7
//! first icount u64 | last icount u64                      icounts  varint deltas
//! payload bytes u32 | raw bytes u32                       values   zigzag varint deltas, by kind
//! payload BLAKE3 32 | previous chunk's id 32              bytes    varint length, then bytes
//! counts by kind 35 x u32
//! ```
//! A chunk's id is the BLAKE3 of its header, which holds the payload's hash: the
//! header alone shows order, integrity and chain. A chunk never splits a checkpoint
//! from its async events. Every length is bounded before anything is allocated.

use crate::compress::{compress, decompress};
use crate::event::{AsyncEvent, Body, Event, KINDS};
use crate::{Hash, RecordingId};
use bytes::Bytes;
use columns::Columns;

mod columns;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 4 + 4 + 16 + 16 + 16 + 8 + 64 + KINDS * 4;
/// Largest compressed payload.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;
/// Largest decompressed payload.
pub const RAW_BYTES_MAX: usize = 32 << 20;
/// Most events in a chunk.
pub const EVENTS_MAX: usize = 1 << 20;
const MAGIC: &[u8; 4] = b"HDLC";
const VERSION: u16 = 2;
const CODEC_ZSTD: u8 = 1;
/// Level 3: the live stream must not slow the guest; sealing may recompress.
const ZSTD_LEVEL: i32 = 3;

/// Why bytes are not a chunk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChunkError {
    /// Fewer bytes than the format needs.
    #[error("chunk is cut short: {what} needs {need} bytes, {have} are there")]
    Truncated {
        /// The part that is short.
        what: &'static str,
        /// Bytes it needs.
        need: usize,
        /// Bytes it has.
        have: usize,
    },
    /// Not a chunk at all.
    #[error("not a chunk: it does not begin with HDLC")]
    Magic,
    /// A version or codec this build does not read.
    #[error("chunk {what} {number} is not known to this build, which reads {known}")]
    Version {
        /// "version" or "codec".
        what: &'static str,
        /// The number found.
        number: u16,
        /// The number this build reads.
        known: u16,
    },
    /// A length beyond its bound.
    #[error("chunk's {what} is {value}, more than the bound of {bound}")]
    TooLong {
        /// The length's name.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Its bound.
        bound: u64,
    },
    /// Payload and header disagree.
    #[error("chunk's payload does not have the hash its header names: the bytes were changed")]
    Corrupt,
    /// The payload's columns do not decode.
    #[error("chunk's payload is malformed: {0}")]
    Malformed(&'static str),
    /// This chunk does not follow the one before.
    #[error("chunk does not follow: {0}")]
    Chain(&'static str),
}

/// What a chunk says of itself; all that the store needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The recording it belongs to.
    pub recording: RecordingId,
    /// Index of its first event.
    pub first_event: u64,
    /// Number of its events.
    pub events: u32,
    /// icount of its first event.
    pub first_icount: u64,
    /// icount of its last event.
    pub last_icount: u64,
    /// Compressed payload bytes.
    pub payload_bytes: u32,
    /// Payload bytes before compression.
    pub raw_bytes: u32,
    /// BLAKE3 of the compressed payload.
    pub payload_hash: Hash,
    /// Id of the chunk before, zero for the first.
    pub previous: Hash,
    /// Events by kind code.
    pub counts: [u32; KINDS],
}

impl ChunkHeader {
    /// Index of the event after its last.
    pub fn end_event(&self) -> u64 {
        self.first_event.saturating_add(u64::from(self.events))
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[CODEC_ZSTD, 0]);
        out.extend_from_slice(&self.recording.0);
        out.extend_from_slice(&self.first_event.to_le_bytes());
        out.extend_from_slice(&self.events.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.first_icount.to_le_bytes());
        out.extend_from_slice(&self.last_icount.to_le_bytes());
        out.extend_from_slice(&self.payload_bytes.to_le_bytes());
        out.extend_from_slice(&self.raw_bytes.to_le_bytes());
        out.extend_from_slice(&self.payload_hash.0);
        out.extend_from_slice(&self.previous.0);
        self.counts.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
        out.try_into().expect("the fields add up to HEADER_BYTES")
    }

    /// Reads and bounds a header.
    pub fn decode(bytes: &[u8]) -> Result<ChunkHeader, ChunkError> {
        let mut r = Reader { bytes, what: "header" };
        if r.have() < HEADER_BYTES {
            let have = r.have();
            return Err(ChunkError::Truncated { what: "header", need: HEADER_BYTES, have });
        }
        if r.take(4)? != MAGIC {
            return Err(ChunkError::Magic);
        }
        let version = u16::from_le_bytes(r.array()?);
        if version != VERSION {
            return Err(ChunkError::Version { what: "version", number: version, known: VERSION });
        }
        let [codec, reserved] = r.array()?;
        if codec != CODEC_ZSTD {
            let number = u16::from(codec);
            return Err(ChunkError::Version { what: "codec", number, known: 1 });
        }
        let recording = RecordingId(r.array()?);
        let first_event = u64::from_le_bytes(r.array()?);
        let events = u32::from_le_bytes(r.array()?);
        let reserved_too: [u8; 4] = r.array()?;
        if reserved != 0 || reserved_too != [0; 4] {
            return Err(ChunkError::Malformed("reserved header bytes are set"));
        }
        let header = ChunkHeader {
            recording,
            first_event,
            events,
            first_icount: u64::from_le_bytes(r.array()?),
            last_icount: u64::from_le_bytes(r.array()?),
            payload_bytes: u32::from_le_bytes(r.array()?),
            raw_bytes: u32::from_le_bytes(r.array()?),
            payload_hash: Hash(r.array()?),
            previous: Hash(r.array()?),
            counts: {
                let mut counts = [0; KINDS];
                for n in &mut counts {
                    *n = u32::from_le_bytes(r.array()?);
                }
                counts
            },
        };
        header.check_bounds()?;
        Ok(header)
    }

    fn check_bounds(&self) -> Result<(), ChunkError> {
        let bounds = [
            ("event count", u64::from(self.events), EVENTS_MAX as u64),
            ("payload length", u64::from(self.payload_bytes), PAYLOAD_BYTES_MAX as u64),
            ("raw length", u64::from(self.raw_bytes), RAW_BYTES_MAX as u64),
            ("first event index", self.first_event, u64::MAX >> 1),
        ];
        for (what, value, bound) in bounds {
            if value > bound {
                return Err(ChunkError::TooLong { what, value, bound });
            }
        }
        if self.events == 0 || self.first_icount > self.last_icount {
            return Err(ChunkError::Malformed("no events, or icounts that run backwards"));
        }
        if self.counts.iter().map(|n| u64::from(*n)).sum::<u64>() != u64::from(self.events) {
            return Err(ChunkError::Malformed("counts by kind do not add up"));
        }
        Ok(())
    }

    /// The chunk's id.
    pub fn id(&self) -> Hash {
        Hash::of(&self.encode())
    }
}

/// An encoded chunk: header and payload, checked against each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its header.
    pub header: ChunkHeader,
    /// Header and payload as they travel and are stored.
    pub bytes: Bytes,
}

impl Chunk {
    /// Takes a chunk from bytes; header, length and payload hash are checked.
    pub fn parse(bytes: Bytes) -> Result<Chunk, ChunkError> {
        let header = ChunkHeader::decode(&bytes)?;
        let (need, have) = (header.payload_bytes as usize, bytes.len() - HEADER_BYTES);
        if have < need {
            return Err(ChunkError::Truncated { what: "payload", need, have });
        }
        if have > need {
            return Err(ChunkError::Malformed("bytes after the payload"));
        }
        if Hash::of(&bytes[HEADER_BYTES..]) != header.payload_hash {
            return Err(ChunkError::Corrupt);
        }
        Ok(Chunk { header, bytes })
    }

    /// Encodes `events`, the first of which has index `first_event`.
    ///
    /// Panics if there are none, or more than [`EVENTS_MAX`]: the builder holds both.
    pub fn encode(recording: RecordingId, first_event: u64, previous: Hash, events: &[Event]) -> Chunk {
        let mut columns = Columns::default();
        events.iter().for_each(|event| columns.push(event));
        Chunk::of_columns(recording, first_event, previous, &mut columns)
    }

    fn of_columns(recording: RecordingId, first_event: u64, previous: Hash, columns: &mut Columns) -> Chunk {
        let (events, counts) = (columns.events, columns.counts);
        let (first_icount, last_icount) = (columns.first_icount, columns.last_icount);
        assert!(events > 0 && events as usize <= EVENTS_MAX, "builder bounds a chunk");
        let raw = columns.take();
        let payload = compress(&raw, ZSTD_LEVEL);
        assert!(payload.len() <= PAYLOAD_BYTES_MAX && raw.len() <= RAW_BYTES_MAX);
        let header = ChunkHeader {
            recording,
            first_event,
            events,
            first_icount,
            last_icount,
            payload_bytes: payload.len() as u32,
            raw_bytes: raw.len() as u32,
            payload_hash: Hash::of(&payload),
            previous,
            counts,
        };
        let bytes = Bytes::from([&header.encode()[..], &payload].concat());
        Chunk { header, bytes }
    }

    /// The chunk's id.
    pub fn id(&self) -> Hash {
        Hash::of(&self.bytes[..HEADER_BYTES])
    }

    /// Decodes the events.
    pub fn events(&self) -> Result<Vec<Event>, ChunkError> {
        let raw_bytes = self.header.raw_bytes as usize;
        let raw = decompress(&self.bytes[HEADER_BYTES..], raw_bytes)
            .ok_or(ChunkError::Malformed("zstd refuses the payload"))?;
        if raw.len() != raw_bytes {
            return Err(ChunkError::Malformed("raw length differs from the header's"));
        }
        let events = columns::decode(&raw, &self.header)?;
        if events.first().map(|e| e.icount) != Some(self.header.first_icount) {
            return Err(ChunkError::Malformed("first icount differs from the header's"));
        }
        if events.last().map(|e| e.icount) != Some(self.header.last_icount) {
            return Err(ChunkError::Malformed("last icount differs from the header's"));
        }
        Ok(events)
    }

    /// Checks that this chunk follows `before`. `None`: that it is the first, which names
    /// `anchor` as the one before: zero, or the last chunk of a chain that was written anew.
    pub fn check_follows(&self, before: Option<&ChunkHeader>, anchor: Hash) -> Result<(), ChunkError> {
        let (event, id, icount) = before.map_or((0, anchor, 0), |b| (b.end_event(), b.id(), b.last_icount));
        if self.header.first_event != event {
            return Err(ChunkError::Chain("its first event index leaves a gap or overlaps"));
        }
        if self.header.previous != id {
            return Err(ChunkError::Chain("it names another chunk as the one before"));
        }
        if self.header.first_icount < icount {
            return Err(ChunkError::Chain("its icounts begin before the last chunk's end"));
        }
        Ok(())
    }
}

/// Gathers events into chunks; its borders are fixed when a chunk is taken.
#[derive(Debug)]
pub struct ChunkBuilder {
    recording: RecordingId,
    next_event: u64,
    previous: Hash,
    columns: Columns,
    bytes: usize,
}

impl ChunkBuilder {
    /// Starts at the beginning of `recording`.
    pub fn new(recording: RecordingId) -> Self {
        ChunkBuilder::resume(recording, 0, Hash::ZERO)
    }

    /// Goes on behind chunks that are there: from event `next_event`, after chunk `previous`.
    pub fn resume(recording: RecordingId, next_event: u64, previous: Hash) -> Self {
        ChunkBuilder { recording, next_event, previous, columns: Columns::default(), bytes: 0 }
    }

    /// Adds an event.
    pub fn push(&mut self, event: &Event) {
        self.bytes += 8 + match &event.body {
            Body::Async(AsyncEvent::Char { data }) => data.len(),
            Body::Digest { .. } => 64,
            Body::Qemu(event) => 8 + event.data().map_or(0, <[u8]>::len),
            _ => 0,
        };
        self.columns.push(event);
    }

    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.columns.events == 0
    }

    /// Bytes of the payload before compression.
    pub fn raw_bytes(&self) -> usize {
        self.columns.bytes()
    }

    /// Rough encoded size, to decide when to close.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Closes the chunk. The caller makes sure that no async event of the last
    /// checkpoint is still to come.
    pub fn take(&mut self) -> Option<Chunk> {
        if self.is_empty() {
            return None;
        }
        self.bytes = 0;
        let chunk = Chunk::of_columns(self.recording, self.next_event, self.previous, &mut self.columns);
        self.next_event = chunk.header.end_event();
        self.previous = chunk.id();
        Some(chunk)
    }
}

/// Takes bytes apart, bounded.
struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn have(&self) -> usize {
        self.bytes.len()
    }
    fn take(&mut self, need: usize) -> Result<&'a [u8], ChunkError> {
        if need > self.bytes.len() {
            return Err(ChunkError::Truncated { what: self.what, need, have: self.bytes.len() });
        }
        let (head, tail) = self.bytes.split_at(need);
        self.bytes = tail;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], ChunkError> {
        Ok(self.take(N)?.try_into().expect("take gives N bytes"))
    }
    fn varint(&mut self) -> Result<u64, ChunkError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(ChunkError::Malformed("varint is longer than 64 bits"))
    }
}

#[cfg(test)]
#[path = "chunk/tests.rs"]
mod tests;
