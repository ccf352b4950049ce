//! Properties of the log's decoder and encoder.
#![allow(clippy::unwrap_used)]

use super::*;
use heddle_proto::Role;
use proptest::prelude::*;

/// All of a log's events, fed in pieces of `step` bytes.
fn decode(bytes: &[u8], step: usize) -> Vec<Located> {
    let mut decoder = Decoder::new(Dialect::Qemu7, HEADER_BYTES, 0);
    let mut found = vec![];
    for piece in bytes.chunks(step) {
        decoder.push(piece);
        found.extend(std::iter::from_fn(|| decoder.next_event()));
    }
    found.extend(decoder.finish());
    found
}

fn encode_all(located: &[Located]) -> Vec<u8> {
    let events: Vec<Event> =
        located.iter().map(|l| Event { icount: l.icount, role: Role::Vcpu, body: l.body.clone() }).collect();
    let mut out = vec![];
    encode(&mut out, &mut 0, &events).unwrap();
    out
}

/// A record of each kind, with random contents.
fn record() -> impl Strategy<Value = Vec<u8>> {
    let array = || {
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(|data| {
            let mut out = (data.len() as u32).to_be_bytes().to_vec();
            out.extend(data);
            out
        })
    };
    let fixed = |kind: u8, len: usize| {
        proptest::collection::vec(any::<u8>(), len).prop_map(move |rest| [vec![kind], rest].concat())
    };
    let plain = prop::sample::select(
        [0x01, 0x02, 0x06].into_iter().chain(0x0A..=0x15).chain(0x1E..=0x27).collect::<Vec<u8>>(),
    );
    prop_oneof![
        (1u32..1 << 31).prop_map(|n| [vec![0], n.to_be_bytes().to_vec()].concat()),
        plain.prop_map(|kind| vec![kind]),
        prop::sample::select(vec![0x03u8, 0x04, 0x08, 0x19, 0x1C, 0x1D]).prop_flat_map(move |k| fixed(k, 8)),
        fixed(0x16, 8),
        fixed(0x18, 4),
        proptest::collection::vec(any::<u8>(), 9).prop_map(|r| [
            vec![5, 0, 0, 0, 0, 0, 0, 0, 1],
            r[..5].to_vec()
        ]
        .concat()),
        proptest::collection::vec(any::<u8>(), 9).prop_map(|r| [vec![5, 0, 0, 0, 0, 0, 0, 0, 0], r].concat()),
        proptest::collection::vec(any::<u8>(), 5).prop_map(|r| [vec![5, 0, 0, 0, 1], r].concat()),
        proptest::collection::vec(any::<u8>(), 12).prop_map(|r| [vec![5, 0, 0, 0, 3], r].concat()),
        (any::<u8>(), array()).prop_map(|(device, a)| [vec![0x07, device], a].concat()),
        (any::<[u8; 5]>(), array()).prop_map(|(head, a)| [vec![0x09], head.to_vec(), a].concat()),
        array().prop_map(|a| [vec![0x17], a].concat()),
        (any::<u32>(), array()).prop_map(|(r, a)| [vec![0x1B], r.to_be_bytes().to_vec(), a].concat()),
        any::<u64>().prop_map(|p| [vec![0x1A], vec![0; 8], p.to_be_bytes().to_vec()].concat()),
    ]
}

proptest! {
    #[test]
    fn a_log_whole_or_cut_is_encoded_as_it_was(
        records in proptest::collection::vec(record(), 0..60), step in 1usize..64, cut in any::<prop::sample::Index>(),
    ) {
        let log = records.concat();
        let log = &log[..cut.index(log.len() + 1)];
        let located = decode(log, step);
        prop_assert_eq!(encode_all(&located), log);
        for pair in located.windows(2) {
            prop_assert!(pair[0].end <= pair[1].start && pair[0].icount <= pair[1].icount);
        }
    }

    #[test]
    fn any_bytes_are_kept(bytes in proptest::collection::vec(any::<u8>(), 0..400), step in 1usize..64) {
        prop_assert_eq!(encode_all(&decode(&bytes, step)), bytes);
    }
}

#[test]
fn an_unknown_kind_and_all_behind_it_is_raw() {
    let mut log = vec![0, 0, 0, 0, 9, 0x25, 0x63, 0x25];
    let located = decode(&log, 3);
    assert_eq!(located.len(), 2);
    assert_eq!((located[0].icount, &located[0].body), (9, &Body::Checkpoint(CheckpointKind::Init)));
    assert_eq!(located[1].body, Body::Qemu(QemuEvent::Raw { data: vec![0x63, 0x25] }));
    // A length beyond any bound is not waited for.
    log = vec![0x17, 0xff, 0xff, 0xff, 0xff];
    assert!(matches!(decode(&log, 1)[0].body, Body::Qemu(QemuEvent::Raw { .. })));
}

#[test]
fn touch_exists_in_the_later_dialect_alone() {
    let log = [vec![5, 0, 0, 0, 4], vec![7; 32], vec![6]].concat();
    for (dialect, events) in [(Dialect::Qemu7, 1), (Dialect::Qemu10, 2)] {
        let mut decoder = Decoder::new(dialect, HEADER_BYTES, 0);
        decoder.push(&log);
        assert_eq!(decoder.finish().len(), events, "{dialect:?}");
    }
}
