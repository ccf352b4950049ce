//! QEMU's VM state (`savevm`): RAM by page, every device's fields by name, and the
//! digest over both.
//!
//! ```text
//! "QEVM" | u32 3 | 07 machine type | sections ... | 00 | 06 u32 length, description (JSON)
//! section: 01 start, 04 full   u32 id, name, u32 instance, u32 version, data, 7E u32 id
//!          02 part, 03 end     u32 id, data, 7E u32 id
//! command: 08                  u16 command, u16 length, data        (QEMU 10)
//! RAM:     u64 address | flags: 04 list of RAM blocks, 02 page of one byte, 08 page,
//!          10 end; 20: same RAM block as the last page
//! ```
//! The description names every device's fields with their sizes, so that a state can
//! be compared field by field. RAM is cut out: pages are stored by hash, and a state
//! is put together again from them and the rest.

use heddle_proto::Hash;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;

/// A page of guest RAM.
pub const PAGE: usize = 4096;
const MAGIC: &[u8; 8] = b"QEVM\0\0\0\x03";
const RAM: &str = "ram";
/// Bounds what a description may make of a state.
const FIELDS_MAX: usize = 1 << 20;
const BLOCKS_MAX: usize = 256;
/// All RAM blocks together: the most guest RAM, and room for video RAM and ROMs.
const RAM_BYTES_MAX: u64 = 80 << 30;
/// Bytes of all fields' names together; a description can repeat a field in a few bytes.
const NAMES_BYTES_MAX: usize = 256 << 20;

/// Fields that honestly differ between a recording's state and its replay's at the same
/// position, with the reason. Everything else is in the digest.
pub const LEFT_OUT: [(&str, &str); 11] = [
    ("replay/cached_clock", "last clock value read from the log: a recorder has none"),
    ("replay/data_kind", "the replayer's look-ahead"),
    ("replay/instruction_count", "the replayer's look-ahead"),
    ("replay/current_event", "the replayer's look-ahead"),
    ("replay/has_unread_data", "the replayer's look-ahead"),
    ("replay/file_offset", "the replayer's look-ahead"),
    ("timer/cpu_clock_offset", "host time for which the emulator has run"),
    ("timer/cpu_ticks_offset", "host time for which the emulator has run"),
    ("globalstate/", "whether the emulator was running or paused when asked"),
    ("slirp/", "the host's side of user networking: a replay drops what it would send"),
    ("ide/bmdma/migration_retry_", "set by loading a state, unused while no request is retried"),
];

/// Which state a digest covers.
pub const COVERAGE: &str = "ram by page, all fields of all devices and vcpus in the VM state but: \
     replay look-ahead and cached clocks, host time offsets, run state, ide migration_retry, the \
     host's side of user networking";

/// Why bytes are not a VM state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VmStateError {
    /// Not a state, or cut.
    #[error("the VM state is malformed at byte {at}: {what}")]
    Malformed {
        /// Where.
        at: usize,
        /// What is wrong.
        what: String,
    },
}

/// A RAM block: guest RAM, video RAM, a ROM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name for it.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// For each page its place in the state; `None`: zeros.
    pub pages: Vec<Option<usize>>,
}

/// A parsed VM state.
#[derive(Clone, Debug)]
pub struct VmState<'a> {
    bytes: &'a [u8],
    /// Before RAM's first section.
    head: Range<usize>,
    /// RAM's section header, from its id to its version.
    ram_header: Range<usize>,
    /// What is not RAM, in order.
    rest: Vec<Range<usize>>,
    /// Where the description begins: behind the last section.
    description: usize,
    /// RAM, by block.
    pub ram: Vec<RamBlock>,
    /// Every field of every device: `device.instance#path` and its bytes.
    pub fields: BTreeMap<String, Range<usize>>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Bytes of the fields' names so far.
    names: usize,
}

