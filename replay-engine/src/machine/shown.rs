//! How fields of the state look to people and programs that read text.
//!
//! Each of these is a `serialize_with` that matters to formats for people alone. Digests and
//! snapshots have their bytes from one that is not, and see nothing of it.
//!
//! Registers of 64 bits, addresses and masks are text, as in `0x80000000`: a number of JSON has
//! no 64 bits. Bytes are text, too, two digits each. Counts, icounts and nanoseconds are numbers.

use serde::{Serialize, Serializer};
use std::fmt::LowerHex;

/// A register or an address.
pub(super) fn hex<T: LowerHex + Serialize, S: Serializer>(
    value: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if !serializer.is_human_readable() {
        return value.serialize(serializer);
    }
    serializer.collect_str(&format_args!("{value:#x}"))
}

/// Bytes.
pub(super) fn bytes<C, S>(bytes: &C, serializer: S) -> Result<S::Ok, S::Error>
where
    C: Serialize,
    for<'a> &'a C: IntoIterator<Item = &'a u8>,
    S: Serializer,
{
    if !serializer.is_human_readable() {
        return bytes.serialize(serializer);
    }
    let text: String = bytes.into_iter().map(|byte| format!("{byte:02x}")).collect();
    serializer.serialize_str(&text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::hart::{Hart, TLB_ENTRIES, TlbEntry};
    use super::super::plic::Plic;
    use super::super::uart::Uart;
    use super::super::virtqueue::Virtqueue;
    use serde_json::json;

    #[test]
    fn a_register_is_text_and_a_set_of_sources_is_their_numbers() {
        let mut plic = Plic::new();
        plic.store(4 * 10, 7);
        plic.store(0x2080, 1 << 10 | 1 << 1);
        plic.store(0x2084, 1);
        plic.set_level(10, true);
        plic.set_level(40, true);
        let shown = serde_json::to_value(&plic).unwrap();
        assert_eq!(shown["priority"], json!({ "10": 7 }));
        assert_eq!((&shown["pending"], &shown["claimed"]), (&json!([10, 40]), &json!([])));
        assert_eq!(shown["contexts"][1], json!({ "enable": [1, 10, 32], "threshold": 0 }));
        let mut queue = Virtqueue::default();
        (queue.size, queue.descriptors) = (8, 1 << 63);
        let shown = serde_json::to_value(&queue).unwrap();
        assert_eq!((&shown["descriptors"], &shown["size"]), (&json!("0x8000000000000000"), &json!(8)));
    }

    #[test]
    fn bytes_are_digits_and_only_known_translations_are_shown() {
        let mut uart = Uart::new();
        uart.store(2, 1);
        uart.receive(b"hi, who types so much?");
        let shown = serde_json::to_value(&uart).unwrap();
        assert_eq!(shown["fifo"], "68692c2077686f20747970657320736f");
        assert_eq!(shown["backlog"], "206d7563683f");
        let mut hart = Hart::new(0);
        hart.tlb[3] = TlbEntry { vpn: 3, ppn: 0x80003, permissions: 2, level: 0 };
        let shown = serde_json::to_value(&hart).unwrap();
        assert_eq!(shown["tlb"], json!([{ "vpn": 3, "ppn": 0x80003, "permissions": 2, "level": 0 }]));
    }

    #[test]
    fn what_is_encoded_has_it_all() {
        let mut hart = Hart::new(0x1000);
        hart.tlb[200] = TlbEntry { vpn: 200, ppn: 1, permissions: 2, level: 1 };
        let bytes = postcard::to_stdvec(&hart).unwrap();
        let again: Hart = postcard::from_bytes(&bytes).unwrap();
        assert_eq!((again.tlb.len(), &again), (TLB_ENTRIES, &hart));
        let mut uart = Uart::new();
        uart.receive(b"typed");
        let again: Uart = postcard::from_bytes(&postcard::to_stdvec(&uart).unwrap()).unwrap();
        assert_eq!(again, uart);
        let mut plic = Plic::new();
        plic.set_level(95, true);
        let again: Plic = postcard::from_bytes(&postcard::to_stdvec(&plic).unwrap()).unwrap();
        assert_eq!(again, plic);
    }
}
