//! The writer: the one who writes the journal. All that has come since its last sync goes
//! into the next: the group commit, over all groups and the keeper.

use crate::error::Error;
use crate::group::Mark;
use crate::journal::{Frame, Journal, Location};
use std::collections::VecDeque;

/// Bytes of frames in one group commit, about.
const COMMIT_BYTES: usize = 8 << 20;

/// What waits for frames.
#[derive(Debug)]
pub enum Waiter<T> {
    /// Marks of the replica, each with how many of the frames are its own.
    Core(Vec<(Mark, usize)>),
    /// Somebody else.
    Other(T),
}

/// What became durable.
#[derive(Debug)]
pub struct Durable<T> {
    /// Marks of the replica, each with the places of its frames.
    pub marks: Vec<(Mark, Vec<Location>)>,
    /// Others, each with theirs.
    pub others: Vec<(T, Vec<Location>)>,
}

/// Frames that wait, in the order in which they came.
#[derive(Debug)]
pub struct Writer<T> {
    /// The journal.
    pub journal: Journal,
    queue: VecDeque<(Vec<Frame>, Waiter<T>)>,
}

impl<T> Writer<T> {
    /// A writer of a journal.
    pub fn new(journal: Journal) -> Writer<T> {
        Writer { journal, queue: VecDeque::new() }
    }

    /// Takes frames.
    pub fn push(&mut self, frames: Vec<Frame>, waiter: Waiter<T>) {
        self.queue.push_back((frames, waiter));
    }

    /// Whether nothing waits.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Writes what waits, with one sync. [`Error::Full`]: all of it goes on waiting.
    pub fn commit(&mut self) -> Result<Durable<T>, Error> {
        let mut bytes = 0;
        let fits = |(frames, _): &&(Vec<Frame>, Waiter<T>)| {
            let is_first = bytes == 0;
            bytes += frames.iter().map(Frame::bytes).sum::<usize>().max(1);
            is_first || bytes <= COMMIT_BYTES
        };
        let count = self.queue.iter().take_while(fits).count();
        let mut parts: Vec<(Vec<Frame>, Waiter<T>)> = self.queue.drain(..count).collect();
        let frames: Vec<Frame> = parts.iter().flat_map(|(frames, _)| frames).cloned().collect();
        let places = match self.journal.append(&frames) {
            Ok(places) => places,
            Err(error) => {
                while let Some(part) = parts.pop() {
                    self.queue.push_front(part);
                }
                return Err(error);
            }
        };
        let mut places = places.into_iter();
        let mut durable = Durable { marks: vec![], others: vec![] };
        for (frames, waiter) in parts {
            let mut own: Vec<Location> = places.by_ref().take(frames.len()).collect();
            match waiter {
                Waiter::Core(marks) => {
                    for (mark, count) in marks {
                        let rest = own.split_off(count.min(own.len()));
                        durable.marks.push((mark, own));
                        own = rest;
                    }
                }
                Waiter::Other(other) => durable.others.push((other, own)),
            }
        }
        Ok(durable)
    }
}
