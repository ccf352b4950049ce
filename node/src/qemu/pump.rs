//! From the tap's ring to events with their true roles; for a recording that runs, and
//! for one whose node died.

use crate::qemu::ring::Ring;
use anyhow::{Context, Result};
use heddle_proto::qemu::RoleSource;
use heddle_proto::{Body, Event, Position, QemuEvent, Role};
use heddle_replay_engine::qemu::log::{Decoder, HEADER_BYTES, Located};
use heddle_replay_engine::qemu::roles::{Marks, by_rule};
use std::collections::VecDeque;
use std::path::Path;

/// Turns the ring's bytes into events.
pub(crate) struct Pump {
    decoder: Decoder,
    marks: Marks,
    read: u64,
    /// Events of a group whose last is an async one: a chunk may not end there.
    group: Vec<Event>,
    events: u64,
    pub(crate) icount: u64,
    /// Offset and position behind each event that the outbox may not have yet.
    ends: VecDeque<(u64, Position)>,
    pub(crate) has_shutdown: bool,
    /// Bytes that character devices were given.
    pub(crate) char_bytes: u64,
    /// The last event, whose role may tell the next one's, where no thread is known.
    by_rule: Option<Event>,
    roles: RoleSource,
}

impl Pump {
    pub(crate) fn new(decoder: Decoder, from: u64, position: Position, roles: RoleSource) -> Pump {
        Pump {
            decoder,
            marks: Marks::default(),
            read: from,
            group: vec![],
            events: position.event,
            icount: position.icount,
            ends: VecDeque::new(),
            has_shutdown: false,
            char_bytes: 0,
            by_rule: None,
            roles,
        }
    }

    fn event(&mut self, located: Located, unknown: Role) -> Event {
        let role = match self.roles {
            RoleSource::Tap => {
                self.marks.at(located.start).and_then(|thread| thread.role()).unwrap_or(unknown)
            }
            RoleSource::ByRule => by_rule(self.by_rule.as_ref(), &located.body),
        };
        let event = Event { icount: located.icount, role, body: located.body };
        if self.roles == RoleSource::ByRule {
            self.by_rule = Some(event.clone());
        }
        event
    }

    /// Takes what is new; the groups of events that are complete.
    pub(crate) fn take(&mut self, ring: &mut Ring) -> Result<Vec<Event>> {
        let bytes = ring.read(self.read)?;
        for (offset, thread) in ring.take_marks()? {
            self.marks.push(offset, thread);
        }
        self.read += bytes.len() as u64;
        self.decoder.push(&bytes);
        let mut complete = vec![];
        while let Some(located) = self.decoder.next_event() {
            self.events += 1;
            self.icount = located.icount;
            self.has_shutdown |= matches!(located.body, Body::Qemu(QemuEvent::Shutdown { .. }));
            if let Body::Qemu(QemuEvent::CharRead { data, .. }) = &located.body {
                self.char_bytes += data.len() as u64;
            }
            let position = Position { icount: located.icount, event: self.events };
            self.ends.push_back((located.end, position));
            let is_async = located.body.is_async();
            let event = self.event(located, Role::Iothread);
            self.group.push(event);
            if !is_async {
                complete.append(&mut self.group);
            }
        }
        Ok(complete)
    }

    /// At the end: what is left. A record that was cut is left out; what could not be
    /// decoded is kept.
    pub(crate) fn finish(&mut self) -> Vec<Event> {
        let mut rest = std::mem::take(&mut self.group);
        let keeps_raw = self.decoder.is_raw();
        for located in self.decoder.finish() {
            if matches!(located.body, Body::Qemu(QemuEvent::Raw { .. })) && !keeps_raw {
                break;
            }
            self.events += 1;
            self.icount = located.icount;
            rest.push(self.event(located, Role::Vcpu));
        }
        rest
    }

    /// Where the log stands.
    pub(crate) fn position(&self) -> Position {
        Position { icount: self.icount, event: self.events }
    }

    /// The number of events before `offset`, as far back as they are remembered.
    pub(crate) fn event_at(&self, offset: u64) -> u64 {
        match self.ends.iter().rev().find(|(end, _)| *end <= offset) {
            Some((_, position)) => position.event,
            None => self.ends.front().map_or(self.events, |(_, position)| position.event - 1),
        }
    }

    /// Forgets events up to `written`; where the last of them ended.
    pub(crate) fn written(&mut self, written: u64) -> Option<(u64, Position)> {
        let mut last = None;
        while self.ends.front().is_some_and(|(_, position)| position.event <= written) {
            last = self.ends.pop_front();
        }
        last
    }
}

/// Events that a dead node left in its ring, from event `from` on; whole ones only.
pub(crate) fn left_in_ring(path: &Path, from: u64) -> Result<Vec<Event>> {
    let mut ring = Ring::open(path)?;
    let (offset, position) = (ring.taken(), ring.position()?);
    // Before anything was given back, the log begins behind its header.
    let offset = offset.max(HEADER_BYTES);
    let decoder = Decoder::new(ring.dialect()?, offset, position.icount);
    let mut pump = Pump::new(decoder, offset, position, ring.roles()?);
    for (offset, thread) in ring.all_marks()? {
        pump.marks.push(offset, thread);
    }
    let mut events = pump.take(&mut ring)?;
    events.extend(pump.finish());
    let known = from.checked_sub(position.event);
    let known = known.with_context(|| format!("{} begins behind event {from}", path.display()))?;
    events.drain(..(known as usize).min(events.len()));
    Ok(events)
}
