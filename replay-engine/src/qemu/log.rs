//! QEMU's record/replay log: an incremental decoder and an encoder, lossless.
//!
//! ```text
//! u32 version 00E0200C | u64 0         written at a clean end; zeros until then
//! u8 kind, then by kind:               all integers big-endian
//!   00 INSTRUCTION   u32 count         executed since the last one, before the next event
//!   03 04 08 1C 1D   u64               bottom half, block, clock
//!   05 INPUT         u32 kind ...      17, 13, 9, 16 or 36 bytes by its kinds
//!   07 CHAR_READ     u8, array         an array is a u32 length and its bytes
//!   09 NET           u8, u32, array
//!   16 CHAR_WRITE    u32, u32
//!   17 CHAR_READ_ALL array | 18 u32 | 19 u64 | 1B RANDOM u32, array
//!   1A AUDIO_IN      u64 recorded, u64 position, samples
//!   01 02 06 0A-15 1E-27               nothing
//! ```
//! An INSTRUCTION record in front of an event is that event's icount. One that stands
//! alone is an event of its own, so that encoding gives the same bytes again. What is
//! unknown is kept raw to the end and never guessed: without lengths, nothing behind
//! it can be trusted. So are audio captures with samples, whose number the log does
//! not tell for a full ring.

use heddle_proto::{AsyncEvent, Body, CheckpointKind, ClockKind, Event, QemuEvent};

/// The version of the logs of QEMU 7.2 and 10.0; both have it, with one difference.
pub const VERSION: u32 = 0x00E0_200C;
/// Bytes of the header: where events begin.
pub const HEADER_BYTES: u64 = 12;
/// Kind byte of the end.
pub const END: u8 = 0x27;
/// Kind byte of the shutdown that every clean end has before [`END`].
pub const SHUTDOWN_HOST_SIGNAL: u8 = 0x0E;
/// Longest array: more than any packet, paste or entropy request, and so that an event
/// always fits in a chunk.
const ARRAY_BYTES_MAX: usize = 2 << 20;
/// Raw bytes are handed out in events of this size.
const RAW_BYTES: usize = 64 << 10;
const CHECKPOINTS: [CheckpointKind; 9] = [
    CheckpointKind::ClockWarpStart,
    CheckpointKind::ClockWarpAccount,
    CheckpointKind::ResetRequested,
    CheckpointKind::SuspendRequested,
    CheckpointKind::ClockVirtual,
    CheckpointKind::ClockHost,
    CheckpointKind::ClockVirtualRt,
    CheckpointKind::Init,
    CheckpointKind::Reset,
];

/// What differs between the QEMUs that write [`VERSION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Debian 12's.
    Qemu7,
    /// Debian 13's: input has multi-touch.
    Qemu10,
}

impl Dialect {
    /// The dialect of a QEMU version like "7.2.22"; `None`: none that is known.
    pub fn of_version(version: &str) -> Option<Dialect> {
        match version.split('.').next()?.parse::<u32>().ok()? {
            7 => Some(Dialect::Qemu7),
            10 => Some(Dialect::Qemu10),
            _ => None,
        }
    }

    fn input_kinds(self) -> u32 {
        match self {
            Dialect::Qemu7 => 4,
            Dialect::Qemu10 => 5,
        }
    }
}

/// A decoded event and its place in the log's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// icount at which it stands.
    pub icount: u64,
    /// What it is.
    pub body: Body,
    /// Offset of its kind byte; of an INSTRUCTION record in front of it: five less.
    pub start: u64,
    /// Offset behind it.
    pub end: u64,
}

/// Decodes a log that grows.
#[derive(Debug)]
pub struct Decoder {
    dialect: Dialect,
    buffer: Vec<u8>,
    at: usize,
    /// Offset in the log of `buffer[at]`.
    offset: u64,
    icount: u64,
    /// Count of an INSTRUCTION record whose event has not come.
    instructions: u32,
    is_raw: bool,
}

