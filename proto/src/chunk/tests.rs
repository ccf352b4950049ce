//! Properties of the chunk codec.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::event::{CheckpointKind, ClockKind, Role};
use proptest::prelude::*;

fn body() -> impl Strategy<Value = Body> {
    prop_oneof![
        any::<i64>().prop_map(|value| Body::Clock { clock: ClockKind::Host, value }),
        any::<i64>().prop_map(|value| Body::Clock { clock: ClockKind::VirtualRt, value }),
        (0usize..7).prop_map(|i| Body::Checkpoint(CheckpointKind::ALL[i])),
        any::<u64>().prop_map(|id| Body::Async(AsyncEvent::BottomHalf { id })),
        any::<u64>().prop_map(|id| Body::Async(AsyncEvent::Block { id })),
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(|data| Body::Async(AsyncEvent::Char { data })),
        any::<u16>().prop_map(|code| Body::Shutdown { code }),
        any::<u64>().prop_map(|value| Body::Check { value, output: !value }),
        any::<[u8; 32]>().prop_map(|h| Body::Digest { root: Hash(h), history: Hash::of(&h) }),
        Just(Body::End),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    proptest::collection::vec((body(), any::<bool>(), 0u64..1 << 40), 1..80).prop_map(|list| {
        let mut icount = 0;
        list.into_iter()
            .map(|(body, io, delta)| {
                icount += delta;
                let role = if io { Role::Iothread } else { Role::Vcpu };
                Event { icount, role, body }
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(events in events(), first in 0u64..1 << 50) {
        let chunk = Chunk::encode(RecordingId([7; 16]), first, Hash::ZERO, &events);
        let parsed = Chunk::parse(chunk.bytes.clone()).unwrap();
        prop_assert_eq!(&parsed, &chunk);
        prop_assert_eq!(parsed.events().unwrap(), events);
        prop_assert_eq!(parsed.header.id(), parsed.id());
    }

    #[test]
    fn a_cut_or_flipped_chunk_is_refused(events in events(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let chunk = Chunk::encode(RecordingId([7; 16]), 0, Hash::ZERO, &events);
        let cut = at.index(chunk.bytes.len());
        prop_assert!(Chunk::parse(chunk.bytes.slice(..cut)).is_err());
        let mut flipped = chunk.bytes.to_vec();
        flipped[cut] ^= 1 << bit;
        // A flip in the header that still parses gives another id: the chain shows it.
        if let Ok(other) = Chunk::parse(Bytes::from(flipped)) {
            prop_assert_ne!(other.id(), chunk.id());
            let _ = other.events();
        }
    }

    #[test]
    fn hostile_columns_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..200), events in 1u32..50) {
        let payload = zstd::bulk::compress(&raw, 1).unwrap();
        let mut counts = [0; KINDS];
        counts[0] = events;
        let header = ChunkHeader {
            recording: RecordingId([0; 16]), first_event: 0, events, first_icount: 0, last_icount: 0,
            payload_bytes: payload.len() as u32, raw_bytes: raw.len() as u32,
            payload_hash: Hash::of(&payload), previous: Hash::ZERO, counts,
        };
        let bytes = Bytes::from([&header.encode()[..], &payload].concat());
        if let Ok(chunk) = Chunk::parse(bytes) {
            let _ = chunk.events();
        }
    }
}

#[test]
fn a_huge_length_is_refused_before_it_is_allocated() {
    let end = Event { icount: 0, role: Role::Vcpu, body: Body::End };
    let mut header = Chunk::encode(RecordingId::default(), 0, Hash::ZERO, &[end]).header;
    header.raw_bytes = u32::MAX;
    let error = ChunkHeader::decode(&header.encode()).unwrap_err();
    assert!(error.to_string().contains("raw length is 4294967295"), "{error}");
}

#[test]
fn an_unknown_version_is_named() {
    let end = Event { icount: 0, role: Role::Vcpu, body: Body::End };
    let mut bytes = Chunk::encode(RecordingId::default(), 0, Hash::ZERO, &[end]).bytes.to_vec();
    bytes[4] = 9;
    let error = Chunk::parse(Bytes::from(bytes)).unwrap_err();
    assert!(error.to_string().contains("version 9"), "{error}");
}
