//! What a real QEMU writes: its log, its VM state, its disks, and the tap's ring.

use super::{Blocks, join, split};
use heddle_node::qemu::qcow2::{self, CLUSTER, Cluster, Contents, NewSnapshot, Qcow2};
use heddle_node::qemu::ring::{Mode, Ring};
use heddle_node::qemu::snapshot::{self, Tracker};
use heddle_proto::{Event, Hash, Position, Role};
use heddle_replay_engine::qemu::log::{self, Decoder, Dialect, HEADER_BYTES};
use heddle_replay_engine::qemu::vmstate::{self, PAGE, VmState, WithoutRam};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The name of the snapshots here.
const NAME: &str = "s";
/// Pages that a check puts together again, at most.
const PAGES_MAX: usize = 4096;

pub(super) fn check_log(bytes: &[u8]) -> bool {
    let mut is_known = true;
    for (dialect, step) in [(Dialect::Qemu7, 7), (Dialect::Qemu10, 4096)] {
        let mut decoder = Decoder::new(dialect, HEADER_BYTES, 0);
        let mut located = vec![];
        for piece in bytes.chunks(step) {
            decoder.push(piece);
            located.extend(std::iter::from_fn(|| decoder.next_event()));
        }
        located.extend(decoder.finish());
        is_known &= !decoder.is_raw();
        let event = |l: log::Located| Event { icount: l.icount, role: Role::Vcpu, body: l.body };
        let events: Vec<Event> = located.into_iter().map(event).collect();
        let mut again = vec![];
        log::encode(&mut again, &mut 0, &events).expect("all of it stood in a log");
        assert_eq!(again, bytes, "{dialect:?}");
    }
    is_known
}

pub(super) fn log_seeds() -> Vec<Vec<u8>> {
    let array = |data: &[u8]| [&(data.len() as u32).to_be_bytes()[..], data].concat();
    let input = [vec![5], vec![0, 0, 0, 3], vec![1; 12], vec![6]].concat();
    let records: Vec<Vec<u8>> = vec![
        vec![0x25, 0x26, 0, 0, 0, 1, 0, 0x1e],
        [vec![0x1c], 5u64.to_be_bytes().to_vec()].concat(),
        [vec![0, 0x7f, 0xff, 0xff, 0xff, 0x1d], 6u64.to_be_bytes().to_vec()].concat(),
        [vec![0x03], 9u64.to_be_bytes().to_vec(), vec![0x08], 9u64.to_be_bytes().to_vec()].concat(),
        input,
        [vec![0x07, 1], array(b"typed")].concat(),
        [vec![0x09, 0, 0, 0, 0, 1], array(&[7; 60])].concat(),
        [vec![0x16, 0, 0, 0, 1, 0, 0, 0, 1, 0x17], array(b"read")].concat(),
        [vec![0x1b, 0, 0, 0, 0], array(&[8; 16])].concat(),
        vec![1, 2, 0x0a, 0x0e, log::END],
    ];
    vec![records.concat(), records[..3].concat(), records[5..].concat()]
}

/// A state of two RAM blocks and two devices, as QEMU writes it.
fn vm_state() -> Vec<u8> {
    let name = |out: &mut Vec<u8>, name: &str| {
        out.push(name.len() as u8);
        out.extend_from_slice(name.as_bytes());
    };
    let section = |id: u8, title: &str, data: &[u8]| {
        let mut out = vec![0x04, 0, 0, 0, id];
        name(&mut out, title);
        out.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1]);
        out.extend_from_slice(data);
        out.extend_from_slice(&[0x7e, 0, 0, 0, id]);
        out
    };
    let replay: Vec<u8> = [&[0; 7][..], &[77], &[0; 7], &[12], &[0]].concat();
    let list = [1, 2, 3, 0x05, 9, b't', b'i', b'm', b'e', b'r', b'/', b's', b'u', b'b', 0, 0, 0, 1, 4];
    let rest = [section(2, "replay", &replay), section(3, "timer", &list), vec![0]].concat();
    let json = serde_json::json!({ "devices": [
        { "name": "replay", "instance_id": 0, "fields": [
            { "name": "current_icount", "size": 8 },
            { "name": "file_offset", "size": 8 },
            { "name": "has_unread_data", "size": 1 },
        ] },
        { "name": "timer", "instance_id": 0, "fields": [
            { "name": "list", "array_len": 3, "struct": { "fields": [{ "name": "one", "size": 1 }] } },
        ], "subsections": [{ "vmsd_name": "timer/sub", "fields": [{ "name": "x", "size": 1 }] }] },
    ] })
    .to_string();
    let description = [&[0x06][..], &(json.len() as u32).to_be_bytes(), json.as_bytes()].concat();
    let mut ram_header = vec![0, 0, 0, 1];
    name(&mut ram_header, "ram");
    ram_header.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 4]);
    let parts = WithoutRam { head: b"QEVM\0\0\0\x03".to_vec(), ram_header, rest, description };
    let page = vec![9u8; PAGE];
    let ram = [("pc.ram".to_string(), 3 * PAGE as u64), ("pc.rom".to_string(), PAGE as u64)];
    let mut out = vec![];
    let page = |block: usize, index: usize| (block == 0 && index == 2).then_some(&page[..]);
    vmstate::assemble(&mut out, &parts, &ram, page).expect("it has RAM's header");
    out
}