enum Parsed {
    /// Not all of it is there.
    Short,
    Unknown,
    Instructions(u32),
    Event(Body, usize),
}

impl Decoder {
    /// Begins at `offset`, where `icount` instructions have been executed.
    pub fn new(dialect: Dialect, offset: u64, icount: u64) -> Decoder {
        Decoder { dialect, buffer: vec![], at: 0, offset, icount, instructions: 0, is_raw: false }
    }

    /// Takes more of the log.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether something unknown has come; all behind it is raw.
    pub fn is_raw(&self) -> bool {
        self.is_raw
    }

    /// The next event, if all of it has come.
    pub fn next_event(&mut self) -> Option<Located> {
        loop {
            if self.is_raw {
                let len = self.buffer.len() - self.at;
                return if len >= RAW_BYTES { Some(self.raw(RAW_BYTES)) } else { None };
            }
            match parse(&self.buffer[self.at..], self.dialect) {
                Parsed::Short => return None,
                Parsed::Unknown => {
                    self.is_raw = true;
                    if let Some(alone) = self.instruction_alone() {
                        return Some(alone);
                    }
                }
                Parsed::Instructions(count) => {
                    let alone = self.instruction_alone();
                    self.advance(5);
                    self.instructions = count;
                    if alone.is_some() {
                        return alone;
                    }
                }
                Parsed::Event(body, len) => {
                    self.icount += u64::from(std::mem::take(&mut self.instructions));
                    let start = self.offset;
                    self.advance(len);
                    return Some(Located { icount: self.icount, body, start, end: self.offset });
                }
            }
        }
    }

    /// At the log's end: instructions that no event followed, and then, as raw bytes,
    /// an event that is cut.
    pub fn finish(&mut self) -> Vec<Located> {
        let mut rest: Vec<Located> = std::iter::from_fn(|| self.next_event()).collect();
        rest.extend(self.instruction_alone());
        if self.at < self.buffer.len() {
            self.is_raw = true;
            rest.push(self.raw(self.buffer.len() - self.at));
        }
        rest
    }

    fn instruction_alone(&mut self) -> Option<Located> {
        let count = std::mem::take(&mut self.instructions);
        (count > 0).then(|| {
            self.icount += u64::from(count);
            let body = Body::Qemu(QemuEvent::Instruction);
            Located { icount: self.icount, body, start: self.offset, end: self.offset }
        })
    }

    fn raw(&mut self, len: usize) -> Located {
        let data = self.buffer[self.at..self.at + len].to_vec();
        let start = self.offset;
        self.advance(len);
        Located { icount: self.icount, body: Body::Qemu(QemuEvent::Raw { data }), start, end: self.offset }
    }

    fn advance(&mut self, len: usize) {
        self.at += len;
        self.offset += len as u64;
        // What is decoded goes in large steps, not byte by byte.
        if self.at >= 1 << 20 {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().expect("4 bytes")))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().expect("8 bytes")))
}

fn parse(bytes: &[u8], dialect: Dialect) -> Parsed {
    parse_record(bytes, dialect).unwrap_or(Parsed::Short)
}

