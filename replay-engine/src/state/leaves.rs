//! The leaves of the state tree: every hart, every device and every scalar, by name.
//!
//! One list says what they are, for all that is made of them: their bytes, which digests and
//! snapshots have, and their values, for people.

use super::{Rest, decode, encode};
use crate::machine::hart::{Hart, TLB_ENTRIES};
use crate::machine::harts::Turn;
use crate::machine::{BottomHalf, Card, Machine, VirtualClock};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// What is made of a leaf.
trait Form {
    type Made;

    fn part<T: Serialize>(part: &T) -> Self::Made;

    fn hart(hart: &Hart) -> Self::Made {
        Self::part(hart)
    }

    fn card(card: &Card) -> Self::Made {
        Self::part(card)
    }
}

/// Its bytes.
enum Encoded {}

impl Form for Encoded {
    type Made = Vec<u8>;

    fn part<T: Serialize>(part: &T) -> Vec<u8> {
        encode(part)
    }
}

/// Its value.
enum Shown {}

impl Form for Shown {
    type Made = Value;

    fn part<T: Serialize>(part: &T) -> Value {
        serde_json::to_value(part).expect("plain data has a value")
    }

    /// Whose numbers are registers, and so text.
    fn hart(hart: &Hart) -> Value {
        let mut value = Self::part(hart);
        put_in_hex(&mut value);
        value
    }

    /// Without its kind, which the leaf's name says.
    fn card(card: &Card) -> Value {
        match card {
            Card::Net(net) => Self::part(net),
            Card::Rng(rng) => Self::part(rng),
            Card::Console(console) => Self::part(console),
        }
    }
}

fn put_in_hex(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(bits) = number.as_u64() {
                *value = Value::String(format!("{bits:#x}"));
            }
        }
        Value::Array(list) => list.iter_mut().for_each(put_in_hex),
        Value::Object(fields) => fields.values_mut().for_each(put_in_hex),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// All of them, encoded.
pub(super) fn encoded(machine: &Machine, rest: &Rest) -> Vec<(String, Vec<u8>)> {
    all::<Encoded>(machine, rest)
}

/// The values of all of them, by name.
pub fn leaf_values(machine: &Machine, rest: &Rest) -> Vec<(String, Value)> {
    all::<Shown>(machine, rest)
}

fn all<F: Form>(machine: &Machine, rest: &Rest) -> Vec<(String, F::Made)> {
    let scalars = Scalars {
        icount: machine.icount,
        shutdown: machine.shutdown,
        bottom_halves: machine.bottom_halves.clone(),
        next_bottom_half: machine.next_bottom_half,
        next_request: machine.next_request,
    };
    let mut leaves = vec![];
    for (number, hart) in machine.all_harts().enumerate() {
        leaves.push((of_hart(machine.hart_count(), number), F::hart(hart)));
    }
    if let Some(turn) = machine.turn() {
        leaves.push(("turn".into(), F::part(&turn)));
    }
    let others = [
        ("clint", F::part(&machine.clint)),
        ("plic", F::part(&machine.plic)),
        ("uart", F::part(&machine.uart)),
        ("rtc", F::part(&machine.rtc)),
        ("clock", F::part(&machine.clock)),
        ("timers", F::part(&machine.timers)),
        ("machine", F::part(&scalars)),
        ("rest", F::part(rest)),
    ];
    leaves.extend(others.map(|(name, made)| (name.to_string(), made)));
    for (i, drive) in machine.drives.iter().enumerate() {
        leaves.push((format!("virtio-block-{i}"), F::part(&drive.controller)));
    }
    leaves.extend(machine.cards.iter().map(|card| (card.name().to_string(), F::card(card))));
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
    if hart.pc % 2 != 0 {
        return Err(format!("{name} is at an odd pc, {:#x}", hart.pc));
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