pub(super) fn check_vm_state(bytes: &[u8]) -> bool {
    let Ok(state) = VmState::parse(bytes) else { return false };
    let _ = (state.icount(), state.log_offset(), state.instructions_ahead());
    for path in state.fields.keys() {
        assert!(state.field(path).is_some());
    }
    let leaves = state.leaves();
    if state.ram.iter().map(|block| block.pages.len()).sum::<usize>() > PAGES_MAX {
        return true;
    }
    let ram: Vec<(String, u64)> = state.ram.iter().map(|block| (block.name.clone(), block.bytes)).collect();
    let roots = ram.iter().map(|(name, bytes)| (name.as_str(), *bytes, Hash::ZERO));
    let _ = vmstate::digest(roots, &leaves);
    let mut again = vec![];
    let page = |block: usize, page: usize| state.page(block, page);
    vmstate::assemble(&mut again, &state.without_ram(), &ram, page).expect("it has RAM's header");
    // Put together in the usual order, it may be refused, but it is no other state.
    if let Ok(again) = VmState::parse(&again) {
        assert_eq!(again.leaves(), leaves);
    }
    true
}

pub(super) fn vm_state_seeds() -> Vec<Vec<u8>> {
    let plain = vm_state();
    // QEMU 10 puts a command behind RAM's first part.
    let end = [0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 1];
    let at = plain.windows(end.len()).position(|window| window == end).expect("RAM has an end");
    let mut with_command = plain.clone();
    with_command.splice(at + end.len()..at + end.len(), [0x08, 0, 0x0b, 0, 2, 7, 7]);
    vec![plain, with_command]
}

/// A qcow2 file with one snapshot, in a directory that goes with it.
fn qcow2_of(clusters: Vec<(u64, Option<&[u8]>)>, vm_state: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qcow2");
    let snapshot = NewSnapshot { name: NAME, icount: 77, clusters, vm_state };
    let contents = Contents { guest_bytes: 1 << 20, backing: Some(("/b", "raw")), snapshot: Some(snapshot) };
    qcow2::write(&path, &contents).unwrap();
    (dir, path)
}

pub(super) fn check_qcow2(bytes: &[u8]) -> bool {
    let file = file_of(bytes, bytes.len() as u64);
    let Ok(image) = Qcow2::open(&file) else { return false };
    let Ok(found) = image.snapshot(NAME) else { return false };
    let Ok(clusters) = image.clusters(&found) else { return false };
    for (_, cluster) in clusters.iter().take(16) {
        if let Cluster::At(offset) = cluster {
            let _ = image.cluster(*offset);
        }
    }
    let Ok(state) = image.vm_state(&found) else { return false };
    assert_eq!(state.len() as u64, found.vm_state_bytes);
    true
}

pub(super) fn qcow2_seeds() -> Vec<Vec<u8>> {
    let data = vec![1; CLUSTER];
    let (_dir, path) = qcow2_of(vec![(3, Some(&data[..])), (5, None)], &vm_state());
    vec![std::fs::read(path).unwrap()]
}

/// A file of `len` bytes that begins with these.
fn file_of(bytes: &[u8], len: u64) -> File {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(len).unwrap();
    file
}

/// An input is a snapshot's blocks, the root first.
pub(super) fn check_snapshot(bytes: &[u8]) -> bool {
    let parts = split(bytes);
    let Some(root) = parts.first().map(|root| Hash::of(root)) else { return false };
    let mut source = Blocks::of(&parts);
    let Ok(named) = snapshot::blocks_of(root, &mut source) else { return false };
    assert!(named.contains(&root));
    true
}

pub(super) fn snapshot_seeds() -> Vec<Vec<u8>> {
    let data = vec![1; CLUSTER];
    let (_dir, state) = qcow2_of(vec![], &vm_state());
    let (_disk_dir, disk) = qcow2_of(vec![(3, Some(&data[..])), (5, None)], &[]);
    let captured = snapshot::capture(&mut Tracker::default(), NAME, &state, &[disk]).unwrap();
    let taken = captured.finish(4);
    // The root is the last; the disk's data is only named.
    let blocks = taken.blocks.iter().rev().map(|(_, block)| &block[..]);
    vec![join(blocks.filter(|block| block.len() < CLUSTER))]
}

/// Length of a ring's first page, of which an input is the beginning.
const HEAD_BYTES: usize = 4096;

pub(super) fn check_ring(bytes: &[u8]) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let path = new_ring(dir.path()).path().to_path_buf();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[..bytes.len().min(HEAD_BYTES)], 0).unwrap();
    let Ok(mut ring) = Ring::open(&path) else { return false };
    let _ = (ring.stage(), ring.program(), ring.dialect(), ring.roles(), ring.position());
    let _ = ring.all_marks();
    let marks = ring.take_marks();
    let read = ring.read(HEADER_BYTES);
    let is_whole = marks.is_ok() && read.is_ok();
    if let Ok(found) = read
        && found.len() < 1 << 20
        && let Ok(more) = ring.push(b"more")
    {
        assert!(more <= 4);
        let _ = ring.give_back(ring.taken().max(HEADER_BYTES), Position::default());
    }
    is_whole
}

fn new_ring(dir: &Path) -> Ring {
    Ring::create(&dir.join("ring"), Mode::Record, Dialect::Qemu10).unwrap()
}

pub(super) fn ring_seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let mut ring = new_ring(dir.path());
    let head = |ring: &Ring| {
        let mut head = vec![0; HEAD_BYTES];
        let file = File::open(ring.path()).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut head, 0).unwrap();
        head
    };
    let empty = head(&ring);
    ring.push(&[1; 500]).unwrap();
    ring.give_back(200, Position { icount: 5, event: 3 }).unwrap();
    vec![empty, head(&ring)]
}