/// `None`: more bytes are needed.
fn parse_record(bytes: &[u8], dialect: Dialect) -> Option<Parsed> {
    let kind = *bytes.first()?;
    let event = |body, len| Some(Parsed::Event(body, len));
    let qemu = |body, len| Some(Parsed::Event(Body::Qemu(body), len));
    // An array at `at`: its bytes, and the length of all.
    let array = |at: usize| -> Option<Result<(Vec<u8>, usize), ()>> {
        let len = u32_at(bytes, at)? as usize;
        if len > ARRAY_BYTES_MAX {
            return Some(Err(()));
        }
        Some(Ok((bytes.get(at + 4..at + 4 + len)?.to_vec(), at + 4 + len)))
    };
    macro_rules! array {
        ($at:expr) => {
            match array($at)? {
                Ok(array) => array,
                Err(()) => return Some(Parsed::Unknown),
            }
        };
    }
    match kind {
        // Counts of zero or beyond an int are never written.
        0x00 => match u32_at(bytes, 1)? {
            count @ 1..=0x7fff_ffff => Some(Parsed::Instructions(count)),
            _ => Some(Parsed::Unknown),
        },
        0x01 => qemu(QemuEvent::Interrupt, 1),
        0x02 => qemu(QemuEvent::Exception, 1),
        0x03 => event(Body::Async(AsyncEvent::BottomHalf { id: u64_at(bytes, 1)? }), 9),
        0x04 => qemu(QemuEvent::BottomHalfOneshot { id: u64_at(bytes, 1)? }, 9),
        0x05 => {
            let len = match (u32_at(bytes, 1)?, dialect.input_kinds()) {
                (0, _) => match u32_at(bytes, 5)? {
                    0 => 17,
                    1 => 13,
                    _ => return Some(Parsed::Unknown),
                },
                (1, _) => 9,
                (2 | 3, _) => 16,
                (4, 5) => 36,
                _ => return Some(Parsed::Unknown),
            };
            let data = bytes.get(1..1 + len)?.to_vec();
            qemu(QemuEvent::Input { data }, 1 + len)
        }
        0x06 => qemu(QemuEvent::InputSync, 1),
        0x07 => {
            let device = *bytes.get(1)?;
            let (data, len) = array!(2);
            qemu(QemuEvent::CharRead { device, data }, len)
        }
        0x08 => event(Body::Async(AsyncEvent::Block { id: u64_at(bytes, 1)? }), 9),
        0x09 => {
            let (filter, flags) = (*bytes.get(1)?, u32_at(bytes, 2)?);
            let (data, len) = array!(6);
            qemu(QemuEvent::Net { filter, flags, data }, len)
        }
        0x0A..=0x15 => qemu(QemuEvent::Shutdown { cause: kind - 0x0A }, 1),
        0x16 => qemu(QemuEvent::CharWrite { result: u32_at(bytes, 1)?, written: u32_at(bytes, 5)? }, 9),
        0x17 => {
            let (data, len) = array!(1);
            qemu(QemuEvent::CharReadAll { data }, len)
        }
        0x18 => qemu(QemuEvent::CharReadAllError { error: u32_at(bytes, 1)? }, 5),
        0x19 => qemu(QemuEvent::AudioOut { played: u64_at(bytes, 1)? }, 9),
        0x1A => match (u64_at(bytes, 1)?, u64_at(bytes, 9)?) {
            (0, position) => qemu(QemuEvent::AudioIn { position }, 17),
            _ => Some(Parsed::Unknown),
        },
        0x1B => {
            let result = u32_at(bytes, 1)?;
            let (data, len) = array!(5);
            qemu(QemuEvent::Random { result, data }, len)
        }
        0x1C | 0x1D => {
            let clock = if kind == 0x1C { ClockKind::Host } else { ClockKind::VirtualRt };
            event(Body::Clock { clock, value: u64_at(bytes, 1)? as i64 }, 9)
        }
        0x1E..=0x26 => event(Body::Checkpoint(CHECKPOINTS[usize::from(kind - 0x1E)]), 1),
        END => event(Body::End, 1),
        _ => Some(Parsed::Unknown),
    }
}

/// Why an event can't stand in a QEMU log.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EncodeError {
    /// A kind of the built-in machine's.
    #[error("{0} does not exist in a QEMU log")]
    Kind(String),
    /// More instructions than one record can hold.
    #[error("{0} instructions before an event: a QEMU log can't say that in one record")]
    Instructions(u64),
}

