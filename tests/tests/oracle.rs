//! The built-in machine against unicorn, which is QEMU's interpreter of RISC-V: random
//! programs, then registers, flags and memory compared.
//!
//! `HEDDLE_SEED` runs one program again. `./test` puts unicorn into `target/venv`; without
//! it, there is nothing to compare with, and the test is skipped.
#![allow(clippy::unwrap_used)]

#[path = "oracle/encoding.rs"]
mod encoding;
#[path = "oracle/program.rs"]
mod program;

use heddle_replay_engine::machine::hart::{Hart, status};
use heddle_replay_engine::machine::ram::Ram;
use heddle_replay_engine::machine::{Exit, Machine, Nobody};
use heddle_tests::{count, root, skip};
use program::{CODE, CODE_BYTES, PAGE, Program, SCRATCH, State};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Where exceptions go: no program is so long.
const TRAPS: u64 = CODE + 0x8000;
const WFI: u32 = 0x1050_0073;
/// More than a program can execute that goes back as often as it may.
const INSTRUCTIONS_MAX: u64 = 20_000;
const BOX: u64 = 0xffff_ffff << 32;

/// What `code` leaves behind on the built-in machine; an error says why it did not end.
fn on_ours(code: &[u8], before: &State) -> Result<State, String> {
    let mut ram = Ram::new(CODE_BYTES as usize + PAGE);
    ram.write(0, code).unwrap();
    ram.write(code.len() as u64, &WFI.to_le_bytes()).unwrap();
    ram.write(TRAPS - CODE, &WFI.to_le_bytes()).unwrap();
    ram.write(SCRATCH - CODE, &before.memory).unwrap();
    let mut hart = Hart::new(CODE);
    hart.x[..32].copy_from_slice(&before.x);
    hart.f = before.f;
    hart.fcsr = before.fcsr as u8;
    hart.mstatus |= status::FS;
    hart.mtvec = TRAPS;
    let mut machine = Machine::new(ram, hart, 0, vec![]);
    let exit = machine.run(INSTRUCTIONS_MAX, &mut Nobody);
    let hart = machine.hart();
    if exit != Exit::Idle || hart.pc != CODE + code.len() as u64 + 4 {
        let (cause, at, value) = (hart.mcause, hart.mepc, hart.mtval);
        return Err(format!("{exit:?} at {:#x}; mcause {cause}, mepc {at:#x}, mtval {value:#x}", hart.pc));
    }
    Ok(State {
        x: hart.x[..32].try_into().unwrap(),
        f: hart.f,
        fcsr: u64::from(hart.fcsr),
        memory: machine.ram().slice(SCRATCH - CODE, PAGE).unwrap().to_vec(),
    })
}

/// The other side: one process that runs program after program.
struct Unicorn {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Unicorn {
    /// Starts it; an error says why it can't be had.
    fn start() -> Result<Unicorn, String> {
        let python = root().join("target/venv/bin/python");
        if !python.exists() {
            return Err(format!("{} is not there: ./test installs it", python.display()));
        }
        let mut child = Command::new(python)
            .arg(root().join("tests/oracle.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let requests = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        answers.read_line(&mut ready).map_err(|error| error.to_string())?;
        if !ready.starts_with("ready ") {
            return Err(format!("unicorn does not start: {}", child.wait().unwrap()));
        }
        eprintln!("unicorn {}", ready["ready ".len()..].trim());
        Ok(Unicorn { child, requests, answers })
    }

    /// What `code` leaves behind on unicorn; `None` is an exception.
    fn run(&mut self, code: &[u8], before: &State) -> Option<State> {
        let mut request = (code.len() as u32).to_le_bytes().to_vec();
        request.extend_from_slice(code);
        let registers = before.x[1..].iter().chain(&before.f).chain([&before.fcsr]);
        request.extend(registers.flat_map(|value| value.to_le_bytes()));
        request.extend_from_slice(&before.memory);
        self.requests.write_all(&request).unwrap();
        self.requests.flush().unwrap();
        let mut head = [0; 9];
        self.answers.read_exact(&mut head).unwrap();
        let mut word = || {
            let mut bytes = [0; 8];
            self.answers.read_exact(&mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        let mut after = State { x: [0; 32], f: [0; 32], fcsr: 0, memory: vec![0; PAGE] };
        after.x[1..].iter_mut().for_each(|x| *x = word());
        after.f.iter_mut().for_each(|f| *f = word());
        after.fcsr = word();
        self.answers.read_exact(&mut after.memory).unwrap();
        let pc = u64::from_le_bytes(head[1..].try_into().unwrap());
        (head[0] == 0 && pc == CODE + code.len() as u64).then_some(after)
    }
}

impl Drop for Unicorn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where the two differ; ours first.
fn differences(ours: &State, theirs: &State) -> Vec<String> {
    let mut found = vec![];
    let mut compare = |name: String, ours: u64, theirs: u64| {
        if ours != theirs {
            found.push(format!("{name}: ours {ours:#018x}, unicorn's {theirs:#018x}"));
        }
    };
    for n in 1..32 {
        compare(format!("x{n}"), ours.x[n], theirs.x[n]);
    }
    for n in 0..16 {
        compare(format!("f{n}"), ours.f[n], theirs.f[n]);
    }
    for n in 16..32 {
        // Unicorn has no boxes; ours must be whole.
        compare(format!("f{n}"), ours.f[n], theirs.f[n] | BOX);
    }
    compare("fcsr".into(), ours.fcsr, theirs.fcsr);
    let doubleword = |memory: &[u8], at: usize| u64::from_le_bytes(memory[at..at + 8].try_into().unwrap());
    for at in (0..PAGE).step_by(8) {
        compare(format!("memory + {at:#x}"), doubleword(&ours.memory, at), doubleword(&theirs.memory, at));
    }
    found
}

/// Runs the first `items` of a program on both sides.
fn check(unicorn: &mut Unicorn, program: &Program, items: usize) -> Vec<String> {
    let code = program.code(items);
    match (on_ours(&code, &program.state), unicorn.run(&code, &program.state)) {
        (Ok(ours), Some(theirs)) => differences(&ours, &theirs),
        (Err(why), Some(_)) => vec![format!("ours does not end: {why}")],
        (Ok(_), None) => vec!["unicorn's does not end".into()],
        (Err(why), None) => vec![format!("neither ends: the program is not what it should be; {why}")],
    }
}

#[test]
fn random_programs_leave_the_same_behind_as_on_unicorn() {
    let mut unicorn = match Unicorn::start() {
        Ok(unicorn) => unicorn,
        Err(why) => return skip(why),
    };
    let given = std::env::var("HEDDLE_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let first = given.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let programs = if given.is_some() { 1 } else { count(2_000, 100_000) };
    eprintln!("{programs} programs from seed {first} on");
    for seed in first..first + programs {
        let program = Program::new(seed);
        let found = check(&mut unicorn, &program, program.items());
        if found.is_empty() {
            continue;
        }
        // The shortest beginning that shows it has the culprit at its end.
        let shortest = (1..=program.items()).find(|items| !check(&mut unicorn, &program, *items).is_empty());
        let items = shortest.unwrap_or(program.items());
        let culprit = CODE + program.code(items - 1).len() as u64;
        panic!(
            "HEDDLE_SEED={seed} shows it again; first by what begins at {culprit:#x} or is jumped to there:\n{}\n{}",
            program.listing(),
            found.join("\n")
        );
    }
}
