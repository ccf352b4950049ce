//! The replayer: the log drives. A checkpoint runs when it is the next event, on
//! its recorded role, with the vCPU at its icount; anything else is judged.

use crate::role;
use heddle_proto::verdict::Side;
use heddle_proto::{
    Body, CheckpointKind, ClockKind, Divergence, DivergenceKind, Event, Position, QemuEvent, Role,
};
use std::collections::{BTreeMap, VecDeque};

/// Where a replay's events come from, in order.
pub trait EventSource: Send {
    /// The next events; `None` at the log's end. An error means: could not tell.
    fn next_events(&mut self) -> Result<Option<Vec<Event>>, String>;
}

impl EventSource for std::vec::IntoIter<Event> {
    fn next_events(&mut self) -> Result<Option<Vec<Event>>, String> {
        let events: Vec<Event> = self.by_ref().take(4096).collect();
        Ok((!events.is_empty()).then_some(events))
    }
}

/// How a log is meant to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogEnd {
    /// With an `End` event.
    Complete,
    /// At its last committed event: the recorder was lost.
    Cut,
    /// Before this event index: the span's end.
    Before(u64),
}

/// How a replay ended.
#[derive(Clone, Debug, PartialEq)]
pub enum ReplayEnd {
    /// The log's end was reached and all was equal.
    Match,
    /// Something differed.
    Diverged(Box<Divergence>),
    /// Could not tell.
    Failed(String),
}

/// The replaying side of the log.
pub struct Replayer {
    source: Box<dyn EventSource>,
    buffer: VecDeque<Event>,
    index: u64,
    end: LogEnd,
    /// Checkpoints run only on their recorded role. Off only to show why.
    is_pinned: bool,
    /// What each role could run, since anything last happened.
    offers: [Option<Vec<CheckpointKind>>; 2],
    outcome: Option<ReplayEnd>,
    last_good: Position,
    /// Events whose role was compared with the thread that ran them.
    pub role_checked: u64,
    /// Of these, how many ran on the wrong role.
    pub role_mismatches: u64,
    /// Checkpoints run, by kind and role.
    checkpoints: [[u64; 2]; CheckpointKind::ALL.len()],
}

impl Replayer {
    /// A replayer whose first event, from `source`, has index `from.event`.
    pub fn new(source: Box<dyn EventSource>, from: Position, end: LogEnd) -> Replayer {
        Replayer {
            source,
            buffer: VecDeque::new(),
            index: from.event,
            end,
            is_pinned: true,
            offers: [None, None],
            outcome: None,
            last_good: from,
            role_checked: 0,
            role_mismatches: 0,
            checkpoints: Default::default(),
        }
    }

    /// Lets either role run any checkpoint, to show what the pinning is for.
    pub fn unpin(&mut self) {
        self.is_pinned = false;
    }

    /// How the replay ended, once it has.
    pub fn outcome(&self) -> Option<&ReplayEnd> {
        self.outcome.as_ref()
    }

    /// Index of the next event.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The last position where check or digest agreed.
    pub fn last_good(&self) -> Position {
        self.last_good
    }

    /// Ends the replay; the first end counts.
    pub fn finish(&mut self, end: ReplayEnd) {
        self.outcome.get_or_insert(end);
    }

    /// The next event; `None` once the replay has ended, the log's end included.
    pub fn peek(&mut self) -> Option<&Event> {
        if self.outcome.is_some() {
            return None;
        }
        if let LogEnd::Before(end) = self.end
            && self.index >= end
        {
            self.finish(ReplayEnd::Match);
            return None;
        }
        while self.buffer.is_empty() {
            match self.source.next_events() {
                Ok(Some(events)) => self.buffer.extend(events),
                Ok(None) => {
                    self.log_ended();
                    return None;
                }
                Err(error) => {
                    self.finish(ReplayEnd::Failed(error));
                    return None;
                }
            }
        }
        self.buffer.front()
    }

    /// Whether the log is replayed to its end, not to a span's.
    pub fn goes_to_the_end(&self) -> bool {
        !matches!(self.end, LogEnd::Before(_))
    }

    /// Whether checkpoints run only on their recorded role.
    pub fn is_pinned(&self) -> bool {
        self.is_pinned
    }

    fn log_ended(&mut self) {
        if self.end == LogEnd::Cut {
            return self.finish(ReplayEnd::Match);
        }
        let at = self.last_good.icount;
        let side = |what: &str| Side { what: what.into(), role: None, icount: at };
        self.diverge(DivergenceKind::LogEndedEarly, at, side("the log's end event"), side("nothing more"), 0);
    }

