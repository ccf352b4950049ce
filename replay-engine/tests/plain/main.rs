//! The machine against a second, deliberately plain interpreter, which shares no code with it.
//!
//! `HEDDLE_SEED` runs one program again.
#![allow(clippy::unwrap_used, missing_docs)]

mod interpreter;

use heddle_replay_engine::machine::hart::Hart;
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Exit, Machine, Nobody};
use interpreter::{BASE, NotMine, Plain};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const RAM_BYTES: usize = 16 << 10;
const STEPS_MAX: u64 = 1000;
const OPCODES: [u32; 20] = [
    0x33, 0x33, 0x33, 0x3b, 0x3b, 0x13, 0x13, 0x13, 0x1b, 0x03, 0x03, 0x23, 0x23, 0x63, 0x63, 0x6f, 0x37,
    0x17, 0x2f, 0x73,
];

/// What `OP-32` has: funct7 and funct3.
const WORD_OPERATIONS: [(u32, u32); 10] =
    [(0, 0), (0, 1), (0, 5), (0x20, 0), (0x20, 5), (1, 0), (1, 4), (1, 5), (1, 6), (1, 7)];
const POINTERS: std::ops::Range<usize> = 8..16;

/// Memory full of instructions, so that wherever a jump goes there is one more.
fn program(seed: u64) -> Plain {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let code: Vec<u8> = (0..RAM_BYTES / 4).flat_map(|_| instruction(&mut rng).to_le_bytes()).collect();
    let mut x = [0; 32];
    for (n, x) in x.iter_mut().enumerate().skip(1) {
        let value: u64 = rng.r#gen();
        *x = match rng.gen_range(0..8) {
            _ if POINTERS.contains(&n) => BASE + 2048 + value % (RAM_BYTES as u64 - 4096) / 8 * 8,
            0 => value,
            1 => value as i32 as u64,
            2 => *[1, u64::MAX, 1 << 63, i64::MAX as u64, 0x8000_0000, 0xffff_ffff].choose(&mut rng).unwrap(),
            _ => BASE + value % RAM_BYTES as u64 / 8 * 8,
        };
    }
    let pc = BASE + rng.gen_range(0..RAM_BYTES as u64 / 4) * 4;
    let mtvec = BASE + rng.gen_range(0..RAM_BYTES as u64 / 4) * 4;
    Plain { x, pc, memory: code, icount: 0, instret: 0, mtvec, mscratch: 0, mepc: 0, mcause: 0, mtval: 0 }
}

/// Random bits, pushed towards what both sides have.
fn instruction(rng: &mut ChaCha8Rng) -> u32 {
    let opcode = *OPCODES.choose(rng).unwrap();
    let w = rng.r#gen::<u32>() & !0x7f | opcode;
    let funct3 = w >> 12 & 7;
    // With another operation: its upper seven bits, and funct3.
    let as_operation = |upper: u32, funct3: u32| w & !(0x7f << 25) & !(7 << 12) | upper << 25 | funct3 << 12;
    let w = match opcode {
        0x33 if rng.gen_range(0..4) == 0 => as_operation(0x20, funct3 / 4 * 5),
        0x33 => as_operation(rng.gen_range(0..2), funct3),
        0x3b => {
            let (upper, funct3) = *WORD_OPERATIONS.choose(rng).unwrap();
            as_operation(upper, funct3)
        }
        // Shifts: of six bits, the lowest of which lies where others have funct7's.
        0x13 if funct3 == 1 => w & !(0x3f << 26),
        0x13 if funct3 == 5 => w & !(0x3f << 26) | (w >> 31) << 30,
        0x1b => {
            let upper = *[0, 0, 0x20].choose(rng).unwrap();
            as_operation(upper, if upper == 0 { *[0, 1, 5].choose(rng).unwrap() } else { 5 })
        }
        // Offsets are multiples of four, and short.
        0x63 => w & !(1 << 8) & !(7 << 28),
        0x6f => w & !(1 << 21) & !0x800f_e000,
        0x2f => {
            let function = *[0u32, 1, 4, 8, 12, 16, 20, 24, 28].choose(rng).unwrap();
            w & 0x07ff_8fff | function << 27 | *[2u32, 3].choose(rng).unwrap() << 12
        }
        0x73 => match rng.gen_range(0..8) {
            0 => 0x73,
            1 => 0x0010_0073,
            2 => w & 0xf80 | 0xb020_2073,
            _ if funct3 & 3 == 0 => w & 0xf_ffff | 0x1000 | 0x340 << 20,
            _ => w & 0xf_ffff | *[0x340u32, 0x341, 0x342, 0x343].choose(rng).unwrap() << 20,
        },
        _ => w,
    };
    // x8 to x15 go on pointing into memory, and are most accesses' bases.
    let writes = !matches!(opcode, 0x23 | 0x63);
    let w = if writes && POINTERS.contains(&(w as usize >> 7 & 31)) { w & !(1 << 10) } else { w };
    let accesses = matches!(opcode, 0x03 | 0x23 | 0x2f);
    if accesses && rng.gen_range(0..8) != 0 { w & !(1 << 19) | 1 << 18 } else { w }
}

