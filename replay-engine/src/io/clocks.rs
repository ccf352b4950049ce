//! The host's clocks and its entropy, as a recording reads them.

use crate::emulator::World;
use heddle_proto::ClockKind;
use rand::RngCore;
use rand::rngs::OsRng;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The real clocks. VirtualRt stands still while the recording is paused.
#[derive(Clone)]
pub struct HostClocks {
    start: Instant,
    paused: Duration,
    exit: Arc<AtomicBool>,
}

impl HostClocks {
    /// Clocks that start now; `exit` asks the vCPU out of its run.
    pub fn new(exit: Arc<AtomicBool>) -> HostClocks {
        HostClocks { start: Instant::now(), paused: Duration::ZERO, exit }
    }

    /// The recording stood still for so long.
    pub fn add_pause(&mut self, pause: Duration) {
        self.paused += pause;
    }

    /// How long from now until VirtualRt or the host clock shows `deadline`.
    pub fn until(&mut self, clock: ClockKind, deadline: i64) -> Duration {
        Duration::from_nanos((deadline - self.now(clock)).max(0) as u64)
    }
}

impl World for HostClocks {
    fn now(&mut self, clock: ClockKind) -> i64 {
        let elapsed = match clock {
            ClockKind::Host => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            ClockKind::VirtualRt => self.start.elapsed().saturating_sub(self.paused),
        };
        elapsed.as_nanos() as i64
    }

    fn entropy(&mut self, out: &mut [u8]) {
        OsRng.fill_bytes(out);
    }

    fn must_exit(&mut self) -> bool {
        self.exit.load(Ordering::Relaxed)
    }
}