impl<'a> Reader<'a> {
    fn error<T>(&self, what: impl Into<String>) -> Result<T, VmStateError> {
        Err(VmStateError::Malformed { at: self.at, what: what.into() })
    }
    fn take(&mut self, len: usize) -> Result<&'a [u8], VmStateError> {
        match self.at.checked_add(len).and_then(|end| self.bytes.get(self.at..end)) {
            Some(found) => {
                self.at += len;
                Ok(found)
            }
            None => self.error(format!("{len} bytes are wanted and not there")),
        }
    }
    fn u8(&mut self) -> Result<u8, VmStateError> {
        Ok(self.take(1)?[0])
    }
    fn u16(&mut self) -> Result<u16, VmStateError> {
        Ok(u16::from_be_bytes(self.take(2)?.try_into().expect("2 bytes")))
    }
    fn u32(&mut self) -> Result<u32, VmStateError> {
        Ok(u32::from_be_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }
    fn u64(&mut self) -> Result<u64, VmStateError> {
        Ok(u64::from_be_bytes(self.take(8)?.try_into().expect("8 bytes")))
    }
    /// A field is visited: bounds the work that a description asks for.
    fn visit(&mut self, path: &str) -> Result<(), VmStateError> {
        self.names += path.len() + 1;
        if self.names > NAMES_BYTES_MAX { self.error("more fields than a state can have") } else { Ok(()) }
    }
    /// A name with its length in a byte.
    fn name(&mut self) -> Result<String, VmStateError> {
        let len = usize::from(self.u8()?);
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }
}