/// Runs the plain one as far as it goes, and the machine as far as that; how far.
fn check(seed: u64) -> u64 {
    let before = program(seed);
    let mut ram = Ram::new(RAM_BYTES);
    ram.write(0, &before.memory).unwrap();
    let mut hart = Hart::new(before.pc);
    hart.x[..32].copy_from_slice(&before.x);
    hart.mtvec = before.mtvec;
    let mut machine = Machine::new(ram, hart, 0, vec![]);
    let mut plain = before.clone();
    while plain.icount < STEPS_MAX {
        if let Err(NotMine) = plain.step() {
            break;
        }
    }
    assert_eq!(machine.run(plain.icount, &mut Nobody), Exit::Budget, "HEDDLE_SEED={seed}");
    if difference(&machine, &plain).is_some() {
        step_by_step(seed, before);
    }
    plain.icount
}

fn difference(machine: &Machine, plain: &Plain) -> Option<String> {
    let hart = machine.hart();
    let mut pairs: Vec<(String, u64, u64)> =
        (0..32).map(|n| (format!("x{n}"), hart.x[n], plain.x[n])).collect();
    pairs.push(("pc".into(), hart.pc, plain.pc));
    pairs.push(("icount".into(), machine.icount(), plain.icount));
    pairs.push(("mscratch".into(), hart.mscratch, plain.mscratch));
    pairs.push(("mepc".into(), hart.mepc, plain.mepc));
    pairs.push(("mcause".into(), hart.mcause, plain.mcause));
    pairs.push(("mtval".into(), hart.mtval, plain.mtval));
    let memory = machine.ram().slice(0, RAM_BYTES).unwrap();
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
    (!found.is_empty()).then(|| found.join("\n"))
}

/// Finds the first instruction after which the two differ, and fails there.
fn step_by_step(seed: u64, mut plain: Plain) {
    let mut ram = Ram::new(RAM_BYTES);
    ram.write(0, &plain.memory).unwrap();
    let mut hart = Hart::new(plain.pc);
    hart.x[..32].copy_from_slice(&plain.x);
    hart.mtvec = plain.mtvec;
    let mut machine = Machine::new(ram, hart, 0, vec![]);
    loop {
        let pc = plain.pc;
        let text = machine.instruction_at(pc);
        assert!(plain.step().is_ok(), "HEDDLE_SEED={seed}: the two differ only when run as a whole");
        machine.run(plain.icount, &mut Nobody);
        if let Some(found) = difference(&machine, &plain) {
            panic!("HEDDLE_SEED={seed}, instruction {}: {pc:#x}  {text}\n{found}", plain.icount);
        }
    }
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
    assert!(executed > 20 * programs, "{executed} instructions");
}
