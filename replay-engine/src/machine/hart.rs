//! A hart's architectural state: registers, CSRs, TLB, reservation.

use super::decode::SINK;
use super::pmp::Pmp;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::ops::{Deref, DerefMut};

/// Privilege modes by their encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Mode {
    User = 0,
    Supervisor = 1,
    Machine = 3,
}

impl Mode {
    /// From `mstatus.MPP`; the reserved value 2 is never stored.
    pub fn from_bits(bits: u64) -> Mode {
        match bits & 3 {
            0 => Mode::User,
            1 => Mode::Supervisor,
            _ => Mode::Machine,
        }
    }
}

/// Bits of `mip`/`mie`.
#[allow(missing_docs)]
pub mod irq {
    pub const SSI: u64 = 1 << 1;
    pub const MSI: u64 = 1 << 3;
    pub const STI: u64 = 1 << 5;
    pub const MTI: u64 = 1 << 7;
    pub const SEI: u64 = 1 << 9;
    pub const MEI: u64 = 1 << 11;
    pub const SUPERVISOR: u64 = SSI | STI | SEI;
    pub const ALL: u64 = SUPERVISOR | MSI | MTI | MEI;
}

/// Bits of `mstatus`.
#[allow(missing_docs)]
pub mod status {
    pub const SIE: u64 = 1 << 1;
    pub const MIE: u64 = 1 << 3;
    pub const SPIE: u64 = 1 << 5;
    pub const MPIE: u64 = 1 << 7;
    pub const SPP: u64 = 1 << 8;
    pub const MPP: u64 = 3 << 11;
    pub const MPP_SHIFT: u32 = 11;
    /// The state of floating point: off, initial, clean, or (all ones) dirty.
    pub const FS: u64 = 3 << 13;
    pub const MPRV: u64 = 1 << 17;
    pub const SUM: u64 = 1 << 18;
    pub const MXR: u64 = 1 << 19;
    pub const TVM: u64 = 1 << 20;
    pub const TW: u64 = 1 << 21;
    pub const TSR: u64 = 1 << 22;
    /// UXL and SXL, both 64-bit, read-only.
    pub const XL: u64 = 2 << 32 | 2 << 34;
    /// Some state is dirty; read-only, and made when it is read.
    pub const SD: u64 = 1 << 63;
    pub const SSTATUS: u64 = SIE | SPIE | SPP | FS | SUM | MXR | 3 << 32;
}

/// Bits of `menvcfg` and `senvcfg`; the extensions that have the others are not there.
#[allow(missing_docs)]
pub mod envcfg {
    /// Fences of devices order memory too, which here they always do.
    pub const FIOM: u64 = 1;
    /// A walk sets A and D of a page-table entry; without it an access that needs them set is a
    /// page fault, and they are software's (Svadu's, and Svade's).
    pub const ADUE: u64 = 1 << 61;
    /// `stimecmp` drives STIP.
    pub const STCE: u64 = 1 << 63;
}

/// Bits of `mcountinhibit`.
#[allow(missing_docs)]
pub mod inhibit {
    pub const CY: u64 = 1;
    pub const IR: u64 = 1 << 2;
}

/// An exception: what `*cause` and `*tval` will hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Exception code.
    pub cause: u64,
    /// Trap value.
    pub tval: u64,
}

/// Entries of the TLB; direct-mapped by the low bits of the page number.
pub const TLB_ENTRIES: usize = 256;

/// One translation. Guest-visible until `sfence.vma`, so part of every snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlbEntry {
    /// Virtual page number, `u64::MAX` for an empty entry.
    pub vpn: u64,
    /// Physical page number.
    pub ppn: u64,
    /// R 2, W 4, X 8, U 16 as in a PTE; W only once D is set, and none that PMP denies.
    pub permissions: u8,
    /// Of the leaf entry it was made from: 0 for a page of 4 KiB, 1 for 2 MiB, 2 for 1 GiB.
    pub level: u8,
}

impl TlbEntry {
    /// No translation.
    pub const EMPTY: TlbEntry = TlbEntry { vpn: u64::MAX, ppn: 0, permissions: 0, level: 0 };
}

