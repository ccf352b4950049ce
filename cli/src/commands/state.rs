//! `heddle state`: registers, memory, devices and the digest's parts at an icount.

use super::recordings;
use crate::args::{Format, MemoryRange, State};
use crate::cluster::Cluster;
use crate::exit::{DIVERGED, OK, UNEXPECTED, USAGE, coded};
use crate::output;
use anyhow::{Result, anyhow};
use heddle_node::blocks::BlockCache;
use heddle_node::debugger::Recorded;
use heddle_proto::verdict::on_hart;
use heddle_replay_engine::debugger::{Session, registers};
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::{Machine, RAM_BASE, View};
use serde_json::{Map, Value, json};

/// Bytes of memory in a line.
const LINE_BYTES: usize = 16;
/// Registers in a line.
const LINE_REGISTERS: usize = 4;

/// Prints the state that a replay has at an icount.
pub async fn run(cluster: &Cluster, command: State, format: Format) -> Result<u8> {
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    let Some((machine, _)) = recording.manifest.builtin() else {
        return Err(coded(USAGE, "only the built-in machine's states can be shown"));
    };
    if let Some(refusal) = command.hart.and_then(|hart| no_such_hart(hart, machine.harts as usize)) {
        return Err(coded(USAGE, refusal));
    }
    let end = recording.row.committed_icount;
    if command.at > end {
        return Err(coded(USAGE, format!("the recording ends at icount {end}")));
    }
    let blocks = BlockCache::new(cluster.store.clone());
    let origin = Recorded::fetch(&cluster.store, &blocks, recording.id()).await?;
    let wanted = command.clone();
    let value = tokio::task::spawn_blocking(move || {
        let mut session = Session::new(Box::new(origin)).map_err(|error| anyhow!(error))?;
        session.goto(wanted.at).map_err(|error| anyhow!(error))?;
        if session.icount() != wanted.at {
            let code = if session.has_diverged() { DIVERGED } else { UNEXPECTED };
            return Err(coded(code, session.ending().unwrap_or_default()));
        }
        state(&mut session, &wanted)
    })
    .await??;
    match format {
        Format::Json | Format::Yaml => output::value(format, &value)?,
        _ => output::line(text(&value, command.leaves))?,
    }
    Ok(OK)
}

/// Why this hart can't be shown, if it can't.
fn no_such_hart(hart: usize, harts: usize) -> Option<String> {
    let there_are = match harts {
        1 => "one hart, number 0".to_string(),
        _ => format!("{harts} harts, numbers 0 to {}", harts.saturating_sub(1)),
    };
    (hart >= harts).then(|| format!("--hart {hart}: the recording's machine has {there_are}"))
}

