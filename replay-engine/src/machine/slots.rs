//! The virtio-mmio slots: which device is in which, and what reaches it from both sides.
//!
//! ```text
//! slot    0x1000_1000 + slot * 0x1000, PLIC source 1 + slot
//! disks   from slot 0 up, in their order
//! others  from slot 7 down, in the manifest's order, as QEMU hands its slots out
//! ```

use super::output::Output;
use super::virtio::{Identity, Transport, VirtioWrite};
use super::virtio_console::VirtioConsole;
use super::virtio_net::VirtioNet;
use super::virtio_rng::VirtioRng;
use super::{BottomHalf, Machine, virtio_block, virtio_console, virtio_net, virtio_rng};
use crate::queue::{CONSOLE_NUMBER, Port, Room, TYPED_BYTES_MAX};
use heddle_proto::QemuEvent;
use heddle_proto::manifest::{Device, VIRTIO_SLOTS};
use serde::{Deserialize, Serialize};

/// A virtio device that has no image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Card {
    /// A network card.
    Net(VirtioNet),
    /// A source of entropy.
    Rng(VirtioRng),
    /// A console.
    Console(VirtioConsole),
}

impl Card {
    /// After reset.
    fn new(device: Device) -> Card {
        match device {
            Device::Net => Card::Net(VirtioNet::new()),
            Device::Rng => Card::Rng(VirtioRng::new()),
            Device::Console => Card::Console(VirtioConsole::new()),
        }
    }

    /// Its name as a leaf of the state.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Card::Net(_) => "virtio-net",
            Card::Rng(_) => "virtio-rng",
            Card::Console(_) => "virtio-console",
        }
    }

    /// Whether it is the same kind of device as `other` and has its kind's queues.
    pub(crate) fn is_like(&self, other: &Card) -> bool {
        self.name() == other.name() && self.transport().is_whole(self.identity())
    }

    /// What it has sent out of the machine, if it can.
    fn output(&self) -> Option<Output> {
        match self {
            Card::Net(net) => Some(net.output),
            Card::Rng(_) => None,
            Card::Console(console) => Some(console.output),
        }
    }

    fn identity(&self) -> &'static Identity {
        match self {
            Card::Net(_) => &virtio_net::IDENTITY,
            Card::Rng(_) => &virtio_rng::IDENTITY,
            Card::Console(_) => &virtio_console::IDENTITY,
        }
    }

    fn config(&self) -> u64 {
        if matches!(self, Card::Net(_)) { virtio_net::MAC } else { 0 }
    }

    fn transport(&self) -> &Transport {
        match self {
            Card::Net(net) => &net.transport,
            Card::Rng(rng) => &rng.transport,
            Card::Console(console) => &console.transport,
        }
    }

    fn transport_mut(&mut self) -> &mut Transport {
        match self {
            Card::Net(net) => &mut net.transport,
            Card::Rng(rng) => &mut rng.transport,
            Card::Console(console) => &mut console.transport,
        }
    }
}

/// What is in a slot, by its place among its like.
#[derive(Clone, Copy)]
enum Slot {
    Drive(usize),
    Card(usize),
}

impl Machine {
    /// Puts a device into the last free slot. Before the first instruction.
    pub fn plug(&mut self, device: Device) {
        assert!(self.drives.len() + self.cards.len() < VIRTIO_SLOTS, "the manifest bounds the devices");
        self.cards.push(Card::new(device));
    }

    fn slot(&self, slot: usize) -> Option<Slot> {
        let card = (VIRTIO_SLOTS - 1).checked_sub(slot)?;
        if slot < self.drives.len() {
            Some(Slot::Drive(slot))
        } else if card < self.cards.len() {
            Some(Slot::Card(card))
        } else {
            None
        }
    }

    /// Whether a bottom half is of a queue that is there: one from outside may not be.
    pub(crate) fn has_queue(&self, half: &BottomHalf) -> bool {
        let identity = match self.slot(half.slot) {
            None => return false,
            Some(Slot::Drive(_)) => &virtio_block::IDENTITY,
            Some(Slot::Card(card)) => self.cards[card].identity(),
        };
        usize::from(half.queue) < identity.queues
    }

    pub(super) fn load_virtio(&self, offset: u64, size: usize) -> Option<u64> {
        let (slot, register) = ((offset >> 12) as usize, offset & 0xfff);
        let (transport, identity, config) = match self.slot(slot) {
            // An empty slot has the magic and version, and device id 0.
            None => {
                return Some(match register {
                    0 => 0x7472_6976,
                    4 => 2,
                    _ => 0,
                });
            }
            Some(Slot::Drive(drive)) => {
                let drive = &self.drives[drive];
                (&drive.controller.transport, &virtio_block::IDENTITY, drive.disk.sectors())
            }
            Some(Slot::Card(card)) => {
                let card = &self.cards[card];
                (card.transport(), card.identity(), card.config())
            }
        };
        let load = |register: u64| u64::from(transport.load(register, identity, config));
        let word = load(register & !3);
        match size {
            4 => Some(word),
            8 if register >= 0x100 => Some(word | load((register & !3) + 4) << 32),
            1 | 2 if register >= 0x100 => Some(word >> (register % 4 * 8) & ((1 << (size * 8)) - 1)),
            _ => None,
        }
    }

