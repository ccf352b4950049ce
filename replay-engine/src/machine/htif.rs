//! HTIF: how bare programs, RISC-V's own suites among them, end and print: by a store to
//! the doubleword that their ELF names `tohost`.
//!
//! ```text
//!  63    56 55     48 47                 0
//! |  device | command |      payload      |
//!    not 1, and odd: the end; the exit code is the whole, shifted right by one
//!    1, 1            : print the payload's byte
//!    0, 0            : a system call; the payload points at its number and arguments
//! ```
//!
//! A request is taken by the store that completes it, so its icount is the store's. That
//! store is one of 8 bytes, one of 4 to the upper half, or the lower half stored again:
//! some programs store nothing but the lower half of their exit code, over and over.
//!
//! The word itself is RAM; nothing here is state of its own.

use super::{Machine, RAM_BASE};

/// The console's device number.
const CONSOLE: u64 = 1;
const CONSOLE_GET: u64 = 0;
const CONSOLE_PUT: u64 = 1;
/// System calls, by the numbers of RISC-V's proxy kernel.
const WRITE: u64 = 64;
const EXIT: u64 = 93;

/// The two doublewords, as offsets in RAM.
#[derive(Clone, Debug)]
pub(super) struct Htif {
    tohost: u64,
    fromhost: Option<u64>,
    /// What `tohost` held before the store that is looked at.
    seen: u64,
    /// The exit code in full.
    exit: Option<u64>,
    /// Why the machine was switched off, if the guest did not ask for that.
    complaint: Option<String>,
}

impl Machine {
    /// Watches the doubleword at physical address `tohost`, and answers at `fromhost`. One
    /// that is not in RAM, or misaligned, is nobody's.
    pub fn watch_tohost(&mut self, tohost: u64, fromhost: Option<u64>) {
        let is_word = |at: &u64| at % 8 == 0 && self.ram.load::<8>(*at).is_some();
        let tohost = Some(tohost.wrapping_sub(RAM_BASE)).filter(is_word);
        let fromhost = fromhost.map(|at| at.wrapping_sub(RAM_BASE)).filter(is_word);
        self.htif = tohost.map(|tohost| Htif { tohost, fromhost, seen: 0, exit: None, complaint: None });
        self.watch_again();
    }

    /// RAM is another one: its page is watched there.
    pub(super) fn watch_again(&mut self) {
        if let Some(htif) = &self.htif {
            self.ram.watch(htif.tohost);
            self.fast.forget_stores();
        }
        self.see_tohost();
    }

    /// Whatever has been stored so far is old.
    pub(super) fn see_tohost(&mut self) {
        if let Some(htif) = &mut self.htif {
            htif.seen = self.ram.load::<8>(htif.tohost).unwrap_or(0);
        }
    }

    /// The guest's exit code, once it has switched the machine off; HTIF's in full.
    pub fn exit_code(&self) -> Option<u64> {
        let code = self.shutdown.map(u64::from);
        code.map(|code| self.htif.as_ref().and_then(|htif| htif.exit).unwrap_or(code))
    }

    /// Why the machine was switched off without being asked to, if it was.
    pub fn take_complaint(&mut self) -> Option<String> {
        self.htif.as_mut()?.complaint.take()
    }

    /// A store of `len` bytes at physical address `pa` has met a page whose writes are told.
    #[cold]
    pub(super) fn store_is_told(&mut self, pa: u64, len: usize) {
        self.attention = true;
        let Some(htif) = &self.htif else { return };
        let request = self.ram.load::<8>(htif.tohost).unwrap_or(0);
        let is_complete = match (pa.wrapping_sub(RAM_BASE).wrapping_sub(htif.tohost), len) {
            (0, 8) | (4, 4) => true,
            (0, 4) => request == htif.seen && request & 1 != 0,
            _ => false,
        };
        if is_complete && request != 0 && self.shutdown.is_none() {
            self.take_request(request);
        }
    }

    fn take_request(&mut self, request: u64) {
        let (device, command) = (request >> 56, request >> 48 & 0xff);
        let payload = request & 0xffff_ffff_ffff;
        match (device, command) {
            (CONSOLE, CONSOLE_PUT) => {
                self.print(&[payload as u8]);
                self.answer(1);
            }
            // Nothing is ever typed here: no answer.
            (CONSOLE, CONSOLE_GET) => self.answer(0),
            _ if device != CONSOLE && request & 1 != 0 => self.leave(request >> 1),
            (0, 0) => self.call(payload),
            _ => self.refuse(format!("no command {command} of device {device}: tohost is {request:#x}")),
        }
    }

    /// A system call, whose number and arguments are at `block`; the result goes to its head.
    fn call(&mut self, block: u64) {
        let at = block.wrapping_sub(RAM_BASE);
        let words = [0, 8, 16, 24].map(|n| self.ram.load::<8>(at.wrapping_add(n)));
        let [Some(number), Some(first), Some(address), Some(bytes)] = words else {
            return self.refuse(format!("a system call's arguments are not in RAM: {block:#x}"));
        };
        match number {
            EXIT => self.leave(first),
            WRITE if first == 1 || first == 2 => {
                let text = self.ram.slice(address.wrapping_sub(RAM_BASE), bytes as usize).map(<[u8]>::to_vec);
                let Some(text) = text else {
                    return self.refuse(format!("{bytes} bytes to print at {address:#x} are not in RAM"));
                };
                self.print(&text);
                self.put(Some(at), bytes);
                self.answer(1);
            }
            _ => self.refuse(format!("no system call {number} with {first:#x}, {address:#x}, {bytes:#x}")),
        }
    }

    /// To the console; like what the UART sends, it counts in the checks.
    fn print(&mut self, text: &[u8]) {
        text.iter().for_each(|byte| self.uart.output.byte(*byte));
        self.console.extend_from_slice(text);
    }

    /// The request is done; a program waits for the one word to change, or the other.
    fn answer(&mut self, value: u64) {
        let Some(htif) = &self.htif else { return };
        let (tohost, fromhost) = (htif.tohost, htif.fromhost);
        self.put(Some(tohost), 0);
        if value != 0 {
            self.put(fromhost, value);
        }
    }

    fn put(&mut self, at: Option<u64>, value: u64) {
        if let Some(at) = at {
            // Both words were seen to be in RAM; an unaligned block of a call may cross a page.
            let _ = self.ram.write(at, &value.to_le_bytes());
        }
    }

    fn leave(&mut self, code: u64) {
        self.shutdown = Some(u16::try_from(code).unwrap_or(u16::MAX));
        if let Some(htif) = &mut self.htif {
            htif.exit = Some(code);
        }
    }

    /// What is asked for is not there: better to end than to let the program wait.
    fn refuse(&mut self, why: String) {
        self.shutdown = Some(1);
        if let Some(htif) = &mut self.htif {
            htif.complaint = Some(format!("HTIF: {why}"));
        }
    }
}
