//! Commands: what a Raft entry of the store holds, one or many.
//!
//! ```text
//! entry data   version u8 | 0 x3 | commands u32, then of each:
//!              head bytes u32 | bulk bytes u32 | head (postcard) | bulk
//! ```
//! Version 2 differs in this: `DropOwner` and `Unplace` had no `until`, their last field.
//!
//! The bulk (a chunk, a manifest, blocks) is copied once, into the entry, and stays where
//! the journal puts that: rows point at it.

use bytes::{BufMut, Bytes, BytesMut};
use heddle_proto::{Hash, RecordingId};
use serde::{Deserialize, Serialize};

use crate::schema::Wish;

/// Largest bulk of a command.
pub const BULK_BYTES_MAX: usize = 8 << 20;
/// An entry that has so many bytes takes no further command.
pub const ENTRY_BYTES: usize = 256 << 10;
const VERSION: u8 = 3;
/// The oldest that is read.
const VERSION_MIN: u8 = 2;
/// What a command of version 2 lacks, as postcard has it: the highest index. A command that
/// lacks nothing ends before it.
const UNTIL_EVER: [u8; 10] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
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
    /// Bulk: chunks of these lengths, one behind the other. If one is refused, those before
    /// it stand.
    AppendMany {
        /// Which.
        recording: RecordingId,
        /// The writer's epoch.
        epoch: u64,
        /// Bytes of each.
        lengths: Vec<u32>,
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
        /// The recording that refers to them.
        owner: RecordingId,
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
    /// Refers to blocks that are there, and says which are not.
    Pin {
        /// The recording that refers to them.
        owner: RecordingId,
        /// The blocks.
        hashes: Vec<Hash>,
    },
    /// A recording that is deleted refers to no block of this shard any more. Refused if it
    /// was made to by an entry behind `until`: that may be a later recording of this id.
    DropOwner {
        /// The recording.
        owner: RecordingId,
        /// An index of this group from before the recording was seen to be deleted.
        until: u64,
    },
    /// Removes what is left of a deleted recording, once it refers to no block.
    Forget {
        /// Which.
        recording: RecordingId,
    },
    /// A recording that owns blocks and was never opened never will be.
    Abandon {
        /// Which.
        recording: RecordingId,
    },
    /// Fixes the shard of a recording; the first wins.
    Place {
        /// Which.
        recording: RecordingId,
        /// Where.
        shard: u32,
    },
    /// Forgets the shard of a recording that is gone. Refused if it was placed again by an
    /// entry behind `until`.
    Unplace {
        /// Which.
        recording: RecordingId,
        /// An index of group 0 from before the recording was seen to be gone.
        until: u64,
    },
    /// What a replica is to be.
    Member {
        /// Which.
        id: u64,
        /// Where it listens.
        address: String,
        /// What.
        wish: Wish,
    },
}

impl Command {
    /// Bytes it takes in an entry, without its bulk.
    pub fn bytes(&self) -> usize {
        postcard::to_stdvec(self).map_or(usize::MAX, |bytes| bytes.len())
    }
}

/// A command with its bulk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The command.
    pub command: Command,
    /// Its bulk.
    pub bulk: Bytes,
}

impl Proposal {
    /// About how many bytes it takes.
    pub fn bytes(&self) -> usize {
        self.bulk.len() + 64
    }
}

/// The data of an entry that holds these commands.
pub fn encode<'a>(proposals: impl IntoIterator<Item = &'a Proposal>) -> Bytes {
    let mut out = BytesMut::new();
    out.put_slice(&[VERSION, 0, 0, 0, 0, 0, 0, 0]);
    let mut count = 0u32;
    for proposal in proposals {
        let head = postcard::to_stdvec(&proposal.command).expect("plain data encodes to memory");
        out.reserve(8 + head.len() + proposal.bulk.len());
        out.put_u32_le(head.len() as u32);
        out.put_u32_le(proposal.bulk.len() as u32);
        out.put_slice(&head);
        out.put_slice(&proposal.bulk);
        count += 1;
    }
    out[4..PREFIX].copy_from_slice(&count.to_le_bytes());
    out.freeze()
}

/// The commands of an entry, each with where its bulk begins.
pub fn decode(data: &Bytes) -> Result<Vec<(Proposal, usize)>, String> {
    let prefix = data.get(..PREFIX).ok_or("entry is shorter than its prefix")?;
    let version = prefix[0];
    if !(VERSION_MIN..=VERSION).contains(&version) {
        return Err(format!("entry has version {version}; this build reads {VERSION_MIN} to {VERSION}"));
    }
    let u32_at = |at: usize| {
        let bytes = data.get(at..at + 4).ok_or("entry is cut short")?;
        Ok::<_, String>(u32::from_le_bytes(bytes.try_into().expect("4 bytes")) as usize)
    };
    let mut proposals = vec![];
    let mut at = PREFIX;
    for _ in 0..u32_at(4)? {
        let (head_bytes, bulk_bytes) = (u32_at(at)?, u32_at(at + 4)?);
        let bulk_at = at + 8 + head_bytes;
        let head = data.get(at + 8..bulk_at).ok_or("entry is shorter than a head")?;
        let command = match version {
            VERSION => postcard::from_bytes(head),
            _ => postcard::from_bytes(&[head, &UNTIL_EVER[..]].concat()),
        };
        let command = command.map_err(|e| format!("a head: {e}"))?;
        at = bulk_at + bulk_bytes;
        if at > data.len() {
            return Err("entry is shorter than a bulk".into());
        }
        proposals.push((Proposal { command, bulk: data.slice(bulk_at..at) }, bulk_at));
    }
    if at != data.len() {
        return Err("entry has bytes behind its last command".into());
    }
    Ok(proposals)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const ID: RecordingId = RecordingId([7; 16]);

    /// An entry of version 2 that holds one command without bulk.
    fn version_2(variant: u8, fields: &[u8]) -> Bytes {
        let head_bytes = 1 + fields.len() as u8;
        let begin = [2, 0, 0, 0, 1, 0, 0, 0, head_bytes, 0, 0, 0, 0, 0, 0, 0, variant];
        [&begin[..], fields].concat().into()
    }

    #[test]
    fn entries_of_version_2_are_read() {
        let old = [
            (version_2(12, &ID.0), Command::DropOwner { owner: ID, until: u64::MAX }),
            (version_2(13, &ID.0), Command::Forget { recording: ID }),
            (version_2(16, &ID.0), Command::Unplace { recording: ID, until: u64::MAX }),
        ];
        for (bytes, command) in old {
            let decoded = decode(&bytes).unwrap();
            assert_eq!(decoded.into_iter().map(|(one, _)| one.command).collect::<Vec<_>>(), [command]);
        }
    }

    #[test]
    fn an_entry_comes_out_as_it_went_in() {
        let commands = [Command::DropOwner { owner: ID, until: 300 }, Command::Delete { recording: ID }];
        let proposals = commands.map(|command| Proposal { command, bulk: Bytes::from_static(b"bulk") });
        let decoded = decode(&encode(&proposals)).unwrap();
        assert!(decoded.iter().map(|(proposal, _)| proposal).eq(&proposals));
    }
}
