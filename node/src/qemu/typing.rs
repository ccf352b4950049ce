//! Typing at a guest, no faster than it reads.
//!
//! QEMU takes what is typed as long as the UART has room, and gives it to the UART later,
//! at a checkpoint: several keys may come there at once, and what its FIFO has no room for
//! is lost. So after a few keys the typist waits until they are in the log and the guest
//! has run.

use std::io::Write;
use std::process::ChildStdin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// Half the FIFO of a 16550.
const KEYS: usize = 8;
/// A guest that takes nothing for so long is typed at all the same.
const PATIENCE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(2);

/// How far the guest is, as the log tells.
#[derive(Clone, Default)]
pub(crate) struct Taken {
    /// Bytes that its character devices were given.
    pub(crate) bytes: Arc<AtomicU64>,
    /// Its icount.
    pub(crate) icount: Arc<AtomicU64>,
}

/// Types what comes, until nobody types any more or the guest is gone.
pub(crate) fn type_all(typed: &Receiver<Vec<u8>>, mut stdin: ChildStdin, taken: &Taken) {
    let mut written = 0;
    // How far the guest was when it was given up: until it takes more, nobody waits for it.
    let mut given_up = None;
    while let Ok(data) = typed.recv() {
        for keys in data.chunks(KEYS) {
            if stdin.write_all(keys).and_then(|()| stdin.flush()).is_err() {
                return;
            }
            written += keys.len() as u64;
            if given_up == Some(taken.bytes.load(Ordering::Relaxed)) {
                continue;
            }
            given_up = None;
            let began = Instant::now();
            wait(began, || taken.bytes.load(Ordering::Relaxed) >= written);
            let then = taken.icount.load(Ordering::Relaxed);
            wait(began, || taken.icount.load(Ordering::Relaxed) != then);
            if taken.bytes.load(Ordering::Relaxed) < written {
                given_up = Some(taken.bytes.load(Ordering::Relaxed));
            }
        }
    }
    // Kept open: an end of input is an event that no user typed.
    std::mem::forget(stdin);
}

fn wait(began: Instant, is_there: impl Fn() -> bool) {
    while !is_there() && began.elapsed() < PATIENCE {
        std::thread::sleep(POLL);
    }
}
