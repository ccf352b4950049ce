//! The inner loop: a block of decoded operations after the other.
//!
//! What is looked at is looked at once a block: whether the run is to end, and whether something
//! wants attention. A block that is longer than what is left of the run is cut. Whatever can
//! raise attention, trap or change what pc means is executed apart, by [`Machine::execute`],
//! and ends the block if it did: interrupts are taken and runs end exactly where they would,
//! were everything looked at before each instruction.

use super::code::{self, CodeCache};
use super::decode::{Code, Op};
use super::execute::{divide_signed, remainder_signed};
use super::hart::{Hart, Trap};
use super::{Exit, Machine, Outside, RAM_BASE, bits};

/// Page numbers have 52 bits.
pub(super) const NO_PAGE: u64 = u64::MAX;

/// Instructions between two looks at whether somebody wants the run to end: some tens of
/// microseconds.
pub(super) const LOOK: u64 = 8192;

/// Addresses that differ by a multiple of it are the same to a CPU that asks whether a load
/// must wait for a store before it; [`Machine`] is aligned to it.
const ALIAS: usize = 4096;
/// Where the loop's frame ends, within [`ALIAS`]: clear of what the loop goes to in a machine,
/// which is at its beginning, and of the end of a page, where guests have their stacks.
const FRAME: usize = 0x800;
/// Steps down the stack. The smaller one is less than [`Placed`]'s alignment with all that its
/// call puts there.
const STEPS: [usize; 2] = [1024, 192];
/// More than are ever needed: a place is worth little, and a stack has an end.
pub(super) const STEPS_MAX: u32 = 16;

const _: () = {
    let registers = std::mem::offset_of!(Machine, hart) + std::mem::offset_of!(Hart, x);
    assert!(registers + 33 * 8 < 0x300 && FRAME >= 0x600, "what the loop goes to is below its frame");
};

/// The code cache while blocks of it are executed. The frame of whoever has it is aligned, and
/// those of what it calls with it.
#[repr(align(256))]
struct Placed(CodeCache);

/// Where a run ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Never behind this icount.
    pub until: u64,
    /// At the end of the first block that reaches this one, or at `until`: a block that is cut
    /// costs its copy now, and the decoding of its rest when that is entered.
    pub enough: u64,
}

impl Machine {
    /// Runs the loop with its frame at the same place within a page, or the one before it,
    /// wherever the caller's is, in `steps` steps at most.
    ///
    /// A CPU holds a load back, or does it again, where an older store has the same low twelve
    /// bits ("4K aliasing"). The loop stores to registers and to its frame all the time; where
    /// the frame came to lie badly, over the registers or the guest's own stack, it was 5 to 13 %
    /// slower. Where a frame lies is chance, but the same in every run of a build: a recording
    /// took longer than its replay for nothing else.
    pub(super) fn run_in_place(&mut self, bounds: Bounds, outside: &mut dyn Outside, steps: u32) -> Exit {
        let mark = 0u8;
        let excess = (&raw const mark).addr().wrapping_sub(FRAME) % ALIAS;
        if excess < align_of::<Placed>() || steps == 0 {
            self.run_loop::<false>(bounds, outside)
        } else if excess < STEPS[0] + align_of::<Placed>() {
            self.step_down::<{ STEPS[1] }>(bounds, outside, steps - 1)
        } else {
            self.step_down::<{ STEPS[0] }>(bounds, outside, steps - 1)
        }
    }

    #[inline(never)]
    fn step_down<const BYTES: usize>(
        &mut self,
        bounds: Bounds,
        outside: &mut dyn Outside,
        steps: u32,
    ) -> Exit {
        let mut space = std::mem::MaybeUninit::<[u8; BYTES]>::uninit();
        std::hint::black_box(&mut space);
        let exit = self.run_in_place(bounds, outside, steps);
        // Until here: else the call above might come in the place of this frame.
        std::hint::black_box(&mut space);
        exit
    }

