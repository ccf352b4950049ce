//! `heddle run`: a bare-metal ELF on the built-in machine, and nothing else.

mod signature;

use crate::args::Run;
use crate::exit::{OK, TIMEOUT, UNEXPECTED, USAGE, coded, of_guest};
use anyhow::{Context, Result};
use heddle_node::record::BadRequest;
use heddle_proto::manifest::{MachineSpec, Sleep};
use heddle_proto::verdict::on_hart;
use heddle_replay_engine::bare::{Bare, Pause};
use heddle_replay_engine::machine::Machine;
use heddle_replay_engine::machine::loader::{self, Images, LoadError};
use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds an instruction, as a power of two: what recordings have unless told otherwise.
const SHIFT: u32 = 3;
/// Instructions between two looks at the console: a few milliseconds.
const SLICE: u64 = 1_000_000;
/// Pieces of input that wait for the guest; beyond it standard input waits.
const INPUT_PIECES: usize = 16;
const INPUT_BYTES: usize = 256;

/// Runs the guest; its exit code is ours.
pub async fn run(command: Run) -> Result<u8> {
    tokio::task::spawn_blocking(move || run_here(&command)).await.context("run the guest")?
}

fn run_here(command: &Run) -> Result<u8> {
    let elf = read(&command.elf)?;
    let results = match &command.signature {
        Some(file) => Some((file, signature_of(&command.elf, &elf)?)),
        None => None,
    };
    let machine = load(command, elf)?;
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut guest = Bare::new(machine, epoch.as_nanos() as i64);
    let mut input = if command.console { Some(standard_input()?) } else { None };
    let limit = command.max_instructions.unwrap_or(u64::MAX);
    loop {
        let pause = guest.run(guest.machine().icount().saturating_add(SLICE).min(limit));
        print(&guest.machine_mut().take_console())?;
        match pause {
            Pause::Off => {
                if let Some((file, place)) = &results {
                    let lines = signature::lines(guest.machine(), place, command.signature_granularity);
                    let lines = lines.context("find the signature in RAM")?;
                    std::fs::write(file, lines).with_context(|| format!("write {}", file.display()))?;
                }
                return ending(guest.machine_mut());
            }
            Pause::Budget if guest.machine().icount() >= limit => {
                let text = format!("not done after {limit} instructions, at {}", place(guest.machine()));
                return Err(coded(TIMEOUT, text));
            }
            Pause::Budget => type_some(&mut guest, &mut input),
            // Only input can wake it, if anything can.
            Pause::Stuck => match input.as_ref().and_then(|input| input.recv().ok()) {
                Some(data) => guest.type_in(data),
                None => {
                    let text = format!(
                        "the guest waits for ever, at {}: no timer is set, and nothing else can wake it",
                        place(guest.machine())
                    );
                    return Err(coded(UNEXPECTED, text));
                }
            },
        }
    }
}

fn refused(path: &Path, why: &str) -> anyhow::Error {
    coded(USAGE, format!("{}: {why}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(|error| refused(path, &error.to_string()))?;
    if !bytes.starts_with(b"\x7fELF") {
        let head: Vec<String> = bytes.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let found: String =
            if head.is_empty() { "it is empty".into() } else { format!("it begins with {}", head.join(" ")) };
        return Err(refused(path, &format!("not an ELF: at offset 0, {found}, not 7f 45 4c 46")));
    }
    Ok(bytes)
}

/// Where the guest's signature will be.
fn signature_of(path: &Path, elf: &[u8]) -> Result<Range<u64>> {
    let place = loader::signature(elf);
    place.ok_or_else(|| refused(path, "it has no signature: from begin_signature to end_signature"))
}

fn load(command: &Run, elf: Vec<u8>) -> Result<Machine> {
    let spec = MachineSpec {
        harts: command.harts,
        memory_bytes: command.memory,
        shift: SHIFT,
        sleep: Sleep::Off,
        bios: None,
        kernel: None,
        initrd: None,
        dtb: None,
        seed: command.seed,
        append: String::new(),
        drives: vec![],
        devices: vec![],
    };
    let images = Images { kernel: Some(Arc::from(elf)), ..Images::default() };
    loader::build(&spec, &images).map_err(|error| match error {
        LoadError::Memory(_) => BadRequest::from(error).into(),
        _ => refused(&command.elf, &error.to_string()),
    })
}

/// Standard input, piece by piece, from a thread that waits for it.
fn standard_input() -> Result<Receiver<Vec<u8>>> {
    let (sender, receiver) = sync_channel(INPUT_PIECES);
    let read = move || {
        let mut buffer = [0; INPUT_BYTES];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("console".into()).spawn(read).context("start the console thread")?;
    Ok(receiver)
}

/// What has been typed so far, as far as the guest has room for it.
fn type_some(guest: &mut Bare, input: &mut Option<Receiver<Vec<u8>>>) {
    while let Some(typed) = input
        && guest.takes_input()
    {
        match typed.try_recv() {
            Ok(data) => guest.type_in(data),
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => *input = None,
        }
    }
}

/// A reader that has gone away ends the run, and is no error.
fn print(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(coded(OK, "")),
        done => done.context("print the console"),
    }
}

/// The guest has switched itself off: with what code, and whatever is to be said of it.
fn ending(machine: &mut Machine) -> Result<u8> {
    if let Some(complaint) = machine.take_complaint() {
        return Err(coded(UNEXPECTED, format!("{complaint}; ended at {}", place(machine))));
    }
    if machine.wants_reset() {
        eprintln!("heddle: the guest asked for a reset, which ends the run");
    }
    let code = machine.exit_code().unwrap_or(0);
    let ours = of_guest(machine.shutdown().unwrap_or(0));
    if code != u64::from(ours) {
        eprintln!("heddle: the guest's exit code is {code}; ours is {ours}");
    }
    Ok(ours)
}

/// Where the guest is, for people.
fn place(machine: &Machine) -> String {
    let pc = machine.hart().pc;
    format!("pc {pc:#x}{} ({})", on_hart(machine.named_hart()), machine.instruction_at(pc))
}
