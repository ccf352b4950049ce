//! What QEMU is fed in a replay: derived from the lossless log by one function.
//!
//! The header is supplied, the log is cut at a record, and END appended: alone, it
//! parks QEMU at the last icount with the machine alive. A SHUTDOWN is moved behind
//! the INSTRUCTION that it overtook: QEMU writes it without the instructions before
//! it, and a replay would act on it at once. What the vCPU thread slips in between a
//! request for a reset and the reset goes before the request: a replay's main loop
//! would not wait for it. Everything keeps its place in the original, so that a position in what is fed is a position in the recording.

use super::log::{EncodeError, HEADER_BYTES, VERSION, encode_body, encode_instructions};
use heddle_proto::{Body, Event, QemuEvent, Role};

/// An event's place in the fed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its index in the recording.
    pub event: u64,
    /// Offset of its kind byte: who reads there has executed all instructions before it.
    pub start: u64,
    /// Offset behind its last byte: who reads there has handled it.
    pub end: u64,
}

/// A part of the log, ready to be fed.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    /// Offset in the file where `bytes` belong.
    pub offset: u64,
    /// The records, and END.
    pub bytes: Vec<u8>,
    /// The events' places, in the order fed.
    pub places: Vec<Place>,
    /// Behind the events: bytes of clock reads for whoever saves the state at the end.
    pub reads_bytes: u64,
    /// Where the main loop is not needed.
    pub vcpu_only: Vec<VcpuOnly>,
}

/// A range of offsets that has work for the vCPU thread alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuOnly {
    /// A reader past this
    pub from: u64,
    /// and not past this is in it.
    pub to: u64,
    /// A main loop that is awake here would act on a shutdown sooner than it was recorded to.
    pub has_shutdown: bool,
}

/// From where to where a log is fed.
#[derive(Clone, Copy, Debug)]
pub struct FeedBounds {
    /// Offset in the log where it begins: a snapshot's, or behind the header.
    pub offset: u64,
    /// icount there.
    pub icount: u64,
    /// Index of the first event.
    pub first_event: u64,
    /// icount at which QEMU is to be parked.
    pub to_icount: u64,
}

/// How many events at index `at` of a log are reads of the clock by the saving of a state
/// at `icount`: devices that keep the host's time bring it up to date first. Whoever loads
/// that state reads as often. A replay that passes by does not, and must not be fed them.
pub fn saving_reads(events: &[Event], at: usize, icount: u64) -> usize {
    let rest = events.get(at..).unwrap_or_default();
    rest.iter().take_while(|event| event.icount == icount && matches!(event.body, Body::Clock { .. })).count()
}

/// Shorter runs of the vCPU thread's events are not worth a sleep of the other.
const RUN_EVENTS_MIN: usize = 12;

/// The header of a log that is fed.
pub fn header() -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..4].copy_from_slice(&VERSION.to_be_bytes());
    header
}

