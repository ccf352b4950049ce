//! A replica's threads: the core takes inputs and ticks, the writer writes the journal, the
//! keeper looks after rows. Messages of a leader go out while its own write is under way.

use crate::command::Proposal;
use crate::core::{Core, CoreConfig, Envelope, Input, Output, Status};
use crate::disk::Directory;
use crate::error::Error;
use crate::group::{Answer, NotDone};
use crate::install::ServePage;
use crate::journal::{Frame, Journal, JournalConfig, Location};
use crate::keeper::{self, Job, Sink};
use crate::mend::Reader;
use crate::recover;
use crate::rows::SledRows;
use crate::transport::Outbound;
use crate::writer::{Waiter, Writer};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Raft's clock: elections after 10 to 20 ticks, heartbeats every 2.
pub const TICK: Duration = Duration::from_millis(50);
/// Inputs taken in one round; bounds it together with the byte budget.
const INPUTS_MAX: usize = 2048;
/// A writer that has been idle for so long marks its last batch as synced.
const IDLE: Duration = Duration::from_secs(1);
/// A full disk is looked at again after so long.
const FULL_RETRY: Duration = Duration::from_millis(200);

/// Sends inputs to a replica from anywhere.
#[derive(Clone)]
pub struct Handle(Sender<Input>);

impl Handle {
    /// Hands an input over.
    pub fn send(&self, input: Input) {
        // A stopped replica drops the answer's sender, which its caller sees.
        let _ = self.0.send(input);
    }

    /// Proposes a command in a group.
    pub async fn propose(&self, group: u32, proposal: Proposal) -> Answer {
        let (sender, answer) = oneshot::channel();
        self.send(Input::Propose(group, proposal, sender));
        answer.await.unwrap_or(Err(NotDone::Stopped))
    }

    /// Waits until all that was committed in a group when asked is applied here.
    pub async fn read_index(&self, group: u32) -> Result<(), NotDone> {
        let (sender, answer) = oneshot::channel();
        self.send(Input::ReadIndex(group, sender));
        answer.await.unwrap_or(Err(NotDone::Stopped))
    }

    /// How the replica stands.
    pub async fn status(&self) -> Option<Status> {
        let (sender, answer) = oneshot::channel();
        self.send(Input::Status(sender));
        answer.await.ok()
    }
}

/// Frames for the writer.
enum ToWrite {
    Core(Vec<Frame>, Vec<(crate::group::Mark, usize)>),
    Other(Vec<Frame>, Sender<Vec<Location>>),
    Stop,
}

/// Writes through the writer's thread.
#[derive(Clone)]
pub struct WriterHandle(Sender<ToWrite>);

impl Sink for WriterHandle {
    fn write(&mut self, frames: Vec<Frame>) -> Result<Vec<Location>, Error> {
        let (sender, places) = channel();
        self.0.send(ToWrite::Other(frames, sender)).map_err(|_| Error::Stopped)?;
        places.recv().map_err(|_| Error::Stopped)
    }
}

/// A replica that was opened and does not run yet.
pub struct Opened {
    core: Core,
    journal: Journal,
    inputs: Receiver<Input>,
    handle: Handle,
}

/// What others share with a replica's threads.
pub struct Shared {
    /// Where inputs go.
    pub handle: Handle,
    /// Rows.
    pub catalog: crate::catalog::Catalog,
    /// Bytes.
    pub reader: Reader,
}

/// Opens the replica in `dir`. `voters` are the first members of a new cluster.
pub fn open(dir: &Path, config: CoreConfig, groups: u32, voters: &[u64]) -> Result<Opened, Error> {
    let disk = Arc::new(Directory::open(&dir.join("journal"))?);
    let rows = Arc::new(SledRows::open(&dir.join("catalog"))?);
    let journal = JournalConfig::default();
    let (core, journal) = recover::open(disk, journal, rows, config, groups, voters)?;
    let (sender, inputs) = channel();
    Ok(Opened { core, journal, inputs, handle: Handle(sender) })
}

impl Opened {
    /// Where inputs go.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Its rows.
    pub fn catalog(&self) -> &crate::catalog::Catalog {
        self.core.catalog()
    }

