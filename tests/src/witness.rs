//! Witnesses: clients that write one recording and look at it, all at the same time, and
//! note what they ask and what they are told. Some order must explain all of it: see
//! [`crate::linear`].
//!
//! One of them writes; now and then another takes over. Whoever gets no answer asks another
//! replica next. Each question is sent once, as [`crate::recording_model`] wants it.

use crate::linear::check;
use crate::recording_model::{Input, Output, Progress, RecordingModel, RecordingOp};
use crate::{append, until};
use bytes::Bytes;
use heddle_proto::{Body, Chunk, ChunkBuilder, Event, Hash, RecordingId, Role, v1};
use heddle_storage::{StoreClient, StoreError};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngCore, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tonic::Status;

/// Witnesses of a recording: more of them take longer to judge, and see little more.
const WITNESSES: u64 = 2;
/// How long a witness waits for an answer; then nobody knows the outcome.
const ATTEMPT: Duration = Duration::from_millis(700);
/// Between two questions: a history is not to grow for ever while another waits for a leader.
const PAUSE: Duration = Duration::from_millis(10);
const MANIFEST: &[u8] = b"{}";

/// A recording that is written and looked at by witnesses until it is ended.
pub struct Watched {
    /// The recording.
    pub id: RecordingId,
    shared: Arc<Shared>,
    witnesses: Vec<JoinHandle<Witness>>,
}

/// What its witnesses share.
#[derive(Default)]
struct Shared {
    is_over: AtomicBool,
    acked: AtomicU64,
    lost: AtomicU64,
}

impl Watched {
    /// Sets witnesses to work. They know the replicas at these addresses, each by connections
    /// of its own.
    pub fn start(id: RecordingId, addresses: &[String], random: &mut StdRng) -> Watched {
        let (shared, began) = (Arc::<Shared>::default(), Instant::now());
        let witness = |number: u64| Witness {
            id,
            store: StoreClient::new(addresses.to_vec()),
            token: format!("witness {number}").into_bytes(),
            shared: shared.clone(),
            began,
            random: StdRng::seed_from_u64(random.next_u64()),
            place: None,
            is_fenced: false,
            ops: vec![],
            acked: vec![],
        };
        let witnesses: Vec<Witness> = (0..WITNESSES).map(witness).collect();
        let witnesses = witnesses.into_iter().map(|witness| tokio::spawn(witness.run())).collect();
        Watched { id, shared, witnesses }
    }

    /// How many chunks were acknowledged.
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::Relaxed)
    }

    /// How many questions got no answer.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// Seals the recording, and judges all that was seen of it: panics if no order explains
    /// it. The chunks that were acknowledged.
    pub async fn end(self) -> Vec<Chunk> {
        self.shared.is_over.store(true, Ordering::Relaxed);
        let mut witnesses = vec![];
        for witness in self.witnesses {
            witnesses.push(witness.await.unwrap());
        }
        witnesses[0].seal().await;
        let ops: Vec<RecordingOp> = witnesses.iter_mut().flat_map(|w| std::mem::take(&mut w.ops)).collect();
        if let Err(stuck) = check(&RecordingModel, &ops) {
            let stuck: Vec<String> = stuck.iter().map(|op| format!("{:?}", ops[*op])).collect();
            panic!("no order explains what clients of {} saw: {}", self.id, stuck.join("; "));
        }
        witnesses.into_iter().flat_map(|witness| witness.acked).collect()
    }
}

struct Witness {
    id: RecordingId,
    store: StoreClient,
    token: Vec<u8>,
    shared: Arc<Shared>,
    /// Where the clock of all witnesses began.
    began: Instant,
    random: StdRng,
    /// Where it writes, if it is the writer.
    place: Option<Place>,
    /// Somebody else has opened the recording.
    is_fenced: bool,
    ops: Vec<RecordingOp>,
    acked: Vec<Chunk>,
}

/// Where a writer is.
struct Place {
    epoch: u64,
    events: u64,
    last_chunk: Hash,
    next: Chunk,
}

impl Witness {
    async fn run(mut self) -> Witness {
        while !self.shared.is_over.load(Ordering::Relaxed) {
            let input = self.next_input();
            self.perform(input).await;
            tokio::time::sleep(PAUSE).await;
        }
        self
    }

    fn next_input(&mut self) -> Input {
        if self.random.gen_bool(0.3) {
            return Input::Get;
        }
        if let Some(place) = &self.place {
            return Input::append(place.epoch, &place.next);
        }
        // Somebody else writes, and goes on for a while.
        if self.is_fenced && self.random.gen_bool(0.95) {
            return Input::Get;
        }
        Input::Open { token: self.token.clone(), fence: self.is_fenced }
    }

