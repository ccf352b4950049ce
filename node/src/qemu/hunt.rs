//! The exact instruction at which two sides of a QEMU recording part.
//!
//! Both sides are run from the same position and stopped at the same icounts; where
//! registers differ, the interval behind the last equal stop is searched again, finer,
//! to a single instruction. If registers are equal to the end, whole states are compared
//! in the same way. What was put in on side B, and has only been copied since, is an
//! input and no effect.

use crate::qemu::builds::QemuBuild;
use crate::qemu::difference::{Difference, difference, page_hashes};
use crate::qemu::snapshot::Captured;
use crate::qemu::span::{Overlay, QemuSpan};
use crate::qemu::stepped::{Reached, Stepped, differing, pc_of};
use anyhow::{Context, Result, anyhow, bail};
use heddle_proto::verdict::Finding;
use heddle_proto::{Body, Hash, QemuEvent};
use heddle_replay_engine::page_tree::BlockSource;
use heddle_replay_engine::qemu::vmstate::PAGE;
use std::collections::{BTreeMap, BTreeSet};

/// Stops of a round that compares registers: cheap.
const REGISTER_PROBES: u64 = 48;
/// Stops of a round that compares whole states: a third of a second each.
const STATE_PROBES: u64 = 8;
/// Effects beyond so many say no more.
const EFFECTS_MAX: usize = 400;
/// Lines of the card.
const LINES_MAX: usize = 24;

/// One side.
#[derive(Clone)]
pub struct Side {
    /// What is replayed.
    pub span: QemuSpan,
    /// By which QEMU.
    pub build: QemuBuild,
}

/// What was put in on side B: pairs of bytes that differ, by file.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// For people.
    pub lines: Vec<String>,
    /// Pairs (A, B) of differing bytes.
    pairs: BTreeSet<(u8, u8)>,
}

impl Inputs {
    /// Compares the files and disks of two sides.
    pub fn of(a: &QemuSpan, b: &QemuSpan) -> Inputs {
        let mut inputs = Inputs::default();
        let files = a.contents.files.iter().zip(&b.contents.files).enumerate();
        let disks = a.contents.disks.iter().zip(&b.contents.disks).enumerate();
        let spec = a.manifest.qemu();
        for (kind, (number, (x, y))) in files.map(|f| ("file", f)).chain(disks.map(|d| ("disk", d))) {
            if x == y {
                continue;
            }
            let name = spec.and_then(|spec| match kind {
                "file" => spec.files.get(number).map(|image| image.name.clone()),
                _ => spec.disks.get(number).map(|disk| disk.image.name.clone()),
            });
            let at: Vec<usize> = (0..x.len().min(y.len())).filter(|at| x[*at] != y[*at]).collect();
            inputs.pairs.extend(at.iter().map(|at| (x[*at], y[*at])));
            let first = at.first().map_or(x.len().min(y.len()), |first| *first);
            let count = at.len() + x.len().abs_diff(y.len());
            let name = name.unwrap_or_else(|| format!("{kind} {number}"));
            inputs.lines.push(format!("{name}: {count} bytes differ, from offset {first}"));
        }
        inputs
    }

    /// Whether two pages differ only in bytes that differ in the inputs.
    fn explain(&self, a: &[u8], b: &[u8]) -> bool {
        a.iter().zip(b).filter(|(x, y)| x != y).all(|(x, y)| self.pairs.contains(&(*x, *y)))
    }
}

enum Stop {
    /// They part behind `lo`, at `hi` at the latest.
    Parted { lo: u64, hi: u64 },
    /// Equal at every stop.
    Equal,
}

