//! What the store reads: its journal, entries, rows, and its peers' messages.

use crate::sim::disk::SimDisk;
use bytes::Bytes;
use heddle_proto::event::{Body, Event, Role};
use heddle_proto::{Chunk, Hash, RecordingId, v1};
use heddle_storage::apply::{Entry, Planted};
use heddle_storage::catalog::Catalog;
use heddle_storage::command::{self, Command, Proposal};
use heddle_storage::core::Envelope;
use heddle_storage::disk::Disk;
use heddle_storage::install::{Fetch, Page, PageRow, checkpoint_frames, decode_rows};
use heddle_storage::journal::{Frame, FrameKind, Journal, JournalConfig, Location};
use heddle_storage::rows::MemRows;
use heddle_storage::schema::{
    self, BlockRow, Chain, ChunkRow, GroupRow, MemberRow, RecordingRow, RecordingState, SnapshotRow,
    VALUE_BYTES_MAX, Wish, chunks_of, is_hashes_full, is_page_full, locations, relocated,
};
use heddle_storage::transport;
use prost::Message as _;
use raft::eraftpb::{self, Message, MessageType};
use std::io::IoSlice;
use std::sync::Arc;

/// An input is segments of this length, one behind the other.
const SEGMENT_BYTES: usize = 64 << 10;
const BLOCK: usize = 4 << 10;
const ID: RecordingId = RecordingId([7; 16]);

fn config() -> JournalConfig {
    JournalConfig { segment_bytes: SEGMENT_BYTES as u64, reserve_bytes: 0, in_background: false }
}

pub(super) fn check_journal(bytes: &[u8]) -> bool {
    // With checksums made good, any number can be in a head.
    let _ = Journal::open(disk_of(&with_checksums(bytes)), config(), |_| {});
    let disk = disk_of(bytes);
    let Ok(mut journal) = Journal::open(disk.clone(), config(), |_| {}) else { return false };
    // What was opened can be written to, and opens again.
    let data = Bytes::from_static(b"behind all that was there");
    let frame = Frame { kind: FrameKind::Entry, group: 7, term: 7, index: 7, data };
    let places = journal.append(std::slice::from_ref(&frame)).expect("there is room");
    assert_eq!(journal.segments().read(places[0]).expect("it was written"), frame.data);
    drop(journal);
    let mut last = None;
    let visit = |found: heddle_storage::journal::Scanned| {
        if found.frame.kind == FrameKind::Entry {
            last = Some(found.frame);
        }
    };
    Journal::open(disk, config(), visit).expect("what was opened and written opens again");
    assert_eq!(last, Some(frame));
    true
}

fn disk_of(bytes: &[u8]) -> Arc<SimDisk> {
    let disk = SimDisk::default();
    for (i, part) in bytes.chunks(SEGMENT_BYTES).take(4).enumerate() {
        let name = format!("{:016x}.seg", i + 1);
        disk.create(&name, SEGMENT_BYTES as u64).expect("it has room");
        let file = disk.open(&name).expect("it was made");
        file.write(&[IoSlice::new(part)], 0).expect("it is as long");
    }
    Arc::new(disk)
}

/// The same bytes with the checksum of every head, and of every frame's data, made good.
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let seal = |out: &mut [u8], at: usize, from: usize, to: usize| {
        let crc = crc32c::crc32c(&out[from..to]);
        out[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    };
    for at in (0..out.len()).step_by(BLOCK) {
        if out[at..].starts_with(b"HDLJ") && out.len() - at >= 20 {
            seal(&mut out, at + 16, at, at + 16);
        }
        if !out[at..].starts_with(b"HDLB") || out.len() - at < 40 {
            continue;
        }
        seal(&mut out, at + 4, at + 8, at + 40);
        let mut from = at + 40;
        while out[from..].starts_with(b"HDLF") && out.len() - from >= 48 {
            let length = out[from + 12..from + 16].try_into().expect("4 bytes");
            let end = from + 48 + u32::from_le_bytes(length) as usize;
            if end <= out.len() {
                seal(&mut out, from + 8, from + 48, end);
            }
            seal(&mut out, from + 4, from + 8, from + 48);
            from = end.min(out.len());
        }
    }
    out
}