    /// Runs until `until` instructions have been executed in all, or a reason to leave.
    /// `TRACE`: somebody wants to see every instruction before it runs.
    #[inline(never)]
    pub(super) fn run_loop<const TRACE: bool>(&mut self, bounds: Bounds, outside: &mut dyn Outside) -> Exit {
        // Apart from the rest of the machine while blocks of it are executed.
        let mut cache = Placed(std::mem::take(&mut self.code));
        let exit = self.run_blocks::<TRACE>(&mut cache.0, bounds, outside);
        self.code = cache.0;
        exit
    }

    #[rustfmt::skip]
    #[expect(unused_assignments, reason = "not every operation wants all that `next` gives")]
    fn run_blocks<const TRACE: bool>(
        &mut self,
        cache: &mut CodeCache,
        Bounds { until, enough }: Bounds,
        outside: &mut dyn Outside,
    ) -> Exit {
        // Here the run or the hart's turn ends. icount is `bound - left`; machine and hart have
        // it, and pc, before anybody looks.
        let mut bound = until.min(self.harts.turn_end());
        let (mut pc, mut left) = (self.hart.pc, bound.saturating_sub(self.icount));
        // When so much is left, or less, there is a look at whether the run is to end.
        let mut look = left;
        let mut single;
        loop {
            // Before anything is attended to: what the last instruction made pending is
            // taken at the next run's start, whoever asked this run to end.
            if self.attention || left <= look {
                (self.hart.pc, self.icount) = (pc, bound - left);
                if self.icount >= enough {
                    return Exit::Budget;
                }
                if let Some(exit) = self.attend(cache, outside) {
                    return exit;
                }
                pc = self.hart.pc;
                bound = until.min(self.harts.turn_end());
                left = bound - self.icount;
                look = left.saturating_sub(LOOK.min(enough - self.icount));
            }
            if TRACE {
                (self.hart.pc, self.icount) = (pc, bound - left);
                if self.look_out() {
                    return Exit::Stopped;
                }
                if let Some(trace) = &mut self.trace {
                    *trace = (trace.rotate_left(1) ^ self.hart.quick_fold()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                }
            }
            let mut ops = if pc >> 12 == self.here { cache.block(pc) } else { &[] };
            if ops.is_empty() {
                (self.hart.pc, self.icount) = (pc, bound - left);
                ops = match self.enter(cache, pc) {
                    Ok(None) => cache.block(pc),
                    Ok(Some(op)) => {
                        single = op;
                        std::slice::from_ref(&single)
                    }
                    Err(trap) => {
                        left -= 1;
                        self.stop_clock();
                        pc = self.trap(trap);
                        continue;
                    }
                };
            }
            let cut;
            let room = if TRACE { 1 } else { left };
            if ops.len() as u64 > room {
                cut = code::cut(ops, room as usize);
                ops = &cut;
            }
            left = left.wrapping_sub(ops.len() as u64);
            let page = pc & !0xfff;
            let mut rest = ops.iter();
            // The operation, the values of its two registers, its immediate, and what three in
            // four operations want: register plus immediate.
            let (mut op, mut a, mut b, mut imm, mut at);
            macro_rules! next {
                () => {
                    op = match rest.next() {
                        Some(next) => next,
                        None => break ops.last().map_or(pc, |last| page.wrapping_add(u64::from(last.next))),
                    };
                    imm = op.imm as i64 as u64;
                    (a, b) = (self.x(op.rs1), self.x(op.rs2));
                    at = a.wrapping_add(imm);
                };
            }
            // What goes elsewhere is the last of its block.
            macro_rules! branch {
                ($is_taken:expr) => { break page.wrapping_add(if $is_taken { imm } else { u64::from(op.next) }) };
            }
            macro_rules! jump {
                ($to:expr) => {{ self.set(op.rd, page.wrapping_add(u64::from(op.next))); break $to }};
            }
            macro_rules! store {
                ($bytes:literal) => {{ if self.store_known::<$bytes>(at, b) { continue } None }};
            }
            // The value for `rd`; `None`, if there is more to do than can be done here.
            macro_rules! run {
                (Auipc) => { Some(page.wrapping_add(imm)) };
                (Jal) => { jump!(page.wrapping_add(imm)) };
                (Jalr) => { jump!(at & !1) };
                (Beq) => { branch!(a == b) };
                (Bne) => { branch!(a != b) };
                (Bge) => { branch!(a as i64 >= b as i64) };
                (Bltu) => { branch!(a < b) };
                (Lw) => { self.load_known::<4>(at).map(|v| v as i32 as u64) };
                (Ld) => { self.load_known::<8>(at) };
                (Lbu) => { self.load_known::<1>(at) };
                (Sb) => { store!(1) };
                (Sw) => { store!(4) };
                (Sd) => { store!(8) };
                (Addi) => { Some(at) };
                (Andi) => { Some(a & imm) };
                (Slli) => { Some(a << (imm & 63)) };
                (Srli) => { Some(a >> (imm & 63)) };
                (Add) => { Some(a.wrapping_add(b)) };
                (Xor) => { Some(a ^ b) };
                (Or) => { Some(a | b) };
                (Addiw) => { Some(at as i32 as u64) };
                (Slliw) => { Some(((a as u32) << (imm & 31)) as i32 as u64) };
                (Srliw) => { Some((a as u32 >> (imm & 31)) as i32 as u64) };
                (Addw) => { Some(a.wrapping_add(b) as i32 as u64) };
                (Mulw) => { Some(a.wrapping_mul(b) as i32 as u64) };
            }
            // Whether the first of a pair is done.
            macro_rules! first {
                (Sb) => { self.store_known::<1>(at, b) };
                (Sw) => { self.store_known::<4>(at, b) };
                (Sd) => { self.store_known::<8>(at, b) };
                ($code:ident) => { match run!($code) { Some(value) => { self.set(op.rd, value); true } None => false } };
            }
            macro_rules! pair {
                ($first:ident, $second:ident) => { if first!($first) { next!(); run!($second) } else { None } };
            }
            pc = loop {
                next!();
                use Code::*;
                let value = match op.run {
                    Lui => Some(imm),
                    Auipc => run!(Auipc),
                    Jal => run!(Jal),
                    Jalr => run!(Jalr),
                    Beq => run!(Beq),
                    Bne => run!(Bne),
                    Blt => branch!((a as i64) < b as i64),
                    Bge => run!(Bge),
                    Bltu => run!(Bltu),
                    Bgeu => branch!(a >= b),
                    Lb => self.load_known::<1>(at).map(|v| v as i8 as u64),
                    Lh => self.load_known::<2>(at).map(|v| v as i16 as u64),
                    Lw => run!(Lw),
                    Ld => run!(Ld),
                    Lbu => run!(Lbu),
                    Lhu => self.load_known::<2>(at),
                    Lwu => self.load_known::<4>(at),
                    Sb => run!(Sb),
                    Sh => store!(2),
                    Sw => run!(Sw),
                    Sd => run!(Sd),
                    Addi => run!(Addi),
                    Slti => Some(u64::from((a as i64) < imm as i64)),
                    Sltiu => Some(u64::from(a < imm)),
                    Xori => Some(a ^ imm),
                    Ori => Some(a | imm),
                    Andi => run!(Andi),
                    Slli => run!(Slli),
                    Srli => run!(Srli),
                    Srai => Some((a as i64 >> (imm & 63)) as u64),
                    Add => run!(Add),
                    Sub => Some(a.wrapping_sub(b)),
                    Sll => Some(a << (b & 63)),
                    Slt => Some(u64::from((a as i64) < b as i64)),
                    Sltu => Some(u64::from(a < b)),
                    Xor => run!(Xor),
                    Srl => Some(a >> (b & 63)),
                    Sra => Some((a as i64 >> (b & 63)) as u64),
                    Or => run!(Or),
                    And => Some(a & b),
                    Addiw => run!(Addiw),
                    Slliw => run!(Slliw),
                    Srliw => run!(Srliw),
                    Sraiw => Some((a as i32 >> (imm & 31)) as u64),
                    Addw => run!(Addw),
                    Subw => Some(a.wrapping_sub(b) as i32 as u64),
                    Sllw => Some(((a as u32) << (b & 31)) as i32 as u64),
                    Srlw => Some((a as u32 >> (b & 31)) as i32 as u64),
                    Sraw => Some((a as i32 >> (b & 31)) as u64),
                    Mul => Some(a.wrapping_mul(b)),
                    Mulh => Some(((a as i64 as i128 * b as i64 as i128) >> 64) as u64),
                    Mulhsu => Some(((a as i64 as i128).wrapping_mul(b as i128) >> 64) as u64),
                    Mulhu => Some(((a as u128 * b as u128) >> 64) as u64),
                    Div => Some(divide_signed(a as i64, b as i64) as u64),
                    Divu => Some(a.checked_div(b).unwrap_or(u64::MAX)),
                    Rem => Some(remainder_signed(a as i64, b as i64) as u64),
                    Remu => Some(a.checked_rem(b).unwrap_or(a)),
                    Mulw => run!(Mulw),
                    Divw => Some(divide_signed(a as i32 as i64, b as i32 as i64) as i32 as u64),
                    Divuw => Some((a as u32).checked_div(b as u32).unwrap_or(u32::MAX) as i32 as u64),
                    Remw => Some(remainder_signed(a as i32 as i64, b as i32 as i64) as i32 as u64),
                    Remuw => Some((a as u32).checked_rem(b as u32).unwrap_or(a as u32) as i32 as u64),
                    Fence => continue,
                    AddiAddi => pair!(Addi, Addi), AddAdd => pair!(Add, Add), XorXor => pair!(Xor, Xor),
                    SrliwSlliw => pair!(Srliw, Slliw), AddwAddw => pair!(Addw, Addw),
                    AddwSrliw => pair!(Addw, Srliw), SlliSrli => pair!(Slli, Srli),
                    SrliSlli => pair!(Srli, Slli), SlliAdd => pair!(Slli, Add), SrliAdd => pair!(Srli, Add),
                    XorOr => pair!(Xor, Or), OrOr => pair!(Or, Or), OrXor => pair!(Or, Xor),
                    SlliwOr => pair!(Slliw, Or), SlliOr => pair!(Slli, Or), OrAddw => pair!(Or, Addw),
                    AddwOr => pair!(Addw, Or), XorAddw => pair!(Xor, Addw), MulwAddw => pair!(Mulw, Addw),
                    AddiMulw => pair!(Addi, Mulw), XorAndi => pair!(Xor, Andi),
                    SrliwAddi => pair!(Srliw, Addi), AndiSlli => pair!(Andi, Slli),
                    AddiXor => pair!(Addi, Xor), AddiAdd => pair!(Addi, Add), AddAddi => pair!(Add, Addi),
                    AddiAddw => pair!(Addi, Addw), AddiAddiw => pair!(Addi, Addiw),
                    XorAddiw => pair!(Xor, Addiw), AddiAndi => pair!(Addi, Andi), LwAddi => pair!(Lw, Addi),
                    LdAdd => pair!(Ld, Add), LdAddi => pair!(Ld, Addi), LwXor => pair!(Lw, Xor),
                    LbuAddi => pair!(Lbu, Addi), LbuAndi => pair!(Lbu, Andi), LbuSrliw => pair!(Lbu, Srliw),
                    LdXor => pair!(Ld, Xor), LdOr => pair!(Ld, Or), LwLw => pair!(Lw, Lw),
                    LdLd => pair!(Ld, Ld), LbuLbu => pair!(Lbu, Lbu), LdSd => pair!(Ld, Sd),
                    AddLw => pair!(Add, Lw), AddLd => pair!(Add, Ld), AddLbu => pair!(Add, Lbu),
                    AddiLd => pair!(Addi, Ld), AddiLw => pair!(Addi, Lw), AddiSd => pair!(Addi, Sd),
                    AddiSw => pair!(Addi, Sw), SdSd => pair!(Sd, Sd), SdLd => pair!(Sd, Ld),
                    SdAddi => pair!(Sd, Addi), SwAddi => pair!(Sw, Addi), SbSb => pair!(Sb, Sb),
                    AddwBne => pair!(Addw, Bne), AddiBne => pair!(Addi, Bne), AddiBeq => pair!(Addi, Beq),
                    AddiBltu => pair!(Addi, Bltu), AndiBne => pair!(Andi, Bne), AndiBeq => pair!(Andi, Beq),
                    AddBeq => pair!(Add, Beq), AddBge => pair!(Add, Bge), AddiwBne => pair!(Addiw, Bne),
                    LdBne => pair!(Ld, Bne), LdBeq => pair!(Ld, Beq), LbuBne => pair!(Lbu, Bne),
                    LbuBeq => pair!(Lbu, Beq), SbBne => pair!(Sb, Bne), AddJal => pair!(Add, Jal),
                    AddiJal => pair!(Addi, Jal), AddiJalr => pair!(Addi, Jalr),
                    AuipcJalr => pair!(Auipc, Jalr),
                    // Calls, so that code without these extensions pays for none of them.
                    code if code.is_bit_operation() => Some(bits::execute(code, a, b, imm)),
                    _ => None,
                };
                let Some(value) = value else {
                    let next = page.wrapping_add(u64::from(op.next));
                    let done = (std::ptr::from_ref(op).addr() - ops.as_ptr().addr()) / size_of::<Op>();
                    let behind = (ops.len() - done - 1) as u64;
                    self.hart.pc = next.wrapping_sub(u64::from(op.len));
                    self.icount = bound - left - behind - 1;
                    match self.execute(*op, next, outside) {
                        Ok(to) if to == next && !self.attention && self.here == page >> 12 => continue,
                        Ok(to) => {
                            left += behind;
                            break to;
                        }
                        Err(trap) => {
                            left += behind;
                            if !op.code.traps_by_itself(&self.hart) {
                                self.stop_clock();
                            }
                            break self.trap(trap);
                        }
                    }
                };
                self.set(op.rd, value);
            };
        }
    }

    /// No virtual time passes for an instruction that was begun and could not be done: on QEMU
    /// it does not count. Here it does, so that a machine that does nothing but trap comes to
    /// the end of its run, and every icount is one place in its execution.
    fn stop_clock(&mut self) {
        self.faults += 1;
        self.clock.bias = self.clock.bias.wrapping_sub(1 << self.clock.shift);
    }

    /// The handler's pc.
    fn trap(&mut self, trap: Trap) -> u64 {
        self.hart.enter_trap(trap.cause, trap.tval);
        self.update_paging();
        self.hart.pc
    }

    /// Enters pc's page and decodes the block there, or the instruction alone, if it can't be
    /// kept: only it is known to be executable, not its page, or it ends in the next page.
    #[inline(never)]
    fn enter(&mut self, cache: &mut CodeCache, pc: u64) -> Result<Option<Op>, Trap> {
        let ppn = self.fetch_ppn(pc)?;
        if self.ram.has_stale_code() {
            // The walk has set A in a page that was executed; it may be this one.
            cache.forget(self.ram.take_stale_code());
            self.see_tohost();
        }
        let at = pc as usize & 0xfff;
        if self.hart.fetch_page.is_none() {
            self.here = NO_PAGE;
            return Ok(Some(super::decode::decode(self.fetch_bits(pc)?).placed(at)));
        }
        let from = (ppn << 12).wrapping_sub(RAM_BASE);
        let ram_page = (from >> 12) as u32;
        let Some(bytes) = self.ram.slice(from, 4096) else {
            // Of ROM, or a fault.
            let bits = self.fetch_bits(pc)?;
            self.here = NO_PAGE;
            return Ok(Some(super::decode::decode(bits).placed(at)));
        };
        cache.enter(ram_page);
        self.here = pc >> 12;
        if cache.block(pc).is_empty() {
            if !cache.decode_block(ram_page, bytes, at) {
                return Ok(Some(super::decode::decode(self.fetch_bits(pc)?).placed(at)));
            }
            if self.ram.mark_code(ram_page) {
                self.fast.forget_stores_to(ram_page as usize);
            }
        }
        Ok(None)
    }
}
