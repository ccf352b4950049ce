//! The async event queue: what the outside world has to tell a running guest.
//!
//! Filled from any thread, drained at checkpoints while recording. In replay it
//! stays empty: the log says what happens.

use heddle_proto::AsyncEvent;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Typed bytes that one event carries at most; the guest gets more once it has read most of them.
pub const TYPED_BYTES_MAX: usize = 1024;

/// A handle to the queue; clones share it.
#[derive(Clone, Debug, Default)]
pub struct AsyncQueue {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    events: VecDeque<AsyncEvent>,
    /// What was typed and not yet taken by the guest.
    typed: VecDeque<u8>,
    shutdown: Option<u16>,
}

impl AsyncQueue {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic elsewhere leaves the queue whole: every change is one call.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event. Typed bytes wait until the console has room for them.
    pub fn push(&self, event: AsyncEvent) {
        let mut shared = self.lock();
        match event {
            AsyncEvent::Char { data } => shared.typed.extend(data),
            other => shared.events.push_back(other),
        }
    }

    /// Asks the machine to be switched off, from outside, with this code.
    pub fn request_shutdown(&self, code: u16) {
        self.lock().shutdown.get_or_insert(code);
    }

    /// Whether nothing waits that the guest could get now.
    pub(crate) fn is_empty(&self, takes_typed: bool) -> bool {
        let shared = self.lock();
        shared.events.is_empty() && (!takes_typed || shared.typed.is_empty())
    }

    /// Bytes typed and not yet taken by the guest.
    pub fn typed_bytes(&self) -> usize {
        self.lock().typed.len()
    }

    pub(crate) fn pop(&self, takes_typed: bool) -> Option<AsyncEvent> {
        let mut shared = self.lock();
        if let Some(event) = shared.events.pop_front() {
            return Some(event);
        }
        if !takes_typed || shared.typed.is_empty() {
            return None;
        }
        let count = shared.typed.len().min(TYPED_BYTES_MAX);
        Some(AsyncEvent::Char { data: shared.typed.drain(..count).collect() })
    }

    /// A switch-off that was asked for, if one was.
    pub fn shutdown_requested(&self) -> Option<u16> {
        self.lock().shutdown
    }
}