/// Finds the first effect between `from` and `to`; and how many instructions both sides
/// replayed for it.
pub fn first_effect(
    a: &Side,
    b: &Side,
    to: u64,
    is_cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<(Option<Finding>, u64)> {
    let inputs = Inputs::of(&a.span, &b.span);
    let from = a.span.from.icount;
    let mut replayed = 0;
    // What a fault printed it may have forgotten soon after: no stop would see it.
    let printed = console_difference(a, b, to, &mut replayed)?;
    let searches = printed.map(|at| (false, at)).into_iter().chain([(false, to), (true, to)]);
    for (is_deep, to) in searches {
        let (mut lo, mut hi) = (from, to);
        let mut is_found = false;
        while hi - lo > 1 || !is_found {
            if is_cancelled() {
                bail!("the task was cancelled");
            }
            match round(a, b, (lo, hi), is_deep, &inputs, &mut replayed)? {
                Stop::Equal => break,
                Stop::Parted { lo: l, hi: h } => {
                    is_found = true;
                    if (l, h) == (lo, hi) {
                        break;
                    }
                    (lo, hi) = (l, h);
                }
            }
        }
        if is_found {
            let finding = card(a, b, (lo, hi), &inputs, &mut replayed)?;
            return Ok((Some(finding), replayed));
        }
    }
    let only_inputs =
        Finding { icount: to, kind: "inputs".into(), inputs: inputs.lines.clone(), ..Finding::default() };
    Ok(((!inputs.lines.is_empty()).then_some(only_inputs), replayed))
}

/// The icount of the character write that first printed something else on side B.
fn console_difference(a: &Side, b: &Side, to: u64, replayed: &mut u64) -> Result<Option<u64>> {
    let (mut x, mut y) = (start(a)?, start(b)?);
    let from = x.icount;
    let _ = advance_both(&mut x, &mut y, to)?;
    *replayed += (x.icount - from) + y.icount.saturating_sub(from);
    let (p, q) = (x.console()?, y.console()?);
    let Some(at) = p.iter().zip(&q).position(|(p, q)| p != q) else { return Ok(None) };
    let mut printed = 0u64;
    for event in &a.span.events {
        if let Body::Qemu(QemuEvent::CharWrite { written, .. }) = &event.body {
            printed += u64::from(*written);
            if printed > at as u64 {
                return Ok(Some(event.icount.max(from + 1)));
            }
        }
    }
    Ok(None)
}

/// Runs both sides over an interval with stops in it.
fn round(
    a: &Side,
    b: &Side,
    (lo, hi): (u64, u64),
    is_deep: bool,
    inputs: &Inputs,
    replayed: &mut u64,
) -> Result<Stop> {
    let probes = if is_deep { STATE_PROBES } else { REGISTER_PROBES };
    let step = (hi - lo).div_ceil(probes).max(1);
    let (mut x, mut y) = (start(a)?, start(b)?);
    let from = x.icount;
    advance_both(&mut x, &mut y, lo)?;
    let mut equal_at = lo;
    let mut next = lo;
    let mut found = Stop::Equal;
    while next < hi {
        next = (next + step).min(hi);
        let (reached_a, reached_b) = advance_both(&mut x, &mut y, next)?;
        let end = match (reached_a, reached_b) {
            (Reached::There, Reached::There) => {
                let is_equal = if is_deep {
                    is_state_equal(a, &mut x, &mut y, inputs)?
                } else {
                    x.registers()? == y.registers()?
                };
                if is_equal {
                    equal_at = next;
                    continue;
                }
                next
            }
            (Reached::Ended(said), _) | (Reached::Stuck(_), Reached::Ended(said)) => {
                bail!("the recorded side does not replay: {said}")
            }
            // Side A reached it, and side B never will.
            (Reached::There, Reached::Stuck(at)) => at.max(equal_at) + 1,
            (Reached::There, Reached::Ended(_)) => next,
            // Both stand still: the guest has switched itself off.
            (Reached::Stuck(at), Reached::Stuck(other)) if at == other => break,
            (Reached::Stuck(at), Reached::Stuck(other)) => at.min(other).max(equal_at) + 1,
            (Reached::Stuck(at), Reached::There) => at.max(equal_at) + 1,
        };
        found = Stop::Parted { lo: equal_at, hi: end.min(hi).max(equal_at + 1) };
        break;
    }
    *replayed += (x.icount - from) + (y.icount.saturating_sub(from));
    Ok(found)
}

fn start(side: &Side) -> Result<Stepped> {
    Stepped::start(&side.span, &side.build, false)
}

/// Both sides at once: each needs a core of its own.
fn advance_both(x: &mut Stepped, y: &mut Stepped, to: u64) -> Result<(Reached, Reached)> {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| y.advance(to));
        let first = x.advance(to)?;
        let second = other.join().map_err(|_| anyhow::anyhow!("a side's thread panicked"))??;
        Ok((first, second))
    })
}

fn is_state_equal(a: &Side, x: &mut Stepped, y: &mut Stepped, inputs: &Inputs) -> Result<bool> {
    // Queued async events: nothing can be saved here, and the next stop will tell.
    let (Some(x), Some(y)) = (x.capture()?, y.capture()?) else { return Ok(true) };
    if x.digest() == y.digest() {
        return Ok(true);
    }
    let (effects, _) = split(a, &x, &y, inputs)?;
    Ok(effects.is_empty())
}

