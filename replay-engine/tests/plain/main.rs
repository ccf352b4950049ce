//! The machine against a second, deliberately plain interpreter, which shares no code with it.
//! Its floating point is the exact model that `float` has.
//!
//! `HEDDLE_SEED` runs one program again.
#![allow(clippy::unwrap_used, missing_docs)]

mod atomics;
mod bits;
mod compressed;
mod encoding;
mod floats;
mod instructions;
mod interpreter;
#[path = "../float/model.rs"]
mod model;
#[path = "../float/operands.rs"]
mod operands;
mod program;

use heddle_replay_engine::machine::hart::{Hart, status};
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Exit, Machine, Nobody};
use interpreter::{CLOCK_SHIFT, NotMine, Plain};
use program::{RAM_BYTES, program};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const STEPS_MAX: u64 = 600;

/// Runs a program on both; how far it went.
fn check(seed: u64) -> u64 {
    let before = program(seed);
    run(&before, pieces(seed)).unwrap_or_else(|found| {
        let single = run(&before, || 1).err();
        let single = single.unwrap_or_else(|| "there is no difference".into());
        panic!("HEDDLE_SEED={seed}: {found}\n\nOne instruction at a time:\n{single}");
    })
}

/// How far a program's runs go: to its end at once, or so many instructions each.
fn pieces(seed: u64) -> impl FnMut() -> u64 {
    let mut rng = ChaCha8Rng::seed_from_u64(!seed);
    let (least, most) = [(STEPS_MAX, STEPS_MAX), (1, 70), (1, 9)][(seed % 3) as usize];
    move || rng.gen_range(least..=most)
}

/// Runs the plain one as far as it goes, and the machine as far as that, piece by piece: how far,
/// or what is different first.
fn run(before: &Plain, mut piece: impl FnMut() -> u64) -> Result<u64, String> {
    let (mut machine, mut plain) = (machine(before), before.clone());
    loop {
        let (pc, from) = (plain.pc, plain.icount);
        let to = (from + piece()).min(STEPS_MAX);
        let mut is_over = to == STEPS_MAX;
        while plain.icount < to {
            if let Err(NotMine) = plain.step() {
                is_over = true;
                break;
            }
        }
        let exit = machine.run(plain.icount, &mut Nobody);
        let found =
            if exit == Exit::Budget { difference(&machine, &plain) } else { Some(format!("{exit:?}")) };
        if let Some(found) = found {
            let (to, text) = (plain.icount, machine.instruction_at(pc));
            return Err(format!("after {from} instructions and up to {to}, from {pc:#x}  {text}\n{found}"));
        }
        if is_over {
            return Ok(plain.icount);
        }
    }
}

fn machine(plain: &Plain) -> Machine {
    let mut ram = Ram::new(RAM_BYTES);
    ram.write(0, &plain.memory).unwrap();
    let mut hart = Hart::new(plain.pc);
    hart.x[..32].copy_from_slice(&plain.x);
    hart.f = plain.f;
    hart.fcsr = plain.fcsr as u8;
    hart.mstatus |= if plain.has_floats { status::FS } else { 0 };
    hart.mtvec = plain.mtvec;
    Machine::new(ram, hart, CLOCK_SHIFT, vec![])
}

fn difference(machine: &Machine, plain: &Plain) -> Option<String> {
    let (hart, memory) = (machine.hart(), machine.ram().slice(0, RAM_BYTES).unwrap());
    let others = [
        ("pc", hart.pc, plain.pc),
        ("icount", machine.icount(), plain.icount),
        ("fcsr", u64::from(hart.fcsr), plain.fcsr),
        ("instret", hart.instret(machine.icount()), plain.instret),
        ("faults", machine.faults(), plain.faults),
        ("mscratch", hart.mscratch, plain.mscratch),
        ("mepc", hart.mepc, plain.mepc),
        ("mcause", hart.mcause, plain.mcause),
        ("mtval", hart.mtval, plain.mtval),
    ];
    let is_same = hart.x[..32] == plain.x[..] && hart.f == plain.f && *memory == plain.memory[..];
    if is_same && others.iter().all(|(_, machine, plain)| machine == plain) {
        return None;
    }
    let mut pairs: Vec<(String, u64, u64)> =
        (0..32).map(|n| (format!("x{n}"), hart.x[n], plain.x[n])).collect();
    pairs.extend((0..32).map(|n| (format!("f{n}"), hart.f[n], plain.f[n])));
    pairs.extend(others.map(|(name, machine, plain)| (name.to_string(), machine, plain)));
    let byte = memory.iter().zip(&plain.memory).position(|(a, b)| a != b);
    if let Some(at) = byte {
        pairs.push((format!("memory + {at:#x}"), u64::from(memory[at]), u64::from(plain.memory[at])));
    }
    let found: Vec<String> = pairs
        .into_iter()
        .filter(|(_, machine, plain)| machine != plain)
        .map(|(name, machine, plain)| {
            format!("{name}: the machine's {machine:#x}, the plain one's {plain:#x}")
        })
        .collect();
    Some(found.join("\n"))
}

#[test]
fn random_programs_do_the_same_on_a_plain_interpreter() {
    if let Ok(seed) = std::env::var("HEDDLE_SEED") {
        check(seed.parse().unwrap());
        return;
    }
    let programs = if std::env::var_os("HEDDLE_FULL").is_some() { 200_000 } else { 10_000 };
    let first = u64::from(rand::random::<u32>());
    let executed: u64 = (first..first + programs).map(check).sum();
    eprintln!("{programs} programs from seed {first} on, {executed} instructions");
    // Programs that end at once would compare nothing.
    assert!(executed > 60 * programs, "{executed} instructions");
}
