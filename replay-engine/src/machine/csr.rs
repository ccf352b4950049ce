//! Control and status registers.

use super::Machine;
use super::hart::{Hart, Mode, envcfg, inhibit, irq, status};

/// RV64GC (ACDFIM) with S and U.
const MISA: u64 = 2 << 62 | 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8 | 1 << 12 | 1 << 18 | 1 << 20;
/// Exceptions that can be delegated: all but M-mode's own environment call.
const MEDELEG: u64 = 0xb3ff;
const SATP_SV39: u64 = 8;
/// `fcsr`'s lower part; `frm` is the rest.
const FFLAGS: u8 = 0x1f;
const FRM_SHIFT: u32 = 5;
/// TM of `mcounteren`.
const TIME: u64 = 1 << 1;
/// `tinfo` of a trigger that is not there: `tselect` stays at the first one, whose `tdata1` has
/// type 0. A program that looks for triggers finds none, and does not trap on the way.
const NO_TRIGGER: u64 = 1;

impl Machine {
    /// Reads a CSR; `None` is an illegal instruction.
    pub(super) fn csr_read(&self, csr: u32) -> Option<u64> {
        let h = &self.hart;
        if Mode::from_bits(u64::from(csr >> 8 & 3)) > h.mode {
            return None;
        }
        Some(match csr {
            0x001..=0x003 if h.mstatus & status::FS == 0 => return None,
            0x001 => u64::from(h.fcsr & FFLAGS),
            0x002 => u64::from(h.fcsr >> FRM_SHIFT),
            0x003 => u64::from(h.fcsr),
            0x100 => h.status() & (status::SSTATUS | status::SD),
            0x104 => h.mie & h.mideleg,
            0x105 => h.stvec,
            0x106 => h.scounteren,
            0x10a => h.senvcfg,
            0x140 => h.sscratch,
            0x141 => h.sepc,
            0x142 => h.scause,
            0x143 => h.stval,
            0x144 => h.mip() & h.mideleg,
            0x14d if !may_compare(h) => return None,
            0x14d => h.stimecmp,
            0x180 if self.satp_is_trapped() => return None,
            0x180 => h.satp,
            0x300 => h.status(),
            0x301 => MISA,
            0x302 => h.medeleg,
            0x303 => h.mideleg,
            0x304 => h.mie,
            0x305 => h.mtvec,
            0x306 => h.mcounteren,
            0x30a => h.menvcfg,
            0x320 => h.mcountinhibit,
            0x323..=0x33f => 0,
            0x340 => h.mscratch,
            0x341 => h.mepc,
            0x342 => h.mcause,
            0x343 => h.mtval,
            0x344 => h.mip(),
            0x3a0 | 0x3a2 => h.pmp.configs((csr & 3) as usize * 4),
            0x3b0..=0x3bf => h.pmp.address((csr & 15) as usize),
            0x7a0..=0x7a3 => 0,
            0x7a4 => NO_TRIGGER,
            0xb00 => h.cycle(self.icount),
            0xb02 => h.instret(self.icount),
            0xb03 => h.kicks,
            0xb04..=0xb1f => 0,
            0xc00..=0xc1f => return self.user_counter(csr),
            0xf14 => self.current_hart() as u64,
            0xf11..=0xf13 | 0xf15 => 0,
            _ => return None,
        })
    }

    fn user_counter(&self, csr: u32) -> Option<u64> {
        let h = &self.hart;
        let bit = 1 << (csr & 31);
        let allowed = (h.mode == Mode::Machine || h.mcounteren & bit != 0)
            && (h.mode != Mode::User || h.scounteren & bit != 0);
        if !allowed {
            return None;
        }
        Some(match csr {
            0xc00 => h.cycle(self.icount),
            0xc01 => self.mtime(),
            0xc02 => h.instret(self.icount),
            0xc03 => h.kicks,
            _ => 0,
        })
    }

    fn satp_is_trapped(&self) -> bool {
        self.hart.mode == Mode::Supervisor && self.hart.mstatus & status::TVM != 0
    }