/// The hart. Everything in here is state; nothing is a cache that may be dropped. Its registers
/// are at its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Hart {
    pub x: Registers,
    pub pc: u64,
    /// f0..f31; a binary32 has ones above it.
    pub f: [u64; 32],
    /// `frm` and `fflags`.
    pub fcsr: u8,
    pub mode: Mode,
    /// LR's physical address and the value loaded there.
    pub reservation: Option<(u64, u64)>,
    pub mstatus: u64,
    pub mie: u64,
    /// SSIP, STIP and SEIP as software wrote them.
    pub mip_soft: u64,
    /// MSIP, MTIP, MEIP and SEIP as the devices drive them, and STIP as `stimecmp` does.
    pub lines: u64,
    pub medeleg: u64,
    pub mideleg: u64,
    pub mtvec: u64,
    pub mepc: u64,
    pub mcause: u64,
    pub mtval: u64,
    pub mscratch: u64,
    pub mcounteren: u64,
    pub mcountinhibit: u64,
    pub menvcfg: u64,
    pub pmp: Pmp,
    pub stvec: u64,
    pub sepc: u64,
    pub scause: u64,
    pub stval: u64,
    pub sscratch: u64,
    pub scounteren: u64,
    pub senvcfg: u64,
    pub satp: u64,
    pub stimecmp: u64,
    /// `menvcfg.STCE` is set, and virtual time has come to `stimecmp`.
    pub stimecmp_passed: bool,
    /// Added to icount by `mcycle` and `minstret`; all they have while they are inhibited. They
    /// count what all harts execute, as QEMU's do under icount: a counter that stood still in
    /// other harts' turns would not be time for whoever takes it as that.
    pub cycle_offset: u64,
    pub instret_offset: u64,
    /// Waits in WFI.
    pub is_idle: bool,
    /// The iothread wants the hart out of its run, to look at its lines.
    pub kick_pending: bool,
    /// How often that happened: `mhpmcounter3`.
    pub kicks: u64,
    /// The page being fetched from: virtual and physical number.
    pub fetch_page: Option<(u64, u64)>,
    #[serde(serialize_with = "known")]
    pub tlb: Vec<TlbEntry>,
}

/// To people, the entries that there are.
fn known<S: Serializer>(tlb: &[TlbEntry], serializer: S) -> Result<S::Ok, S::Error> {
    if !serializer.is_human_readable() {
        return tlb.serialize(serializer);
    }
    serializer.collect_seq(tlb.iter().filter(|entry| **entry != TlbEntry::EMPTY))
}

/// Registers with the sink and padding: any byte is an index.
const REGISTERS: usize = 256;

/// x0..x31, then the sink of writes to x0, then padding, so that no index needs a check. The sink
/// is no state: only the 32 are compared, and serialized.
#[derive(Clone, Debug)]
pub struct Registers([u64; REGISTERS]);

impl Deref for Registers {
    type Target = [u64; REGISTERS];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Registers {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl PartialEq for Registers {
    fn eq(&self, other: &Registers) -> bool {
        self.0[..SINK as usize] == other.0[..SINK as usize]
    }
}

impl Eq for Registers {}

impl Serialize for Registers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0[..SINK as usize].serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Registers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Registers, D::Error> {
        let values = Vec::<u64>::deserialize(deserializer)?;
        let mut registers = [0; REGISTERS];
        if values.len() != SINK as usize {
            return Err(D::Error::custom(format!("a hart has 32 registers, not {}", values.len())));
        }
        registers[..SINK as usize].copy_from_slice(&values);
        Ok(Registers(registers))
    }
}

impl Hart {
    /// After reset, about to execute at `pc`.
    pub fn new(pc: u64) -> Hart {
        Hart {
            x: Registers([0; REGISTERS]),
            pc,
            f: [0; 32],
            fcsr: 0,
            mode: Mode::Machine,
            reservation: None,
            mstatus: status::XL,
            mie: 0,
            mip_soft: 0,
            lines: 0,
            medeleg: 0,
            mideleg: 0,
            mtvec: 0,
            mepc: 0,
            mcause: 0,
            mtval: 0,
            mscratch: 0,
            mcounteren: 0,
            mcountinhibit: 0,
            // As QEMU's hart begins: many kernels for it never set A and D.
            menvcfg: envcfg::ADUE,
            pmp: Pmp::default(),
            stvec: 0,
            sepc: 0,
            scause: 0,
            stval: 0,
            sscratch: 0,
            scounteren: 0,
            senvcfg: 0,
            satp: 0,
            stimecmp: u64::MAX,
            stimecmp_passed: false,
            cycle_offset: 0,
            instret_offset: 0,
            is_idle: false,
            kick_pending: false,
            kicks: 0,
            fetch_page: None,
            tlb: vec![TlbEntry::EMPTY; TLB_ENTRIES],
        }
    }