impl<'a> VmState<'a> {
    /// Parses a state.
    pub fn parse(bytes: &'a [u8]) -> Result<VmState<'a>, VmStateError> {
        let mut r = Reader { bytes, at: 0, names: 0 };
        if r.take(8)? != MAGIC {
            r.at = 0;
            return r.error("it does not begin with QEVM, version 3");
        }
        let (description, devices) = description(bytes)?;
        let mut state = VmState {
            bytes,
            head: 0..0,
            ram_header: 0..0,
            rest: vec![],
            description,
            ram: vec![],
            fields: BTreeMap::new(),
        };
        let mut sections: BTreeMap<u32, (String, u32)> = BTreeMap::new();
        let mut last_block = None;
        loop {
            let began = r.at;
            let kind = r.u8()?;
            let (id, is_new) = match kind {
                0x00 => {
                    state.rest.push(began..r.at);
                    break;
                }
                0x07 => {
                    let len = r.u32()? as usize;
                    r.take(len)?;
                    if state.ram.is_empty() && state.head.is_empty() {
                        continue;
                    }
                    return r.error("a machine type in the middle");
                }
                // QEMU 10 says that the switch-over to the other side begins. RAM's end follows;
                // behind that, the command is as good.
                0x08 => {
                    r.u16()?;
                    let len = usize::from(r.u16()?);
                    r.take(len)?;
                    if state.ram_header.is_empty() {
                        return r.error("a command before RAM");
                    }
                    state.rest.push(began..r.at);
                    continue;
                }
                0x01 | 0x04 => (r.u32()?, true),
                0x02 | 0x03 => (r.u32()?, false),
                other => return r.error(format!("section kind {other:#x} is not known")),
            };
            if is_new {
                let (name, instance) = (r.name()?, r.u32()?);
                r.u32()?;
                sections.insert(id, (name, instance));
            }
            let Some((name, instance)) = sections.get(&id).cloned() else {
                return r.error(format!("section {id} goes on and was never begun"));
            };
            if name == RAM {
                if is_new {
                    state.head = 0..began;
                    state.ram_header = began + 1..r.at;
                }
                state.ram_section(&mut r, &mut last_block)?;
            } else {
                let Some(device) = devices.get(&(name.clone(), instance)) else {
                    return r.error(format!("{name} {instance} is not in the description"));
                };
                let prefix = format!("{name}.{instance}#");
                state.walk(&mut r, &prefix, device)?;
            }
            if r.u8()? != 0x7e || r.u32()? != id {
                return r.error(format!("{name} {instance} does not end where its description says"));
            }
            if name != RAM {
                // Before RAM's first section it is part of the head.
                if !state.ram_header.is_empty() {
                    state.rest.push(began..r.at);
                }
            }
        }
        if state.ram_header.is_empty() {
            return r.error("there is no RAM in it");
        }
        Ok(state)
    }

    fn ram_section(&mut self, r: &mut Reader<'a>, last: &mut Option<usize>) -> Result<(), VmStateError> {
        loop {
            let word = r.u64()?;
            let (address, flags) = (word & !0xfff, word & 0xfff);
            match flags & !0x20 {
                0x04 => {
                    let mut total = address;
                    let known: u64 = self.ram.iter().map(|block| block.bytes).sum();
                    if total > RAM_BYTES_MAX - known {
                        return r.error(format!("{total} bytes of RAM"));
                    }
                    while total > 0 {
                        let (name, bytes) = (r.name()?, r.u64()?);
                        if bytes == 0 || bytes > total || self.ram.len() >= BLOCKS_MAX {
                            return r.error(format!("RAM block {name} of {bytes} bytes"));
                        }
                        total -= bytes;
                        let pages = vec![None; bytes.div_ceil(PAGE as u64) as usize];
                        self.ram.push(RamBlock { name, bytes, pages });
                    }
                }
                0x02 | 0x08 => {
                    if flags & 0x20 == 0 {
                        let name = r.name()?;
                        *last = self.ram.iter().position(|block| block.name == name);
                    }
                    let is_page = flags & 0x08 != 0;
                    let at = r.at;
                    let fill = r.take(if is_page { PAGE } else { 1 })?[0];
                    let slot =
                        last.and_then(|last| self.ram[last].pages.get_mut((address / PAGE as u64) as usize));
                    match slot {
                        Some(slot) if is_page => *slot = Some(at),
                        Some(slot) if fill == 0 => *slot = None,
                        _ => return r.error("a page outside its RAM block, or filled with one byte"),
                    }
                }
                0x10 => return Ok(()),
                other => return r.error(format!("RAM flags {other:#x} are not known")),
            }
        }
    }

    fn walk(&mut self, r: &mut Reader<'a>, path: &str, device: &Value) -> Result<(), VmStateError> {
        for field in device["fields"].as_array().into_iter().flatten() {
            let name = field["name"].as_str().unwrap_or_default();
            let count = field["array_len"].as_u64().unwrap_or(1);
            let base = match field["index"].as_u64() {
                Some(index) => format!("{path}{name}[{index}]"),
                None => format!("{path}{name}"),
            };
            if count > FIELDS_MAX as u64 || self.fields.len() > FIELDS_MAX {
                return r.error("more fields than a state can have");
            }
            r.visit(&base)?;
            for i in 0..count {
                let path = if count > 1 { format!("{base}[{i}]") } else { base.clone() };
                r.visit(&path)?;
                match field.get("struct") {
                    Some(inner) => self.walk(r, &format!("{path}/"), inner)?,
                    None => {
                        let size = field["size"].as_u64().unwrap_or(0) as usize;
                        let from = r.at;
                        r.take(size)?;
                        self.fields.insert(path, from..r.at);
                    }
                }
            }
        }
        for sub in device["subsections"].as_array().into_iter().flatten() {
            let expected = sub["vmsd_name"].as_str().unwrap_or_default();
            if r.u8()? != 0x05 || r.name()? != expected {
                return r.error(format!("subsection {expected} of {path} is not there"));
            }
            r.u32()?;
            let name = expected.rsplit('/').next().unwrap_or(expected);
            self.walk(r, &format!("{path}{name}/"), sub)?;
        }
        Ok(())
    }

    /// A page's bytes; `None`: zeros, or no such page.
    pub fn page(&self, block: usize, page: usize) -> Option<&'a [u8]> {
        let at = (*self.ram.get(block)?.pages.get(page)?)?;
        self.bytes.get(at..at + PAGE)
    }

