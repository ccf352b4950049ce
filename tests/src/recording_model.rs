//! One recording of the log store, one operation after the other: what apply decides,
//! said a second time and without rows.
//!
//! For [`crate::linear::check`]; an append is an operation a chunk. An operation must have
//! been sent once: a client that tries again by itself makes two of one. Not modelled:
//! chunks written anew, snapshots, icounts that run backwards, malformed requests.

use crate::linear::{Model, Op};
use heddle_proto::{Chunk, Hash};
use heddle_storage::StoreError;
use std::sync::Arc;

/// The rules.
pub struct RecordingModel;

/// An operation on one recording.
pub type RecordingOp = Op<Input, Output>;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Opens it, or fences its writer.
    Open {
        /// The writer.
        token: Vec<u8>,
        /// Take over from another token.
        fence: bool,
    },
    /// Appends a chunk.
    Append {
        /// The writer's epoch.
        epoch: u64,
        /// Index of the chunk's first event.
        first_event: u64,
        /// Number of its events.
        events: u64,
        /// Its id.
        id: Hash,
        /// The chunk that it names as the one before.
        previous: Hash,
    },
    /// Fixes the end.
    Seal {
        /// The writer's epoch.
        epoch: u64,
        /// Events in all.
        events: u64,
        /// The last chunk.
        last_chunk: Hash,
        /// The recorder was lost.
        cut: bool,
    },
    /// Removes it.
    Delete,
    /// Looks at it.
    Get,
}

impl Input {
    /// The append of `chunk`.
    pub fn append(epoch: u64, chunk: &Chunk) -> Input {
        Input::Append {
            epoch,
            first_event: chunk.header.first_event,
            events: u64::from(chunk.header.events),
            id: chunk.id(),
            previous: chunk.header.previous,
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Opened: the writer's epoch, and where to go on.
    Opened {
        /// The epoch.
        epoch: u64,
        /// The committed watermark.
        events: u64,
    },
    /// Appended, sealed: the committed watermark.
    Committed {
        /// Events committed.
        events: u64,
    },
    /// Deleted.
    Done,
    /// How far it is, and its committed watermark, if it is there.
    Found(Option<(Progress, u64)>),
    /// Refused.
    Refused(Refusal),
    /// Nobody knows.
    Unknown,
}

impl From<&StoreError> for Output {
    /// What an error says of the outcome. A leader that could not be reached says nothing.
    fn from(error: &StoreError) -> Output {
        Output::Refused(match error {
            StoreError::Fenced(_) => Refusal::Fenced,
            StoreError::Conflict(_) => Refusal::Conflict,
            StoreError::Gap(events) => Refusal::Gap { events: *events },
            StoreError::Sealed => Refusal::Sealed,
            StoreError::NotFound(_) => Refusal::NotFound,
            _ => return Output::Unknown,
        })
    }
}

/// Why nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A newer writer has taken over.
    Fenced,
    /// Something else is committed.
    Conflict,
    /// Chunks are missing before this one.
    Gap {
        /// The committed watermark.
        events: u64,
    },
    /// It has ended.
    Sealed,
    /// It is not there.
    NotFound,
}

/// How far a recording is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Progress {
    /// It may grow.
    Recording,
    /// Complete.
    Sealed,
    /// Ended by the loss of its recorder.
    Cut,
}

/// A recording, or none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Never opened.
    Absent,
    /// There.
    There(Row),
    /// Deleted; it can be opened as if it had never been.
    Deleted,
}

/// A recording that is there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    progress: Progress,
    epoch: u64,
    token: Vec<u8>,
    events: u64,
    /// Each chunk's first event and id.
    chunks: Arc<Vec<(u64, Hash)>>,
}

impl Model for RecordingModel {
    type State = State;
    type Input = Input;
    type Output = Output;

    fn initial(&self) -> State {
        State::Absent
    }

    fn step(&self, state: &State, input: &Input, output: &Output) -> Option<State> {
        let (next, right) = state.apply(input);
        let is_right = match (input, output) {
            (_, Output::Unknown) => true,
            // The client says so too of one that was gone already.
            (Input::Delete, Output::Done) => {
                matches!(right, Output::Done | Output::Refused(Refusal::NotFound))
            }
            (Input::Get, Output::Refused(Refusal::NotFound)) => right == Output::Found(None),
            _ => *output == right,
        };
        is_right.then_some(next)
    }
}