    /// `mstatus` as the guest reads it.
    pub fn status(&self) -> u64 {
        let is_dirty = self.mstatus & status::FS == status::FS;
        self.mstatus | if is_dirty { status::SD } else { 0 }
    }

    /// The tick that drives STIP; none, while `stimecmp` does not.
    pub(super) fn supervisor_compare(&self) -> Option<u64> {
        (self.menvcfg & envcfg::STCE != 0).then_some(self.stimecmp)
    }

    /// `mip` as the guest reads it.
    pub fn mip(&self) -> u64 {
        let mut soft = self.mip_soft;
        if self.menvcfg & envcfg::STCE != 0 {
            soft &= !irq::STI;
        }
        soft | self.lines
    }

    /// `mcycle`, read by the instruction at `icount`.
    pub fn cycle(&self, icount: u64) -> u64 {
        self.counted(inhibit::CY, icount).wrapping_add(self.cycle_offset)
    }

    /// `minstret`, read by the instruction at `icount`.
    pub fn instret(&self, icount: u64) -> u64 {
        self.counted(inhibit::IR, icount).wrapping_add(self.instret_offset)
    }

    /// What counts of `icount` in a counter by its bit of `mcountinhibit`.
    pub(super) fn counted(&self, bit: u64, icount: u64) -> u64 {
        if self.mcountinhibit & bit == 0 { icount } else { 0 }
    }

    /// Writes `mcountinhibit`; the counters go on from, or stay at, what they are at `icount`.
    pub(super) fn inhibit_counters(&mut self, value: u64, icount: u64) {
        let (cycle, instret) = (self.cycle(icount), self.instret(icount));
        self.mcountinhibit = value & (inhibit::CY | inhibit::IR);
        self.cycle_offset = cycle.wrapping_sub(self.counted(inhibit::CY, icount));
        self.instret_offset = instret.wrapping_sub(self.counted(inhibit::IR, icount));
    }

    /// Whether WFI ends: an enabled interrupt is pending, even if masked globally.
    pub fn has_wakeup(&self) -> bool {
        self.kick_pending || self.mip() & self.mie != 0
    }

    /// Whether it waits in WFI with nothing to wake it.
    pub fn is_waiting(&self) -> bool {
        self.is_idle && !self.has_wakeup()
    }

    /// The interrupt to take now, by cause number.
    pub fn pending_interrupt(&self) -> Option<u64> {
        let pending = self.mip() & self.mie;
        if pending == 0 {
            return None;
        }
        let machine_on = self.mode < Mode::Machine || self.mstatus & status::MIE != 0;
        let supervisor_on = self.mode < Mode::Supervisor
            || (self.mode == Mode::Supervisor && self.mstatus & status::SIE != 0);
        let machine = pending & !self.mideleg;
        let supervisor = pending & self.mideleg;
        let chosen = if machine_on && machine != 0 {
            machine
        } else if supervisor_on {
            supervisor
        } else {
            0
        };
        [11, 3, 7, 9, 1, 5].into_iter().find(|cause| chosen >> cause & 1 != 0)
    }