    /// A field's bytes.
    pub fn field(&self, path: &str) -> Option<&'a [u8]> {
        self.fields.get(path).map(|range| &self.bytes[range.clone()])
    }

    /// A field as a number; `None` if it is not there or longer than 8 bytes.
    pub fn number(&self, path: &str) -> Option<u64> {
        let bytes = self.field(path)?;
        (bytes.len() <= 8).then(|| bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)))
    }

    /// Offset in the log at which this state was saved.
    pub fn log_offset(&self) -> Option<u64> {
        self.number("replay.0#file_offset")
    }

    /// Instructions executed when this state was saved.
    pub fn icount(&self) -> Option<u64> {
        self.number("replay.0#current_icount")
    }

    /// Instructions of which a replay had read and that were not executed yet. `None`: it
    /// had read the kind of another event, and can't go on from the log alone.
    pub fn instructions_ahead(&self) -> Option<u64> {
        if self.number("replay.0#has_unread_data")? == 0 {
            return Some(0);
        }
        match self.number("replay.0#data_kind")? {
            0 => self.number("replay.0#instruction_count"),
            // Parked at the end of what it was fed.
            0x27 => Some(0),
            _ => None,
        }
    }

    /// A hash for each device and vCPU over its fields but [`LEFT_OUT`].
    pub fn leaves(&self) -> BTreeMap<String, Hash> {
        let mut hashers: BTreeMap<&str, blake3::Hasher> = BTreeMap::new();
        for (path, range) in &self.fields {
            if is_left_out(path) {
                continue;
            }
            let device = path.split_once('#').map_or(path.as_str(), |(device, _)| device);
            let hasher = hashers.entry(device).or_default();
            hasher.update(&(path.len() as u64).to_le_bytes());
            hasher.update(path.as_bytes());
            hasher.update(&(range.len() as u64).to_le_bytes());
            hasher.update(&self.bytes[range.clone()]);
        }
        let hash = |hasher: &blake3::Hasher| Hash(*hasher.finalize().as_bytes());
        hashers.iter().map(|(device, hasher)| (device.to_string(), hash(hasher))).collect()
    }

    /// What is not RAM: head, RAM's header, the rest, and the description, to be put
    /// together by [`assemble`].
    pub fn without_ram(&self) -> WithoutRam {
        let mut rest = vec![];
        self.rest.iter().for_each(|range| rest.extend_from_slice(&self.bytes[range.clone()]));
        WithoutRam {
            head: self.bytes[self.head.clone()].to_vec(),
            ram_header: self.bytes[self.ram_header.clone()].to_vec(),
            rest,
            description: self.bytes[self.description..].to_vec(),
        }
    }
}

/// Whether a field honestly differs between record and replay.
pub fn is_left_out(path: &str) -> bool {
    let Some((device, field)) = path.split_once('#') else { return false };
    // Without bus address, instance and indexes: `0000:00:01.1/ide.0#bmdma[1]` is ide/bmdma.
    let device = device.rsplit('/').next().unwrap_or(device);
    let device = device.rsplit_once('.').map_or(device, |(name, _)| name);
    let mut plain = format!("{device}/");
    let mut depth = 0;
    for c in field.chars() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            c if depth == 0 => plain.push(c),
            _ => {}
        }
    }
    LEFT_OUT.iter().any(|(left_out, _)| plain.starts_with(left_out))
}

/// The digest over RAM blocks (name, bytes, root of the page tree) and devices' leaves.
pub fn digest<'b>(
    ram: impl IntoIterator<Item = (&'b str, u64, Hash)>,
    leaves: &BTreeMap<String, Hash>,
) -> Hash {
    let mut hasher = blake3::Hasher::new();
    let mut leaf = |name: &str, number: u64, hash: Hash| {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&number.to_le_bytes());
        hasher.update(&hash.0);
    };
    ram.into_iter().for_each(|(name, bytes, root)| leaf(name, bytes, root));
    leaves.iter().for_each(|(name, hash)| leaf(name, u64::MAX, *hash));
    Hash(*hasher.finalize().as_bytes())
}

/// A VM state without its RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WithoutRam {
    /// Magic, machine type, and sections before RAM.
    pub head: Vec<u8>,
    /// RAM's section id, name, instance and version.
    pub ram_header: Vec<u8>,
    /// The other sections, and the end of sections.
    pub rest: Vec<u8>,
    /// The description, with what is behind it.
    pub description: Vec<u8>,
}

