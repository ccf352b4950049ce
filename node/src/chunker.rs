//! From events to chunks to the outbox; shared by the recording's threads and the uploader.

use crate::outbox::Outbox;
use heddle_proto::{Body, ChunkBuilder, Event};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A chunk is closed at this many bytes of events, or after the linger, whichever first.
const CHUNK_BYTES: usize = 64 << 10;
/// Far below what a chunk may hold.
pub(crate) const CHUNK_BYTES_MAX: usize = 1 << 20;
/// How long an event that is news may wait for its chunk to fill.
pub const LINGER: Duration = Duration::from_millis(50);
/// The same of an event that has nothing from outside: a replay that has all events before it
/// comes there by itself. A guest that computes has hardly any others, and each chunk costs the
/// recorder and three replicas a group commit.
const LINGER_WITHOUT_NEWS: Duration = Duration::from_millis(200);

/// Events on their way out.
#[derive(Clone)]
pub struct Chunker {
    inner: Arc<Mutex<Inner>>,
    /// Told when a chunk has entered the outbox.
    pub added: Arc<Notify>,
}

struct Inner {
    builder: ChunkBuilder,
    /// When the chunk is closed, however short it is.
    close_at: Option<Instant>,
    outbox: Option<Outbox>,
}

impl Chunker {
    /// A chunker into `outbox`.
    pub fn new(builder: ChunkBuilder, outbox: Outbox) -> Chunker {
        let inner = Inner { builder, close_at: None, outbox: Some(outbox) };
        Chunker { inner: Arc::new(Mutex::new(inner)), added: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the events of one step: a checkpoint and its async events come together,
    /// so that a chunk may be closed behind them.
    pub fn push(&self, events: Vec<Event>) {
        let mut inner = self.lock();
        let linger = if events.iter().any(has_news) { LINGER } else { LINGER_WITHOUT_NEWS };
        let close_at = Instant::now() + linger;
        let close_at = inner.close_at.map_or(close_at, |at| at.min(close_at));
        let mut events = events.into_iter().peekable();
        while let Some(event) = events.next() {
            inner.builder.push(&event);
            // Many groups that come at once must not become one chunk beyond its bounds.
            let is_border = events.peek().is_none_or(|next| !next.body.is_async());
            if inner.builder.bytes() >= CHUNK_BYTES_MAX && is_border {
                self.close(&mut inner);
            }
        }
        // Behind all chunks that were closed in between: what is left waits no longer.
        inner.close_at = Some(close_at);
        if inner.builder.bytes() >= CHUNK_BYTES {
            self.close(&mut inner);
        }
    }

    /// Closes the chunk if an event of it has waited for its linger, or at once.
    pub fn flush(&self, at_once: bool) {
        let mut inner = self.lock();
        if at_once || inner.close_at.is_some_and(|at| at <= Instant::now()) {
            self.close(&mut inner);
        }
    }

    fn close(&self, inner: &mut Inner) {
        inner.close_at = None;
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

/// Whether an event has something that no replay can know without it.
fn has_news(event: &Event) -> bool {
    !event.body.is_mark() && !matches!(event.body, Body::Checkpoint(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use heddle_proto::{AsyncEvent, CheckpointKind, ClockKind, Role};

    #[test]
    fn what_a_replay_comes_to_by_itself_is_no_news() {
        let has_news = |body: Body| has_news(&Event { icount: 0, role: Role::Vcpu, body });
        assert!(has_news(Body::Clock { clock: ClockKind::Host, value: 1 }));
        assert!(has_news(Body::Async(AsyncEvent::Char { data: vec![b'a'] })));
        assert!(has_news(Body::Shutdown { code: 0 }));
        assert!(!has_news(Body::Check { value: 1, output: 2 }));
        assert!(!has_news(Body::Checkpoint(CheckpointKind::ClockWarpAccount)));
    }
}
