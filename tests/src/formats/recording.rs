//! What a recording is made of, what is said of it, and the files it travels in.

use super::machine::{Over, image_of, snapshot_of};
use bytes::Bytes;
use heddle_coordinator::hunt;
use heddle_coordinator::job::{Job, JobKind, JobState, Span, Task, TaskState, Work};
use heddle_node::container::{Container, SnapshotEntry, Summary, Writer};
use heddle_node::outbox::{Outbox, read_left_behind};
use heddle_proto::chunk::{ChunkHeader, HEADER_BYTES, RAW_BYTES_MAX};
use heddle_proto::compress::compress;
use heddle_proto::event::{AsyncEvent, Body, CheckpointKind, ClockKind, Event, KINDS, Position, Role};
use heddle_proto::manifest::{
    Device, EmulatorSpec, MANIFEST_VERSION, MANIFEST_VERSION_OLDEST, Manifest, Positions,
};
use heddle_proto::qemu::{QemuDisk, RoleSource};
use heddle_proto::verdict::{Finding, Proof, Side, SideB, TaskResult};
use heddle_proto::{
    Chunk, Divergence, DivergenceKind, Hash, Outcome, QemuEvent, QemuSpec, RecordingId, Verdict,
};
use heddle_replay_engine::guest;
use heddle_replay_engine::qemu::recorded;
use std::io::Write;
use std::path::{Path, PathBuf};

const ID: RecordingId = RecordingId([7; 16]);

pub(super) fn check_id(bytes: &[u8]) -> bool {
    let _ = (Hash::from_slice(bytes), RecordingId::from_slice(bytes));
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let (hash, id) = (text.parse::<Hash>(), text.parse::<RecordingId>());
    let said = [hash.as_ref().ok().map(Hash::to_string), id.as_ref().ok().map(RecordingId::to_string)];
    for said in said.iter().flatten() {
        assert_eq!(*said, text.to_lowercase());
    }
    hash.is_ok() || id.is_ok()
}

pub(super) fn id_seeds() -> Vec<Vec<u8>> {
    let hash = Hash::of(b"seed").to_string();
    vec![hash.to_uppercase().into(), hash.into(), ID.to_string().into()]
}

/// An event of nearly every kind.
fn events() -> Vec<Event> {
    let data = b"typed".to_vec();
    let bodies = [
        Body::Checkpoint(CheckpointKind::Init),
        Body::Clock { clock: ClockKind::Host, value: -5 },
        Body::Clock { clock: ClockKind::VirtualRt, value: i64::MAX },
        Body::Async(AsyncEvent::BottomHalf { id: u64::MAX }),
        Body::Async(AsyncEvent::Block { id: 3 }),
        Body::Async(AsyncEvent::Char { data: data.clone() }),
        Body::Check { value: 1, output: 2 },
        Body::Digest { root: Hash::of(b"a"), history: Hash::of(b"b") },
        Body::Checkpoint(CheckpointKind::Reset),
        Body::Qemu(QemuEvent::Net { filter: 1, flags: 2, data: data.clone() }),
        Body::Qemu(QemuEvent::CharRead { device: 9, data: data.clone() }),
        Body::Qemu(QemuEvent::CharWrite { result: 5, written: 5 }),
        Body::Qemu(QemuEvent::Random { result: 0, data }),
        Body::Qemu(QemuEvent::Instruction),
        Body::Shutdown { code: 7 },
        Body::End,
    ];
    let role = |i: usize| if i % 2 == 0 { Role::Vcpu } else { Role::Iothread };
    let numbered = bodies.into_iter().enumerate();
    numbered.map(|(i, body)| Event { icount: 100 + i as u64 * 1000, role: role(i), body }).collect()
}

pub(super) fn check_chunk(bytes: &[u8]) -> bool {
    let is_taken = take_chunk(bytes);
    // What the header says of the payload is made good.
    if let Some(header) = bytes.get(..HEADER_BYTES) {
        let payload = &bytes[HEADER_BYTES..];
        let mut sealed = header.to_vec();
        sealed[56..60].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        sealed[64..96].copy_from_slice(&Hash::of(payload).0);
        sealed.extend_from_slice(payload);
        take_chunk(&sealed);
    }
    is_taken
}