    /// Enters the handler of an exception or (top bit of `cause`) an interrupt.
    pub fn enter_trap(&mut self, cause: u64, tval: u64) {
        let is_interrupt = cause >> 63 != 0;
        let code = cause & 63;
        let delegated = if is_interrupt { self.mideleg } else { self.medeleg };
        // An instruction that raises an exception does not retire: icount counts it, `minstret` not.
        if !is_interrupt && self.mcountinhibit & inhibit::IR == 0 {
            self.instret_offset = self.instret_offset.wrapping_sub(1);
        }
        let to_supervisor = self.mode <= Mode::Supervisor && delegated >> code & 1 != 0;
        let vector = if to_supervisor {
            self.scause = cause;
            self.sepc = self.pc;
            self.stval = tval;
            let spie = if self.mstatus & status::SIE != 0 { status::SPIE } else { 0 };
            let spp = if self.mode == Mode::Supervisor { status::SPP } else { 0 };
            self.mstatus &= !(status::SPIE | status::SPP | status::SIE);
            self.mstatus |= spie | spp;
            self.mode = Mode::Supervisor;
            self.stvec
        } else {
            self.mcause = cause;
            self.mepc = self.pc;
            self.mtval = tval;
            let mpie = if self.mstatus & status::MIE != 0 { status::MPIE } else { 0 };
            self.mstatus &= !(status::MPIE | status::MPP | status::MIE);
            self.mstatus |= mpie | (self.mode as u64) << status::MPP_SHIFT;
            self.mode = Mode::Machine;
            self.mtvec
        };
        let vectored = vector & 3 == 1 && is_interrupt;
        let offset = if vectored { code * 4 } else { 0 };
        self.pc = (vector & !3).wrapping_add(offset);
        self.fetch_page = None;
        self.is_idle = false;
    }

    /// `mret`.
    pub fn return_machine(&mut self) {
        let mode = Mode::from_bits(self.mstatus >> status::MPP_SHIFT);
        let mie = if self.mstatus & status::MPIE != 0 { status::MIE } else { 0 };
        self.mstatus &= !(status::MPP | status::MIE);
        self.mstatus |= mie | status::MPIE;
        if mode != Mode::Machine {
            self.mstatus &= !status::MPRV;
        }
        self.mode = mode;
        self.fetch_page = None;
    }

    /// `sret`.
    pub fn return_supervisor(&mut self) {
        let mode = if self.mstatus & status::SPP != 0 { Mode::Supervisor } else { Mode::User };
        let sie = if self.mstatus & status::SPIE != 0 { status::SIE } else { 0 };
        self.mstatus &= !(status::SPP | status::SIE | status::MPRV);
        self.mstatus |= sie | status::SPIE;
        self.mode = mode;
        self.fetch_page = None;
    }

    /// Forgets all translations.
    pub fn flush_tlb(&mut self) {
        self.tlb.fill(TlbEntry::EMPTY);
        self.fetch_page = None;
    }

    /// Forgets the translations of the page that `va` lies in: a large one has many here.
    pub fn flush_page(&mut self, va: u64) {
        let vpn = va >> 12;
        for entry in &mut self.tlb {
            let differs = (entry.vpn ^ vpn).checked_shr(9 * u32::from(entry.level));
            if differs == Some(0) {
                *entry = TlbEntry::EMPTY;
            }
        }
        self.fetch_page = None;
    }

    /// pc and registers summed to 64 bits, each times an odd number of its own, so
    /// that one flipped bit always shows. Without a dependency from one to the next.
    #[inline]
    pub fn quick_fold(&self) -> u64 {
        let times = |sum: u64, (value, n): (&u64, u64)| {
            sum.wrapping_add(value.wrapping_mul(n.wrapping_mul(0x9fb2_1c65_1e98_df25) | 1))
        };
        let pc = self.pc.wrapping_mul(0xa24b_aed4_963e_e407);
        let sum = self.x[1..SINK as usize].iter().zip(1u64..).fold(pc, times);
        let fcsr = u64::from(self.fcsr);
        self.usable_floats().iter().chain([&fcsr]).zip(u64::from(SINK)..).fold(sum, times)
    }

    /// pc and registers folded to 64 bits: the cheap check.
    pub fn fold(&self) -> u64 {
        let mut sum = self.pc.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for value in self.x[1..SINK as usize].iter().chain(self.usable_floats()) {
            sum = (sum.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        sum ^= u64::from(self.fcsr);
        sum ^ sum >> 29
    }

    /// The floating-point registers, none while they are switched off: nothing reads
    /// or writes them then, and most code that is checked runs so.
    fn usable_floats(&self) -> &[u64] {
        if self.mstatus & status::FS == 0 { &[] } else { &self.f }
    }
}