impl State {
    /// The state behind the operation, and its answer.
    fn apply(&self, input: &Input) -> (State, Output) {
        let State::There(row) = self else {
            return match input {
                Input::Open { token, fence: false } => {
                    let row = Row {
                        progress: Progress::Recording,
                        epoch: 1,
                        token: token.clone(),
                        events: 0,
                        chunks: Arc::default(),
                    };
                    (State::There(row), Output::Opened { epoch: 1, events: 0 })
                }
                Input::Get => (self.clone(), Output::Found(None)),
                _ => (self.clone(), Output::Refused(Refusal::NotFound)),
            };
        };
        let mut row = row.clone();
        let output = match input {
            Input::Open { token, fence } => row.open(token, *fence),
            Input::Append { epoch, first_event, events, id, previous } => {
                row.append(*epoch, *first_event, *events, (*id, *previous))
            }
            Input::Seal { epoch, events, last_chunk, cut } => row.seal(*epoch, *events, *last_chunk, *cut),
            Input::Delete if row.progress == Progress::Recording => Output::Refused(Refusal::Conflict),
            Input::Delete => return (State::Deleted, Output::Done),
            Input::Get => Output::Found(Some((row.progress, row.events))),
        };
        (State::There(row), output)
    }
}

impl Row {
    fn open(&mut self, token: &[u8], fence: bool) -> Output {
        // A retry gets the same answer, even after the end.
        if self.token != token {
            if self.progress != Progress::Recording {
                return Output::Refused(Refusal::Sealed);
            }
            if !fence {
                return Output::Refused(Refusal::Fenced);
            }
            self.epoch += 1;
            self.token = token.to_vec();
        }
        Output::Opened { epoch: self.epoch, events: self.events }
    }

    fn append(&mut self, epoch: u64, first_event: u64, events: u64, (id, previous): (Hash, Hash)) -> Output {
        if epoch != self.epoch {
            return Output::Refused(Refusal::Fenced);
        }
        // A duplicate is acknowledged, even after the end.
        if first_event < self.events {
            return match self.chunks.contains(&(first_event, id)) {
                true => Output::Committed { events: self.events },
                false => Output::Refused(Refusal::Conflict),
            };
        }
        if self.progress != Progress::Recording {
            return Output::Refused(Refusal::Sealed);
        }
        if first_event > self.events {
            return Output::Refused(Refusal::Gap { events: self.events });
        }
        if previous != self.last_chunk() {
            return Output::Refused(Refusal::Conflict);
        }
        Arc::make_mut(&mut self.chunks).push((first_event, id));
        self.events += events;
        Output::Committed { events: self.events }
    }

    fn seal(&mut self, epoch: u64, events: u64, last_chunk: Hash, cut: bool) -> Output {
        if epoch != self.epoch {
            return Output::Refused(Refusal::Fenced);
        }
        if events > self.events {
            return Output::Refused(Refusal::Gap { events: self.events });
        }
        if events != self.events || last_chunk != self.last_chunk() {
            return Output::Refused(Refusal::Conflict);
        }
        if self.progress == Progress::Recording {
            self.progress = if cut { Progress::Cut } else { Progress::Sealed };
        }
        Output::Committed { events }
    }

