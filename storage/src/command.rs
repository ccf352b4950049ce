//! Commands: what a Raft entry of the store holds.
//!
//! ```text
//! entry data   version u8 | 0 x3 | head bytes u32 | head (postcard) | bulk
//! ```
//! The bulk (a chunk, a manifest, blocks) is never copied on its way to the
//! journal, and stays there: rows point at it.

use bytes::{BufMut, Bytes, BytesMut};
use heddle_proto::{Hash, RecordingId};
use serde::{Deserialize, Serialize};

/// Largest bulk of a command.
pub const BULK_BYTES_MAX: usize = 8 << 20;
const VERSION: u8 = 1;
const PREFIX: usize = 8;

/// The small part of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Opens a recording, or fences its writer. Bulk: the manifest.
    Open {
        /// Which.
        recording: RecordingId,
        /// The writer.
        token: Vec<u8>,
        /// Take over from another token.
        fence: bool,
    },
    /// Bulk: one chunk, header and payload.
    Append {
        /// Which.
        recording: RecordingId,
        /// The writer's epoch.
        epoch: u64,
    },
    /// Fixes the end.
    Seal {
        /// Which.
        recording: RecordingId,
        /// The writer's epoch.
        epoch: u64,
        /// Events in all.
        events: u64,
        /// The last chunk.
        last_chunk: Hash,
        /// The recorder was lost.
        cut: bool,
    },
    /// A snapshot whose blocks are all there.
    AddSnapshot {
        /// Which.
        recording: RecordingId,
        /// The writer's epoch.
        epoch: u64,
        /// Position.
        icount: u64,
        /// Position.
        event: u64,
        /// The root block.
        root: Hash,
        /// The state's digest.
        digest: Hash,
    },
    /// Bulk: the blocks' compressed bytes, one after the other.
    PutBlocks {
        /// Name, compressed and raw length of each.
        blocks: Vec<(Hash, u32, u32)>,
    },
    /// A coordinator takes over.
    MetaAcquire {
        /// Who, for people.
        holder: String,
    },
    /// Rows of the coordinator. Bulk: the values, one after the other.
    MetaWrite {
        /// The coordinator's epoch.
        epoch: u64,
        /// Key and length of each value.
        puts: Vec<(String, u32)>,
        /// Keys to remove.
        deletes: Vec<String>,
    },
    /// Removes a recording that nobody writes any more.
    Delete {
        /// Which.
        recording: RecordingId,
    },
    /// One chunk of a sealed recording that is written anew. Bulk: the chunk.
    Rewrite {
        /// Which.
        recording: RecordingId,
        /// The writer's epoch.
        epoch: u64,
    },
    /// The rewritten chunks take the place of the old.
    Adopt {
        /// Which.
        recording: RecordingId,
        /// The writer's epoch.
        epoch: u64,
        /// The last of the old chunks.
        old: Hash,
        /// The last of the new.
        new: Hash,
    },
}

impl Command {
    /// The entry's data.
    pub fn encode(&self, bulk: &[u8]) -> Bytes {
        let head = postcard::to_stdvec(self).expect("plain data encodes to memory");
        let mut out = BytesMut::with_capacity(PREFIX + head.len() + bulk.len());
        out.put_slice(&[VERSION, 0, 0, 0]);
        out.put_u32_le(head.len() as u32);
        out.put_slice(&head);
        out.put_slice(bulk);
        out.freeze()
    }

    /// The command, and where its bulk begins.
    pub fn decode(data: &[u8]) -> Result<(Command, usize), String> {
        let prefix = data.get(..PREFIX).ok_or("entry is shorter than its prefix")?;
        if prefix[0] != VERSION {
            return Err(format!("entry has version {}; this build reads {VERSION}", prefix[0]));
        }
        let head_bytes = u32::from_le_bytes(prefix[4..].try_into().expect("4 bytes")) as usize;
        let head = data[PREFIX..].get(..head_bytes).ok_or("entry is shorter than its head")?;
        let command = postcard::from_bytes(head).map_err(|e| format!("entry's head: {e}"))?;
        Ok((command, PREFIX + head_bytes))
    }
}
