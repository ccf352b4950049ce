//! States are put together and taken apart again, and damaged ones are refused.
#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

/// A state of two RAM blocks and one device, as QEMU writes them.
fn state(timer: u64, offset: u64) -> Vec<u8> {
    let section = |id: u32, name: &str| {
        let mut out = vec![0x04];
        out.extend_from_slice(&id.to_be_bytes());
        put_name(&mut out, name);
        out.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1]);
        out
    };
    let mut rest = section(2, "timer");
    rest.extend_from_slice(&timer.to_be_bytes());
    rest.extend_from_slice(&offset.to_be_bytes());
    rest.extend_from_slice(&[1, 2, 3]);
    rest.extend_from_slice(&[0x7e, 0, 0, 0, 2, 0x00]);
    let json = serde_json::json!({ "devices": [{
        "name": "timer", "instance_id": 0, "fields": [
            { "name": "icount", "size": 8 },
            { "name": "cpu_clock_offset", "size": 8 },
            { "name": "list", "array_len": 3, "size": 1 },
        ],
    }] })
    .to_string();
    let mut description = vec![0x06];
    description.extend_from_slice(&(json.len() as u32).to_be_bytes());
    description.extend_from_slice(json.as_bytes());
    let mut ram_header = 1u32.to_be_bytes().to_vec();
    put_name(&mut ram_header, RAM);
    ram_header.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 4]);
    let parts = WithoutRam { head: MAGIC.to_vec(), ram_header, rest, description };
    let page = vec![9u8; PAGE];
    let ram = [("pc.ram".to_string(), 3 * PAGE as u64), ("pc.rom".to_string(), PAGE as u64)];
    let mut out = vec![];
    assemble(&mut out, &parts, &ram, |block, index| (block == 0 && index == 2).then_some(&page[..])).unwrap();
    out
}

#[test]
fn a_state_is_taken_apart_as_it_was_put_together() {
    let bytes = state(5, 77);
    let state = VmState::parse(&bytes).unwrap();
    assert_eq!(state.ram.iter().map(|block| block.pages.len()).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(
        (state.page(0, 2).map(|page| page[0]), state.page(0, 1), state.page(1, 0)),
        (Some(9), None, None)
    );
    assert_eq!(state.number("timer.0#icount"), Some(5));
    assert_eq!(state.field("timer.0#list[2]"), Some(&[3u8][..]));
    let mut again = vec![];
    let ram: Vec<(String, u64)> = state.ram.iter().map(|block| (block.name.clone(), block.bytes)).collect();
    assemble(&mut again, &state.without_ram(), &ram, |block, page| state.page(block, page)).unwrap();
    assert_eq!(again, bytes);
}

/// QEMU 10 puts a command between RAM's parts and RAM's end.
#[test]
fn a_command_goes_behind_ram() {
    let bytes = state(5, 77);
    let end = [0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 1];
    let ends: Vec<usize> = (0..bytes.len()).filter(|at| bytes[..*at].ends_with(&end)).collect();
    let with_command = |at: usize| {
        let mut with = bytes.clone();
        with.splice(at..at, [0x08, 0, 0x0b, 0, 2, 7, 7]);
        with
    };
    assert_eq!(ends.len(), 2);
    let mut with = with_command(ends[0]);
    let parsed = VmState::parse(&with).unwrap();
    assert_eq!(parsed.leaves(), VmState::parse(&bytes).unwrap().leaves());
    let mut again = vec![];
    let ram: Vec<(String, u64)> = parsed.ram.iter().map(|block| (block.name.clone(), block.bytes)).collect();
    assemble(&mut again, &parsed.without_ram(), &ram, |block, page| parsed.page(block, page)).unwrap();
    assert!(again == with_command(ends[1]), "it goes behind RAM's last section");
    with.truncate(ends[0] + 5);
    assert!(VmState::parse(&with).is_err());
}

#[test]
fn what_is_left_out_does_not_change_a_digest() {
    let leaves = |timer, offset| VmState::parse(&state(timer, offset)).unwrap().leaves();
    assert_eq!(leaves(5, 77), leaves(5, 78));
    assert_ne!(leaves(5, 77), leaves(6, 77));
    assert!(is_left_out("0000:00:01.1/ide.0#bmdma[1]/migration_retry_nsector"));
    assert!(!is_left_out("0000:00:01.1/ide.0#bmdma[1]/status"));
}

proptest! {
    #[test]
    fn a_damaged_state_is_an_error_or_another_state(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
        let mut bytes = state(5, 77);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = VmState::parse(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(VmState::parse(&bytes).is_err());
    }
}
