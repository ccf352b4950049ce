//! virtio-mmio, version 2: the registers that every virtio device has.
//!
//! A device is a [`Transport`] and what it does with its queues. A driver that breaks the
//! rules gets `DEVICE_NEEDS_RESET` and a configuration interrupt; until it resets the
//! device, that takes no more requests.

use super::ram::Ram;
use super::virtqueue::{Broken, Chain, QUEUE_MAX, Virtqueue};
use serde::{Deserialize, Serialize};

const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 64;
/// A device without it would be a legacy one.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIGURATION: u32 = 2;

/// What a device says of itself and never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The device's number in the specification.
    pub id: u32,
    /// Features offered.
    pub features: u64,
    /// Number of queues.
    pub queues: usize,
}

/// What a register write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioWrite {
    /// Look at this queue, in a bottom half.
    Notify(u16),
    /// The driver has reset the transport: the device behind it follows.
    Reset,
    /// The interrupt line may have changed.
    Line,
    /// Nothing.
    Nothing,
}

/// Registers and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transport {
    #[serde(serialize_with = "super::shown::hex")]
    status: u32,
    features_select: u32,
    driver_features_select: u32,
    #[serde(serialize_with = "super::shown::hex")]
    driver_features: u64,
    queue_select: u32,
    #[serde(serialize_with = "super::shown::hex")]
    interrupt_status: u32,
    queues: Vec<Virtqueue>,
}

impl Transport {
    /// After reset.
    pub fn new(identity: &Identity) -> Transport {
        Transport {
            status: 0,
            features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            interrupt_status: 0,
            queues: vec![Virtqueue::default(); identity.queues],
        }
    }

    /// Whether it has the queues of its kind, within their bounds: one from outside may not.
    pub fn is_whole(&self, identity: &Identity) -> bool {
        self.queues.len() == identity.queues && self.queues.iter().all(|queue| queue.size <= QUEUE_MAX)
    }

    /// Whether the interrupt line is high.
    pub fn line(&self) -> bool {
        self.interrupt_status != 0
    }

    /// Whether the device may look at its queues.
    pub fn is_running(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }

    /// Reads register `offset`; `config` is the device's first eight bytes of configuration.
    pub fn load(&self, offset: u64, identity: &Identity, config: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            0x000 => 0x7472_6976,
            0x004 => 2,
            0x008 => identity.id,
            0x00c => 0x4c44_4448, // "HDDL"
            0x010 if self.features_select < 2 => (identity.features >> (32 * self.features_select)) as u32,
            0x034 if queue.is_some() => u32::from(QUEUE_MAX),
            0x044 => queue.map_or(0, |queue| u32::from(queue.is_ready)),
            0x060 => self.interrupt_status,
            0x070 => self.status,
            0x100 => config as u32,
            0x104 => (config >> 32) as u32,
            _ => 0,
        }
    }

    /// Writes register `offset`.
    pub fn store(&mut self, offset: u64, value: u32, identity: &Identity) -> VirtioWrite {
        match offset {
            0x014 => self.features_select = value,
            0x020 => match self.driver_features_select {
                0 => set_low(&mut self.driver_features, value),
                1 => set_high(&mut self.driver_features, value),
                _ => {}
            },
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            0x050 if (value as usize) < self.queues.len() => return VirtioWrite::Notify(value as u16),
            0x064 => {
                self.interrupt_status &= !value;
                return VirtioWrite::Line;
            }
            0x070 if value == 0 => {
                *self = Transport::new(identity);
                return VirtioWrite::Reset;
            }
            0x070 => self.set_status(value, identity),
            _ => {
                if let Some(queue) = self.queues.get_mut(self.queue_select as usize) {
                    store_queue(queue, offset, value);
                }
            }
        }
        VirtioWrite::Nothing
    }

    fn set_status(&mut self, value: u32, identity: &Identity) {
        // Only a reset takes back that one is needed.
        let mut status = value & 0xff | self.status & STATUS_NEEDS_RESET;
        let is_offered = self.driver_features & !identity.features == 0;
        if !is_offered || self.driver_features & FEATURE_VERSION_1 == 0 {
            // The driver reads the status back, and sees that its choice was refused.
            status &= !STATUS_FEATURES_OK;
        }
        self.status = status;
    }

    /// The driver broke the rules: until it resets the device, that takes no more requests.
    pub fn fail(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
        self.interrupt_status |= INTERRUPT_CONFIGURATION;
    }

    /// Chains that wait in queue `queue`, as far as the device may look.
    pub fn waiting(&self, queue: u16, ram: &Ram) -> Result<u16, Broken> {
        if self.is_running() { self.queues[usize::from(queue)].waiting(ram) } else { Ok(0) }
    }

    /// The same for who will pop them: how often, since what is given back may overwrite the
    /// ring that is being read, and a ring that grows as fast as it is read has no end.
    pub fn offered(&mut self, queue: u16, ram: &Ram) -> u16 {
        let waiting = self.waiting(queue, ram);
        if waiting == Err(Broken) {
            self.fail();
        }
        waiting.unwrap_or(0)
    }

    /// Takes the next chain of queue `queue`.
    pub fn pop(&mut self, queue: u16, ram: &Ram) -> Option<Chain> {
        if !self.is_running() {
            return None;
        }
        match self.queues[usize::from(queue)].pop(ram) {
            Ok(chain) => chain,
            Err(Broken) => {
                self.fail();
                None
            }
        }
    }

    /// Takes the last pop of queue `queue` back.
    pub fn unpop(&mut self, queue: u16) {
        self.queues[usize::from(queue)].unpop();
    }

    /// Gives a chain of queue `queue` back and raises the interrupt. `written` bytes are in
    /// it, or the driver broke the rules.
    pub fn give_back(&mut self, queue: u16, ram: &mut Ram, head: u16, written: Result<u32, Broken>) {
        let queue = &mut self.queues[usize::from(queue)];
        let done = written.and_then(|written| queue.give_back(ram, head, written));
        self.interrupt_status |= INTERRUPT_USED;
        if done == Err(Broken) {
            self.fail();
        }
    }

    /// Entries of queue `queue`.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.queues[usize::from(queue)].size
    }
}

fn store_queue(queue: &mut Virtqueue, offset: u64, value: u32) {
    match offset {
        0x038 => queue.size = value.min(u32::from(QUEUE_MAX)) as u16,
        0x044 => queue.is_ready = value & 1 != 0,
        0x080 => set_low(&mut queue.descriptors, value),
        0x084 => set_high(&mut queue.descriptors, value),
        0x090 => set_low(&mut queue.available, value),
        0x094 => set_high(&mut queue.available, value),
        0x0a0 => set_low(&mut queue.used, value),
        0x0a4 => set_high(&mut queue.used, value),
        _ => {}
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}
