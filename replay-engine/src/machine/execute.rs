//! Executing one instruction.

use super::decode::{Code, Op, decode};
use super::hart::{Mode, Trap, status};
use super::memory::Access;
use super::{Machine, Outside, RAM_BASE, bits};

const ILLEGAL: u64 = 2;
const BREAKPOINT: u64 = 3;

impl Machine {
    /// Executes the instruction at `pc`, which is also in the hart; the next one's place.
    #[inline(always)]
    pub(super) fn step(&mut self, pc: u64, outside: &mut dyn Outside) -> Result<u64, Trap> {
        let op = match self.code.at(pc) {
            Some((_, op)) if op.code != Code::Undecoded => op,
            _ => self.fetch_slow(pc)?,
        };
        self.execute(op, pc, outside)
    }

    /// Enters pc's page and decodes the instruction there.
    #[cold]
    fn fetch_slow(&mut self, pc: u64) -> Result<Op, Trap> {
        let ppn = self.fetch_ppn(pc)?;
        let op = decode(self.fetch_bits(pc)?);
        if self.hart.fetch_page.is_none() {
            // Only the instruction is known to be executable, not its page.
            self.code.leave();
            return Ok(op);
        }
        let ram_page = (ppn << 12).wrapping_sub(RAM_BASE) >> 12;
        self.code.enter(pc >> 12, ram_page as u32);
        // One that crosses into the next page depends on that page's mapping too.
        let crosses = op.len == 4 && pc & 0xfff == 0xffe;
        if !crosses && let Some((slot, _)) = self.code.at(pc) {
            self.code.set(slot, op);
            self.ram.mark_code(ram_page as u32);
        }
        Ok(op)
    }

    #[inline(always)]
    pub(super) fn x(&self, n: u8) -> u64 {
        self.hart.x[n as usize & 63]
    }

    #[inline(always)]
    pub(super) fn set(&mut self, n: u8, value: u64) {
        self.hart.x[n as usize & 63] = value;
    }

    #[inline(always)]
    #[rustfmt::skip]
    fn execute(&mut self, op: Op, pc: u64, outside: &mut dyn Outside) -> Result<u64, Trap> {
        use Code::*;
        let imm = op.imm as i64 as u64;
        let a = self.x(op.rs1);
        let next = pc.wrapping_add(u64::from(op.len));
        let target = pc.wrapping_add(imm);
        let at = a.wrapping_add(imm);
        let value = match op.code {
            Lui => imm,
            Auipc => target,
            Jal => { self.set(op.rd, next); return Ok(target); }
            Jalr => { self.set(op.rd, next); return Ok(at & !1); }
            Beq => return Ok(if a == self.x(op.rs2) { target } else { next }),
            Bne => return Ok(if a != self.x(op.rs2) { target } else { next }),
            Blt => return Ok(if (a as i64) < self.x(op.rs2) as i64 { target } else { next }),
            Bge => return Ok(if a as i64 >= self.x(op.rs2) as i64 { target } else { next }),
            Bltu => return Ok(if a < self.x(op.rs2) { target } else { next }),
            Bgeu => return Ok(if a >= self.x(op.rs2) { target } else { next }),
            Lb => self.load::<1>(at, outside)? as i8 as u64,
            Lh => self.load::<2>(at, outside)? as i16 as u64,
            Lw => self.load::<4>(at, outside)? as i32 as u64,
            Ld => self.load::<8>(at, outside)?,
            Lbu => self.load::<1>(at, outside)?,
            Lhu => self.load::<2>(at, outside)?,
            Lwu => self.load::<4>(at, outside)?,
            Sb => { self.store::<1>(at, self.x(op.rs2), outside)?; return Ok(next); }
            Sh => { self.store::<2>(at, self.x(op.rs2), outside)?; return Ok(next); }
            Sw => { self.store::<4>(at, self.x(op.rs2), outside)?; return Ok(next); }
            Sd => { self.store::<8>(at, self.x(op.rs2), outside)?; return Ok(next); }
            Addi => at,
            Slti => u64::from((a as i64) < imm as i64),
            Sltiu => u64::from(a < imm),
            Xori => a ^ imm,
            Ori => a | imm,
            Andi => a & imm,
            Slli => a << (imm & 63),
            Srli => a >> (imm & 63),
            Srai => (a as i64 >> (imm & 63)) as u64,
            Add => a.wrapping_add(self.x(op.rs2)),
            Sub => a.wrapping_sub(self.x(op.rs2)),
            Sll => a << (self.x(op.rs2) & 63),
            Slt => u64::from((a as i64) < self.x(op.rs2) as i64),
            Sltu => u64::from(a < self.x(op.rs2)),
            Xor => a ^ self.x(op.rs2),
            Srl => a >> (self.x(op.rs2) & 63),
            Sra => (a as i64 >> (self.x(op.rs2) & 63)) as u64,
            Or => a | self.x(op.rs2),
            And => a & self.x(op.rs2),
            Addiw => at as i32 as u64,
            Slliw => ((a as u32) << (imm & 31)) as i32 as u64,
            Srliw => (a as u32 >> (imm & 31)) as i32 as u64,
            Sraiw => (a as i32 >> (imm & 31)) as u64,
            Addw => a.wrapping_add(self.x(op.rs2)) as i32 as u64,
            Subw => a.wrapping_sub(self.x(op.rs2)) as i32 as u64,
            Sllw => ((a as u32) << (self.x(op.rs2) & 31)) as i32 as u64,
            Srlw => (a as u32 >> (self.x(op.rs2) & 31)) as i32 as u64,
            Sraw => (a as i32 >> (self.x(op.rs2) & 31)) as u64,
            Mul => a.wrapping_mul(self.x(op.rs2)),
            Mulh => ((a as i64 as i128 * self.x(op.rs2) as i64 as i128) >> 64) as u64,
            Mulhsu => ((a as i64 as i128).wrapping_mul(self.x(op.rs2) as i128) >> 64) as u64,
            Mulhu => ((a as u128 * self.x(op.rs2) as u128) >> 64) as u64,
            Div => divide_signed(a as i64, self.x(op.rs2) as i64) as u64,
            Divu => a.checked_div(self.x(op.rs2)).unwrap_or(u64::MAX),
            Rem => remainder_signed(a as i64, self.x(op.rs2) as i64) as u64,
            Remu => a.checked_rem(self.x(op.rs2)).unwrap_or(a),
            Mulw => a.wrapping_mul(self.x(op.rs2)) as i32 as u64,
            Divw => divide_signed(a as i32 as i64, self.x(op.rs2) as i32 as i64) as i32 as u64,
            Divuw => (a as u32).checked_div(self.x(op.rs2) as u32).unwrap_or(u32::MAX) as i32 as u64,
            Remw => remainder_signed(a as i32 as i64, self.x(op.rs2) as i32 as i64) as i32 as u64,
            Remuw => (a as u32).checked_rem(self.x(op.rs2) as u32).unwrap_or(a as u32) as i32 as u64,
            Fence => return Ok(next),
            // Calls, so that code without these extensions pays for none of them.
            _ if op.code.is_bit_operation() => bits::execute(op.code, a, self.x(op.rs2), imm),
            _ if op.code.is_float() => return self.execute_float(op, pc, next, outside),
            _ => return self.execute_rare(op, pc, next, outside),
        };
        self.set(op.rd, value);
        Ok(next)
    }

