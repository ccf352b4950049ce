//! What two QEMU states differ in: fields of devices and vCPUs, pages, disks.

use crate::qemu::snapshot::{Root, get_blob};
use anyhow::{Result, anyhow};
use heddle_proto::Hash;
use heddle_replay_engine::page_tree::{BlockSource, PageTree};
use heddle_replay_engine::qemu::vmstate::{self, PAGE, VmState, WithoutRam, is_left_out};
use std::collections::BTreeMap;

/// Longest field that is shown whole.
const SHOWN_BYTES: usize = 8;

/// Where two states differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Fields: path, and both values.
    pub fields: Vec<(String, String, String)>,
    /// Pages: RAM block and address.
    pub pages: Vec<(String, u64)>,
    /// Disks whose clusters differ.
    pub disks: Vec<String>,
}

impl Difference {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty() && self.pages.is_empty() && self.disks.is_empty()
    }

    /// One line for each difference, at most `most`.
    pub fn lines(&self, most: usize) -> Vec<String> {
        let fields = self.fields.iter().map(|(path, a, b)| format!("{} {a} / {b}", path.replace('#', " ")));
        let pages = self.pages.iter().map(|(block, address)| format!("page {block} {address:#x}"));
        let all: Vec<String> = fields.chain(pages).chain(self.disks.iter().cloned()).collect();
        let more = all.len().saturating_sub(most);
        let mut lines: Vec<String> = all.into_iter().take(most).collect();
        if more > 0 {
            lines.push(format!("and {more} more"));
        }
        lines
    }
}

/// A state's devices, without its RAM.
fn devices(root: &Root, source: &mut dyn BlockSource) -> Result<Vec<u8>> {
    let parts = WithoutRam {
        head: root.head.clone(),
        ram_header: root.ram_header.clone(),
        rest: get_blob(&root.rest, source)?,
        description: get_blob(&root.description, source)?,
    };
    let mut stream = vec![];
    vmstate::assemble(&mut stream, &parts, &[], |_, _| None)?;
    Ok(stream)
}

/// All fields of a state that its digest covers, by path.
pub fn fields(root: &Root, source: &mut dyn BlockSource) -> Result<BTreeMap<String, Vec<u8>>> {
    let stream = devices(root, source)?;
    let state = VmState::parse(&stream)?;
    let covered = state.fields.keys().filter(|path| !is_left_out(path));
    Ok(covered.map(|path| (path.clone(), state.field(path).unwrap_or_default().to_vec())).collect())
}

/// The hash of every page of a RAM block.
pub fn page_hashes(bytes: u64, tree: Hash, source: &mut dyn BlockSource) -> Result<Vec<Hash>> {
    PageTree::leaves(bytes.div_ceil(PAGE as u64) as usize, tree, source).map_err(|error| anyhow!(error))
}

/// Compares two states. Blocks of both come from `source`.
pub fn difference(a: &Root, b: &Root, source: &mut dyn BlockSource) -> Result<Difference> {
    let mut found = Difference::default();
    let device_leaves_differ = a.leaves != b.leaves;
    if device_leaves_differ {
        let (x, y) = (fields(a, source)?, fields(b, source)?);
        for path in x.keys().chain(y.keys().filter(|path| !x.contains_key(*path))) {
            let (x, y) = (x.get(path), y.get(path));
            if x != y {
                found.fields.push((path.clone(), shown(x, y), shown(y, x)));
            }
        }
        for (name, hash) in a.leaves.iter().filter(|(name, _)| name.starts_with("disk")) {
            if b.leaves.get(name) != Some(hash) {
                found.disks.push(name.clone());
            }
        }
    }
    for (name, bytes, tree) in &a.ram {
        let Some((_, other_bytes, other)) = b.ram.iter().find(|(other, _, _)| other == name) else {
            found.fields.push((format!("ram#{name}"), format!("{bytes} bytes"), "none".into()));
            continue;
        };
        if tree == other {
            continue;
        }
        let (x, y) = (page_hashes(*bytes, *tree, source)?, page_hashes(*other_bytes, *other, source)?);
        let differing = x.iter().zip(&y).enumerate().filter(|(_, (x, y))| x != y);
        found.pages.extend(differing.map(|(page, _)| (name.clone(), (page * PAGE) as u64)));
    }
    Ok(found)
}

/// A field's value; of a long one, where it differs.
fn shown(value: Option<&Vec<u8>>, other: Option<&Vec<u8>>) -> String {
    let Some(value) = value else { return "none".into() };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    if value.len() <= SHOWN_BYTES {
        let number = hex(value);
        let digits = number.trim_start_matches('0');
        return format!("0x{}", if digits.is_empty() { "0" } else { digits });
    }
    let empty = vec![];
    let other = other.unwrap_or(&empty);
    let at = value.iter().zip(other).position(|(x, y)| x != y).unwrap_or(other.len().min(value.len()));
    let part = &value[at.min(value.len())..value.len().min(at + SHOWN_BYTES)];
    format!("[{at}]={}", hex(part))
}