fn take_chunk(bytes: &[u8]) -> bool {
    let Ok(chunk) = Chunk::parse(Bytes::copy_from_slice(bytes)) else { return false };
    assert_eq!(chunk.header.encode(), bytes[..HEADER_BYTES]);
    assert_eq!(chunk.header.id(), chunk.id());
    let Ok(events) = chunk.events() else { return false };
    events.iter().for_each(|event| assert!(!event.to_string().is_empty()));
    let header = &chunk.header;
    let again = Chunk::encode(header.recording, header.first_event, header.previous, &events);
    assert_eq!(again.header.counts, header.counts);
    assert_eq!((again.header.first_icount, again.header.last_icount), (events[0].icount, header.last_icount));
    assert_eq!(again.events().expect("it was encoded"), events);
    true
}

pub(super) fn chunk_seeds() -> Vec<Vec<u8>> {
    let all = events();
    let first = Chunk::encode(ID, 0, Hash::ZERO, &all);
    let second = Chunk::encode(ID, all.len() as u64, first.id(), &all[3..8]);
    vec![first.bytes.to_vec(), second.bytes.to_vec()]
}

/// An input is a payload before compression: a header is made that fits it.
pub(super) fn check_columns(raw: &[u8]) -> bool {
    if raw.len() > RAW_BYTES_MAX {
        return false;
    }
    let length = |at: usize| {
        let bytes = raw.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes) as usize
    };
    let (kinds, icounts) = (length(0), length(4));
    let Some(kinds) = raw.get(16..16 + kinds) else { return false };
    let from = 16 + kinds.len();
    let Some(icounts) = raw.get(from..from + icounts) else { return false };
    let mut counts = [0; KINDS];
    for kind in kinds {
        counts[usize::from(kind & 0x7f) % KINDS] += 1;
    }
    let payload = compress(raw, 1);
    let header = ChunkHeader {
        recording: ID,
        first_event: 0,
        events: kinds.len() as u32,
        first_icount: 0,
        last_icount: sum_of_varints(icounts),
        payload_bytes: payload.len() as u32,
        raw_bytes: raw.len() as u32,
        payload_hash: Hash::of(&payload),
        previous: Hash::ZERO,
        counts,
    };
    take_chunk(&[&header.encode()[..], &payload].concat())
}

fn sum_of_varints(bytes: &[u8]) -> u64 {
    let (mut sum, mut value, mut shift) = (0u64, 0u64, 0);
    for byte in bytes {
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        shift += 7;
        if *byte < 0x80 {
            sum = sum.wrapping_add(value);
            (value, shift) = (0, 0);
        }
    }
    sum
}

pub(super) fn columns_seeds() -> Vec<Vec<u8>> {
    let payload = |chunk: &[u8]| {
        heddle_proto::compress::decompress(&chunk[HEADER_BYTES..], RAW_BYTES_MAX).expect("it was compressed")
    };
    let mut all = events();
    // The first event's icount is in the header alone, and here that is zero.
    all.iter_mut().for_each(|event| event.icount -= 100);
    vec![payload(&Chunk::encode(ID, 0, Hash::ZERO, &all).bytes)]
}

pub(super) fn check_manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = Manifest::decode(bytes) else { return false };
    assert_eq!(Manifest::decode(&manifest.encode()).expect("it was encoded"), manifest);
    if let Some((_, positions)) = manifest.builtin() {
        for icount in [0, 1, 1 << 40, u64::MAX] {
            assert!(positions.next_after(icount) >= icount);
            let _ = (positions.is_digest(icount), positions.is_snapshot(icount));
        }
    }
    if let Some(spec) = manifest.qemu() {
        let _ = (recorded::check(&spec.arguments), recorded::check_icount(&spec.icount));
        let paths = [PathBuf::from("/a"), PathBuf::from("/b")];
        let _ = recorded::arguments(spec, &paths, &paths, Path::new("/s"));
    }
    true
}

fn manifest(emulator: EmulatorSpec) -> Manifest {
    Manifest {
        version: MANIFEST_VERSION,
        id: ID,
        name: "seed".into(),
        labels: [("of".to_string(), "tests".to_string())].into(),
        created_unix_ms: 1,
        build: "heddle 1".into(),
        emulator,
    }
}

fn builtin() -> EmulatorSpec {
    let positions =
        Positions { check_every: 1000, digest_every: 5000, snapshot_every: 50_000, snapshots_at: vec![7, 9] };
    let mut machine = guest::spec();
    machine.kernel = Some(image_of("loom.elf", guest::LOOM_ELF).0);
    machine.drives.clear();
    machine.devices = vec![Device::Rng, Device::Net];
    machine.seed = Some(7);
    EmulatorSpec::Builtin { machine: Box::new(machine), positions }
}

