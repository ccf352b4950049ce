//! Two replays of one log side by side, compared as they go: finds the first
//! icount at which their states differ, and names what differs.

use crate::emulator::Emulator;
use crate::machine::disasm::{float_register_name, register_name};
use crate::machine::hart::Hart;
use crate::replayer::ReplayEnd;
use crate::schedule::advance;
use heddle_proto::verdict::{Finding, Masked};

/// Instructions between two comparisons, coarse to fine; each pass begins anew
/// at the start and goes straight to the last place where all was equal.
const STRIDES: [u64; 3] = [1 << 20, 1 << 12, 1];
/// Strides when registers are folded before every instruction.
const TRACED_STRIDES: [u64; 2] = [1 << 16, 1];
/// Once registers are equal again, whole states are compared at every instruction
/// for so long, then at every so many: `to` is then the first look, not the first icount.
const CLOSE_LOOK: u64 = 1024;

/// Both sides at the start: A is the recorded build, B the other.
pub struct Pair {
    /// The recorded build.
    pub a: Emulator,
    /// The other.
    pub b: Emulator,
}

impl Pair {
    fn icount(&self) -> u64 {
        self.a.machine().icount()
    }

    /// Runs both to `until`; whether both could.
    fn advance(&mut self, until: u64) -> bool {
        let a = advance(&mut self.a, until);
        let b = advance(&mut self.b, until);
        a && b
    }

    /// Folds registers before every instruction from here on.
    fn trace(&mut self) {
        self.a.machine_mut().trace = Some(0);
        self.b.machine_mut().trace = Some(0);
    }

    fn is_traced(&self) -> bool {
        self.a.machine().trace.is_some()
    }

    fn registers_equal(&self) -> bool {
        let (a, b) = (self.a.machine(), self.b.machine());
        let (traces_equal, same_turn) = (a.trace == b.trace, a.current_hart() == b.current_hart());
        let (a, b) = (a.hart(), b.hart());
        let floats_equal = a.f == b.f && a.fcsr == b.fcsr;
        traces_equal
            && same_turn
            && floats_equal
            && a.x[..32] == b.x[..32]
            && a.pc == b.pc
            && a.mode == b.mode
    }

    fn is_equal(&mut self) -> bool {
        self.a.has_ended() == self.b.has_ended()
            && self.registers_equal()
            && self.a.digest() == self.b.digest()
    }

    /// What differs now: registers with both values, then pages and leaves.
    fn differences(&mut self) -> Vec<String> {
        let turns = [self.a.machine().current_hart(), self.b.machine().current_hart()];
        let mut out = match turns {
            [a, b] if a != b => vec![format!("whose turn it is (hart {a} / hart {b})")],
            _ => register_differences(self.a.machine().hart(), self.b.machine().hart()),
        };
        self.a.digest();
        self.b.digest();
        let ((tree_a, rest_a), (tree_b, rest_b)) = (self.a.parts(), self.b.parts());
        let machines = [self.a.machine(), self.b.machine()];
        out.extend(tree_a.differences(tree_b, machines, [rest_a, rest_b]));
        out
    }
}

/// Registers that differ, each with both values.
fn register_differences(a: &Hart, b: &Hart) -> Vec<String> {
    let mut out: Vec<String> = (1..32)
        .filter(|n| a.x[*n] != b.x[*n])
        .map(|n| format!("{} ({:#x} / {:#x})", register_name(n), a.x[n], b.x[n]))
        .collect();
    let floats = (0..32).filter(|n| a.f[*n] != b.f[*n]);
    out.extend(floats.map(|n| format!("{} ({:#x} / {:#x})", float_register_name(n), a.f[n], b.f[n])));
    if a.pc != b.pc {
        out.push(format!("pc ({:#x} / {:#x})", a.pc, b.pc));
    }
    out
}

