//! A simulated replica: the shipped core, writer, keeper and recovery over a simulated disk.

use super::disk::SimDisk;
use heddle_storage::apply::Planted;
use heddle_storage::core::{Core, CoreConfig, Input, Output};
use heddle_storage::error::Error;
use heddle_storage::journal::{Frame, Journal, JournalConfig, Location};
use heddle_storage::keeper::{self, Job, Sink};
use heddle_storage::recover;
use heddle_storage::rows::MemRows;
use heddle_storage::writer::{Waiter, Writer};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::collections::VecDeque;
use std::sync::Arc;

/// Length of a simulated segment.
pub const SEGMENT_BYTES: u64 = 128 << 10;

/// What runs of a replica while it is up.
pub struct Running {
    /// The shipped state machine.
    pub core: Core,
    /// The shipped writer.
    pub writer: Writer<()>,
    /// Jobs that wait for the keeper.
    pub jobs: VecDeque<Job>,
    /// A turn of the writer is on its way.
    pub is_write_due: bool,
    /// The keeper's.
    pub is_keep_due: bool,
}

/// A replica, up or down.
pub struct SimReplica {
    /// Its id, from 1.
    pub id: u64,
    /// Its disk.
    pub disk: SimDisk,
    /// Its catalog's rows, and an older copy.
    pub rows: Arc<MemRows>,
    old_rows: Option<Arc<MemRows>>,
    /// The running part.
    pub running: Option<Running>,
    /// How often it was started: messages to an earlier life are lost.
    pub life: u64,
    voters: Vec<u64>,
}

/// Writes to the journal at once.
pub(super) struct Direct<'a>(pub(super) &'a mut Journal);

impl Sink for Direct<'_> {
    fn write(&mut self, frames: Vec<Frame>) -> Result<Vec<Location>, Error> {
        self.0.append(&frames)
    }
}

impl SimReplica {
    /// A replica that was never started; `voters` are the first members, none if it joins.
    pub fn new(id: u64, voters: Vec<u64>) -> SimReplica {
        SimReplica {
            id,
            disk: SimDisk::default(),
            rows: Arc::default(),
            old_rows: None,
            running: None,
            life: 0,
            voters,
        }
    }

    /// Starts it on what is on its disk.
    pub fn start(&mut self, rng: &mut ChaCha8Rng, groups: u32, planted: Planted) -> Result<(), Error> {
        self.life += 1;
        // The catalog may be lost, or somebody hands back an old copy.
        match rng.gen_range(0..12) {
            0 => self.rows = Arc::default(),
            1 => {
                if let Some(old) = self.old_rows.take() {
                    self.rows = old;
                }
            }
            2 => self.old_rows = Some(Arc::new(self.rows.copy())),
            _ => {}
        }
        let config = CoreConfig {
            flush_rows: 40,
            flush_ticks: 10,
            checkpoint_bytes: 96 << 10,
            retain_bytes: 48 << 10,
            cache_bytes: 24 << 10,
            message_bytes: 600,
            planted,
            ..CoreConfig::new(self.id, rng.r#gen())
        };
        let journal = JournalConfig { segment_bytes: SEGMENT_BYTES, reserve_bytes: 0, in_background: false };
        let disk = Arc::new(self.disk.clone());
        let (core, journal) = recover::open(disk, journal, self.rows.clone(), config, groups, &self.voters)?;
        self.running = Some(Running {
            core,
            writer: Writer::new(journal),
            jobs: VecDeque::new(),
            is_write_due: false,
            is_keep_due: false,
        });
        Ok(())
    }

    /// The power is cut.
    pub fn cut(&mut self, rng: &mut ChaCha8Rng) {
        self.running = None;
        self.disk.cut(rng);
        if rng.gen_bool(0.5) {
            self.rows.cut();
        }
    }

    /// Runs the writer once: one group commit. Whether more waits.
    pub fn write(&mut self) -> Result<bool, Error> {
        let Some(running) = &mut self.running else { return Ok(false) };
        running.is_write_due = false;
        let is_full = running.writer.journal.is_full();
        if running.writer.is_idle() {
            running.writer.journal.mark()?;
            running.core.take(Input::Full(is_full))?;
            return Ok(false);
        }
        match running.writer.commit() {
            Ok(durable) => running.core.take(Input::Written(durable.marks))?,
            Err(Error::Full { .. }) => {
                running.core.take(Input::Full(true))?;
                return Ok(true);
            }
            Err(error) => return Err(error),
        }
        running.core.take(Input::Full(is_full))?;
        Ok(!running.writer.is_idle())
    }

    /// Runs the writer once, in this life.
    pub fn write_if(&mut self, life: u64) -> Result<bool, Error> {
        if self.life == life { self.write() } else { Ok(false) }
    }

    /// Runs the keeper once, in this life.
    pub fn keep_if(&mut self, life: u64) -> Result<bool, Error> {
        if self.life == life { self.keep() } else { Ok(false) }
    }

    /// Runs the keeper once. A full disk makes it try again later.
    pub fn keep(&mut self) -> Result<bool, Error> {
        let Some(running) = &mut self.running else { return Ok(false) };
        running.is_keep_due = false;
        let Some(job) = running.jobs.front() else { return Ok(false) };
        let catalog = running.core.catalog().clone();
        let segments = running.writer.journal.segments();
        match keeper::run(job, &catalog, &segments, &mut Direct(&mut running.writer.journal)) {
            Ok(kept) => {
                running.jobs.pop_front();
                running.core.take(Input::Kept(Box::new(kept)))?;
                Ok(false)
            }
            Err(Error::Full { .. }) => {
                running.core.take(Input::Full(true))?;
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// What the core wants done; writes and jobs are queued here.
    pub fn work(&mut self) -> Result<Vec<Output>, Error> {
        let Some(running) = &mut self.running else { return Ok(vec![]) };
        let mut others = vec![];
        for output in running.core.work()? {
            match output {
                Output::Write(frames, marks) => running.writer.push(frames, Waiter::Core(marks)),
                Output::Keep(job) => running.jobs.push_back(job),
                other => others.push(other),
            }
        }
        Ok(others)
    }
}