    pub(super) fn store_virtio(&mut self, offset: u64, value: u32) {
        let (slot, register) = ((offset >> 12) as usize, offset & 0xfff);
        let write = match self.slot(slot) {
            None => return,
            Some(Slot::Drive(drive)) => {
                let controller = &mut self.drives[drive].controller;
                controller.transport.store(register, value, &virtio_block::IDENTITY)
            }
            Some(Slot::Card(card)) => {
                let card = &mut self.cards[card];
                let identity = card.identity();
                card.transport_mut().store(register, value, identity)
            }
        };
        match write {
            VirtioWrite::Notify(queue) => self.notify(slot, queue),
            VirtioWrite::Reset => {
                self.reset_slot(slot);
                self.update_lines();
            }
            VirtioWrite::Line => self.update_lines(),
            VirtioWrite::Nothing => {}
        }
    }

    fn notify(&mut self, slot: usize, queue: u16) {
        let card = match self.slot(slot) {
            Some(Slot::Card(card)) => Some(&self.cards[card]),
            _ => None,
        };
        // New buffers for frames need no work of the device's: whoever has frames must look.
        if !(matches!(card, Some(Card::Net(_))) && queue == virtio_net::RECEIVE) {
            self.bottom_halves.push(BottomHalf { id: self.next_bottom_half, slot, queue });
            self.next_bottom_half = self.next_bottom_half.wrapping_add(1);
        }
        self.leave_for_work();
    }

    fn reset_slot(&mut self, slot: usize) {
        match self.slot(slot) {
            Some(Slot::Drive(drive)) => self.drives[drive].controller.reset(),
            Some(Slot::Card(card)) => {
                // What was typed is the terminal's, and still waits.
                if let Card::Rng(rng) = &mut self.cards[card] {
                    rng.reset();
                }
            }
            None => {}
        }
    }

    /// The interrupt lines, by slot.
    pub(super) fn virtio_lines(&self) -> [bool; VIRTIO_SLOTS] {
        let mut lines = [false; VIRTIO_SLOTS];
        for (slot, drive) in self.drives.iter().enumerate() {
            lines[slot] = drive.controller.transport.line();
        }
        for (card, line) in self.cards.iter().zip(lines.iter_mut().rev()) {
            *line = card.transport().line();
        }
        lines
    }

    /// A bottom half: looks at a device's queue.
    pub(super) fn run_queue(&mut self, half: BottomHalf) {
        match self.slot(half.slot) {
            None => {}
            Some(Slot::Drive(drive)) => {
                let controller = &mut self.drives[drive].controller;
                let popped = controller.pop_requests(&self.ram, &mut self.next_request);
                self.submitted.extend(popped);
            }
            Some(Slot::Card(card)) => {
                let ram = &mut self.ram;
                match &mut self.cards[card] {
                    Card::Net(net) if half.queue != virtio_net::RECEIVE => {
                        self.frames.append(&mut net.transmit(ram));
                    }
                    Card::Net(_) => {}
                    Card::Rng(rng) => rng.pop_requests(ram),
                    Card::Console(console) if half.queue == virtio_console::RECEIVE => console.fill(ram),
                    Card::Console(console) => self.console.append(&mut console.transmit(ram)),
                }
            }
        }
    }

    /// Something came from outside for a virtio device. `false`: no such device.
    pub fn receive(&mut self, event: &QemuEvent) -> bool {
        let ram = &mut self.ram;
        let mut cards = self.cards.iter_mut();
        let is_taken = match event {
            QemuEvent::Net { data, .. } => cards.any(|card| match card {
                Card::Net(net) => {
                    net.receive(ram, data);
                    true
                }
                _ => false,
            }),
            QemuEvent::CharRead { device: CONSOLE_NUMBER, data } => cards.any(|card| match card {
                Card::Console(console) => {
                    console.receive(ram, data);
                    true
                }
                _ => false,
            }),
            _ => false,
        };
        self.update_lines();
        is_taken
    }

    /// Bytes of entropy that a request waits for. Each is answered before the guest runs on.
    pub fn entropy_wanted(&self) -> Option<usize> {
        self.cards.iter().find_map(|card| if let Card::Rng(rng) = card { rng.wanted() } else { None })
    }

    /// Answers the request that [`Machine::entropy_wanted`] speaks of.
    pub fn give_entropy(&mut self, entropy: &[u8]) {
        for card in &mut self.cards {
            if let Card::Rng(rng) = card {
                rng.answer(&mut self.ram, entropy);
            }
        }
        self.update_lines();
    }

    /// What the guest has room for now. What is typed goes to the virtio console if there is one.
    pub(crate) fn room(&self) -> Room {
        let mut room = Room { typed: None, frames: false };
        let mut backlog = (Port::Uart, self.uart.backlog());
        for card in &self.cards {
            match card {
                Card::Net(net) => room.frames = net.takes_frames(&self.ram),
                Card::Rng(_) => {}
                Card::Console(console) => backlog = (Port::Virtio, console.backlog()),
            }
        }
        let (port, bytes) = backlog;
        room.typed = (bytes < TYPED_BYTES_MAX).then_some(port);
        room
    }

    /// What was sent so far, on all ways out; the UART's alone where there is no other.
    pub(crate) fn output(&self) -> u64 {
        let others = self.cards.iter().filter_map(Card::output);
        others.fold(self.uart.output, Output::with).fold
    }

    /// Frames that the guest has sent since the last call.
    pub fn take_frames(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.frames)
    }
}