    fn last_chunk(&self) -> Hash {
        self.chunks.last().map_or(Hash::ZERO, |(_, id)| *id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::check;

    fn open(token: u8, fence: bool) -> Input {
        Input::Open { token: vec![token], fence }
    }

    /// The chunk of ten events with this name, behind the chunk of that name; zero: none.
    fn append(epoch: u64, first_event: u64, name: u8, previous: u8) -> Input {
        Input::Append { epoch, first_event, events: 10, id: Hash([name; 32]), previous: Hash([previous; 32]) }
    }

    fn seal(epoch: u64, events: u64, name: u8, cut: bool) -> Input {
        Input::Seal { epoch, events, last_chunk: Hash([name; 32]), cut }
    }

    fn opened(epoch: u64, events: u64) -> Output {
        Output::Opened { epoch, events }
    }

    fn committed(events: u64) -> Output {
        Output::Committed { events }
    }

    /// Each operation called when the one before has returned.
    fn one_by_one(said: Vec<(Input, Output)>) -> Vec<RecordingOp> {
        let numbered = said.into_iter().enumerate();
        numbered
            .map(|(i, (input, output))| {
                let called = 10 * i as u64;
                Op { input, output, called, returned: Some(called + 5) }
            })
            .collect()
    }

    #[test]
    fn it_decides_as_apply_does() {
        use Output::{Done, Found, Refused};
        use Refusal::{Conflict, Fenced, Gap, NotFound, Sealed};
        let said = vec![
            (Input::Get, Found(None)),
            (Input::Get, Refused(NotFound)),
            (append(1, 0, 1, 0), Refused(NotFound)),
            (open(1, true), Refused(NotFound)),
            (open(1, false), opened(1, 0)),
            (open(1, false), opened(1, 0)),
            (open(2, false), Refused(Fenced)),
            (append(1, 0, 1, 0), committed(10)),
            (append(1, 10, 2, 1), committed(20)),
            (append(1, 0, 1, 0), committed(20)),
            (append(1, 0, 9, 0), Refused(Conflict)),
            (append(1, 5, 1, 0), Refused(Conflict)),
            (append(1, 30, 4, 3), Refused(Gap { events: 20 })),
            (append(1, 20, 3, 9), Refused(Conflict)),
            (Input::Delete, Refused(Conflict)),
            (open(2, true), opened(2, 20)),
            (append(1, 20, 3, 2), Refused(Fenced)),
            (append(3, 20, 3, 2), Refused(Fenced)),
            (seal(1, 20, 2, false), Refused(Fenced)),
            (seal(2, 30, 3, true), Refused(Gap { events: 20 })),
            (seal(2, 10, 1, true), Refused(Conflict)),
            (seal(2, 20, 1, true), Refused(Conflict)),
            (seal(2, 20, 2, true), committed(20)),
            // The first end stands.
            (seal(2, 20, 2, false), committed(20)),
            (Input::Get, Found(Some((Progress::Cut, 20)))),
            (append(2, 10, 2, 1), committed(20)),
            (append(2, 20, 3, 2), Refused(Sealed)),
            (open(2, false), opened(2, 20)),
            (open(3, true), Refused(Sealed)),
            (Input::Delete, Done),
            (Input::Delete, Refused(NotFound)),
            (Input::Delete, Done),
            (open(3, false), opened(1, 0)),
        ];
        let ops = one_by_one(said);
        assert_eq!(check(&RecordingModel, &ops), Ok(()));
        // Any other answer is wrong, wherever it stands.
        for wrong in 0..ops.len() {
            let mut ops = ops.clone();
            ops[wrong].output = committed(999);
            assert_eq!(check(&RecordingModel, &ops), Err(vec![wrong]), "{:?}", ops[wrong].input);
        }
    }

    #[test]
    fn an_acknowledged_chunk_that_is_lost_is_found() {
        let lost = one_by_one(vec![
            (open(1, false), opened(1, 0)),
            (append(1, 0, 1, 0), committed(10)),
            (Input::Get, Output::Found(Some((Progress::Recording, 0)))),
        ]);
        assert_eq!(check(&RecordingModel, &lost), Err(vec![2]));
    }

    #[test]
    fn an_unknown_append_may_come_before_a_fence_and_never_behind_it() {
        let mut ops = one_by_one(vec![
            (open(1, false), opened(1, 0)),
            (append(1, 0, 1, 0), Output::Unknown),
            (open(2, true), opened(2, 0)),
            (append(2, 0, 7, 0), committed(10)),
            (Input::Get, Output::Found(Some((Progress::Recording, 10)))),
        ]);
        ops[1].returned = None;
        assert_eq!(check(&RecordingModel, &ops), Ok(()));
        // It was committed first, so the second writer has to be told.
        ops[2].output = opened(2, 10);
        assert_eq!(check(&RecordingModel, &ops), Err(vec![3]));
        ops[3].output = Output::Refused(Refusal::Conflict);
        assert_eq!(check(&RecordingModel, &ops), Ok(()));
        // Behind the fence it would have made twenty.
        ops[4].output = Output::Found(Some((Progress::Recording, 20)));
        assert_eq!(check(&RecordingModel, &ops), Err(vec![4]));
    }
}
