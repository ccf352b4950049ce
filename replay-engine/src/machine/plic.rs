//! PLIC: 95 sources, one hart's machine and supervisor contexts.
//!
//! A source's gateway is level-triggered: while its line is high it is pending
//! again as soon as its last claim was completed.

use super::hart::irq;
use serde::{Deserialize, Serialize};

/// Sources, number 0 included, which never interrupts.
pub const SOURCES: usize = 96;
const WORDS: usize = SOURCES / 32;

/// Registers and gateways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plic {
    priority: Vec<u32>,
    level: [u32; WORDS],
    pending: [u32; WORDS],
    claimed: [u32; WORDS],
    /// By context: 0 machine, 1 supervisor.
    enable: [[u32; WORDS]; 2],
    threshold: [u32; 2],
}

impl Plic {
    /// After reset.
    pub fn new() -> Plic {
        Plic {
            priority: vec![0; SOURCES],
            level: [0; WORDS],
            pending: [0; WORDS],
            claimed: [0; WORDS],
            enable: [[0; WORDS]; 2],
            threshold: [0; 2],
        }
    }

    /// Whether it has all its sources: one from outside may not.
    pub fn is_whole(&self) -> bool {
        self.priority.len() == SOURCES
    }

    /// Drives a source's line.
    pub fn set_level(&mut self, source: u32, high: bool) {
        let (word, bit) = (source as usize / 32, 1 << (source % 32));
        if high {
            self.level[word] |= bit;
            if self.claimed[word] & bit == 0 {
                self.pending[word] |= bit;
            }
        } else {
            self.level[word] &= !bit;
        }
    }

    /// MEIP and SEIP as the contexts drive them.
    pub fn lines(&self) -> u64 {
        let machine = if self.best(0).is_some() { irq::MEI } else { 0 };
        let supervisor = if self.best(1).is_some() { irq::SEI } else { 0 };
        machine | supervisor
    }

    /// The pending source to serve first: highest priority, then lowest number.
    fn best(&self, context: usize) -> Option<u32> {
        let mut best: Option<(u32, u32)> = None;
        for word in 0..WORDS {
            let mut ready = self.pending[word] & self.enable[context][word];
            while ready != 0 {
                let source = word as u32 * 32 + ready.trailing_zeros();
                ready &= ready - 1;
                let priority = self.priority[source as usize];
                if priority > self.threshold[context] && best.is_none_or(|(p, _)| priority > p) {
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
        if self.enable[context][word] & bit == 0 {
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
            0x2000..=0x20ff => {
                let at = offset as usize - 0x2000;
                self.enable[at / 0x80].get(at % 0x80 / 4).copied().unwrap_or(0)
            }
            0x20_0000 | 0x20_1000 => self.threshold[offset as usize >> 12 & 1],
            0x20_0004 | 0x20_1004 => self.claim(offset as usize >> 12 & 1),
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
            0x2000..=0x20ff => {
                let at = offset as usize - 0x2000;
                if let Some(word) = self.enable[at / 0x80].get_mut(at % 0x80 / 4) {
                    *word = value;
                }
                self.enable[at / 0x80][0] &= !1;
            }
            0x20_0000 | 0x20_1000 => self.threshold[offset as usize >> 12 & 1] = value & 7,
            0x20_0004 | 0x20_1004 => self.complete(offset as usize >> 12 & 1, value),
            _ => {}
        }
    }
}

impl Default for Plic {
    fn default() -> Self {
        Self::new()
    }
}