    fn take(&mut self) -> Event {
        self.index += 1;
        self.progress();
        self.buffer.pop_front().expect("peek() has shown an event")
    }

    /// Something happened: what was offered before counts no more.
    pub fn progress(&mut self) {
        self.offers = [None, None];
    }

    fn diverge(&mut self, kind: DivergenceKind, icount: u64, expected: Side, found: Side, pc: u64) {
        let position = Position { icount, event: self.index };
        let last_good = self.last_good;
        self.finish(ReplayEnd::Diverged(Box::new(Divergence {
            kind,
            position,
            expected,
            found,
            last_good,
            pc,
            hart: None,
        })));
    }

    /// Ends the replay: `found` came where the log has its next event.
    pub fn diverge_from_next(&mut self, kind: DivergenceKind, found: Side, pc: u64) {
        let Some(next) = self.peek() else { return };
        let (expected, icount) = (side_of(next), next.icount);
        let wrong_role = kind == DivergenceKind::WrongRole;
        self.role_mismatches += u64::from(wrong_role);
        self.diverge(kind, icount, expected, found, pc);
    }

    /// Asks for a turn: `offered` is all that this role could run now; the one whose turn it is.
    pub fn checkpoint(&mut self, offered: &[CheckpointKind], icount: u64, pc: u64) -> Option<CheckpointKind> {
        let is_pinned = self.is_pinned;
        let role = role::current();
        let next = self.peek()?;
        if let Body::Checkpoint(kind) = next.body
            && next.icount == icount
            && offered.contains(&kind)
            && (next.role == role || !is_pinned)
        {
            return Some(kind);
        }
        self.offers[role as usize] = Some(offered.to_vec());
        self.decide(icount, pc);
        None
    }

    /// When neither role can go on, the replay has diverged, and this says how.
    fn decide(&mut self, icount: u64, pc: u64) {
        let [Some(_), Some(_)] = &self.offers else { return };
        let Some(next) = self.peek() else { return };
        let (expected_role, body) = (next.role, next.body.clone());
        let other = expected_role.other();
        let offers = std::mem::take(&mut self.offers).map(Option::unwrap_or_default);
        let side = |kind: CheckpointKind, role: Role| Side {
            what: format!("checkpoint {kind:?}"),
            role: Some(role),
            icount,
        };
        if let Body::Checkpoint(kind) = body
            && offers[other as usize].contains(&kind)
        {
            return self.diverge_from_next(DivergenceKind::WrongRole, side(kind, other), pc);
        }
        // The role that should have acted comes first; a switch-off is always on offer.
        let found = [expected_role, other].into_iter().find_map(|role| {
            let own = offers[role as usize].iter().find(|k| **k != CheckpointKind::Shutdown);
            own.map(|kind| side(*kind, role))
        });
        let nothing = Side { what: "nothing that can run".into(), role: None, icount };
        self.diverge_from_next(DivergenceKind::WrongKind, found.unwrap_or(nothing), pc);
    }

    /// Takes the checkpoint that [`Replayer::checkpoint`] gave the turn for.
    pub fn take_checkpoint(&mut self) -> Event {
        self.count_role();
        let event = self.take();
        if let Body::Checkpoint(kind) = event.body {
            self.checkpoints[kind as usize][role::current() as usize] += 1;
        }
        event
    }

    /// Checkpoints run, by kind and by the role they ran on.
    pub fn checkpoints(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let mut out: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for kind in CheckpointKind::ALL {
            for role in [Role::Vcpu, Role::Iothread] {
                let count = self.checkpoints[kind as usize][role as usize];
                if count > 0 {
                    out.entry(format!("{kind:?}")).or_default().insert(role.to_string(), count);
                }
            }
        }
        out
    }

    fn count_role(&mut self) {
        self.role_checked += 1;
        if self.buffer.front().is_some_and(|next| next.role != role::current()) {
            self.role_mismatches += 1;
        }
    }

    /// Reads a clock at `icount`: the value that the log has.
    pub fn read_clock(&mut self, clock: ClockKind, icount: u64, pc: u64) -> Option<(Event, i64)> {
        let (role, is_pinned) = (role::current(), self.is_pinned);
        let next = self.peek()?;
        let value = match next.body {
            Body::Clock { clock: logged, value } if logged == clock => Some(value),
            _ => None,
        };
        let kind = match value {
            None => DivergenceKind::WrongKind,
            Some(_) if next.icount != icount => DivergenceKind::WrongIcount,
            Some(_) if next.role != role && is_pinned => DivergenceKind::WrongRole,
            Some(value) => {
                self.count_role();
                return Some((self.take(), value));
            }
        };
        let found = Side { what: format!("clock {clock:?}"), role: Some(role), icount };
        self.diverge_from_next(kind, found, pc);
        None
    }

