//! A real gdb in Debian's Linux: at the kernel's virtual addresses, forwards and backwards over
//! a snapshot.
//!
//! What gdb is to find is known from single steps of the same recording, so no address of the
//! kernel is written down here. `tests/riscv-guest` makes the guest. Where it can't be had, this
//! says so and is skipped.
#![allow(clippy::unwrap_used)]

use heddle_node::blocks::BlockCache;
use heddle_node::debugger::Recorded;
use heddle_proto::Manifest;
use heddle_replay_engine::debugger::{AccessKind, Points, Session as Replay, Stop, Watchpoint};
use heddle_replay_engine::machine::hart::Mode;
use heddle_replay_engine::machine::{Machine, RAM_BASE};
use heddle_tests::gdb::{Session, icounts, values};
use heddle_tests::{Processes, root, run, skip};
use serde_json::Value;
use std::collections::BTreeMap;

const NAME: &str = "linux";
/// The initramfs's own script, without the line that starts a shell and waits for it.
const APPEND: &str = "console=ttyS0 quiet cryptomgr.notests rdinit=/bin/busybox -- sh -c \
\"/bin/busybox sed /cttyhack/d /init > /run.sh; exec /bin/busybox sh /run.sh\"";
const IMAGES: [(&str, &str); 3] = [("bios", "fw_dynamic.bin"), ("kernel", "Image"), ("initrd", "initrd")];
const SNAPSHOT_EVERY: &str = "50000000";
/// So many instructions before a snapshot, and behind it, are stepped through. The kernel's
/// functions are shorter than that.
const AROUND: u64 = 30_000;
/// Most words that are tried of a stack: each costs a few restores.
const WORDS_MAX: usize = 4;
/// Bytes of an instruction and what is behind it.
const CODE_BYTES: usize = 8;
const PAGE: usize = 4096;
const WORD: usize = 8;
/// `x2`.
const SP: usize = 2;
/// Page numbers have 44 bits.
const PPN: u64 = (1 << 44) - 1;

/// What single steps show around a snapshot.
struct Walk {
    from: u64,
    /// Of every instruction, before it runs: its pc, and whether it is the kernel's.
    steps: Vec<(u64, bool)>,
    /// Words of the stack's page: by address, which instructions have changed them.
    changes: BTreeMap<u64, Vec<u64>>,
}

impl Walk {
    fn new(replay: &mut Replay, from: u64, to: u64) -> Walk {
        arrive(replay, from);
        let page = replay.machine().hart().x[SP] & !(PAGE as u64 - 1);
        let mut walk = Walk { from, steps: vec![], changes: BTreeMap::new() };
        let (mut before, mut now): (Option<[u8; PAGE]>, [u8; PAGE]) = (None, [0; PAGE]);
        for icount in from..to {
            let machine = replay.machine();
            walk.steps.push((machine.hart().pc, machine.hart().mode == Mode::Supervisor));
            if machine.peek(page, &mut now) == PAGE {
                walk.compare(page, before.as_ref().unwrap_or(&now), &now, icount);
                before = Some(now);
            }
            assert_eq!(replay.run_forward(icount + 1, &mut || false), Ok(Stop::There));
        }
        walk
    }

    /// Notes what the instruction before `icount` has changed.
    fn compare(&mut self, page: u64, before: &[u8; PAGE], now: &[u8; PAGE], icount: u64) {
        if before == now {
            return;
        }
        for (word, (old, new)) in before.chunks(WORD).zip(now.chunks(WORD)).enumerate() {
            if old != new {
                self.changes.entry(page + (word * WORD) as u64).or_default().push(icount - 1);
            }
        }
    }

    fn pc(&self, icount: u64) -> u64 {
        self.steps[(icount - self.from) as usize].0
    }

    /// Whether the kernel executes this instruction and its neighbours one behind the other:
    /// no trap comes between them, and nothing jumps.
    fn is_plain(&self, icount: u64) -> bool {
        let first = (icount - self.from).checked_sub(1).map(|first| first as usize);
        let Some(three) = first.and_then(|first| self.steps.get(first..first + 3)) else { return false };
        let is_behind = |pair: &[(u64, bool)]| matches!(pair[1].0.wrapping_sub(pair[0].0), 2 | 4);
        three.iter().all(|step| step.1) && three.windows(2).all(is_behind)
    }

