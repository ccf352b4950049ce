//! The async event queue: what the outside world has to tell a running guest.
//!
//! Filled from any thread, drained at checkpoints while recording. In replay it
//! stays empty: the log says what happens.

use crate::machine::FRAME_BYTES_MAX;
use heddle_proto::{AsyncEvent, Body, QemuEvent};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Typed bytes that one event carries at most; the guest gets more once it has read most of them.
pub const TYPED_BYTES_MAX: usize = 1024;
/// Frames that wait for the guest's buffers, as many as its queue has; more are dropped, as
/// a network card does.
const FRAMES_MAX: usize = 256;
/// The virtio console's number in a `CharRead`.
pub(crate) const CONSOLE_NUMBER: u8 = 1;

/// Where what is typed goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Uart,
    Virtio,
}

/// What a guest has room for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// Typed bytes, and where they go.
    pub(crate) typed: Option<Port>,
    /// A frame.
    pub(crate) frames: bool,
}

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
    /// Frames that came in, oldest first.
    frames: VecDeque<Vec<u8>>,
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

    /// A frame came in from the network. One too many, or too long, is dropped.
    pub fn push_frame(&self, frame: Vec<u8>) {
        let mut shared = self.lock();
        if shared.frames.len() < FRAMES_MAX && frame.len() <= FRAME_BYTES_MAX {
            shared.frames.push_back(frame);
        }
    }

    /// Asks the machine to be switched off, from outside, with this code.
    pub fn request_shutdown(&self, code: u16) {
        self.lock().shutdown.get_or_insert(code);
    }

    /// Whether nothing waits that the guest could get now.
    pub(crate) fn is_empty(&self, room: Room) -> bool {
        let shared = self.lock();
        shared.events.is_empty()
            && (room.typed.is_none() || shared.typed.is_empty())
            && (!room.frames || shared.frames.is_empty())
    }

    /// Bytes typed and not yet taken by the guest.
    pub fn typed_bytes(&self) -> usize {
        self.lock().typed.len()
    }

    pub(crate) fn pop(&self, room: Room) -> Option<Body> {
        let mut shared = self.lock();
        if let Some(event) = shared.events.pop_front() {
            return Some(Body::Async(event));
        }
        if room.frames
            && let Some(data) = shared.frames.pop_front()
        {
            return Some(Body::Qemu(QemuEvent::Net { filter: 0, flags: 0, data }));
        }
        let port = room.typed.filter(|_| !shared.typed.is_empty())?;
        let count = shared.typed.len().min(TYPED_BYTES_MAX);
        let data = shared.typed.drain(..count).collect();
        Some(match port {
            Port::Uart => Body::Async(AsyncEvent::Char { data }),
            Port::Virtio => Body::Qemu(QemuEvent::CharRead { device: CONSOLE_NUMBER, data }),
        })
    }

    /// A switch-off that was asked for, if one was.
    pub fn shutdown_requested(&self) -> Option<u16> {
        self.lock().shutdown
    }
}