    /// Writes a CSR; `None` is an illegal instruction.
    pub(super) fn csr_write(&mut self, csr: u32, value: u64) -> Option<()> {
        if csr >> 10 == 3 || Mode::from_bits(u64::from(csr >> 8 & 3)) > self.hart.mode {
            return None;
        }
        let icount = self.icount;
        if (0x001..=0x003).contains(&csr) {
            return self.write_float_csr(csr, value as u8);
        }
        let h = &mut self.hart;
        let masked = |old: u64, mask: u64| old & !mask | value & mask;
        match csr {
            0x100 => h.mstatus = masked(h.mstatus, status::SSTATUS & !(3 << 32)),
            0x104 => h.mie = masked(h.mie, h.mideleg),
            0x105 => h.stvec = value & !2,
            0x106 => h.scounteren = value & 0xffff_ffff,
            0x10a => h.senvcfg = value & envcfg::FIOM,
            0x140 => h.sscratch = value,
            0x141 => h.sepc = value & !1,
            0x142 => h.scause = value,
            0x143 => h.stval = value,
            0x144 => h.mip_soft = masked(h.mip_soft, h.mideleg & irq::SSI),
            0x14d if !may_compare(h) => return None,
            0x14d => {
                h.stimecmp = value;
                self.follow_stimecmp();
            }
            0x180 => self.write_satp(value)?,
            0x300 => self.write_mstatus(value),
            0x301 | 0x323..=0x33f | 0x7a0..=0x7a4 | 0xb03..=0xb1f => {}
            0x302 => h.medeleg = value & MEDELEG,
            0x303 => h.mideleg = value & irq::SUPERVISOR,
            0x304 => h.mie = value & irq::ALL,
            0x305 => h.mtvec = value & !2,
            0x306 => h.mcounteren = value & 0xffff_ffff,
            0x30a => {
                h.menvcfg = value & (envcfg::FIOM | envcfg::ADUE | envcfg::STCE);
                self.follow_stimecmp();
            }
            // As if behind this instruction: the next one reads what is written to a counter,
            // or where it stopped.
            0x320 => h.inhibit_counters(value, icount + 1),
            0x340 => h.mscratch = value,
            0x341 => h.mepc = value & !1,
            0x342 => h.mcause = value,
            0x343 => h.mtval = value,
            0x344 if h.menvcfg & envcfg::STCE != 0 => {
                h.mip_soft = masked(h.mip_soft, irq::SUPERVISOR & !irq::STI);
            }
            0x344 => h.mip_soft = value & irq::SUPERVISOR,
            0x3a0 | 0x3a2 => {
                h.pmp.set_configs((csr & 3) as usize * 4, value);
                self.follow_pmp();
            }
            0x3b0..=0x3bf => {
                h.pmp.set_address((csr & 15) as usize, value);
                self.follow_pmp();
            }
            0xb00 => h.cycle_offset = value.wrapping_sub(h.counted(inhibit::CY, icount + 1)),
            0xb02 => h.instret_offset = value.wrapping_sub(h.counted(inhibit::IR, icount + 1)),
            _ => return None,
        }
        self.update_paging();
        Some(())
    }

    /// No mode or translation depends on these: nothing more is to be updated.
    fn write_float_csr(&mut self, csr: u32, value: u8) -> Option<()> {
        let h = &mut self.hart;
        if h.mstatus & status::FS == 0 {
            return None;
        }
        h.fcsr = match csr {
            0x001 => h.fcsr & !FFLAGS | value & FFLAGS,
            0x002 => h.fcsr & FFLAGS | value << FRM_SHIFT,
            _ => value,
        };
        h.mstatus |= status::FS;
        Some(())
    }

    fn write_mstatus(&mut self, value: u64) {
        let mask = status::SIE
            | status::MIE
            | status::SPIE
            | status::MPIE
            | status::SPP
            | status::MPP
            | status::FS
            | status::MPRV
            | status::SUM
            | status::MXR
            | status::TVM
            | status::TW
            | status::TSR;
        let mut value = value & mask;
        if value & status::MPP == 2 << status::MPP_SHIFT {
            value = value & !status::MPP | self.hart.mstatus & status::MPP;
        }
        self.hart.mstatus = value | status::XL;
    }

    fn write_satp(&mut self, value: u64) -> Option<()> {
        if self.satp_is_trapped() {
            return None;
        }
        let mode = value >> 60;
        // Writing an unsupported mode changes nothing.
        if (mode == 0 || mode == SATP_SV39) && value != self.hart.satp {
            self.hart.satp = value;
            self.flush_translations();
        }
        Some(())
    }
}

/// Whether `stimecmp` is there for this mode.
fn may_compare(hart: &Hart) -> bool {
    hart.mode == Mode::Machine || (hart.mcounteren & TIME != 0 && hart.menvcfg & envcfg::STCE != 0)
}