    /// Atomics, CSRs and privileged instructions: everything that is seldom or slow.
    #[inline(never)]
    fn execute_rare(&mut self, op: Op, pc: u64, next: u64, outside: &mut dyn Outside) -> Result<u64, Trap> {
        use Code::*;
        let code = op.code as u8;
        match op.code {
            LrW | LrD | ScW | ScD => self.reserve(op)?,
            _ if (AmoswapW as u8..=AmomaxuW as u8).contains(&code) => self.atomic::<4>(op, outside)?,
            _ if (AmoswapD as u8..=AmomaxuD as u8).contains(&code) => self.atomic::<8>(op, outside)?,
            Csrrw | Csrrs | Csrrc | Csrrwi | Csrrsi | Csrrci => {
                self.csr(op).ok_or_else(|| self.illegal(pc))?;
            }
            Ecall => return Err(Trap { cause: 8 + self.hart.mode as u64, tval: 0 }),
            Ebreak => return Err(Trap { cause: BREAKPOINT, tval: pc }),
            FenceI => {
                // Stores outdate decoded code at once: only the fetch translation is renewed.
                self.hart.fetch_page = None;
                self.code.leave();
            }
            Mret if self.hart.mode == Mode::Machine => {
                self.hart.return_machine();
                self.update_paging();
                return Ok(self.hart.mepc);
            }
            Sret if self.may(status::TSR) => {
                self.hart.return_supervisor();
                self.update_paging();
                return Ok(self.hart.sepc);
            }
            Pause => self.end_turn(),
            Wfi if self.may(status::TW) => {
                self.hart.is_idle = !self.hart.has_wakeup();
                self.attention = true;
            }
            SfenceVma if self.may(status::TVM) => {
                // For whichever address space: TLB entries name none.
                match op.rs1 {
                    0 => self.flush_translations(),
                    register => {
                        self.hart.flush_page(self.x(register));
                        self.fast.forget();
                    }
                }
                self.update_paging();
            }
            _ => return Err(self.illegal(pc)),
        }
        Ok(next)
    }