    /// The first instruction behind `second` whose pc has not been there since `first`.
    fn new_place(&self, first: u64, second: u64) -> Option<u64> {
        let is_new = |at: &u64| (first..*at).all(|before| self.pc(before) != self.pc(*at));
        let end = self.from + self.steps.len() as u64;
        (second + 1..end).filter(|at| self.is_plain(*at)).find(is_new)
    }
}

/// Where gdb is to stop.
struct Plan {
    /// The kernel's addresses.
    walk: Walk,
    /// A word of the kernel's stack, and the two instructions that change it: one before the
    /// snapshot, the next one behind it. Nothing else writes it meanwhile.
    word: u64,
    first: u64,
    second: u64,
    /// The first one between them that reads it.
    read: u64,
    /// Behind them, at a place where the replay has not been since the first one.
    place: u64,
    /// Where in physical memory the second one is.
    physical: u64,
}

impl Plan {
    fn new(origin: Recorded, snapshots: &[u64], end: u64) -> Plan {
        let mut replay = Replay::new(Box::new(origin)).unwrap();
        let is_within = |snapshot: &&u64| **snapshot > AROUND && **snapshot + AROUND < end;
        let plan = snapshots.iter().filter(is_within).find_map(|at| Plan::around(&mut replay, *at));
        plan.expect("of no snapshot the kernel's stack is written on both sides")
    }

    fn around(replay: &mut Replay, snapshot: u64) -> Option<Plan> {
        let walk = Walk::new(replay, snapshot - AROUND, snapshot + AROUND);
        let candidates: Vec<(u64, u64, u64)> = walk
            .changes
            .iter()
            .filter_map(|(word, changes)| {
                let behind = changes.partition_point(|change| *change < snapshot);
                let (first, second) = (*changes.get(behind.checked_sub(1)?)?, *changes.get(behind)?);
                // gdb begins one instruction before the first one, and with what was there then.
                let is_alone = behind < 2 || changes[behind - 2] + 1 < first;
                let is_plain = walk.is_plain(first) && walk.is_plain(second);
                let is_in_page = walk.pc(second) as usize % PAGE <= PAGE - CODE_BYTES;
                (is_alone && is_plain && is_in_page).then_some((*word, first, second))
            })
            .take(WORDS_MAX)
            .collect();
        let (word, first, second, read) = candidates.into_iter().find_map(|(word, first, second)| {
            let read = next_access(replay, word, AccessKind::Read, first + 1, second)?;
            let write = next_access(replay, word, AccessKind::Write, first + 1, second + 1)?;
            (write == second && walk.is_plain(read)).then_some((word, first, second, read))
        })?;
        let place = walk.new_place(first, second)?;
        arrive(replay, second);
        let physical = translate(replay.machine(), walk.pc(second));
        Some(Plan { walk, word, first, second, read, place, physical })
    }
}

fn arrive(replay: &mut Replay, icount: u64) {
    assert_eq!(replay.goto(icount), Ok(Stop::There));
    replay.settle();
}

/// The first instruction of `from..to` that accesses a word.
fn next_access(replay: &mut Replay, word: u64, kind: AccessKind, from: u64, to: u64) -> Option<u64> {
    arrive(replay, from);
    let watchpoints = vec![Watchpoint { address: word, bytes: WORD as u64, kind }];
    replay.points = Points { watchpoints, ..Points::default() };
    let stop = replay.run_forward(to, &mut || false).unwrap();
    replay.points = Points::default();
    matches!(stop, Stop::Found(_)).then(|| replay.icount())
}

/// Where a virtual address is in physical memory, by the page table as this test reads it.
fn translate(machine: &Machine, address: u64) -> u64 {
    let satp = machine.hart().satp;
    let levels = match satp >> 60 {
        8 => 3,
        9 => 4,
        10 => 5,
        mode => panic!("the kernel runs with mode {mode} in satp"),
    };
    let mut table = (satp & PPN) << 12;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let at = table + (address >> shift & 0x1ff) * 8;
        let entry = machine.ram().load::<8>(at - RAM_BASE).unwrap();
        assert_eq!(entry & 1, 1, "{address:#x} is not mapped: {entry:#x} at {at:#x}");
        table = (entry >> 10 & PPN) << 12;
        // A page of any size can be read, written or executed; a table can't.
        if entry & 0b1110 != 0 {
            let offset = (1 << shift) - 1;
            return table & !offset | address & offset;
        }
    }
    panic!("the tables of {address:#x} have no end")
}

