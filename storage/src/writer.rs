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
    queue: VecDeque<Part<T>>,
}

type Part<T> = (Vec<Frame>, Waiter<T>);

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

    /// Writes what waits, with one sync. [`Error::Full`]: there is room for none of it, and
    /// all of it goes on waiting.
    pub fn commit(&mut self) -> Result<Durable<T>, Error> {
        let mut bytes = 0;
        let fits = |part: &&Part<T>| {
            let is_first = bytes == 0;
            bytes += bytes_of(part).max(1);
            is_first || bytes <= COMMIT_BYTES
        };
        let count = self.queue.iter().take_while(fits).count();
        let parts = self.queue.drain(..count).collect();
        match self.write(parts) {
            Err(full @ Error::Full { .. }) => {
                let parts = self.take_what_fits();
                if parts.is_empty() { Err(full) } else { self.write(parts) }
            }
            done => done,
        }
    }

    /// Takes what the current segment has room for. Somebody else's frames that find none do
    /// not hold up the replica's own, which stay in the order in which they came.
    fn take_what_fits(&mut self) -> Vec<Part<T>> {
        let (mut taken, mut left) = (vec![], VecDeque::new());
        let (mut bytes, mut is_held_up) = (0, false);
        for part in self.queue.drain(..) {
            let with = bytes + bytes_of(&part);
            if !is_held_up && with <= COMMIT_BYTES && (with == 0 || self.journal.fits(with)) {
                bytes = with;
                taken.push(part);
            } else {
                is_held_up |= matches!(part.1, Waiter::Core(_));
                left.push_back(part);
            }
        }
        self.queue = left;
        taken
    }

    /// Writes these; if that fails, they wait before all others.
    fn write(&mut self, mut parts: Vec<Part<T>>) -> Result<Durable<T>, Error> {
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

fn bytes_of<T>((frames, _): &Part<T>) -> usize {
    frames.iter().map(Frame::bytes).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::disk::Directory;
    use crate::journal::{FrameKind, JournalConfig};
    use bytes::Bytes;
    use std::sync::Arc;

    const SEGMENT: u64 = 256 << 10;

    fn frame(bytes: usize) -> Frame {
        Frame { kind: FrameKind::Bulk, group: 0, term: 0, index: 0, data: Bytes::from(vec![1; bytes]) }
    }

    fn core(commit: u64) -> Waiter<&'static str> {
        Waiter::Core(vec![(Mark::Commit { group: 0, commit }, 1)])
    }

    fn commits(durable: &Durable<&'static str>) -> Vec<u64> {
        let commit = |(mark, _): &(Mark, Vec<Location>)| match mark {
            Mark::Commit { commit, .. } => *commit,
            other => panic!("{other:?}"),
        };
        durable.marks.iter().map(commit).collect()
    }

    #[test]
    fn on_a_full_disk_what_finds_no_room_does_not_hold_up_the_replica() {
        let dir = tempfile::tempdir().unwrap();
        let open = |reserve_bytes| {
            let config = JournalConfig { segment_bytes: SEGMENT, reserve_bytes, in_background: false };
            Journal::open(Arc::new(Directory::open(dir.path()).unwrap()), config, |_| {}).unwrap()
        };
        drop(open(0));
        // No other segment can be made.
        let mut writer = Writer::new(open(u64::MAX >> 1));
        writer.push(vec![frame(150_000), frame(150_000)], Waiter::Other("keeper"));
        writer.push(vec![frame(1000)], core(1));
        writer.push(vec![frame(1000)], Waiter::Other("mend"));
        writer.push(vec![frame(150_000), frame(150_000)], core(2));
        writer.push(vec![frame(1000)], core(3));
        let durable = writer.commit().unwrap();
        assert_eq!(commits(&durable), [1], "the third must not overtake the second");
        let others: Vec<&str> = durable.others.iter().map(|(other, _)| *other).collect();
        assert_eq!(others, ["mend"]);
        assert!(matches!(writer.commit(), Err(Error::Full { .. })));
        assert!(!writer.is_idle());
        // With room again all of it is written, in its order.
        writer.journal = open(0);
        let durable = writer.commit().unwrap();
        assert_eq!(commits(&durable), [2, 3]);
        assert!(durable.others.iter().any(|(other, _)| *other == "keeper") && writer.is_idle());
    }
}
