//! PLIC: 95 sources, and of each hart a machine and a supervisor context.
//!
//! ```text
//! 0x4      + 4 * source      priority            0x1000     pending
//! 0x2000   + 0x80 * context  enable              context    2 * hart machine, + 1 supervisor
//! 0x200000 + 0x1000 * context  threshold, then claim and complete
//! ```
//!
//! A source's gateway is level-triggered: while its line is high it is pending
//! again as soon as its last claim was completed. A line that rises while the source is claimed
//! makes it pending, too, even if it has fallen when the claim is completed, as on QEMU.

use super::hart::irq;
use serde::{Deserialize, Serialize, Serializer};

/// Sources, number 0 included, which never interrupts.
pub const SOURCES: usize = 96;
const WORDS: usize = SOURCES / 32;

/// Registers and gateways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plic {
    #[serde(serialize_with = "priorities")]
    priority: Vec<u32>,
    #[serde(serialize_with = "sources")]
    level: [u32; WORDS],
    #[serde(serialize_with = "sources")]
    pending: [u32; WORDS],
    #[serde(serialize_with = "sources")]
    claimed: [u32; WORDS],
    /// Two of each hart.
    contexts: Vec<Context>,
}

/// Whom a source may interrupt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Context {
    #[serde(serialize_with = "sources")]
    enable: [u32; WORDS],
    threshold: u32,
}

/// Contexts of a hart.
const OF_A_HART: usize = 2;

impl Plic {
    /// Of one hart, after reset.
    pub fn new() -> Plic {
        Plic {
            priority: vec![0; SOURCES],
            level: [0; WORDS],
            pending: [0; WORDS],
            claimed: [0; WORDS],
            contexts: vec![Context::default(); OF_A_HART],
        }
    }

    /// One hart more, after reset.
    pub fn add_hart(&mut self) {
        self.contexts.resize(self.contexts.len() + OF_A_HART, Context::default());
    }

    /// Whether it has all its sources, and is of so many harts: one from outside may not be.
    pub fn is_whole(&self, harts: usize) -> bool {
        self.priority.len() == SOURCES && self.contexts.len() == OF_A_HART * harts
    }

    /// Drives a source's line.
    pub fn set_level(&mut self, source: u32, high: bool) {
        let (word, bit) = (source as usize / 32, 1 << (source % 32));
        if high {
            let has_risen = self.level[word] & bit == 0;
            self.level[word] |= bit;
            if has_risen || self.claimed[word] & bit == 0 {
                self.pending[word] |= bit;
            }
        } else {
            self.level[word] &= !bit;
        }
    }

    /// MEIP and SEIP of a hart as its contexts drive them.
    pub fn lines(&self, hart: usize) -> u64 {
        let machine = if self.best(OF_A_HART * hart).is_some() { irq::MEI } else { 0 };
        let supervisor = if self.best(OF_A_HART * hart + 1).is_some() { irq::SEI } else { 0 };
        machine | supervisor
    }

    /// The pending source to serve first: highest priority, then lowest number.
    fn best(&self, context: usize) -> Option<u32> {
        let context = self.contexts.get(context)?;
        let mut best: Option<(u32, u32)> = None;
        for word in 0..WORDS {
            let mut ready = self.pending[word] & !self.claimed[word] & context.enable[word];
            while ready != 0 {
                let source = word as u32 * 32 + ready.trailing_zeros();
                ready &= ready - 1;
                let priority = self.priority[source as usize];
                if priority > context.threshold && best.is_none_or(|(p, _)| priority > p) {
                    best = Some((priority, source));
                }
            }
        }
        best.map(|(_, source)| source)
    }

    fn claim(&mut self, context: usize) -> u32 {
        let Some(source) = self.best(context) else { return 0 };
        let (word, bit) = (source as usize / 32, 1 << (source % 32));
        self.pending[word] &= !bit;
        self.claimed[word] |= bit;
        source
    }

    fn complete(&mut self, context: usize, source: u32) {
        if source as usize >= SOURCES {
            return;
        }
        let (word, bit) = (source as usize / 32, 1 << (source % 32));
        if self.contexts.get(context).is_none_or(|context| context.enable[word] & bit == 0) {
            return;
        }
        self.claimed[word] &= !bit;
        if self.level[word] & bit != 0 {
            self.pending[word] |= bit;
        }
    }

