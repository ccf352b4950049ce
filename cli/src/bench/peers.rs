//! What the log store is measured against: etcd and JetStream, three members each on this machine.
//!
//! - Every peer gets the same load: `window` operations in flight over one connection to its
//!   leader, of incompressible bytes that were made before.
//! - What is acknowledged within the measured seconds counts, whenever it was sent. So a
//!   warm-up and the draining at the end are neither in the bytes nor in the time.
//! - An operation that fails or is never acknowledged ends the run in an error: a figure
//!   without it would be of another load.
//!
//! The members end with their owner. `stop` also waits for it, so that their directory can go.

mod etcd;
mod members;
mod nats;

pub use etcd::{ETCD_SETTINGS, Etcd};
pub use members::installed;
pub use nats::{NATS_SETTINGS, Nats};

use anyhow::{Result, ensure};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use std::time::{Duration, Instant};

/// Until connections, caches and congestion windows have settled.
const WARM_UP: Duration = Duration::from_secs(1);
/// Distinct payloads: enough that no two neighbours are alike, and few to make.
const PAYLOADS: usize = 16;
/// Largest payload: half of the message limit that the peers are started with.
const PAYLOAD_BYTES_MAX: usize = MESSAGE_BYTES_MAX / 2;
/// The message limit that the peers are started with.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Most operations in flight: etcd refuses new ones once 5,000 wait to be applied.
const WINDOW_MAX: usize = 4096;
/// Longest time: it bounds the latencies that are kept, to some 400 MB at 80,000 a second.
const SECONDS_MAX: f64 = 600.0;
/// Silence for so long is a failure, not a latency.
const STALL: Duration = Duration::from_secs(20);

/// What is asked of a peer.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Bytes of each operation.
    pub payload_bytes: usize,
    /// Operations in flight.
    pub window: usize,
    /// Seconds that count, after the warm-up.
    pub seconds: f64,
}

impl Load {
    /// The payloads, made beforehand: random, so that nobody saves by compressing them.
    pub fn payloads(&self) -> Result<Vec<Bytes>> {
        self.check()?;
        let mut random = StdRng::seed_from_u64(0);
        let mut payload = || {
            let mut bytes = vec![0; self.payload_bytes];
            random.fill_bytes(&mut bytes);
            Bytes::from(bytes)
        };
        Ok((0..PAYLOADS).map(|_| payload()).collect())
    }

    /// Starts the clock.
    pub fn start(&self) -> Result<Timing> {
        self.check()?;
        let began = Instant::now();
        let from = began + WARM_UP;
        Ok(Timing { began, from, until: from + Duration::from_secs_f64(self.seconds) })
    }

    /// Refuses a load that one of the peers can't take.
    fn check(&self) -> Result<()> {
        let (bytes, window) = (self.payload_bytes, self.window);
        ensure!((1..=PAYLOAD_BYTES_MAX).contains(&bytes), "payloads have 1 to {PAYLOAD_BYTES_MAX} bytes");
        ensure!((1..=WINDOW_MAX).contains(&window), "a window has 1 to {WINDOW_MAX} operations");
        ensure!(self.seconds > 0.0 && self.seconds <= SECONDS_MAX, "at most {SECONDS_MAX} seconds count");
        Ok(())
    }
}

/// When an acknowledgement counts.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    began: Instant,
    from: Instant,
    until: Instant,
}

impl Timing {
    /// The start of the warm-up.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Nothing more is to be sent.
    pub fn is_over(&self, now: Instant) -> bool {
        now >= self.until
    }

    /// Takes an acknowledgement at `now` of what was `sent` then, if it counts.
    pub fn take(&self, sent: Instant, now: Instant, latencies_ms: &mut Vec<f64>) {
        if (self.from..self.until).contains(&now) {
            latencies_ms.push(now.duration_since(sent).as_secs_f64() * 1e3);
        }
    }
}

/// What was acknowledged within the measured seconds.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Their payloads' bytes.
    pub bytes: u64,
    /// The measured seconds.
    pub seconds: f64,
    /// From before sending to the acknowledgement, of every operation, in no order.
    pub latencies_ms: Vec<f64>,
}

impl Measured {
    /// Of the latencies that counted; nothing at all is an error.
    pub fn new(load: &Load, latencies_ms: Vec<f64>) -> Result<Measured> {
        ensure!(!latencies_ms.is_empty(), "nothing was acknowledged within {} s", load.seconds);
        let ops = latencies_ms.len() as u64;
        Ok(Measured { bytes: ops * load.payload_bytes as u64, seconds: load.seconds, latencies_ms })
    }

    /// Payload bytes a second, in millions.
    pub fn mb_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.seconds.max(1e-9)
    }

    /// The latency in milliseconds that `p` of a hundred operations keep to.
    pub fn percentile(&self, p: f64) -> f64 {
        let mut sorted = self.latencies_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (p / 100.0 * sorted.len() as f64).ceil() as usize;
        let last = sorted.len().saturating_sub(1);
        sorted.get(rank.saturating_sub(1).min(last)).copied().unwrap_or(f64::NAN)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LOAD: Load = Load { payload_bytes: 1000, window: 4, seconds: 2.0 };

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let measured = Measured::new(&LOAD, (1..=200).rev().map(f64::from).collect()).unwrap();
        let ranks = [0.0, 50.0, 99.0, 100.0, 200.0].map(|p| measured.percentile(p));
        assert_eq!(ranks, [1.0, 100.0, 198.0, 200.0, 200.0]);
        assert_eq!((measured.bytes, measured.mb_per_second()), (200_000, 0.1));
        assert!(Measured::new(&LOAD, vec![]).is_err());
    }

    #[test]
    fn only_what_is_acknowledged_within_the_time_counts() {
        let timing = LOAD.start().unwrap();
        let at = |ms: u64| timing.began() + Duration::from_millis(ms);
        let mut latencies_ms = vec![];
        for (sent, now) in [(0, 999), (900, 1000), (2990, 2999), (2990, 3000)] {
            timing.take(at(sent), at(now), &mut latencies_ms);
        }
        let rounded: Vec<f64> = latencies_ms.iter().map(|ms| ms.round()).collect();
        assert_eq!(rounded, [100.0, 9.0]);
        assert!(!timing.is_over(at(2999)) && timing.is_over(at(3000)));
    }

    #[test]
    fn a_load_that_no_peer_can_take_is_refused() {
        let refused = [
            Load { payload_bytes: 0, ..LOAD },
            Load { payload_bytes: PAYLOAD_BYTES_MAX + 1, ..LOAD },
            Load { window: 0, ..LOAD },
            Load { window: WINDOW_MAX + 1, ..LOAD },
            Load { seconds: 0.0, ..LOAD },
            Load { seconds: f64::NAN, ..LOAD },
            Load { seconds: 2.0 * SECONDS_MAX, ..LOAD },
        ];
        assert!(refused.iter().all(|load| load.start().is_err() && load.payloads().is_err()));
    }
}