fn qemu() -> EmulatorSpec {
    let image = image_of("disk", b"disk").0;
    let arguments = ["-M", "pc-i440fx-7.2", "-kernel", "{file:0}", "-serial", "file:{scratch}/serial0"];
    EmulatorSpec::Qemu(QemuSpec {
        version: "7.2.22".into(),
        program: "qemu-system-x86_64".into(),
        machine_type: "pc-i440fx-7.2".into(),
        arguments: arguments.map(String::from).to_vec(),
        files: vec![image.clone()],
        disks: vec![QemuDisk { image, format: "raw".into(), guest_bytes: 1 << 20 }],
        icount: "shift=auto,sleep=on".into(),
        roles: RoleSource::Tap,
        memory_bytes: 128 << 20,
    })
}

pub(super) fn manifest_seeds() -> Vec<Vec<u8>> {
    let older = Manifest { version: MANIFEST_VERSION_OLDEST, ..manifest(builtin()) };
    let older = String::from_utf8(older.encode()).unwrap();
    let later = [",\"devices\":[\"rng\",\"net\"]", "\"harts\":1,", "\"dtb\":null,", "\"seed\":7,"];
    let older = later.iter().fold(older, |older, field| {
        assert!(older.contains(field), "{field} is not in {older}");
        older.replace(field, "")
    });
    [manifest(builtin()).encode(), manifest(qemu()).encode(), older.into_bytes()].to_vec()
}

/// What a node reports, and what differs on a hunt's other side.
pub(super) fn check_result(bytes: &[u8]) -> bool {
    let side: Result<SideB, _> = serde_json::from_slice(bytes);
    if let Ok(side) = &side {
        let again: SideB = serde_json::from_slice(&serde_json::to_vec(side).unwrap()).unwrap();
        assert_eq!(again, *side);
    }
    let Ok(result) = serde_json::from_slice::<TaskResult>(bytes) else { return side.is_ok() };
    let again: TaskResult = serde_json::from_slice(&serde_json::to_vec(&result).unwrap()).unwrap();
    assert_eq!(again, result);
    true
}

fn replayed() -> TaskResult {
    let side = |what: &str| Side { what: what.into(), role: Some(Role::Vcpu), icount: 9 };
    let divergence = Divergence {
        kind: DivergenceKind::State,
        position: Position { icount: 9, event: 3 },
        expected: side("check 1"),
        found: side("check 2"),
        last_good: Position::default(),
        pc: 0x8000_0000,
        hart: Some(3),
    };
    TaskResult::Replay(Verdict {
        outcome: Outcome::Diverged(Box::new(divergence)),
        from: Position::default(),
        to: Position { icount: 9, event: 3 },
        instructions: u64::MAX,
        events: 3,
        role_checked: 3,
        role_mismatches: 0,
        checkpoints: [("Init".to_string(), [("iothread".to_string(), 1)].into())].into(),
        digest: Some(Hash::of(b"digest")),
        coverage: "all".into(),
        proof: Proof::Spans,
    })
}

fn lockstep() -> TaskResult {
    let finding =
        Finding { icount: 7, kind: "state".into(), differs: vec!["x5".into()], ..Finding::default() };
    TaskResult::Lockstep { finding: Some(finding), replayed_instructions: u64::MAX }
}

pub(super) fn result_seeds() -> Vec<Vec<u8>> {
    let results = [replayed(), lockstep(), TaskResult::Index { snapshots: vec![5, 6] }];
    let image = image_of("a", b"a").0;
    let side = SideB { files: vec![(0, image.clone())], disks: vec![(1, image)], log: Some(ID) };
    let side = serde_json::to_vec(&side).unwrap();
    results.iter().map(|result| serde_json::to_vec(result).unwrap()).chain([side]).collect()
}

/// A job as the coordinator keeps it: whatever its row says, a hunt goes on from there.
pub(super) fn check_job(bytes: &[u8]) -> bool {
    let Ok(mut job) = serde_json::from_slice::<Job>(bytes) else { return false };
    for _ in 0..4 {
        hunt::advance(&mut job);
    }
    // Numbers with a fraction, which only a result could have, may change in their last digit.
    job.result = serde_json::Value::Null;
    let once = serde_json::to_vec(&job).unwrap();
    let again: Job = serde_json::from_slice(&once).unwrap();
    assert_eq!(serde_json::to_vec(&again).unwrap(), once);
    true
}