/// Encodes `events` so that QEMU handles them all and parks at `bounds.to_icount`.
///
/// `skipped` are indexes of events that a passing replay does not have (see
/// [`saving_reads`]); `reads` are those at its end, kept for who saves the state there.
pub fn feed(
    events: &[Event],
    bounds: FeedBounds,
    skipped: &dyn Fn(u64) -> bool,
    reads: &[Event],
) -> Result<Feed, EncodeError> {
    let mut feed = Feed { offset: bounds.offset, ..Feed::default() };
    let mut icount = bounds.icount;
    let mut overtaking: Vec<(u64, &Body)> = vec![];
    let put = |feed: &mut Feed, event: u64, body: &Body| {
        let start = bounds.offset + feed.bytes.len() as u64;
        encode_body(&mut feed.bytes, body)?;
        feed.places.push(Place { event, start, end: bounds.offset + feed.bytes.len() as u64 });
        Ok(())
    };
    for (at, event) in in_order(events) {
        let index = bounds.first_event + at as u64;
        if skipped(index) {
            continue;
        }
        if matches!(event.body, Body::Qemu(QemuEvent::Shutdown { .. })) {
            overtaking.push((index, &event.body));
            continue;
        }
        encode_instructions(&mut feed.bytes, &mut icount, event.icount)?;
        for (index, body) in overtaking.drain(..) {
            put(&mut feed, index, body)?;
        }
        put(&mut feed, index, &event.body)?;
    }
    encode_instructions(&mut feed.bytes, &mut icount, bounds.to_icount)?;
    for (index, body) in overtaking {
        put(&mut feed, index, body)?;
    }
    let before = feed.bytes.len();
    for event in reads {
        encode_body(&mut feed.bytes, &event.body)?;
    }
    feed.reads_bytes = (feed.bytes.len() - before) as u64;
    encode_body(&mut feed.bytes, &Body::End)?;
    feed.vcpu_only = vcpu_only(events, &feed, bounds.first_event);
    Ok(feed)
}

/// The events with their places, in the order in which they are fed. When a reset is
/// requested, QEMU's main loop stops the vCPU, and lets go of the log meanwhile. What the
/// vCPU thread logs there comes before the machine's new random numbers, for which a
/// replay's main loop asks at once; it waits while the request itself is not next.
fn in_order(events: &[Event]) -> impl Iterator<Item = (usize, &Event)> {
    let mut order: Vec<usize> = (0..events.len()).collect();
    let requests = events.iter().enumerate().filter(|(_, event)| {
        matches!(event.body, Body::Checkpoint(heddle_proto::CheckpointKind::ResetRequested))
    });
    for (at, request) in requests {
        let slipped_in = events[at + 1..].iter().take_while(|event| {
            event.role == Role::Vcpu
                && event.icount == request.icount
                && matches!(event.body, Body::Checkpoint(_) | Body::Clock { .. })
        });
        let count = slipped_in.count();
        let next = events.get(at + 1 + count);
        if next.is_some_and(|next| matches!(next.body, Body::Qemu(QemuEvent::Random { .. }))) {
            order[at..=at + count].rotate_left(1);
        }
    }
    order.into_iter().map(|at| (at, &events[at]))
}

/// Whether the vCPU thread can handle this without the main loop. Completions and input
/// need it: it brings them in.
fn is_vcpus_alone(event: &Event) -> bool {
    use heddle_proto::CheckpointKind::{ClockVirtual, ClockWarpAccount};
    event.role == Role::Vcpu
        && matches!(
            event.body,
            Body::Checkpoint(ClockWarpAccount | ClockVirtual)
                | Body::Qemu(
                    QemuEvent::Interrupt
                        | QemuEvent::Exception
                        | QemuEvent::CharWrite { .. }
                        | QemuEvent::Instruction
                        | QemuEvent::Shutdown { .. }
                )
        )
}

fn vcpu_only(events: &[Event], feed: &Feed, first: u64) -> Vec<VcpuOnly> {
    let of = |place: &Place| &events[(place.event - first) as usize];
    let mut ranges = vec![];
    let mut from = None;
    for (at, place) in feed.places.iter().enumerate() {
        let is_alone = is_vcpus_alone(of(place));
        match (is_alone, from) {
            (true, None) => from = Some(at),
            (false, Some(begun)) => {
                ranges.extend(range(feed, begun, at, of));
                from = None;
            }
            _ => {}
        }
    }
    if let Some(begun) = from {
        ranges.extend(range(feed, begun, feed.places.len(), of));
    }
    ranges
}