    /// Starts the threads. `stopped` hears why, once one of them has ended.
    pub fn start(
        self,
        outbound: Outbound,
        stopped: impl Fn(String) + Send + Sync + 'static,
    ) -> std::io::Result<(Shared, Vec<JoinHandle<()>>)> {
        let Opened { core, journal, inputs, handle } = self;
        let stopped = Arc::new(stopped);
        let segments = journal.segments();
        let catalog = core.catalog().clone();
        let (to_write, writes) = channel();
        let (to_keep, jobs) = channel::<Job>();
        let mut threads = vec![];
        let mut spawn = |name: &str, run: Box<dyn FnOnce() -> Result<(), Error> + Send>| {
            let stopped = stopped.clone();
            let (name, handle) = (name.to_string(), handle.clone());
            let thread = std::thread::Builder::new().name(name.clone()).spawn(move || {
                // A panic is a fault of ours, and the replica's end: nothing goes on half.
                let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
                let why = match ended {
                    Ok(Ok(())) => "asked to".to_string(),
                    Ok(Err(error)) => {
                        tracing::error!(%error, thread = name, "the replica stops");
                        error.to_string()
                    }
                    Err(_) => format!("its thread `{name}` panicked"),
                };
                handle.send(Input::Stop);
                stopped(why);
            });
            thread.map(|thread| threads.push(thread))
        };
        let (cluster, me) = outbound.identity();
        let writer = WriterHandle(to_write.clone());
        let reader = Reader {
            cluster,
            me,
            addresses: outbound.addresses(),
            catalog: catalog.clone(),
            segments: segments.clone(),
            writer: writer.clone(),
            replica: handle.clone(),
        };
        let write_inputs = handle.clone();
        spawn("writer", Box::new(move || write_loop(journal, &writes, &write_inputs)))?;
        let (sink, kept, keeper_catalog, keeper_segments) =
            (writer, handle.clone(), catalog.clone(), segments);
        spawn(
            "keeper",
            Box::new(move || {
                let mut sink = sink;
                for job in jobs {
                    match keeper::run(&job, &keeper_catalog, &keeper_segments, &mut sink) {
                        Ok(done) => kept.send(Input::Kept(Box::new(done))),
                        Err(Error::Stopped) => return Ok(()),
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            }),
        )?;
        let pages = Pages { reader: reader.clone(), outbound: outbound.clone(), under_way: Arc::default() };
        spawn(
            "raft",
            Box::new(move || {
                let loop_ = CoreLoop { core, outbound, writes: to_write, jobs: to_keep, pages };
                loop_.run(&inputs)
            }),
        )?;
        Ok((Shared { handle, catalog, reader }, threads))
    }
}

struct CoreLoop {
    core: Core,
    outbound: Outbound,
    writes: Sender<ToWrite>,
    jobs: Sender<Job>,
    pages: Pages,
}

/// However the core ends, the writer does, too: others hold ways to it.
impl Drop for CoreLoop {
    fn drop(&mut self) {
        let _ = self.writes.send(ToWrite::Stop);
    }
}

impl CoreLoop {
    fn run(mut self, inputs: &Receiver<Input>) -> Result<(), Error> {
        let mut next_tick = Instant::now() + TICK;
        let mut ticks = 0u64;
        loop {
            let wait = next_tick.saturating_duration_since(Instant::now());
            match inputs.recv_timeout(wait) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(input) => self.core.take(input)?,
                Err(RecvTimeoutError::Timeout) => {}
            }
            for input in inputs.try_iter().take(INPUTS_MAX) {
                if matches!(input, Input::Stop) {
                    return Ok(());
                }
                self.core.take(input)?;
            }
            if Instant::now() >= next_tick {
                self.core.take(Input::Tick)?;
                ticks += 1;
                if ticks % 20 == 0 {
                    self.outbound.update(&self.core.members()?);
                    self.core.propose_members(&self.outbound.configured())?;
                }
                // Ticks that a stall has missed are skipped, or they would start elections.
                next_tick = Instant::now() + TICK;
            }
            self.dispatch()?;
        }
    }

    fn dispatch(&mut self) -> Result<(), Error> {
        for output in self.core.work()? {
            match output {
                Output::Send(to, envelope) => self.outbound.send(to, envelope),
                Output::Write(frames, marks) => {
                    self.writes.send(ToWrite::Core(frames, marks)).map_err(|_| Error::Stopped)?;
                }
                Output::Keep(job) => self.jobs.send(job).map_err(|_| Error::Stopped)?,
                Output::Serve(serve) => self.pages.send(serve),
            }
        }
        Ok(())
    }
}

/// Reads pages of snapshots and sends them, off the core's thread.
#[derive(Clone)]
struct Pages {
    reader: Reader,
    outbound: Outbound,
    /// Who waits for a page of which group. It is asked for again and again, and takes long
    /// when bytes have rotted: they come from a peer then, and are stored again.
    under_way: Arc<Mutex<BTreeSet<(u64, u32)>>>,
}

impl Pages {
    fn send(&self, serve: ServePage) {
        let waits = (serve.to, serve.group);
        if !self.under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(waits) {
            return;
        }
        let pages = self.clone();
        self.outbound.runtime().spawn_blocking(move || {
            let runtime = pages.outbound.runtime();
            match serve.read(|key, at| runtime.block_on(pages.reader.read(key, at))) {
                Ok(page) => pages.outbound.send(serve.to, Envelope::Page(page)),
                Err(error) => tracing::error!(%error, "a page of a snapshot can't be read"),
            }
            pages.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&waits);
        });
    }
}

fn write_loop(journal: Journal, writes: &Receiver<ToWrite>, inputs: &Handle) -> Result<(), Error> {
    let mut writer: Writer<Sender<Vec<Location>>> = Writer::new(journal);
    let mut was_full = false;
    loop {
        let wait = if writer.is_idle() && !was_full { IDLE } else { FULL_RETRY };
        let mut next =
            match writes.recv_timeout(if writer.is_idle() || was_full { wait } else { Duration::ZERO }) {
                Ok(next) => Some(next),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
        if next.is_none() && writer.is_idle() {
            writer.journal.mark()?;
        }
        while let Some(request) = next {
            match request {
                ToWrite::Core(frames, marks) => writer.push(frames, Waiter::Core(marks)),
                ToWrite::Other(frames, sender) => writer.push(frames, Waiter::Other(sender)),
                ToWrite::Stop => return Ok(()),
            }
            next = writes.try_recv().ok();
        }
        let mut is_full = writer.journal.is_full();
        while !writer.is_idle() {
            match writer.commit() {
                Ok(durable) => {
                    if !durable.marks.is_empty() {
                        inputs.send(Input::Written(durable.marks));
                    }
                    for (sender, places) in durable.others {
                        let _ = sender.send(places);
                    }
                }
                Err(Error::Full { .. }) => {
                    is_full = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if is_full != was_full {
            inputs.send(Input::Full(is_full));
            was_full = is_full;
        }
    }
}