    /// The instruction at `pc` is illegal: the trap value has its bits.
    #[cold]
    pub(super) fn illegal(&mut self, pc: u64) -> Trap {
        Trap { cause: ILLEGAL, tval: self.fetch_bits(pc).map_or(0, u64::from) }
    }

    /// Whether a supervisor instruction is allowed that `trap_bit` of `mstatus` can forbid.
    fn may(&self, trap_bit: u64) -> bool {
        match self.hart.mode {
            Mode::Machine => true,
            Mode::Supervisor => self.hart.mstatus & trap_bit == 0,
            Mode::User => false,
        }
    }

    fn csr(&mut self, op: Op) -> Option<()> {
        use Code::*;
        let csr = op.imm as u32 & 0xfff;
        let operand = match op.code {
            Csrrwi | Csrrsi | Csrrci => u64::from(op.rs1),
            _ => self.x(op.rs1),
        };
        let replaces = matches!(op.code, Csrrw | Csrrwi);
        let old = self.csr_read(csr);
        let new = match op.code {
            Csrrw | Csrrwi => operand,
            Csrrs | Csrrsi => self.writable_value(csr, old?) | operand,
            _ => self.writable_value(csr, old?) & !operand,
        };
        if replaces || op.rs1 != 0 {
            self.csr_write(csr, new)?;
        }
        self.set(op.rd, old?);
        Some(())
    }

    /// `mip`'s SEIP reads as software's bit or the device's; read-modify-write uses software's.
    fn writable_value(&self, csr: u32, old: u64) -> u64 {
        if csr == 0x344 { self.hart.mip_soft } else { old }
    }

    fn reserve(&mut self, op: Op) -> Result<(), Trap> {
        use Code::*;
        let is_load = matches!(op.code, LrW | LrD);
        let size = if matches!(op.code, LrW | ScW) { 4 } else { 8 };
        let access = if is_load { Access::Load } else { Access::Store };
        let va = self.x(op.rs1);
        if va % size != 0 {
            return Err(access.misaligned(va));
        }
        let at = self.translate(va, access, size)?.wrapping_sub(RAM_BASE);
        let read = |machine: &Machine| match size {
            4 => machine.ram.load::<4>(at).map(|v| v as i32 as u64),
            _ => machine.ram.load::<8>(at),
        };
        let now = read(self).ok_or(access.access_fault(va))?;
        if is_load {
            self.hart.reservation = Some((at, now));
            self.set(op.rd, now);
            return Ok(());
        }
        // As QEMU: the store succeeds if address and value are still those loaded.
        let succeeds = self.hart.reservation.take() == Some((at, now));
        if succeeds {
            let value = self.x(op.rs2);
            let stored = match size {
                4 => self.ram.store::<4>(at, value),
                _ => self.ram.store::<8>(at, value),
            };
            stored.ok_or(access.access_fault(va))?;
            self.attention |= self.ram.has_stale_code();
        }
        self.set(op.rd, u64::from(!succeeds));
        Ok(())
    }

    fn atomic<const N: usize>(&mut self, op: Op, outside: &mut dyn Outside) -> Result<(), Trap> {
        use Code::*;
        let va = self.x(op.rs1);
        if va as usize % N != 0 {
            return Err(Access::Store.misaligned(va));
        }
        // Both rights are those of a store: a page that can't be written faults as one.
        self.translate(va, Access::Store, N as u64)?;
        let raw = self.load::<N>(va, outside).map_err(|_| Access::Store.access_fault(va))?;
        let (old, value) = if N == 4 {
            (raw as i32 as i64, self.x(op.rs2) as i32 as i64)
        } else {
            (raw as i64, self.x(op.rs2) as i64)
        };
        let unsigned = |v: i64| if N == 4 { u64::from(v as u32) } else { v as u64 };
        let new = match op.code {
            AmoswapW | AmoswapD => value,
            AmoaddW | AmoaddD => old.wrapping_add(value),
            AmoxorW | AmoxorD => old ^ value,
            AmoandW | AmoandD => old & value,
            AmoorW | AmoorD => old | value,
            AmominW | AmominD => old.min(value),
            AmomaxW | AmomaxD => old.max(value),
            AmominuW | AmominuD => {
                if unsigned(old) <= unsigned(value) {
                    old
                } else {
                    value
                }
            }
            _ => {
                if unsigned(old) >= unsigned(value) {
                    old
                } else {
                    value
                }
            }
        };
        self.store::<N>(va, new as u64, outside)?;
        self.set(op.rd, old as u64);
        Ok(())
    }
}

fn divide_signed(a: i64, b: i64) -> i64 {
    if b == 0 { -1 } else { a.wrapping_div(b) }
}

fn remainder_signed(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { a.wrapping_rem(b) }
}