/// From behind the event before `from` to where `to` begins: the instructions before it
/// are the vCPU thread's, too.
fn range<'e>(feed: &Feed, from: usize, to: usize, of: impl Fn(&Place) -> &'e Event) -> Option<VcpuOnly> {
    let has_shutdown = feed.places[from..to]
        .iter()
        .any(|place| matches!(of(place).body, Body::Qemu(QemuEvent::Shutdown { .. })));
    let start = from.checked_sub(1).map_or(feed.offset, |before| feed.places[before].end);
    let end = feed.places.get(to).map_or(feed.end_offset(), |next| next.start);
    let range = VcpuOnly { from: start, to: end, has_shutdown };
    (to - from >= RUN_EVENTS_MIN || has_shutdown).then_some(range)
}

impl Feed {
    /// Offset behind the last event: once anything there was read, all before is done.
    pub fn end_offset(&self) -> u64 {
        self.offset + self.bytes.len() as u64 - 1 - self.reads_bytes
    }

    /// How many events were handled when the reader stands at `offset`.
    pub fn handled(&self, offset: u64) -> usize {
        self.places.partition_point(|place| place.end < offset)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use heddle_proto::{CheckpointKind, Role};

    fn event(icount: u64, body: Body) -> Event {
        Event { icount, role: Role::Vcpu, body }
    }

    #[test]
    fn a_shutdown_is_fed_behind_the_instructions_it_overtook() {
        let events = [
            Event { role: Role::Iothread, ..event(5, Body::Checkpoint(CheckpointKind::Init)) },
            event(5, Body::Qemu(QemuEvent::Shutdown { cause: 6 })),
            Event { role: Role::Iothread, ..event(9, Body::Checkpoint(CheckpointKind::ClockHost)) },
        ];
        let bounds = FeedBounds { offset: 100, icount: 0, first_event: 7, to_icount: 11 };
        let fed = feed(&events, bounds, &|_| false, &[]).unwrap();
        let bytes = [0, 0, 0, 0, 5, 0x25, 0, 0, 0, 0, 4, 0x10, 0x23, 0, 0, 0, 0, 2, 0x27];
        assert_eq!(fed.bytes, bytes);
        let places: Vec<_> = fed.places.iter().map(|place| (place.event, place.end)).collect();
        assert_eq!(places, [(7, 106), (8, 112), (9, 113)]);
        assert_eq!(fed.end_offset(), 118);
        assert_eq!([fed.handled(106), fed.handled(107), fed.handled(119)], [0, 1, 3]);
        // The main loop sleeps from the last event before it to the next that needs it.
        assert_eq!(fed.vcpu_only, [VcpuOnly { from: 106, to: 112, has_shutdown: true }]);
        // With nothing behind it, it still comes after all instructions.
        let fed = feed(&events[..2], FeedBounds { to_icount: 8, ..bounds }, &|_| false, &[]).unwrap();
        assert_eq!(fed.bytes, [0, 0, 0, 0, 5, 0x25, 0, 0, 0, 0, 3, 0x10, 0x27]);
    }

    #[test]
    fn what_slips_in_before_a_reset_is_fed_before_its_request() {
        use heddle_proto::CheckpointKind::{ClockWarpAccount, ResetRequested};
        use heddle_proto::ClockKind;
        let event = |role, body| Event { icount: 5, role, body };
        let random = QemuEvent::Random { result: 0, data: vec![1] };
        let events = [
            event(Role::Iothread, Body::Checkpoint(ResetRequested)),
            event(Role::Vcpu, Body::Checkpoint(ClockWarpAccount)),
            event(Role::Vcpu, Body::Clock { clock: ClockKind::VirtualRt, value: 7 }),
            event(Role::Iothread, Body::Qemu(random)),
        ];
        let bounds = FeedBounds { offset: 12, icount: 5, first_event: 100, to_icount: 5 };
        let places = |events: &[Event]| -> Vec<u64> {
            feed(events, bounds, &|_| false, &[]).unwrap().places.iter().map(|place| place.event).collect()
        };
        assert_eq!(places(&events), [101, 102, 100, 103]);
        assert_eq!(places(&events[..3]), [100, 101, 102], "no reset follows");
    }
}