/// What two states differ in: effects, and copies of inputs.
fn split(a: &Side, x: &Captured, y: &Captured, inputs: &Inputs) -> Result<(Difference, Vec<String>)> {
    let blocks = x.blocks.iter().chain(&y.blocks).cloned().collect();
    let mut source = Overlay { blocks, below: a.span.blocks().clone() };
    let mut found = difference(&x.root, &y.root, &mut source)?;
    let mut copies = vec![];
    let mut effects = vec![];
    let mut hashes: BTreeMap<String, [Vec<Hash>; 2]> = BTreeMap::new();
    for (block, address) in std::mem::take(&mut found.pages) {
        if effects.len() > EFFECTS_MAX {
            break;
        }
        let page = (address / PAGE as u64) as usize;
        if !hashes.contains_key(&block) {
            let both = [hashes_of(x, &block, &mut source)?, hashes_of(y, &block, &mut source)?];
            hashes.insert(block.clone(), both);
        }
        let [of_x, of_y] = &hashes[&block];
        let (p, q) = (page_of(of_x[page], &mut source)?, page_of(of_y[page], &mut source)?);
        if inputs.explain(&p, &q) {
            copies.push(format!("page {block} {address:#x}"));
        } else {
            effects.push((block, address));
        }
    }
    found.pages = effects;
    Ok((found, copies))
}

fn hashes_of(state: &Captured, block: &str, source: &mut dyn BlockSource) -> Result<Vec<Hash>> {
    let found = state.root.ram.iter().find(|(name, _, _)| name == block);
    let (_, bytes, tree) = found.context("the RAM block is there")?;
    page_hashes(*bytes, *tree, source)
}

fn page_of(hash: Hash, source: &mut dyn BlockSource) -> Result<Vec<u8>> {
    if hash == Hash::ZERO {
        return Ok(vec![0; PAGE]);
    }
    let found = source.blocks(&[hash]).map_err(|error| anyhow!(error))?;
    Ok(found.into_iter().next().unwrap_or_default())
}

/// Both sides once more, to the instruction before and to the difference.
fn card(a: &Side, b: &Side, (lo, hi): (u64, u64), inputs: &Inputs, replayed: &mut u64) -> Result<Finding> {
    let (mut x, mut y) = (start(a)?, start(b)?);
    let from = x.icount;
    advance_both(&mut x, &mut y, lo)?;
    let before = x.registers()?;
    let instruction = x.instruction().unwrap_or_default();
    let (reached_a, reached_b) = advance_both(&mut x, &mut y, hi)?;
    let mut differs = vec![];
    let mut copies = vec![];
    let kind = match (&reached_a, &reached_b) {
        (Reached::There, Reached::There) => {
            differs.extend(differing(&x.registers()?, &y.registers()?));
            if let (Some(p), Some(q)) = (x.capture()?, y.capture()?) {
                let (effects, of_inputs) = split(a, &p, &q, inputs)?;
                differs.extend(effects.lines(LINES_MAX));
                copies = of_inputs;
            }
            "state"
        }
        (_, Reached::Stuck(at)) => {
            differs
                .push(format!("side B stands still at icount {at}, waiting for an event that does not come"));
            differs.extend(differing(&x.registers()?, &y.registers()?));
            "stall"
        }
        (_, Reached::Ended(said)) => {
            differs.push(format!("side B ended: {said}"));
            "wrong kind"
        }
        (Reached::Stuck(at), _) => {
            differs.push(format!("side A stands still at icount {at}, side B goes on"));
            "wrong icount"
        }
        (Reached::Ended(said), _) => bail!("the recorded side does not replay: {said}"),
    };
    differs.truncate(LINES_MAX);
    *replayed += (x.icount - from) + y.icount.saturating_sub(from);
    let mut all_inputs = inputs.lines.clone();
    all_inputs.extend(copies.into_iter().take(LINES_MAX));
    let event = a.span.from.event + a.span.events.partition_point(|event| event.icount < hi) as u64;
    Ok(Finding {
        icount: hi,
        event,
        pc: pc_of(&before),
        hart: None,
        instruction,
        differs,
        kind: kind.into(),
        masked: None,
        replayed_instructions: *replayed,
        inputs: all_inputs,
    })
}
