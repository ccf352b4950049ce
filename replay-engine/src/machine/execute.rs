//! Executing what the inner loop leaves: what can trap, wait or reach a device.

use super::decode::{Code, Op};
use super::hart::{Mode, Trap, status};
use super::memory::Access;
use super::run::NO_PAGE;
use super::{Machine, Outside, RAM_BASE};

const ILLEGAL: u64 = 2;
const BREAKPOINT: u64 = 3;

impl Machine {
    #[inline(always)]
    pub(super) fn x(&self, n: u8) -> u64 {
        self.hart.x[n as usize]
    }

    #[inline(always)]
    pub(super) fn set(&mut self, n: u8, value: u64) {
        self.hart.x[n as usize] = value;
    }

    /// Executes an instruction that the inner loop does not: pc and icount are the hart's, `next`
    /// is the place behind it. Where to go on.
    #[inline(never)]
    pub(super) fn execute(&mut self, op: Op, next: u64, outside: &mut dyn Outside) -> Result<u64, Trap> {
        use Code::*;
        let pc = self.hart.pc;
        let at = self.x(op.rs1).wrapping_add(op.imm as i64 as u64);
        let value = match op.code {
            Lb => self.load::<1>(at, outside)? as i8 as u64,
            Lh => self.load::<2>(at, outside)? as i16 as u64,
            Lw => self.load::<4>(at, outside)? as i32 as u64,
            Ld => self.load::<8>(at, outside)?,
            Lbu => self.load::<1>(at, outside)?,
            Lhu => self.load::<2>(at, outside)?,
            Lwu => self.load::<4>(at, outside)?,
            Sb | Sh | Sw | Sd => {
                let value = self.x(op.rs2);
                match op.code {
                    Sb => self.store::<1>(at, value, outside)?,
                    Sh => self.store::<2>(at, value, outside)?,
                    Sw => self.store::<4>(at, value, outside)?,
                    _ => self.store::<8>(at, value, outside)?,
                }
                return Ok(next);
            }
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
                self.here = NO_PAGE;
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

pub(super) fn divide_signed(a: i64, b: i64) -> i64 {
    if b == 0 { -1 } else { a.wrapping_div(b) }
}

pub(super) fn remainder_signed(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { a.wrapping_rem(b) }
}