pub(super) fn journal_seeds() -> Vec<Vec<u8>> {
    [1, 40].map(journal_of).to_vec()
}

fn journal_of(batches: u64) -> Vec<u8> {
    let disk = Arc::new(SimDisk::default());
    let mut journal = Journal::open(disk.clone(), config(), |_| {}).expect("a new journal");
    for index in 1..=batches {
        let data = Bytes::from(vec![index as u8; 600]);
        let entry = Frame { kind: FrameKind::Entry, group: 1, term: 3, index, data };
        let hard_state = Frame::of_hard_state(1, (3, 2, index));
        journal.append(&[entry, hard_state]).expect("it has room");
    }
    journal.mark().expect("it has room");
    drop(journal);
    let mut names = disk.list().expect("a simulated disk");
    names.sort();
    let mut out = vec![];
    for name in names {
        let file = disk.open(&name).expect("it is there");
        let mut bytes = vec![0; SEGMENT_BYTES];
        file.read(&mut bytes, 0).expect("it is as long");
        out.extend(bytes);
    }
    out
}

pub(super) fn check_commands(bytes: &[u8]) -> bool {
    let Ok(decoded) = command::decode(&Bytes::copy_from_slice(bytes)) else { return false };
    let proposals: Vec<Proposal> = decoded.iter().map(|(proposal, _)| proposal.clone()).collect();
    let again = command::decode(&command::encode(&proposals)).expect("it was encoded");
    assert!(again.iter().map(|(proposal, _)| proposal).eq(&proposals));
    let catalog = Catalog::new(Arc::new(MemRows::default()));
    let mut rows = catalog.begin();
    let entry_at = Location { segment: 1, offset: 4096, bytes: bytes.len() as u32, crc: 0 };
    for (proposal, bulk_from) in decoded {
        let (bulk, planted) = (proposal.bulk.clone(), Planted::None);
        let entry = Entry { group: 0, index: 7, bulk, entry_at, bulk_from, rows: &mut rows, planted };
        entry.apply(proposal).expect("what is committed can't fail here alone");
    }
    true
}

fn chunk() -> Chunk {
    let events: Vec<Event> = (0..20)
        .map(|i| Event { icount: i * 7, role: Role::Vcpu, body: Body::Check { value: i, output: !i } })
        .collect();
    Chunk::encode(ID, 0, Hash::ZERO, &events)
}

pub(super) fn commands_seeds() -> Vec<Vec<u8>> {
    let (recording, owner, epoch, hash) = (ID, ID, 1, Hash::of(b"block"));
    let chunk = chunk();
    let last_chunk = chunk.id();
    let one = |command, bulk: &[u8]| Proposal { command, bulk: Bytes::copy_from_slice(bulk) };
    let begin = [
        one(Command::Open { recording, token: vec![1; 16], fence: false }, b"{\"version\":2}"),
        one(Command::Append { recording, epoch }, &chunk.bytes),
        one(Command::Place { recording, shard: 2 }, b""),
        one(Command::PutBlocks { owner, blocks: vec![(hash, 5, 9)] }, b"block"),
        one(Command::Pin { owner, hashes: vec![hash, Hash::ZERO] }, b""),
        one(Command::AddSnapshot { recording, epoch, icount: 9, event: 3, root: hash, digest: hash }, b""),
        one(Command::Seal { recording, epoch, events: 20, last_chunk, cut: false }, b""),
    ];
    let lengths = vec![chunk.bytes.len() as u32];
    let end = [
        one(Command::AppendMany { recording, epoch, lengths }, &chunk.bytes),
        one(Command::Rewrite { recording, epoch }, &chunk.bytes),
        one(Command::Adopt { recording, epoch, old: last_chunk, new: last_chunk }, b""),
        one(Command::Delete { recording }, b""),
        one(Command::DropOwner { owner, until: 7 }, b""),
        one(Command::Forget { recording }, b""),
        one(Command::Abandon { recording }, b""),
        one(Command::Unplace { recording, until: 7 }, b""),
    ];
    let meta = [
        one(Command::MetaAcquire { holder: "coordinator".into() }, b""),
        one(
            Command::MetaWrite { epoch, puts: vec![("job/a".into(), 4)], deletes: vec!["job/b".into()] },
            b"[{}]",
        ),
        one(Command::Member { id: 4, address: "http://[::1]:1".into(), wish: Wish::Drained }, b""),
    ];
    let all = begin.iter().chain(&end);
    let encoded = [command::encode(&begin), command::encode(all), command::encode(&meta)];
    encoded.map(|bytes| bytes.to_vec()).to_vec()
}

