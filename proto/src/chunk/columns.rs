//! The columns of a chunk: events written one by one, and read back.

use super::{ChunkError, ChunkHeader, Reader};
use crate::event::{AsyncEvent, Body, CheckpointKind, ClockKind, Event, KINDS, Role};
use crate::{Hash, QemuEvent};

const COLUMNS: usize = 4;

/// Columns that grow event by event. Emptied, they keep their memory: the next chunk's
/// pages are there already.
#[derive(Debug)]
pub(super) struct Columns {
    columns: [Vec<u8>; COLUMNS],
    last_value: [[i64; 2]; KINDS],
    /// Events by kind code.
    pub(super) counts: [u32; KINDS],
    pub(super) events: u32,
    pub(super) first_icount: u64,
    pub(super) last_icount: u64,
}

impl Default for Columns {
    fn default() -> Columns {
        Columns {
            columns: Default::default(),
            last_value: [[0; 2]; KINDS],
            counts: [0; KINDS],
            events: 0,
            first_icount: 0,
            last_icount: 0,
        }
    }
}

impl Columns {
    /// Adds an event.
    pub(super) fn push(&mut self, event: &Event) {
        if self.events == 0 {
            self.first_icount = event.icount;
            self.last_icount = event.icount;
        }
        let [kinds, icounts, values, bytes] = &mut self.columns;
        let code = event.body.code();
        self.events += 1;
        self.counts[code as usize] += 1;
        kinds.push(code | (event.role as u8) << 7);
        put_varint(icounts, event.icount - self.last_icount);
        self.last_icount = event.icount;
        let last_value = &mut self.last_value[code as usize];
        let mut put_slot = |slot: usize, value: i64| {
            let delta = value.wrapping_sub(last_value[slot]);
            put_varint(values, ((delta << 1) ^ (delta >> 63)) as u64);
            last_value[slot] = value;
        };
        let mut put_value = |value: i64| put_slot(0, value);
        match &event.body {
            Body::Clock { value, .. } => put_value(*value),
            Body::Async(AsyncEvent::BottomHalf { id } | AsyncEvent::Block { id }) => {
                put_value(*id as i64);
            }
            Body::Async(AsyncEvent::Char { data }) => {
                put_varint(bytes, data.len() as u64);
                bytes.extend_from_slice(data);
            }
            Body::Shutdown { code } => put_value(i64::from(*code)),
            Body::Check { value, output } => {
                bytes.extend_from_slice(&value.to_le_bytes());
                bytes.extend_from_slice(&output.to_le_bytes());
            }
            Body::Digest { root, history } => {
                bytes.extend_from_slice(&root.0);
                bytes.extend_from_slice(&history.0);
            }
            Body::Qemu(event) => {
                let (numbers, count) = event.numbers();
                numbers[..count].iter().enumerate().for_each(|(slot, number)| put_slot(slot, *number));
                if let Some(data) = event.data() {
                    put_varint(bytes, data.len() as u64);
                    bytes.extend_from_slice(data);
                }
            }
            Body::Checkpoint(_) | Body::End => {}
        }
    }

    /// Bytes of all columns.
    pub(super) fn bytes(&self) -> usize {
        self.columns.iter().map(Vec::len).sum()
    }

    /// The payload before compression; the columns are empty again.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 * COLUMNS + self.bytes());
        self.columns.iter().for_each(|c| out.extend_from_slice(&(c.len() as u32).to_le_bytes()));
        self.columns.iter().for_each(|c| out.extend_from_slice(c));
        let mut columns = std::mem::take(&mut self.columns);
        columns.iter_mut().for_each(Vec::clear);
        *self = Columns { columns, ..Columns::default() };
        out
    }
}

/// Reads columns back; nothing in them is trusted.
pub(super) fn decode(raw: &[u8], header: &ChunkHeader) -> Result<Vec<Event>, ChunkError> {
    let mut r = Reader { bytes: raw, what: "columns" };
    let mut lengths = [0usize; 4];
    for length in &mut lengths {
        *length = u32::from_le_bytes(r.array()?) as usize;
    }
    let mut column = |what, len| r.take(len).map(|bytes| Reader { bytes, what });
    let mut kinds = column("kinds", lengths[0])?;
    let mut icounts = column("icounts", lengths[1])?;
    let mut values = column("values", lengths[2])?;
    let mut bytes = column("bytes", lengths[3])?;
    if r.have() != 0 || kinds.have() != header.events as usize {
        return Err(ChunkError::Malformed("columns do not add up"));
    }
    let mut events = Vec::with_capacity(kinds.have());
    let mut icount = header.first_icount;
    let mut last_value = [[0i64; 2]; KINDS];
    let mut counts = [0u32; KINDS];
    for _ in 0..header.events {
        let [kind] = kinds.array()?;
        let (code, role) = (kind & 0x7f, if kind >> 7 == 0 { Role::Vcpu } else { Role::Iothread });
        let delta = icounts.varint()?;
        icount = icount.checked_add(delta).ok_or(ChunkError::Malformed("icount overflows"))?;
        let count = counts.get_mut(code as usize).ok_or(ChunkError::Malformed("unknown event kind"))?;
        *count += 1;
        let mut slot_value = |slot: usize| {
            let zigzag = values.varint()?;
            let delta = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
            let last = &mut last_value[code as usize][slot];
            *last = last.wrapping_add(delta);
            Ok::<i64, ChunkError>(*last)
        };
        let mut value = || slot_value(0);
        let body = match code {
            0 => Body::Clock { clock: ClockKind::Host, value: value()? },
            1 => Body::Clock { clock: ClockKind::VirtualRt, value: value()? },
            2..=8 => Body::Checkpoint(CheckpointKind::ALL[code as usize - 2]),
            9 => Body::Async(AsyncEvent::BottomHalf { id: value()? as u64 }),
            10 => Body::Async(AsyncEvent::Block { id: value()? as u64 }),
            11 => {
                let len = bytes.varint()?;
                let len = usize::try_from(len).map_err(|_| ChunkError::Malformed("length"))?;
                Body::Async(AsyncEvent::Char { data: bytes.take(len)?.to_vec() })
            }
            12 => Body::Shutdown {
                code: u16::try_from(value()?).map_err(|_| ChunkError::Malformed("shutdown code"))?,
            },
            13 => Body::Check {
                value: u64::from_le_bytes(bytes.array()?),
                output: u64::from_le_bytes(bytes.array()?),
            },
            14 => Body::Digest { root: Hash(bytes.array()?), history: Hash(bytes.array()?) },
            15 => Body::End,
            16..=18 => Body::Checkpoint(CheckpointKind::ALL[code as usize - 9]),
            _ => {
                let kind = code - 19;
                let (count, has_data) =
                    QemuEvent::shape(kind).ok_or(ChunkError::Malformed("unknown event kind"))?;
                let mut numbers = [0; 2];
                for (slot, number) in numbers.iter_mut().enumerate().take(count) {
                    *number = slot_value(slot)?;
                }
                let data = if has_data {
                    let len = bytes.varint()?;
                    let len = usize::try_from(len).map_err(|_| ChunkError::Malformed("length"))?;
                    bytes.take(len)?.to_vec()
                } else {
                    vec![]
                };
                let event = QemuEvent::from_parts(kind, numbers, data);
                Body::Qemu(event.ok_or(ChunkError::Malformed("a number is out of its range"))?)
            }
        };
        events.push(Event { icount, role, body });
    }
    if icounts.have() + values.have() + bytes.have() != 0 || counts != header.counts {
        return Err(ChunkError::Malformed("columns do not match the header's counts"));
    }
    Ok(events)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
