//! The leaves of the state tree: every hart, every device and every scalar, by name.

use super::{Rest, decode, encode};
use crate::machine::hart::{Hart, TLB_ENTRIES};
use crate::machine::harts::Turn;
use crate::machine::{BottomHalf, Card, Machine, VirtualClock};
use serde::{Deserialize, Serialize};

/// Scalars of the machine that belong to no device.
#[derive(Serialize, Deserialize)]
struct Scalars {
    icount: u64,
    shutdown: Option<u16>,
    bottom_halves: Vec<BottomHalf>,
    next_bottom_half: u64,
    next_request: u64,
}

/// The leaf of a hart. One that is alone has no number.
pub(super) fn of_hart(count: usize, number: usize) -> String {
    if count == 1 { "hart".into() } else { format!("hart-{number}") }
}

/// All of them, encoded.
pub(super) fn encoded(machine: &Machine, rest: &Rest) -> Vec<(String, Vec<u8>)> {
    let scalars = Scalars {
        icount: machine.icount,
        shutdown: machine.shutdown,
        bottom_halves: machine.bottom_halves.clone(),
        next_bottom_half: machine.next_bottom_half,
        next_request: machine.next_request,
    };
    let mut leaves: Vec<(String, Vec<u8>)> = vec![];
    for (number, hart) in machine.all_harts().enumerate() {
        leaves.push((of_hart(machine.hart_count(), number), encode(hart)));
    }
    if let Some(turn) = machine.turn() {
        leaves.push(("turn".into(), encode(&turn)));
    }
    let others = [
        ("clint", encode(&machine.clint)),
        ("plic", encode(&machine.plic)),
        ("uart", encode(&machine.uart)),
        ("rtc", encode(&machine.rtc)),
        ("clock", encode(&machine.clock)),
        ("timers", encode(&machine.timers)),
        ("machine", encode(&scalars)),
        ("rest", encode(rest)),
    ];
    leaves.extend(others.map(|(name, bytes)| (name.to_string(), bytes)));
    for (i, drive) in machine.drives.iter().enumerate() {
        leaves.push((format!("virtio-block-{i}"), encode(&drive.controller)));
    }
    leaves.extend(machine.cards.iter().map(|card| (card.name().into(), encode(card))));
    leaves
}

/// Puts them into a machine.
pub(super) fn put(machine: &mut Machine, leaves: &[(String, Vec<u8>)]) -> Result<Rest, String> {
    let (mut rest, mut turn) = (None, None);
    let count = machine.hart_count();
    let harts: Vec<String> = (0..count).map(|number| of_hart(count, number)).collect();
    for (name, bytes) in leaves {
        if let Some(number) = harts.iter().position(|hart| hart == name) {
            put_hart(machine, number, name, bytes)?;
            continue;
        }
        match name.as_str() {
            "turn" if count > 1 => turn = Some(decode::<Turn>(name, bytes)?),
            "clint" => machine.clint = decode(name, bytes)?,
            "plic" => machine.plic = decode(name, bytes)?,
            "uart" => machine.uart = decode(name, bytes)?,
            "rtc" => machine.rtc = decode(name, bytes)?,
            "clock" => {
                let clock: VirtualClock = decode(name, bytes)?;
                machine.clock = clock;
            }
            "timers" => machine.timers = decode(name, bytes)?,
            "machine" => {
                let scalars: Scalars = decode(name, bytes)?;
                machine.icount = scalars.icount;
                machine.shutdown = scalars.shutdown;
                machine.bottom_halves = scalars.bottom_halves;
                machine.next_bottom_half = scalars.next_bottom_half;
                machine.next_request = scalars.next_request;
            }
            "rest" => rest = Some(decode(name, bytes)?),
            _ => put_virtio_leaf(machine, name, bytes)?,
        }
    }
    if count > 1 {
        // Behind the icount and the harts, whose turn it must be.
        machine.set_turn(turn.ok_or("snapshot lacks the leaf turn")?)?;
    }
    rest.ok_or_else(|| "snapshot lacks the leaf rest".into())
}

fn put_hart(machine: &mut Machine, number: usize, name: &str, bytes: &[u8]) -> Result<(), String> {
    let hart: Hart = decode(name, bytes)?;
    if hart.tlb.len() != TLB_ENTRIES {
        return Err("snapshot's TLB has another size".into());
    }
    *machine.hart_at_mut(number).ok_or_else(|| format!("no {name} here"))? = hart;
    Ok(())
}

fn put_virtio_leaf(machine: &mut Machine, name: &str, bytes: &[u8]) -> Result<(), String> {
    let is_whole = if let Some(card) = machine.cards.iter_mut().find(|card| card.name() == name) {
        let restored: Card = decode(name, bytes)?;
        let is_whole = restored.is_like(card);
        *card = restored;
        is_whole
    } else {
        let slot = name.strip_prefix("virtio-block-").and_then(|n| n.parse::<usize>().ok());
        let drive = slot.and_then(|slot| machine.drives.get_mut(slot));
        let drive = drive.ok_or_else(|| format!("snapshot has an unknown leaf {name}"))?;
        drive.controller = decode(name, bytes)?;
        drive.controller.is_whole()
    };
    is_whole.then_some(()).ok_or_else(|| format!("the leaf {name} is another device's"))
}