/// The kinds of rows; an input's first byte chooses one.
const KINDS: &[u8] = b"arcwsbomepnqvkl";

/// Whether the value decodes as the type, and comes out the same when encoded.
macro_rules! is_row {
    ($row:ty, $key:expr, $value:expr) => {{
        let decoded = schema::decode::<$row>($key, $value);
        if let Ok(row) = &decoded
            && $value.len() <= VALUE_BYTES_MAX
        {
            let again = schema::decode::<$row>($key, &schema::encode(row)).expect("it was encoded");
            assert_eq!(&again, row);
        }
        decoded.is_ok()
    }};
}

pub(super) fn check_row(bytes: &[u8]) -> bool {
    let Some((kind, value)) = bytes.split_first() else { return false };
    let kind = KINDS[usize::from(*kind) % KINDS.len()];
    let key = [&[0, 1, kind][..], &[9; 24]].concat();
    let places = locations(&key, value);
    if let Ok(places) = &places
        && let Ok(same) = relocated(&key, value, |at| at)
    {
        assert_eq!(&locations(&key, &same).expect("it was encoded"), places);
    }
    match kind {
        b'a' => is_row!(GroupRow, &key, value),
        b'r' => is_row!(RecordingRow, &key, value),
        b's' => is_row!(SnapshotRow, &key, value),
        b'b' => is_row!(BlockRow, &key, value),
        b'n' => is_row!(MemberRow, &key, value),
        b'm' => is_row!(Location, &key, value),
        b'e' | b'k' | b'l' => is_row!(u64, &key, value),
        b'p' | b'v' => is_row!(u32, &key, value),
        b'c' | b'w' => {
            let mut page = vec![];
            for chunk in chunks_of(value) {
                assert!(chunk.end_event() >= chunk.first_event);
                chunk.encode(&mut page);
            }
            assert_eq!(page, value[..page.len()]);
            is_page_full(value);
            true
        }
        _ => {
            is_hashes_full(value);
            true
        }
    }
}

pub(super) fn row_seeds() -> Vec<Vec<u8>> {
    let at = Location { segment: 300, offset: 70_000, bytes: 1000, crc: 0xdead_beef };
    let hash = Hash::of(b"row");
    let recording = RecordingRow {
        state: RecordingState::Sealed,
        epoch: 2,
        token: vec![3; 16],
        manifest: at,
        chain: Chain { events: 1 << 20, ..Chain::new(hash) },
        rewritten_from: hash,
        rewriting: Some(Chain::new(hash)),
    };
    let chunk =
        ChunkRow { at, id: hash, first_event: 5, events: 100, first_icount: 1 << 33, last_icount: 1 << 34 };
    let mut page = vec![];
    (0..3).for_each(|_| chunk.encode(&mut page));
    let group = GroupRow { applied: 500, term: 3, conf: vec![8, 1, 8, 2, 8, 3] };
    let snapshot = SnapshotRow { icount: 1 << 40, event: 77, root: hash, digest: hash };
    let values = [
        (b'a', schema::encode(&group)),
        (b'r', schema::encode(&recording)),
        (b'c', page.clone()),
        (b'w', page),
        (b's', schema::encode(&snapshot)),
        (b'b', schema::encode(&BlockRow { at, raw_bytes: 65_536, owner: ID })),
        (b'm', schema::encode(&at)),
        (b'e', schema::encode(&7u64)),
        (b'p', schema::encode(&3u32)),
        (b'n', schema::encode(&MemberRow { address: "http://a:1".into(), wish: Wish::Member })),
        (b'q', hash.0.to_vec()),
        (b'l', schema::encode(&900u64)),
    ];
    let index = |kind: u8| KINDS.iter().position(|known| *known == kind).expect("a known kind") as u8;
    values.into_iter().map(|(kind, value)| [vec![index(kind)], value].concat()).collect()
}