    /// Reads the word at `offset`.
    pub fn load(&mut self, offset: u64) -> u32 {
        match offset {
            0..=0xfff => self.priority.get(offset as usize / 4).copied().unwrap_or(0),
            0x1000..=0x107f => self.pending.get((offset as usize - 0x1000) / 4).copied().unwrap_or(0),
            0x2000..=0x1f_ffff => {
                let at = offset as usize - 0x2000;
                let context = self.contexts.get(at / 0x80);
                context.and_then(|context| context.enable.get(at % 0x80 / 4)).copied().unwrap_or(0)
            }
            0x20_0000.. => {
                let at = offset as usize - 0x20_0000;
                match at % 0x1000 {
                    0 => self.contexts.get(at / 0x1000).map_or(0, |context| context.threshold),
                    4 => self.claim(at / 0x1000),
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Writes the word at `offset`.
    pub fn store(&mut self, offset: u64, value: u32) {
        match offset {
            4..=0xfff => {
                if let Some(priority) = self.priority.get_mut(offset as usize / 4) {
                    *priority = value & 7;
                }
            }
            0x2000..=0x1f_ffff => {
                let at = offset as usize - 0x2000;
                let Some(context) = self.contexts.get_mut(at / 0x80) else { return };
                if let Some(word) = context.enable.get_mut(at % 0x80 / 4) {
                    *word = value;
                }
                context.enable[0] &= !1;
            }
            0x20_0000.. => {
                let at = offset as usize - 0x20_0000;
                let context = at / 0x1000;
                match at % 0x1000 {
                    0 => {
                        if let Some(context) = self.contexts.get_mut(context) {
                            context.threshold = value & 7;
                        }
                    }
                    4 => self.complete(context, value),
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

impl Default for Plic {
    fn default() -> Self {
        Self::new()
    }
}

/// A set of sources: to people, their numbers.
fn sources<S: Serializer>(words: &[u32; WORDS], serializer: S) -> Result<S::Ok, S::Error> {
    if !serializer.is_human_readable() {
        return words.serialize(serializer);
    }
    let has = |source: &usize| words[source / 32] >> (source % 32) & 1 != 0;
    serializer.collect_seq((0..SOURCES).filter(has))
}

/// To people, the sources' that have one.
fn priorities<S: Serializer>(priority: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
    if !serializer.is_human_readable() {
        return priority.serialize(serializer);
    }
    serializer.collect_map(priority.iter().enumerate().filter(|(_, priority)| **priority != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(harts: usize) -> Plic {
        let mut plic = Plic::new();
        (1..harts).for_each(|_| plic.add_hart());
        plic
    }

    fn enable(context: u64) -> u64 {
        0x2000 + 0x80 * context
    }

    fn threshold(context: u64) -> u64 {
        0x20_0000 + 0x1000 * context
    }

    #[test]
    fn each_context_has_its_registers_and_no_other_is_there() {
        let mut plic = of(3);
        for context in 0..6 {
            for word in 0..4 {
                plic.store(enable(context) + 4 * word, 0x100 * word as u32 + context as u32 * 2 + 1);
            }
            plic.store(threshold(context), context as u32 + 8);
        }
        for context in 0..6 {
            let words = [0, 1, 2, 3].map(|word| plic.load(enable(context) + 4 * word));
            // Source 0 is never enabled, and there are no more than 96.
            let low = context as u32 * 2;
            assert_eq!(words, [low, 0x100 + low + 1, 0x200 + low + 1, 0]);
            assert_eq!(plic.load(threshold(context)), context as u32);
        }
        assert!(plic.is_whole(3) && !plic.is_whole(1));
        for offset in [enable(6), threshold(6), threshold(6) + 4, 0x1f_fffc, 0x5f_fffc, threshold(0) + 8] {
            plic.store(offset, u32::MAX);
            assert_eq!(plic.load(offset), 0, "{offset:#x}");
        }
    }

    #[test]
    fn a_source_interrupts_the_contexts_that_enable_it_and_is_claimed_once() {
        let mut plic = of(2);
        plic.store(4 * 10, 2);
        plic.store(enable(3), 1 << 10);
        plic.set_level(10, true);
        assert_eq!((plic.lines(0), plic.lines(1), plic.lines(2)), (0, irq::SEI, 0));
        plic.store(enable(0), 1 << 10);
        assert_eq!((plic.lines(0), plic.lines(1)), (irq::MEI, irq::SEI));
        assert_eq!(plic.load(threshold(1) + 4), 0, "it is not enabled there");
        assert_eq!(plic.load(threshold(3) + 4), 10);
        assert_eq!((plic.lines(0), plic.lines(1)), (0, 0), "whoever claims it has it");
        assert_eq!(plic.load(threshold(0) + 4), 0);
        // Completed by a context that does not enable it, it stays claimed.
        plic.store(threshold(1) + 4, 10);
        assert_eq!(plic.lines(1), 0);
        plic.store(threshold(3) + 4, 10);
        assert_eq!((plic.lines(0), plic.lines(1)), (irq::MEI, irq::SEI));
        plic.store(threshold(3), 2);
        assert_eq!((plic.lines(0), plic.lines(1)), (irq::MEI, 0));
    }
}