/// The state, for programs. Registers are text: JSON's numbers have no 64 bits.
fn state(session: &mut Session, command: &State) -> Result<Value> {
    let (digest, leaves) = (session.digest(), leaves(session));
    let machine = session.machine();
    let number = command.hart.unwrap_or(machine.current_hart());
    let view = machine.view_of(number).ok_or_else(|| anyhow!("the machine has no hart {number}"))?;
    let hart = view.hart();
    let memory = |range| memory(machine, view, range, command.r#virtual);
    let memory = command.memory.map(memory).transpose()?;
    let mut state = json!({
        "recording": command.recording,
        "icount": session.icount(),
        "event": session.position().event,
        "virtual_ns": machine.virtual_now(),
        "mode": mode(hart),
        "pc": format!("{:#x}", hart.pc),
        "instruction": view.instruction(hart.pc),
        "registers": named(registers::integers(hart)),
        "csrs": named(registers::csrs(hart, machine.icount())),
        "floats": named(registers::floats(hart)),
        "digest": digest,
        "leaves": leaves,
        "memory": memory,
    });
    if let Some(turn) = machine.named_hart() {
        let harts = machine.all_harts().enumerate();
        state["hart"] = json!(number);
        state["turn"] = json!(turn);
        state["harts"] = harts.map(|(number, hart)| place(number, hart)).collect();
    }
    Ok(state)
}

/// The digest's parts, each with its hash and, but for memory, what it holds.
fn leaves(session: &mut Session) -> Map<String, Value> {
    let hashes = session.leaves().into_iter();
    let mut leaves: Map<String, Value> = hashes.map(|(name, hash)| (name, json!({ "hash": hash }))).collect();
    for (name, value) in session.leaf_values() {
        if let Some(leaf) = leaves.get_mut(&name) {
            leaf["value"] = value;
        }
    }
    leaves
}

/// Where a hart stands, among several.
fn place(number: usize, hart: &Hart) -> Value {
    let pc = format!("{:#x}", hart.pc);
    json!({ "hart": number, "mode": mode(hart), "pc": pc, "waits": hart.is_waiting() })
}

fn mode(hart: &Hart) -> String {
    format!("{:?}", hart.mode).to_lowercase()
}

/// A list, since an object would lose the order.
fn named(registers: Vec<(&str, u64)>) -> Vec<Value> {
    registers
        .into_iter()
        .map(|(name, value)| json!({ "name": name, "value": format!("{value:#x}") }))
        .collect()
}

fn memory(machine: &Machine, view: View<'_>, range: MemoryRange, is_virtual: bool) -> Result<Value> {
    let MemoryRange { address, bytes } = range;
    let refused = |what: &str| coded(USAGE, format!("--memory {address:#x}:{bytes}: {what}"));
    let found = if is_virtual {
        let mut out = vec![0; bytes as usize];
        let read = view.read(address, &mut out);
        if read < out.len() {
            let at = address.wrapping_add(read as u64);
            return Err(refused(&format!("nothing, or a device, is mapped at {at:#x}")));
        }
        out
    } else {
        let slice = machine.ram().slice(address.wrapping_sub(RAM_BASE), bytes as usize);
        let end = RAM_BASE + machine.ram().len() as u64;
        let outside = || refused(&format!("not all of it is in RAM, which is {RAM_BASE:#x}..{end:#x}"));
        slice.ok_or_else(outside)?.to_vec()
    };
    let hex: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(json!({ "address": format!("{address:#x}"), "virtual": is_virtual, "bytes": hex }))
}

/// The state, for people. What leaves hold fills a screen: only if that is wanted.
fn text(state: &Value, with_leaves: bool) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let mut out = format!(
        "{} at icount {}, event {}, {} mode{}\n  pc {}  {}\n  virtual clock {} ns\n",
        text(&state["recording"]),
        output::grouped(state["icount"].as_u64().unwrap_or(0)),
        output::grouped(state["event"].as_u64().unwrap_or(0)),
        text(&state["mode"]),
        on_hart(state["hart"].as_u64().map(|hart| hart as u32)),
        text(&state["pc"]),
        text(&state["instruction"]),
        output::grouped(state["virtual_ns"].as_u64().unwrap_or(0)),
    );
    for hart in state["harts"].as_array().into_iter().flatten() {
        let turn = if hart["hart"] == state["turn"] { ", has the turn" } else { "" };
        let waits = if hart["waits"] == true { ", waits" } else { "" };
        let (mode, pc) = (text(&hart["mode"]), text(&hart["pc"]));
        out.push_str(&format!("  hart {}  pc {pc}, {mode} mode{turn}{waits}\n", hart["hart"]));
    }
    for group in ["registers", "csrs", "floats"] {
        out.push_str(&format!("{group}\n"));
        let registers = state[group].as_array().map(Vec::as_slice).unwrap_or_default();
        for line in registers.chunks(LINE_REGISTERS) {
            let cells: Vec<String> = line
                .iter()
                .map(|register| format!("{:<12} {:<18}", text(&register["name"]), text(&register["value"])))
                .collect();
            out.push_str(&format!("  {}\n", cells.join("  ").trim_end()));
        }
    }
    out.push_str(&format!("digest {}\n", text(&state["digest"])));
    for (name, leaf) in state["leaves"].as_object().into_iter().flatten() {
        out.push_str(&format!("  {name:<18} {}\n", text(&leaf["hash"])));
        // A hart's are the registers above, or with --hart another's.
        if let Some(value) = leaf.get("value").filter(|_| with_leaves && !name.starts_with("hart")) {
            out.push_str(&format!("    {value}\n"));
        }
    }
    if let Some(dump) = state.get("memory").filter(|memory| !memory.is_null()) {
        let at = u64::from_str_radix(text(&dump["address"]).trim_start_matches("0x"), 16).unwrap_or(0);
        let kind = if dump["virtual"] == true { "virtual" } else { "physical" };
        out.push_str(&format!("memory, {kind}\n{}", lines(at, &text(&dump["bytes"]))));
    }
    out.trim_end().to_string()
}