pub(super) fn check_rows(bytes: &[u8]) -> bool {
    let Ok(rows) = decode_rows(bytes) else { return false };
    let row = GroupRow::default();
    let frames = checkpoint_frames(1, 0, &row, rows.into_iter());
    let again: Vec<u8> =
        frames.iter().filter(|f| f.kind == FrameKind::Rows).flat_map(|f| f.data.to_vec()).collect();
    assert_eq!(again, bytes);
    true
}

pub(super) fn rows_seeds() -> Vec<Vec<u8>> {
    let rows = row_seeds().into_iter().map(|value| (vec![0, 1, b'r', value[0]], value));
    let frames = checkpoint_frames(1, 1, &GroupRow::default(), rows);
    vec![frames[0].data.to_vec()]
}

pub(super) fn check_raft(bytes: &[u8]) -> bool {
    let Ok(batch) = v1::RaftBatch::decode(bytes) else { return false };
    let (from, to) = (batch.from, batch.to);
    let mut is_taken = true;
    for message in batch.messages {
        let group = message.group;
        let Ok(envelope) = transport::decode(message, from, to, 4) else {
            is_taken = false;
            continue;
        };
        if let Envelope::Page(page) = &envelope {
            fetch(group, page);
        }
        let (one, _) = transport::encode(group, envelope).expect("it was decoded");
        let again = transport::decode(one.clone(), from, to, 4).expect("it was encoded");
        let (two, _) = transport::encode(group, again).expect("it was decoded");
        // Fields that nobody knows come in any order.
        assert_eq!((one.raft.len(), &one.entries), (two.raft.len(), &two.entries));
        assert_eq!((one.pull, one.page), (two.pull, two.page));
    }
    is_taken
}

/// A follower that waits for this page.
fn fetch(group: u32, page: &Page) {
    let mut message = Message::default();
    message.mut_snapshot().mut_metadata().index = page.index;
    let mut fetch = Fetch::new(message, 1);
    if let Some(frames) = fetch.take(page.clone()) {
        // Places as far away as can be: a row may grow by that.
        let at = Location { segment: u64::MAX, offset: u32::MAX, bytes: u32::MAX, crc: u32::MAX };
        if fetch.placed(&vec![at; frames.len()]).is_ok() {
            fetch.finish(group);
        }
    }
}

pub(super) fn raft_seeds() -> Vec<Vec<u8>> {
    let mut message = Message { from: 2, to: 1, term: 5, index: 9, log_term: 4, ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    for index in [10, 11] {
        let data = Bytes::from(vec![index as u8; 40]);
        message.mut_entries().push(eraftpb::Entry { index, term: 5, data, ..eraftpb::Entry::default() });
    }
    let mut vote = Message { from: 2, to: 1, term: 6, ..Message::default() };
    vote.set_msg_type(MessageType::MsgRequestVote);
    let part = Bytes::from_static(b"a coordinator's value");
    let at = Location { segment: 3, offset: 5, bytes: part.len() as u32, crc: crc32c::crc32c(&part) };
    let row = PageRow { key: b"\0\0mjob/a".to_vec(), value: schema::encode(&at), parts: vec![part] };
    let page = Page { group: 0, index: 9, from: 0, rows: vec![row.clone(), row], total: 2 };
    let envelopes = [
        Envelope::Raft { group: 1, message: Box::new(message) },
        Envelope::Raft { group: 3, message: Box::new(vote) },
        Envelope::Pull { group: 2, index: 9, from: 4 },
        Envelope::Page(page),
    ];
    let groups = [1, 3, 2, 0];
    let encode = |(group, envelope)| transport::encode(group, envelope).expect("it is whole").0;
    let messages: Vec<v1::GroupMessage> = groups.into_iter().zip(envelopes).map(encode).collect();
    let batch = |messages| v1::RaftBatch { cluster: 7, from: 2, to: 1, messages, incarnation: 8 };
    let alone = messages.iter().map(|message| batch(vec![message.clone()]).encode_to_vec());
    alone.chain([batch(messages.clone()).encode_to_vec()]).collect()
}