pub(super) fn job_seeds() -> Vec<Vec<u8>> {
    let span = Span { instructions: 9, to_icount: 9, ..Span::default() };
    let mut tasks = hunt::tasks(vec![span.clone(), span.clone()]);
    for task in &mut tasks {
        (task.state, task.result) = (TaskState::Done, Some(replayed()));
    }
    tasks.push(Task { result: Some(lockstep()), ..Task::new(Work::Lockstep, "narrowing", span) });
    let job = Job {
        id: "j1".into(),
        kind: JobKind::Hunt,
        recording: ID,
        build: "heddle 1".into(),
        against: "heddle 1+flip".into(),
        side_b: vec![],
        snapshots: 0,
        state: JobState::Running,
        phase: hunt::SPANS.into(),
        tasks,
        outcome: String::new(),
        result: serde_json::Value::Null,
        created_unix_ms: 1,
        ended_unix_ms: 0,
    };
    let narrowing = Job { phase: "narrowing".into(), ..job.clone() };
    [job, narrowing].map(|job| serde_json::to_vec(&job).unwrap()).to_vec()
}

pub(super) fn check_container(bytes: &[u8]) -> bool {
    // The hash of all at the end is made good.
    if let Some(before) = bytes.len().checked_sub(40) {
        let (all, end) = bytes.split_at(before);
        take_container(&[all, &end[..8], &Hash::of(all).0].concat());
    }
    take_container(bytes)
}

fn take_container(bytes: &[u8]) -> bool {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let Ok(container) = Container::open(file) else { return false };
    let mut events = 0;
    for chunk in container.chunks() {
        let chunk = chunk.expect("it was verified");
        assert_eq!(chunk.header.first_event, events);
        events = chunk.header.end_event();
    }
    assert_eq!(events, container.summary.events);
    true
}

pub(super) fn container_seeds() -> Vec<Vec<u8>> {
    let (snapshot, blocks) = snapshot_of(1, Over::Nothing);
    let icount = snapshot.position.icount;
    let entry = SnapshotEntry { icount, event: 0, root: snapshot.root, digest: snapshot.digest };
    let plain = container(&manifest(builtin()), vec![], image_of("", guest::LOOM_ELF).1);
    let all = [image_of("", guest::LOOM_ELF).1, blocks].concat();
    vec![plain, container(&manifest(builtin()), vec![entry], all)]
}

fn container(manifest: &Manifest, snapshots: Vec<SnapshotEntry>, blocks: Vec<Vec<u8>>) -> Vec<u8> {
    let all = events();
    let first = Chunk::encode(ID, 0, Hash::ZERO, &all[..6]);
    let second = Chunk::encode(ID, 6, first.id(), &all[6..]);
    let (events, icount) = (second.header.end_event(), second.header.last_icount);
    let summary = Summary { is_cut: false, events, icount, anchor: Hash::ZERO, snapshots };
    let mut writer = Writer::new(vec![], &manifest.encode(), &summary).unwrap();
    // A block that is named twice is there once.
    let named: std::collections::BTreeMap<Hash, &Vec<u8>> =
        blocks.iter().map(|block| (Hash::of(block), block)).collect();
    for (hash, block) in named {
        writer.block(hash, block).unwrap();
    }
    for chunk in [first, second] {
        writer.chunk(&chunk).unwrap();
    }
    writer.finish().unwrap()
}

pub(super) fn check_outbox(bytes: &[u8]) -> bool {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let Ok(left) = read_left_behind(Path::new("outbox"), &file) else { return false };
    let held: usize = left.chunks.iter().map(|chunk| chunk.bytes.len()).sum();
    assert!(held <= bytes.len(), "no chunk is found twice");
    true
}

pub(super) fn outbox_seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = Outbox::create(dir.path(), ID, [1; 16], 1 << 20).unwrap();
    let all = events();
    let first = Chunk::encode(ID, 0, Hash::ZERO, &all);
    let second = Chunk::encode(ID, all.len() as u64, first.id(), &all);
    let hole = first.bytes.len() + 8;
    outbox.push(first);
    outbox.push(second);
    let whole = std::fs::read(outbox.path()).unwrap();
    // What was acknowledged reads as zeros.
    let mut punched = whole.clone();
    punched[40..40 + hole].fill(0);
    vec![whole, punched]
}
