//! From events to chunks to the outbox; shared by the recording's threads and the uploader.

use crate::outbox::Outbox;
use heddle_proto::{ChunkBuilder, Event};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A chunk is closed at this many bytes of events, or after the linger, whichever first.
const CHUNK_BYTES: usize = 64 << 10;
/// Far below what a chunk may hold.
pub(crate) const CHUNK_BYTES_MAX: usize = 1 << 20;
/// How long an event may wait for its chunk to fill.
pub const LINGER: Duration = Duration::from_millis(50);

/// Events on their way out.
#[derive(Clone)]
pub struct Chunker {
    inner: Arc<Mutex<Inner>>,
    /// Told when a chunk has entered the outbox.
    pub added: Arc<Notify>,
}

struct Inner {
    builder: ChunkBuilder,
    first_at: Option<Instant>,
    outbox: Option<Outbox>,
}

impl Chunker {
    /// A chunker into `outbox`.
    pub fn new(builder: ChunkBuilder, outbox: Outbox) -> Chunker {
        let inner = Inner { builder, first_at: None, outbox: Some(outbox) };
        Chunker { inner: Arc::new(Mutex::new(inner)), added: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the events of one step: a checkpoint and its async events come together,
    /// so that a chunk may be closed behind them.
    pub fn push(&self, events: Vec<Event>) {
        let mut inner = self.lock();
        inner.first_at.get_or_insert_with(Instant::now);
        let mut events = events.into_iter().peekable();
        while let Some(event) = events.next() {
            inner.builder.push(&event);
            // Many groups that come at once must not become one chunk beyond its bounds.
            let is_border = events.peek().is_none_or(|next| !next.body.is_async());
            if inner.builder.bytes() >= CHUNK_BYTES_MAX && is_border {
                self.close(&mut inner);
            }
        }
        if inner.builder.bytes() >= CHUNK_BYTES {
            self.close(&mut inner);
        }
    }

    /// Closes the chunk if its first event has waited for the linger, or at once.
    pub fn flush(&self, at_once: bool) {
        let mut inner = self.lock();
        if at_once || inner.first_at.is_some_and(|first| first.elapsed() >= LINGER) {
            self.close(&mut inner);
        }
    }

    fn close(&self, inner: &mut Inner) {
        inner.first_at = None;
        if let Some(chunk) = inner.builder.take()
            && let Some(outbox) = &mut inner.outbox
        {
            outbox.push(chunk);
            self.added.notify_one();
        }
    }

    /// Runs `f` on the outbox.
    pub fn with_outbox<T>(&self, f: impl FnOnce(&mut Outbox) -> T) -> Option<T> {
        self.lock().outbox.as_mut().map(f)
    }

    /// Takes the outbox out, at the end.
    pub fn take_outbox(&self) -> Option<Outbox> {
        self.lock().outbox.take()
    }
}
