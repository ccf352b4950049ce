//! The recorder: writes events as they happen. Its methods mirror the replayer's.

use crate::queue::AsyncQueue;
use crate::role;
use heddle_proto::{Body, Event};

/// The recording side of the log.
#[derive(Debug)]
pub struct Recorder {
    events: Vec<Event>,
    count: u64,
    /// What the outside world has to tell.
    pub queue: AsyncQueue,
}

impl Recorder {
    /// A recorder at the beginning of a log.
    pub fn new(queue: AsyncQueue) -> Recorder {
        Recorder { events: vec![], count: 0, queue }
    }

    /// Writes an event, with the role of the thread that really runs it.
    pub fn event(&mut self, icount: u64, body: Body) -> Event {
        let event = Event { icount, role: role::current(), body };
        self.events.push(event.clone());
        self.count += 1;
        event
    }

    /// Index of the next event.
    pub fn index(&self) -> u64 {
        self.count
    }

    /// Events since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }
}