/// The recording's state, and the memory there that is asked for.
async fn state(p: &Processes, at: u64, memory: &[&str]) -> Value {
    let at = at.to_string();
    let asked = ["state", NAME, "--at", &at, "-o", "json", "--memory"];
    p.heddle(&[&asked[..], memory].concat()).await.expect(0).json()
}

/// What gdb has printed by `x/8xb`, as `heddle state` would.
fn bytes(said: &str) -> String {
    let lines = said.lines().filter_map(|line| line.split_once(":\t"));
    lines.flat_map(|(_, bytes)| bytes.split_whitespace()).map(|byte| byte.trim_start_matches("0x")).collect()
}

/// A cluster that has recorded the guest from power-on to poweroff; none, and why, if its files
/// are not there.
async fn recorded() -> Option<Processes> {
    let files = root().join("target/guests/riscv");
    if !files.join("stamp").exists() {
        skip(format_args!("{} is not there: tests/riscv-guest makes it", files.display()));
        return None;
    }
    let p = Processes::start(1, 20_000).await;
    let mut record = p.command();
    record.args(["record", "builtin", "--name", NAME, "--memory", "256M", "--append", APPEND]);
    record.args(["--snapshot-every", SNAPSHOT_EVERY]);
    for (option, file) in IMAGES {
        record.arg(format!("--{option}")).arg(files.join(file));
    }
    let said = tokio::task::spawn_blocking(move || run(&mut record, b"")).await.unwrap().expect(0);
    assert!(said.out.contains("reboot: Power down"), "{}", said.out);
    Some(p)
}

#[tokio::test(flavor = "multi_thread")]
async fn gdb_stops_in_the_kernel_forwards_and_backwards_over_a_snapshot() {
    let Some(p) = recorded().await else { return };
    let row = p.row(NAME).await.unwrap();
    let id = Manifest::decode(&row.manifest).unwrap().id;
    let blocks = BlockCache::new(p.client.store.clone());
    let origin = Recorded::fetch(&p.client.store, &blocks, id).await.unwrap();
    let snapshots: Vec<u64> = row.snapshots.iter().map(|snapshot| snapshot.icount).collect();
    let end = row.committed_icount;
    let plan = tokio::task::spawn_blocking(move || Plan::new(origin, &snapshots, end)).await.unwrap();
    let Plan { walk, word, first, second, read, place, physical } = &plan;

    // What the kernel's page table says is where it says: both kinds of address have the same.
    let pc = walk.pc(*second);
    let by_kernel = state(&p, *second, &[&format!("{pc:#x}:{CODE_BYTES}"), "--virtual"]).await;
    let by_ram = state(&p, *second, &[&format!("{physical:#x}:{CODE_BYTES}")]).await;
    assert_eq!(by_kernel["mode"], "supervisor", "{by_kernel}");
    assert_eq!(by_kernel["pc"], format!("{pc:#x}"));
    assert_eq!(by_kernel["memory"]["bytes"], by_ram["memory"]["bytes"], "{pc:#x} is {physical:#x}");

    let session = Session::start(p.command(), NAME, first - 1, &[]);
    let watch = format!("watch -l *(long *){word:#x}");
    let rwatch = format!("rwatch -l *(long *){word:#x}");
    let hbreak = format!("hbreak *{:#x}", walk.pc(*place));
    // gdb itself goes over an access, in the way it goes.
    let moves: [(&[&str], u64); 8] = [
        (&[], first - 1),
        (&[&watch, "continue"], first + 1),
        (&["delete", &rwatch, "continue"], read + 1),
        (&["reverse-continue"], *read),
        (&["delete", &watch, "continue"], second + 1),
        (&["reverse-continue", "x/8xb $pc"], *second),
        (&["reverse-continue"], *first),
        (&["delete", &hbreak, "continue"], *place),
    ];
    let steps: Vec<&str> =
        moves.iter().flat_map(|(steps, _)| [*steps, &["monitor icount", "p/x $pc"]].concat()).collect();
    let said = session.gdb(&steps).await;
    let icounts = icounts(&said);
    let pcs = moves.map(|(_, icount)| format!("{:#x}", walk.pc(icount)));
    assert_eq!(icounts, moves.map(|(_, icount)| icount), "{said}");
    assert_eq!(values(&said), pcs, "{said}");
    assert_eq!(by_kernel["memory"]["bytes"], bytes(&said), "{said}");
    drop(session);
    p.cluster.stop().await;
}