    /// Reads so many bytes of entropy at `icount`: the event that has them.
    pub fn read_entropy(&mut self, bytes: usize, icount: u64, pc: u64) -> Option<Event> {
        let (role, is_pinned) = (role::current(), self.is_pinned);
        let next = self.peek()?;
        let logged = match &next.body {
            Body::Qemu(QemuEvent::Random { data, .. }) => Some(data.len()),
            _ => None,
        };
        let kind = match logged {
            None => DivergenceKind::WrongKind,
            Some(_) if next.icount != icount => DivergenceKind::WrongIcount,
            Some(_) if next.role != role && is_pinned => DivergenceKind::WrongRole,
            Some(logged) if logged != bytes => DivergenceKind::WrongPayload,
            Some(_) => {
                self.count_role();
                return Some(self.take());
            }
        };
        let found = Side { what: format!("random {bytes} bytes"), role: Some(role), icount };
        self.diverge_from_next(kind, found, pc);
        None
    }

    /// The next event, if it is an async one of the checkpoint being flushed.
    pub fn next_async(&mut self, icount: u64, pc: u64) -> Option<Event> {
        let (role, is_pinned) = (role::current(), self.is_pinned);
        let next = self.peek()?;
        if !next.body.is_async() {
            return None;
        }
        let what = next.body.to_string();
        let kind = if next.icount != icount {
            DivergenceKind::WrongIcount
        } else if next.role != role && is_pinned {
            DivergenceKind::WrongRole
        } else {
            self.count_role();
            return Some(self.take());
        };
        self.diverge_from_next(kind, Side { what, role: Some(role), icount }, pc);
        None
    }

    /// An async event of the log that this guest has no counterpart for.
    pub fn no_such_async(&mut self, event: &Event, pc: u64) {
        let found = Side {
            what: "no such bottom half or request outstanding".into(),
            role: Some(role::current()),
            icount: event.icount,
        };
        let index = self.index;
        self.index -= 1;
        self.diverge(DivergenceKind::WrongPayload, event.icount, side_of(event), found, pc);
        self.index = index;
    }

    /// Compares a mark or the end of the run with the log's next event.
    pub fn expect(&mut self, icount: u64, body: &Body, pc: u64) -> Option<Event> {
        let role = role::current();
        let next = self.peek()?;
        let kind = if next.body.code() != body.code() {
            match body {
                Body::Shutdown { .. } | Body::End => DivergenceKind::LogLeftOver,
                _ => DivergenceKind::WrongKind,
            }
        } else if next.icount != icount {
            DivergenceKind::WrongIcount
        } else if next.role != role && !next.body.is_mark() {
            DivergenceKind::WrongRole
        } else if next.body != *body {
            match (&next.body, body) {
                (Body::Check { value: a, .. }, Body::Check { value: b, .. }) if a == b => {
                    DivergenceKind::Output
                }
                (Body::Check { .. } | Body::Digest { .. }, _) => DivergenceKind::State,
                _ => DivergenceKind::WrongPayload,
            }
        } else {
            if next.body.is_mark() {
                let event = self.index + 1;
                self.last_good = Position { icount, event };
            } else {
                self.count_role();
            }
            return Some(self.take());
        };
        let found = Side { what: body.to_string(), role: Some(role), icount };
        self.diverge_from_next(kind, found, pc);
        None
    }

    /// The end event was reached: nothing may follow.
    pub fn expect_nothing(&mut self, pc: u64) {
        let left_over = match self.buffer.front() {
            Some(event) => Some(event.clone()),
            None => match self.source.next_events() {
                Ok(events) => events.and_then(|events| events.into_iter().next()),
                Err(error) => return self.finish(ReplayEnd::Failed(error)),
            },
        };
        match left_over {
            None => self.finish(ReplayEnd::Match),
            Some(event) => {
                let found = Side { what: "the end".into(), role: None, icount: event.icount };
                let expected = side_of(&event);
                self.diverge(DivergenceKind::LogLeftOver, event.icount, expected, found, pc);
            }
        }
    }
}

fn side_of(event: &Event) -> Side {
    Side { what: event.body.to_string(), role: Some(event.role), icount: event.icount }
}
