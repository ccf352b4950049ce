//! Every format that is read from a disk or a network: examples made by the real encoders,
//! and what must hold of any bytes at all. `tests/formats.rs` runs seeded mutations, `fuzz/`
//! the same checks under libFuzzer.
//!
//! A check gives the bytes to the product's own decoder. It must not panic, and not take
//! memory for lengths that are only claimed; what it takes must come out the same when it is
//! encoded and decoded again. Behind checksums, a check tries the bytes also with the
//! checksums made good, since no mutation would get past them.

mod elf;
mod machine;
pub mod mutate;
mod qemu;
mod recording;
mod store;

/// A format.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Its name, and its fuzz target's.
    pub name: &'static str,
    /// Decodes bytes; whether they were taken, as they are. Panics if something is wrong.
    pub check: fn(&[u8]) -> bool,
    /// Valid examples.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// What a check costs, about, in units of the cheapest: so many times fewer are run.
    pub cost: u64,
}

/// All of them.
pub const FORMATS: &[Format] = &[
    Format { name: "id", check: recording::check_id, seeds: recording::id_seeds, cost: 1 },
    Format { name: "chunk", check: recording::check_chunk, seeds: recording::chunk_seeds, cost: 1 },
    Format { name: "columns", check: recording::check_columns, seeds: recording::columns_seeds, cost: 1 },
    Format { name: "manifest", check: recording::check_manifest, seeds: recording::manifest_seeds, cost: 1 },
    Format { name: "result", check: recording::check_result, seeds: recording::result_seeds, cost: 1 },
    Format { name: "job", check: recording::check_job, seeds: recording::job_seeds, cost: 1 },
    Format {
        name: "container",
        check: recording::check_container,
        seeds: recording::container_seeds,
        cost: 4,
    },
    Format { name: "outbox", check: recording::check_outbox, seeds: recording::outbox_seeds, cost: 4 },
    Format { name: "journal", check: store::check_journal, seeds: store::journal_seeds, cost: 4 },
    Format { name: "commands", check: store::check_commands, seeds: store::commands_seeds, cost: 1 },
    Format { name: "row", check: store::check_row, seeds: store::row_seeds, cost: 1 },
    Format { name: "rows", check: store::check_rows, seeds: store::rows_seeds, cost: 1 },
    Format { name: "raft", check: store::check_raft, seeds: store::raft_seeds, cost: 1 },
    Format { name: "elf", check: machine::check_elf, seeds: machine::elf_seeds, cost: 4 },
    Format {
        name: "device-tree",
        check: machine::check_device_tree,
        seeds: machine::device_tree_seeds,
        cost: 4,
    },
    Format { name: "snapshot", check: machine::check_snapshot, seeds: machine::snapshot_seeds, cost: 4 },
    Format { name: "virtio", check: machine::check_virtio, seeds: machine::virtio_seeds, cost: 4 },
    Format { name: "qemu-log", check: qemu::check_log, seeds: qemu::log_seeds, cost: 1 },
    Format { name: "vm-state", check: qemu::check_vm_state, seeds: qemu::vm_state_seeds, cost: 1 },
    Format { name: "qcow2", check: qemu::check_qcow2, seeds: qemu::qcow2_seeds, cost: 10 },
    Format { name: "qemu-snapshot", check: qemu::check_snapshot, seeds: qemu::snapshot_seeds, cost: 1 },
    Format { name: "ring", check: qemu::check_ring, seeds: qemu::ring_seeds, cost: 10 },
];

/// Checks bytes as the format of this name: what a fuzz target does.
pub fn check(name: &str, bytes: &[u8]) {
    let format = FORMATS.iter().find(|format| format.name == name).expect("a format of this name");
    (format.check)(bytes);
}

/// Parts one behind the other, each behind its length: an input that stands for several.
fn join<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = vec![];
    for part in parts {
        out.extend_from_slice(&(part.len() as u32).to_le_bytes());
        out.extend_from_slice(part);
    }
    out
}

/// The parts of such an input; the last may be cut.
fn split(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut parts = vec![];
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let (part, rest) = rest.split_at(rest.len().min(u32::from_le_bytes(*length) as usize));
        parts.push(part);
        bytes = rest;
    }
    parts
}

/// Blocks by their hashes, as a store has them.
struct Blocks(std::collections::HashMap<heddle_proto::Hash, Vec<u8>>);

impl Blocks {
    fn of(parts: &[&[u8]]) -> Blocks {
        Blocks(parts.iter().map(|part| (heddle_proto::Hash::of(part), part.to_vec())).collect())
    }
}

impl heddle_replay_engine::BlockSource for Blocks {
    fn blocks(&mut self, hashes: &[heddle_proto::Hash]) -> Result<Vec<Vec<u8>>, String> {
        let one = |hash: &heddle_proto::Hash| {
            self.0.get(hash).cloned().ok_or_else(|| format!("block {hash} is not there"))
        };
        hashes.iter().map(one).collect()
    }
}