/// Appends an INSTRUCTION record for what was executed since `icount`, if anything was.
pub fn encode_instructions(out: &mut Vec<u8>, icount: &mut u64, to: u64) -> Result<(), EncodeError> {
    let delta = to.saturating_sub(*icount);
    if delta > 0 {
        let count = i32::try_from(delta).map_err(|_| EncodeError::Instructions(delta))?;
        out.push(0);
        out.extend_from_slice(&count.to_be_bytes());
        *icount = to;
    }
    Ok(())
}

/// Appends an event's own record, without its icount.
pub fn encode_body(out: &mut Vec<u8>, body: &Body) -> Result<(), EncodeError> {
    let put_array = |out: &mut Vec<u8>, data: &[u8]| {
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
    };
    match body {
        Body::Clock { clock, value } => {
            out.push(if *clock == ClockKind::Host { 0x1C } else { 0x1D });
            out.extend_from_slice(&value.to_be_bytes());
        }
        Body::Checkpoint(kind) => {
            let at = CHECKPOINTS.iter().position(|known| known == kind);
            out.push(0x1E + at.ok_or_else(|| EncodeError::Kind(format!("checkpoint {kind:?}")))? as u8);
        }
        Body::Async(AsyncEvent::BottomHalf { id }) => {
            out.push(0x03);
            out.extend_from_slice(&id.to_be_bytes());
        }
        Body::Async(AsyncEvent::Block { id }) => {
            out.push(0x08);
            out.extend_from_slice(&id.to_be_bytes());
        }
        Body::End => out.push(END),
        Body::Async(AsyncEvent::Char { .. })
        | Body::Shutdown { .. }
        | Body::Check { .. }
        | Body::Digest { .. } => return Err(EncodeError::Kind(body.to_string())),
        Body::Qemu(event) => match event {
            QemuEvent::Instruction => {}
            QemuEvent::Interrupt => out.push(0x01),
            QemuEvent::Exception => out.push(0x02),
            QemuEvent::BottomHalfOneshot { id } => {
                out.push(0x04);
                out.extend_from_slice(&id.to_be_bytes());
            }
            QemuEvent::Input { data } => {
                out.push(0x05);
                out.extend_from_slice(data);
            }
            QemuEvent::InputSync => out.push(0x06),
            QemuEvent::CharRead { device, data } => {
                out.extend_from_slice(&[0x07, *device]);
                put_array(out, data);
            }
            QemuEvent::Net { filter, flags, data } => {
                out.extend_from_slice(&[0x09, *filter]);
                out.extend_from_slice(&flags.to_be_bytes());
                put_array(out, data);
            }
            QemuEvent::Shutdown { cause } => out.push(0x0A + (*cause).min(0x0B)),
            QemuEvent::CharWrite { result, written } => {
                out.push(0x16);
                out.extend_from_slice(&result.to_be_bytes());
                out.extend_from_slice(&written.to_be_bytes());
            }
            QemuEvent::CharReadAll { data } => {
                out.push(0x17);
                put_array(out, data);
            }
            QemuEvent::CharReadAllError { error } => {
                out.push(0x18);
                out.extend_from_slice(&error.to_be_bytes());
            }
            QemuEvent::AudioOut { played } => {
                out.push(0x19);
                out.extend_from_slice(&played.to_be_bytes());
            }
            QemuEvent::AudioIn { position } => {
                out.push(0x1A);
                out.extend_from_slice(&0u64.to_be_bytes());
                out.extend_from_slice(&position.to_be_bytes());
            }
            QemuEvent::Random { result, data } => {
                out.push(0x1B);
                out.extend_from_slice(&result.to_be_bytes());
                put_array(out, data);
            }
            QemuEvent::Raw { data } => out.extend_from_slice(data),
        },
    }
    Ok(())
}

/// Appends the records of `events`, which begin after `icount` instructions.
pub fn encode(out: &mut Vec<u8>, icount: &mut u64, events: &[Event]) -> Result<(), EncodeError> {
    for event in events {
        encode_instructions(out, icount, event.icount)?;
        encode_body(out, &event.body)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "log/tests.rs"]
mod tests;
