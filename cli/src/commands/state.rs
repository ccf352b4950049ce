//! `heddle state`: registers, memory and the digest's parts at an icount.

use super::recordings;
use crate::args::{Format, MemoryRange, State};
use crate::cluster::Cluster;
use crate::exit::{OK, USAGE, coded};
use crate::output;
use anyhow::{Result, anyhow};
use heddle_node::blocks::BlockCache;
use heddle_node::debugger::Recorded;
use heddle_proto::verdict::on_hart;
use heddle_replay_engine::debugger::{Session, registers};
use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::{Machine, RAM_BASE};
use serde_json::{Value, json};

/// Bytes of memory in a line.
const LINE_BYTES: usize = 16;
/// Registers in a line.
const LINE_REGISTERS: usize = 4;

/// Prints the state that a replay has at an icount.
pub async fn run(cluster: &Cluster, command: State, format: Format) -> Result<u8> {
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    if recording.manifest.builtin().is_none() {
        return Err(coded(USAGE, "only the built-in machine's states can be shown"));
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
            return Err(anyhow!("{}", session.ending().unwrap_or_default()));
        }
        state(&mut session, &wanted)
    })
    .await??;
    match format {
        Format::Json | Format::Yaml => output::value(format, &value)?,
        _ => output::line(text(&value))?,
    }
    Ok(OK)
}

/// The state, for programs. Registers are text: JSON's numbers have no 64 bits.
fn state(session: &mut Session, command: &State) -> Result<Value> {
    let digest = session.digest();
    let leaves: serde_json::Map<String, Value> =
        session.leaves().into_iter().map(|(name, hash)| (name, json!(hash))).collect();
    let machine = session.machine();
    let pc = machine.hart().pc;
    let memory = command.memory.map(|range| memory(machine, range, command.r#virtual)).transpose()?;
    let mut state = json!({
        "recording": command.recording,
        "icount": session.icount(),
        "event": session.position().event,
        "mode": format!("{:?}", machine.hart().mode).to_lowercase(),
        "pc": format!("{pc:#x}"),
        "instruction": machine.instruction_at(pc),
        "registers": named(registers::integers(machine)),
        "csrs": named(registers::csrs(machine)),
        "floats": named(registers::floats(machine)),
        "digest": digest,
        "leaves": leaves,
        "memory": memory,
    });
    if let Some(hart) = machine.named_hart() {
        let harts = machine.all_harts().enumerate();
        state["hart"] = json!(hart);
        state["harts"] = harts.map(|(number, hart)| place(number, hart)).collect();
    }
    Ok(state)
}

/// Where a hart stands, among several.
fn place(number: usize, hart: &Hart) -> Value {
    let mode = format!("{:?}", hart.mode).to_lowercase();
    json!({ "hart": number, "mode": mode, "pc": format!("{:#x}", hart.pc), "waits": hart.is_waiting() })
}

/// A list, since an object would lose the order.
fn named(registers: Vec<(&str, u64)>) -> Vec<Value> {
    registers
        .into_iter()
        .map(|(name, value)| json!({ "name": name, "value": format!("{value:#x}") }))
        .collect()
}

fn memory(machine: &Machine, range: MemoryRange, is_virtual: bool) -> Result<Value> {
    let MemoryRange { address, bytes } = range;
    let refused = |what: &str| coded(USAGE, format!("--memory {address:#x}:{bytes}: {what}"));
    let found = if is_virtual {
        let mut out = vec![0; bytes as usize];
        let read = machine.peek(address, &mut out);
        if read < out.len() {
            let at = address.wrapping_add(read as u64);
            return Err(refused(&format!("nothing, or a device, is mapped at {at:#x}")));
        }
        out
    } else {
        let slice = machine.ram().slice(address.wrapping_sub(RAM_BASE), bytes as usize);
        slice.ok_or_else(|| refused("not in RAM"))?.to_vec()
    };
    let hex: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(json!({ "address": format!("{address:#x}"), "virtual": is_virtual, "bytes": hex }))
}

/// The state, for people.
fn text(state: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let mut out = format!(
        "{} at icount {}, event {}, {} mode{}\n  pc {}  {}\n",
        text(&state["recording"]),
        output::grouped(state["icount"].as_u64().unwrap_or(0)),
        output::grouped(state["event"].as_u64().unwrap_or(0)),
        text(&state["mode"]),
        on_hart(state["hart"].as_u64().map(|hart| hart as u32)),
        text(&state["pc"]),
        text(&state["instruction"]),
    );
    for hart in state["harts"].as_array().into_iter().flatten() {
        let waits = if hart["waits"] == true { ", waits" } else { "" };
        let (mode, pc) = (text(&hart["mode"]), text(&hart["pc"]));
        out.push_str(&format!("  hart {}  pc {pc}, {mode} mode{waits}\n", hart["hart"]));
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
    for (name, hash) in state["leaves"].as_object().into_iter().flatten() {
        out.push_str(&format!("  {name:<18} {}\n", text(hash)));
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