/// Finds the first difference up to icount `to`. With `every_instruction` the
/// registers are compared after each one, which also shows a difference that is
/// gone again at the end. Returns what was found and the instructions replayed.
pub fn first_difference(
    mut make: impl FnMut() -> Result<Pair, String>,
    from: u64,
    to: u64,
    every_instruction: bool,
    is_cancelled: &dyn Fn() -> bool,
) -> Result<(Option<Finding>, u64), String> {
    let mut replayed = 0;
    let mut equal_at = from;
    let strides = if every_instruction { &TRACED_STRIDES[..] } else { &STRIDES[..] };
    for stride in strides {
        let mut pair = make()?;
        let start = pair.icount();
        pair.advance(equal_at);
        if every_instruction && *stride > 1 {
            pair.trace();
        }
        let found = scan(&mut pair, to, *stride, &mut equal_at, is_cancelled)?;
        replayed += 2 * (pair.icount() - start);
        match found {
            None => return Ok((None, replayed)),
            Some((pc, instruction)) if *stride == 1 => {
                let mut finding = describe(&mut pair, pc, instruction);
                if every_instruction {
                    let before = pair.icount();
                    finding.masked = follow_mask(&mut pair, to, finding.icount, is_cancelled)?;
                    replayed += 2 * (pair.icount() - before);
                }
                finding.replayed_instructions = replayed;
                return Ok((Some(finding), replayed));
            }
            Some(_) => {}
        }
    }
    Ok((None, replayed))
}

/// Compares every `stride` instructions; `equal_at` follows. `Some` at the first
/// difference, with the pc and text of the instruction before it.
fn scan(
    pair: &mut Pair,
    to: u64,
    stride: u64,
    equal_at: &mut u64,
    is_cancelled: &dyn Fn() -> bool,
) -> Result<Option<(u64, String)>, String> {
    let mut steps = 0u64;
    while pair.icount() < to {
        steps += 1;
        if (stride > 1 || steps % 4096 == 0) && is_cancelled() {
            return Err("cancelled".into());
        }
        let pcs: Vec<u64> = pair.a.machine().all_harts().map(|hart| hart.pc).collect();
        let next = (*equal_at + stride).min(to);
        let both_ran = pair.advance(next);
        let registers_do = (stride == 1 || pair.is_traced()) && both_ran;
        let is_equal = if registers_do { pair.registers_equal() } else { pair.is_equal() };
        if !is_equal {
            // Whose turn it still is has executed it: the turn may have passed to it before.
            let pc = pcs[pair.a.machine().current_hart()];
            let instruction =
                if stride == 1 { pair.a.machine_mut().instruction_at(pc) } else { String::new() };
            return Ok(Some((pc, instruction)));
        }
        *equal_at = next;
        if !both_ran {
            break;
        }
    }
    // Registers alone can't show a difference that only memory has.
    Ok((stride == 1 && !pair.is_equal()).then(|| (pair.a.machine().hart().pc, String::new())))
}

fn describe(pair: &mut Pair, pc: u64, instruction: String) -> Finding {
    let diverged = pair.b.replayer().and_then(|replayer| match replayer.outcome() {
        Some(ReplayEnd::Diverged(divergence)) => Some(divergence.kind.to_string()),
        _ => None,
    });
    let position = pair.b.position();
    Finding {
        icount: position.icount.min(pair.icount()),
        event: pair.a.position().event,
        pc,
        hart: pair.a.machine().named_hart(),
        instruction,
        differs: pair.differences(),
        kind: diverged.unwrap_or_else(|| "state".into()),
        inputs: vec![],
        masked: None,
        replayed_instructions: 0,
    }
}

/// Follows both sides on until their states are equal again.
fn follow_mask(
    pair: &mut Pair,
    to: u64,
    from: u64,
    is_cancelled: &dyn Fn() -> bool,
) -> Result<Option<Masked>, String> {
    while pair.icount() < to {
        let next = pair.icount() + 1;
        if next % 4096 == 0 && is_cancelled() {
            return Err("cancelled".into());
        }
        let both_ran = pair.advance(next);
        let look = next - from < CLOSE_LOOK || next % CLOSE_LOOK == 0 || next == to;
        if look && pair.is_equal() {
            return Ok(Some(Masked { from, to: pair.icount() }));
        }
        if !both_ran {
            return Ok(None);
        }
    }
    Ok(None)
}