/// Puts a state together: `page` gives a page's bytes by block and index, `None` for zeros.
/// Zero pages are said, too: a ROM is not zero when QEMU starts.
pub fn assemble<'p>(
    out: &mut Vec<u8>,
    parts: &WithoutRam,
    ram: &[(String, u64)],
    page: impl Fn(usize, usize) -> Option<&'p [u8]>,
) -> Result<(), VmStateError> {
    let id =
        parts.ram_header.get(..4).ok_or(VmStateError::Malformed { at: 0, what: "RAM's header".into() })?;
    let footer = |out: &mut Vec<u8>| {
        out.push(0x7e);
        out.extend_from_slice(id);
    };
    out.extend_from_slice(&parts.head);
    out.push(0x01);
    out.extend_from_slice(&parts.ram_header);
    let total: u64 = ram.iter().map(|(_, bytes)| bytes).sum();
    out.extend_from_slice(&(total | 0x04).to_be_bytes());
    for (name, bytes) in ram {
        put_name(out, name);
        out.extend_from_slice(&bytes.to_be_bytes());
    }
    out.extend_from_slice(&0x10u64.to_be_bytes());
    footer(out);
    out.push(0x03);
    out.extend_from_slice(id);
    for (block, (name, bytes)) in ram.iter().enumerate() {
        let mut is_first = true;
        for index in 0..bytes.div_ceil(PAGE as u64) as usize {
            let address = (index * PAGE) as u64;
            let found = page(block, index);
            let same = if is_first { 0 } else { 0x20 };
            let flags = if found.is_some() { 0x08 } else { 0x02 };
            out.extend_from_slice(&(address | flags | same).to_be_bytes());
            if is_first {
                put_name(out, name);
                is_first = false;
            }
            match found {
                Some(bytes) => out.extend_from_slice(bytes),
                None => out.push(0),
            }
        }
    }
    out.extend_from_slice(&0x10u64.to_be_bytes());
    footer(out);
    out.extend_from_slice(&parts.rest);
    out.extend_from_slice(&parts.description);
    Ok(())
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    let name = &name.as_bytes()[..name.len().min(255)];
    out.push(name.len() as u8);
    out.extend_from_slice(name);
}

type Devices = BTreeMap<(String, u32), Value>;

/// The description at the state's end: where it begins, and its devices.
fn description(bytes: &[u8]) -> Result<(usize, Devices), VmStateError> {
    let malformed = |at, what: &str| VmStateError::Malformed { at, what: what.into() };
    // It is the last thing, padded at most to the container's cluster.
    let from = bytes.len().saturating_sub(16 << 20);
    let starts = [&b"{\"configuration\""[..], b"{\"page_size\"", b"{\"devices\""];
    for start in starts {
        let Some(at) = bytes[from..].windows(start.len()).rposition(|window| window == start) else {
            continue;
        };
        let at = from + at;
        let Some(length) = at.checked_sub(4).and_then(|from| bytes.get(from..at)) else { continue };
        let length = u32::from_be_bytes(length.try_into().expect("4 bytes")) as usize;
        if bytes.get(at.wrapping_sub(5)) != Some(&0x06) || length > bytes.len() - at {
            continue;
        }
        let json: Value = serde_json::from_slice(&bytes[at..at + length])
            .map_err(|error| malformed(at, &format!("the description does not parse: {error}")))?;
        let devices = json["devices"].as_array().ok_or_else(|| malformed(at, "it describes no devices"))?;
        let devices = devices
            .iter()
            .map(|device| {
                let name = device["name"].as_str().unwrap_or_default().to_string();
                ((name, device["instance_id"].as_u64().unwrap_or(0) as u32), device.clone())
            })
            .collect();
        return Ok((at - 5, devices));
    }
    Err(malformed(bytes.len(), "there is no description at its end"))
}

#[cfg(test)]
#[path = "vmstate/tests.rs"]
mod tests;
