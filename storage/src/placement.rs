//! Which shard holds what.

use heddle_proto::{Hash, RecordingId};

/// The shard, from 1, that a new recording goes to: the highest score by rendezvous
/// hashing, so that few recordings would move if shards came. Fixed in shard 0 at the open.
pub fn placement(id: RecordingId, shards: u32) -> u32 {
    let score = |shard: &u32| {
        let hash = Hash::of(&[&id.0[..], &shard.to_le_bytes()].concat());
        u64::from_le_bytes(hash.0[..8].try_into().expect("8 bytes"))
    };
    (1..=shards.max(1)).max_by_key(score).unwrap_or(1)
}

/// The shard, from 1, of a block: its hash is as good as random. The number of shards is
/// fixed when a cluster is created.
pub fn block_shard(hash: Hash, shards: u32) -> u32 {
    1 + u32::from_le_bytes(hash.0[..4].try_into().expect("4 bytes")) % shards.max(1)
}
