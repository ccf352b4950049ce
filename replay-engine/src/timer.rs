//! Timers, one list per clock.

use serde::{Deserialize, Serialize, Serializer};

/// The clocks that timers can stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimerClock {
    /// From icount, plus the warp bias.
    Virtual,
    /// Wall clock.
    Host,
    /// Real time for the warp alone.
    VirtualRt,
}

/// Who is called when a timer expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TimerId {
    /// The CLINT's compare register of the hart of this number.
    Clint(usize),
    /// The hart's own, `stimecmp`.
    Supervisor(usize),
    /// The goldfish RTC's alarm.
    RtcAlarm,
    /// The warp timer: wakes the vCPU when idle time is over.
    Warp,
}

/// Armed timers. Few, so each list is a sorted vector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timers {
    #[serde(serialize_with = "by_clock")]
    lists: [Vec<(i64, TimerId)>; 3],
}

impl Timers {
    /// Arms `id` on `clock` for `deadline` nanoseconds, moving it if it is armed.
    pub fn arm(&mut self, clock: TimerClock, id: TimerId, deadline: i64) {
        self.disarm(clock, id);
        let list = &mut self.lists[clock as usize];
        list.push((deadline, id));
        list.sort_unstable();
    }

    /// Disarms `id` on `clock`.
    pub fn disarm(&mut self, clock: TimerClock, id: TimerId) {
        self.lists[clock as usize].retain(|(_, armed)| *armed != id);
    }

    /// The nearest deadline on `clock`.
    pub fn deadline(&self, clock: TimerClock) -> Option<i64> {
        self.lists[clock as usize].first().map(|(deadline, _)| *deadline)
    }

    /// Takes one timer whose deadline is not after `now`.
    pub fn take_expired(&mut self, clock: TimerClock, now: i64) -> Option<TimerId> {
        let list = &mut self.lists[clock as usize];
        let (deadline, id) = *list.first()?;
        (deadline <= now).then(|| {
            list.remove(0);
            id
        })
    }
}

/// To people, the lists by the names of their clocks: pairs of a deadline, and whose it is.
fn by_clock<S: Serializer>(lists: &[Vec<(i64, TimerId)>; 3], serializer: S) -> Result<S::Ok, S::Error> {
    if !serializer.is_human_readable() {
        return lists.serialize(serializer);
    }
    let clocks = [TimerClock::Virtual, TimerClock::Host, TimerClock::VirtualRt];
    serializer.collect_map(clocks.into_iter().zip(lists))
}