/// Lines of memory: address, bytes, and what of them is text.
fn lines(at: u64, hex: &str) -> String {
    let bytes: Vec<u8> = hex
        .as_bytes()
        .chunks(2)
        .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect();
    let line = |(n, bytes): (usize, &[u8])| {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let seen = |byte: &u8| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' };
        let text: String = bytes.iter().map(seen).collect();
        let address = at.wrapping_add((n * LINE_BYTES) as u64);
        format!("  {address:016x}  {:<47}  {text}\n", hex.join(" "))
    };
    bytes.chunks(LINE_BYTES).enumerate().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shown_in_lines_of_sixteen() {
        let hex: String = (0x30..0x44).map(|byte: u8| format!("{byte:02x}")).collect();
        let shown = lines(0x8000_0ff8, &hex);
        let expected = [
            "  0000000080000ff8  30 31 32 33 34 35 36 37 38 39 3a 3b 3c 3d 3e 3f  0123456789:;<=>?",
            "  0000000080001008  40 41 42 43                                      @ABC",
        ];
        assert_eq!(shown.lines().collect::<Vec<&str>>(), expected);
    }

    #[test]
    fn a_hart_that_is_not_there_is_refused_with_those_that_are() {
        assert_eq!((no_such_hart(0, 1), no_such_hart(7, 8)), (None, None));
        let refused = |hart, harts| no_such_hart(hart, harts).unwrap_or_default();
        assert_eq!(refused(1, 1), "--hart 1: the recording's machine has one hart, number 0");
        assert_eq!(refused(3, 3), "--hart 3: the recording's machine has 3 harts, numbers 0 to 2");
    }

    #[test]
    fn what_leaves_hold_is_shown_if_that_is_wanted_and_harts_have_their_registers() {
        let leaf = |value: &str| json!({ "hash": "ab", "value": { "is": value } });
        let state =
            json!({ "leaves": { "clint": leaf("device"), "hart-1": leaf("hart"), "ram": { "hash": "cd" } } });
        let (short, long) = (text(&state, false), text(&state, true));
        assert!(!short.contains("device") && long.contains("\n    {\"is\":\"device\"}\n"), "{long}");
        assert!(!long.contains("\"hart\"") && long.contains("\n  ram                cd"), "{long}");
    }

    #[test]
    fn a_range_of_memory_is_an_address_and_a_length() {
        assert_eq!(
            "0x80000000:16".parse::<MemoryRange>(),
            Ok(MemoryRange { address: 0x8000_0000, bytes: 16 })
        );
        assert_eq!("4096:0x10".parse::<MemoryRange>(), Ok(MemoryRange { address: 4096, bytes: 16 }));
        for wrong in ["", "1", "1:", "x:1", "1:0", "1:0x100001"] {
            assert!(wrong.parse::<MemoryRange>().is_err(), "{wrong}");
        }
    }
}