    /// Ends the recording, whoever wrote it.
    async fn seal(&mut self) {
        until("the recording to be sealed", async || {
            let input = match &self.place {
                Some(Place { epoch, events, last_chunk, .. }) => {
                    Input::Seal { epoch: *epoch, events: *events, last_chunk: *last_chunk, cut: false }
                }
                None => Input::Open { token: self.token.clone(), fence: true },
            };
            matches!(self.perform(input).await, Output::Committed { .. }).then_some(())
        })
        .await;
    }

    /// Asks, and notes the answer.
    async fn perform(&mut self, input: Input) -> Output {
        let (called, tried) = (self.now(), self.store.tried(self.id));
        let output = match tokio::time::timeout(ATTEMPT, self.attempt(&input)).await {
            Ok(Ok(output)) => output,
            Ok(Err(status)) => self.failed(&input, tried, &status),
            Err(_) => self.failed(&input, tried, &Status::deadline_exceeded("no answer in time")),
        };
        let returned = (output != Output::Unknown).then(|| self.now());
        match (&input, &output) {
            (Input::Get, _) => {}
            (Input::Append { .. }, Output::Committed { .. }) => self.keep(),
            (_, Output::Refused(_)) => {
                self.place = None;
                self.is_fenced = true;
            }
            _ => {}
        }
        // A look that saw nothing tells nothing.
        if returned.is_some() || input != Input::Get {
            self.ops.push(RecordingOp { input, output: output.clone(), called, returned });
        }
        output
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    async fn attempt(&mut self, input: &Input) -> Result<Output, Status> {
        let recording: Bytes = self.id.to_vec().into();
        let mut leader = self.store.leader(self.id).unwrap();
        Ok(match input {
            Input::Open { token, fence } => {
                let (token, manifest) = (token.clone().into(), Bytes::from_static(MANIFEST));
                let request = v1::OpenRequest { recording, token, manifest, fence: *fence };
                let reply = leader.open(request).await?.into_inner();
                let (epoch, events) = (reply.epoch, reply.committed_events);
                self.go_on(epoch, events, Hash::from_slice(&reply.last_chunk).unwrap());
                Output::Opened { epoch, events }
            }
            Input::Append { epoch, .. } => {
                let next = self.place.as_ref().unwrap().next.clone();
                Output::Committed { events: append(&self.store, *epoch, &[next]).await? }
            }
            Input::Seal { epoch, events, last_chunk, cut } => {
                let (last_chunk, cut) = (last_chunk.to_vec().into(), *cut);
                let request = v1::SealRequest { recording, epoch: *epoch, events: *events, last_chunk, cut };
                Output::Committed { events: leader.seal(request).await?.into_inner().committed_events }
            }
            Input::Get => {
                // Whichever is asked must know all that was acknowledged before.
                let address = self.store.addresses().choose(&mut self.random).unwrap().clone();
                let mut replica = self.store.at(&address).unwrap();
                let row = replica.get(v1::GetRequest { recording }).await?.into_inner();
                Output::Found(Some((progress(&row.state), row.committed_events)))
            }
            Input::Delete => unreachable!("a witness deletes nothing"),
        })
    }

    /// The outcome, as far as a failure tells it.
    fn failed(&self, input: &Input, tried: usize, status: &Status) -> Output {
        let error = StoreError::from(status.clone());
        let is_wrong = matches!(error, StoreError::Invalid(_) | StoreError::Corrupt(_) | StoreError::Full(_));
        assert!(!is_wrong, "the store refuses what it should take: {error}");
        let output = Output::from(&error);
        if output == Output::Unknown {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            // A look goes to anyone, and says nothing of who leads.
            if *input != Input::Get {
                self.store.redirect(self.id, tried, status);
            }
        }
        output
    }

    /// The chunk that was next is acknowledged.
    fn keep(&mut self) {
        let Place { epoch, next, .. } = self.place.take().unwrap();
        self.go_on(epoch, next.header.end_event(), next.id());
        self.acked.push(next);
        self.shared.acked.fetch_add(1, Ordering::Relaxed);
    }

    /// It is the writer, behind so many events.
    fn go_on(&mut self, epoch: u64, events: u64, last_chunk: Hash) {
        let mut builder = ChunkBuilder::resume(self.id, events, last_chunk);
        for output in events..events + self.random.gen_range(1..40u64) {
            let body = Body::Check { value: self.random.next_u64(), output };
            builder.push(&Event { icount: output * 10, role: Role::Vcpu, body });
        }
        let next = builder.take().unwrap();
        self.place = Some(Place { epoch, events, last_chunk, next });
    }
}

fn progress(state: &str) -> Progress {
    match state {
        "recording" => Progress::Recording,
        "sealed" => Progress::Sealed,
        "cut" => Progress::Cut,
        other => panic!("a recording is {other}"),
    }
}
