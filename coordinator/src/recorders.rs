//! Recorders and their signs of life. One that falls silent has its recording cut
//! at the durable prefix, by a higher epoch.

use heddle_proto::{Hash, RecordingId};
use heddle_storage::{StoreClient, StoreError};
use std::collections::HashMap;

/// When each recorder was last heard.
#[derive(Debug, Default)]
pub struct Recorders {
    heard_unix_ms: HashMap<RecordingId, u64>,
    fenced: HashMap<RecordingId, u64>,
    polled_unix_ms: u64,
}

impl Recorders {
    /// A sign of life; whether that recorder has been fenced.
    pub fn handle_sign(&mut self, id: RecordingId, epoch: u64, now: u64) -> bool {
        if self.fenced.get(&id).is_some_and(|fenced| epoch < *fenced) {
            return true;
        }
        self.heard_unix_ms.insert(id, now);
        false
    }

    /// The recordings among `open` whose recorder was silent for `silence_ms`. One
    /// never heard of counts from the first look at it.
    pub fn poll_silent(&mut self, open: &[RecordingId], now: u64, silence_ms: u64) -> Vec<RecordingId> {
        let has_slept = self.polled_unix_ms != 0 && now.saturating_sub(self.polled_unix_ms) >= silence_ms;
        self.polled_unix_ms = now;
        self.heard_unix_ms.retain(|id, _| open.contains(id));
        if has_slept {
            // It was this coordinator that heard nothing: everybody gets a new chance.
            self.heard_unix_ms.values_mut().for_each(|heard| *heard = now);
        }
        open.iter()
            .filter(|id| now >= *self.heard_unix_ms.entry(**id).or_insert(now) + silence_ms)
            .copied()
            .collect()
    }

    /// The recorder was fenced by `epoch`.
    pub fn fence(&mut self, id: RecordingId, epoch: u64) {
        self.fenced.insert(id, epoch);
        self.heard_unix_ms.remove(&id);
    }
}

/// Fences the recorder and seals what is committed; the epoch that fences.
pub async fn cut(store: &StoreClient, id: RecordingId, token: &[u8]) -> Result<u64, StoreError> {
    let opened = store.open(id, token, &[], true).await?;
    loop {
        let row = store.get(id).await?;
        let last = Hash::from_slice(&row.last_chunk).map_err(|e| StoreError::Corrupt(e.to_string()))?;
        match store.seal(id, opened.epoch, row.committed_events, last, true).await {
            // An append of the old epoch was applied in between.
            Err(StoreError::Gap(_) | StoreError::Conflict(_)) => {}
            done => return done.map(|()| opened.epoch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_counted_from_the_last_sign() {
        let mut recorders = Recorders::default();
        let id = RecordingId([1; 16]);
        assert!(!recorders.handle_sign(id, 1, 1000));
        for now in (1100..2000).step_by(300) {
            assert!(recorders.poll_silent(&[id], now, 1000).is_empty());
        }
        assert_eq!(recorders.poll_silent(&[id], 2000, 1000), vec![id]);
        recorders.fence(id, 2);
        assert!(recorders.handle_sign(id, 1, 2001), "the old epoch is told");
        let unheard = RecordingId([2; 16]);
        assert!(recorders.poll_silent(&[unheard], 2500, 1000).is_empty());
        assert!(recorders.poll_silent(&[unheard], 3400, 1000).is_empty());
        assert_eq!(recorders.poll_silent(&[unheard], 3500, 1000), vec![unheard]);
    }

    #[test]
    fn a_coordinator_that_slept_cuts_nobody() {
        let mut recorders = Recorders::default();
        let id = RecordingId([1; 16]);
        recorders.handle_sign(id, 1, 1000);
        assert!(recorders.poll_silent(&[id], 1100, 1000).is_empty());
        assert!(recorders.poll_silent(&[id], 90_000, 1000).is_empty());
        assert!(recorders.poll_silent(&[id], 90_500, 1000).is_empty());
        assert_eq!(recorders.poll_silent(&[id], 91_000, 1000), vec![id]);
    }
}
