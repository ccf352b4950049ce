//! The async event queue: what the outside world has to tell a running guest.
//!
//! Filled from any thread, drained at checkpoints while recording. In replay it
//! stays empty: the log says what happens.

use heddle_proto::AsyncEvent;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A handle to the queue; clones share it.
#[derive(Clone, Debug, Default)]
pub struct AsyncQueue {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    events: VecDeque<AsyncEvent>,
    shutdown: Option<u16>,
}

impl AsyncQueue {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic elsewhere leaves the queue whole: every change is one call.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event.
    pub fn push(&self, event: AsyncEvent) {
        self.lock().events.push_back(event);
    }

    /// Asks the machine to be switched off, from outside, with this code.
    pub fn request_shutdown(&self, code: u16) {
        self.lock().shutdown.get_or_insert(code);
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().events.is_empty()
    }

    pub(crate) fn pop(&self) -> Option<AsyncEvent> {
        self.lock().events.pop_front()
    }

    /// A switch-off that was asked for, if one was.
    pub fn shutdown_requested(&self) -> Option<u16> {
        self.lock().shutdown
    }
}
