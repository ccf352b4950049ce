//! RV64GC in machine mode, with few CSRs: written from the specification alone, bit by bit as its
//! tables have them, and slow.

use crate::encoding::opcode::*;
use crate::{bits, compressed};

/// Where RAM begins.
pub const BASE: u64 = 0x8000_0000;
/// Nanoseconds an instruction, as a power of two: more than a tick of `time`.
pub const CLOCK_SHIFT: u32 = 7;
const TICK_NS: u64 = 100;

const FETCH_ACCESS: u64 = 1;
const ILLEGAL: u64 = 2;
const BREAKPOINT: u64 = 3;
pub const LOAD_ACCESS: u64 = 5;
pub const STORE_ACCESS: u64 = 7;
const ENVIRONMENT_CALL: u64 = 11;

const ECALL: u32 = 0b0000_0000_0000_0000_0000_0000_0111_0011;
const EBREAK: u32 = 0b0000_0000_0001_0000_0000_0000_0111_0011;
const MRET: u32 = 0b0011_0000_0010_0000_0000_0000_0111_0011;
/// Those of S and U, and what waits: `sret`, `wfi`, `sfence.vma`.
const SRET: u32 = 0b0001_0000_0010_0000_0000_0000_0111_0011;
const WFI: u32 = 0b0001_0000_0101_0000_0000_0000_0111_0011;
const SFENCE_VMA: u32 = 0b000_1001;

/// What is left to the other: an instruction or an address that this interpreter has not.
pub struct NotMine;

/// Why an instruction does not complete.
#[derive(Clone, Copy)]
pub enum Stop {
    NotMine,
    /// An exception, its cause and value, that the instruction's bits are enough for.
    Exception(u64, u64),
    /// The same of an instruction that was begun and could not be done: it takes no time.
    Fault(u64, u64),
}

/// The interpreter.
#[derive(Clone)]
pub struct Plain {
    pub x: [u64; 32],
    pub f: [u64; 32],
    /// `frm` and `fflags`.
    pub fcsr: u64,
    /// Floating point is switched on, for good.
    pub has_floats: bool,
    pub pc: u64,
    pub memory: Vec<u8>,
    /// Instructions executed.
    pub icount: u64,
    /// Those among them that raised no exception.
    pub instret: u64,
    /// Those among them that took no time.
    pub faults: u64,
    pub mtvec: u64,
    pub mscratch: u64,
    pub mepc: u64,
    pub mcause: u64,
    pub mtval: u64,
    /// What `lr` has reserved: an address, and the value loaded there.
    pub reservation: Option<(u64, u64)>,
    /// `mstatus.MPP` is machine mode: an exception was taken, and not returned from.
    returns_to_machine: bool,
}

impl Plain {
    /// About to execute at `pc`, all else zero.
    pub fn new(pc: u64, memory: Vec<u8>) -> Plain {
        Plain {
            x: [0; 32],
            f: [0; 32],
            fcsr: 0,
            has_floats: false,
            pc,
            memory,
            icount: 0,
            instret: 0,
            faults: 0,
            mtvec: 0,
            mscratch: 0,
            mepc: 0,
            mcause: 0,
            mtval: 0,
            reservation: None,
            returns_to_machine: false,
        }
    }

    /// Executes one instruction, or takes its exception.
    pub fn step(&mut self) -> Result<(), NotMine> {
        match self.instruction() {
            Ok(next) => {
                self.pc = next;
                self.instret += 1;
            }
            Err(Stop::NotMine) => return Err(NotMine),
            Err(Stop::Exception(cause, value)) => self.trap(cause, value),
            Err(Stop::Fault(cause, value)) => {
                self.faults += 1;
                self.trap(cause, value);
            }
        }
        self.x[0] = 0;
        self.icount += 1;
        Ok(())
    }

    fn trap(&mut self, cause: u64, value: u64) {
        self.mepc = self.pc;
        self.mcause = cause;
        self.mtval = value;
        self.returns_to_machine = true;
        self.pc = self.mtvec;
    }

    /// Where `size` bytes at `address` are in memory; a fault of `cause` at the first that is not.
    fn place(&self, address: u64, size: u64, cause: u64) -> Result<usize, Stop> {
        if (0x10_0000..BASE).contains(&address) {
            return Err(Stop::NotMine);
        }
        let end = BASE + self.memory.len() as u64;
        if address < BASE || address >= end {
            return Err(Stop::Fault(cause, address));
        }
        if end - address < size {
            return Err(Stop::Fault(cause, end));
        }
        Ok((address - BASE) as usize)
    }

    pub fn load(&self, address: u64, size: u64, cause: u64) -> Result<u64, Stop> {
        let place = self.place(address, size, cause)?;
        let mut value = 0;
        for n in 0..size as usize {
            value |= u64::from(self.memory[place + n]) << (8 * n);
        }
        Ok(value)
    }

    pub fn store(&mut self, address: u64, size: u64, value: u64) -> Result<(), Stop> {
        let place = self.place(address, size, STORE_ACCESS)?;
        for n in 0..size as usize {
            self.memory[place + n] = (value >> (8 * n)) as u8;
        }
        Ok(())
    }

    /// Executes the instruction at pc: where the next one is.
    fn instruction(&mut self) -> Result<u64, Stop> {
        let low = self.load(self.pc, 2, FETCH_ACCESS)?;
        if low & 0b11 != 0b11 {
            let illegal = Stop::Exception(ILLEGAL, low);
            let w = compressed::expand(low as u16).ok_or(illegal)?;
            return self.execute(w, self.pc.wrapping_add(2), low);
        }
        let high = self.load(self.pc.wrapping_add(2), 2, FETCH_ACCESS)?;
        let bits = high << 16 | low;
        self.execute(bits as u32, self.pc.wrapping_add(4), bits)
    }

    /// Executes `w`, which memory has as `bits`; `following` is the place behind it.
    fn execute(&mut self, w: u32, following: u64, bits: u64) -> Result<u64, Stop> {
        let illegal = Stop::Exception(ILLEGAL, bits);
        let rd = (w >> 7 & 0b1_1111) as usize;
        let funct3 = w >> 12 & 0b111;
        let a = self.x[(w >> 15 & 0b1_1111) as usize];
        let b = self.x[(w >> 20 & 0b1_1111) as usize];
        let funct7 = w >> 25;
        let imm_i = sign_extend(u64::from(w >> 20), 12);
        let imm_s = sign_extend(u64::from(w >> 25 << 5 | w >> 7 & 0b1_1111), 12);
        let imm_b = sign_extend(
            u64::from(
                (w >> 31 & 1) << 12
                    | (w >> 7 & 1) << 11
                    | (w >> 25 & 0b11_1111) << 5
                    | (w >> 8 & 0b1111) << 1,
            ),
            13,
        );
        let imm_u = sign_extend(u64::from(w >> 12) << 12, 32);
        let imm_j = sign_extend(
            u64::from(
                (w >> 31 & 1) << 20 | (w >> 12 & 0xff) << 12 | (w >> 20 & 1) << 11 | (w >> 21 & 0x3ff) << 1,
            ),
            21,
        );
        let result = match w & 0b111_1111 {
            LUI => imm_u,
            AUIPC => self.pc.wrapping_add(imm_u),
            JAL => {
                let target = self.pc.wrapping_add(imm_j);
                self.x[rd] = following;
                return Ok(target);
            }
            JALR if funct3 == 0 => {
                let target = a.wrapping_add(imm_i) & !1;
                self.x[rd] = following;
                return Ok(target);
            }
            BRANCH => {
                let is_taken = match funct3 {
                    0b000 => a == b,
                    0b001 => a != b,
                    0b100 => (a as i64) < (b as i64),
                    0b101 => (a as i64) >= (b as i64),
                    0b110 => a < b,
                    0b111 => a >= b,
                    _ => return Err(illegal),
                };
                return Ok(if is_taken { self.pc.wrapping_add(imm_b) } else { following });
            }
            LOAD => {
                let address = a.wrapping_add(imm_i);
                match funct3 {
                    0b000 => sign_extend(self.load(address, 1, LOAD_ACCESS)?, 8),
                    0b001 => sign_extend(self.load(address, 2, LOAD_ACCESS)?, 16),
                    0b010 => sign_extend(self.load(address, 4, LOAD_ACCESS)?, 32),
                    0b011 => self.load(address, 8, LOAD_ACCESS)?,
                    0b100 => self.load(address, 1, LOAD_ACCESS)?,
                    0b101 => self.load(address, 2, LOAD_ACCESS)?,
                    0b110 => self.load(address, 4, LOAD_ACCESS)?,
                    _ => return Err(illegal),
                }
            }
            STORE => {
                if funct3 > 0b011 {
                    return Err(illegal);
                }
                self.store(a.wrapping_add(imm_s), 1 << funct3, b)?;
                return Ok(following);
            }
            OP_IMM => {
                let shift = (w >> 20 & 0b11_1111) as u64;
                match (funct3, w >> 26) {
                    (0b000, _) => a.wrapping_add(imm_i),
                    (0b010, _) => u64::from((a as i64) < (imm_i as i64)),
                    (0b011, _) => u64::from(a < imm_i),
                    (0b100, _) => a ^ imm_i,
                    (0b110, _) => a | imm_i,
                    (0b111, _) => a & imm_i,
                    (0b001, 0b00_0000) => a << shift,
                    (0b101, 0b00_0000) => a >> shift,
                    (0b101, 0b01_0000) => ((a as i64) >> shift) as u64,
                    _ => bits::operate(w, a, b).ok_or(illegal)?,
                }
            }
            OP_IMM_32 => {
                let shift = w >> 20 & 0b1_1111;
                match (funct3, funct7) {
                    (0b000, _) => word(a.wrapping_add(imm_i)),
                    (0b001, 0b000_0000) => word(u64::from((a as u32) << shift)),
                    (0b101, 0b000_0000) => word(u64::from((a as u32) >> shift)),
                    (0b101, 0b010_0000) => word(((a as i32) >> shift) as u64),
                    _ => bits::operate(w, a, b).ok_or(illegal)?,
                }
            }
            OP => match (funct7, funct3) {
                (0b000_0000, 0b000) => a.wrapping_add(b),
                (0b010_0000, 0b000) => a.wrapping_sub(b),
                (0b000_0000, 0b001) => a << (b & 0b11_1111),
                (0b000_0000, 0b010) => u64::from((a as i64) < (b as i64)),
                (0b000_0000, 0b011) => u64::from(a < b),
                (0b000_0000, 0b100) => a ^ b,
                (0b000_0000, 0b101) => a >> (b & 0b11_1111),
                (0b010_0000, 0b101) => ((a as i64) >> (b & 0b11_1111)) as u64,
                (0b000_0000, 0b110) => a | b,
                (0b000_0000, 0b111) => a & b,
                (0b000_0001, 0b000) => a.wrapping_mul(b),
                (0b000_0001, 0b001) => high(signed(a), signed(b)),
                (0b000_0001, 0b010) => high(signed(a), unsigned(b)),
                (0b000_0001, 0b011) => ((u128::from(a) * u128::from(b)) >> 64) as u64,
                (0b000_0001, 0b100) => quotient(signed(a), signed(b)),
                (0b000_0001, 0b101) => quotient(unsigned(a), unsigned(b)),
                (0b000_0001, 0b110) => remainder(signed(a), signed(b)),
                (0b000_0001, 0b111) => remainder(unsigned(a), unsigned(b)),
                _ => bits::operate(w, a, b).ok_or(illegal)?,
            },
            OP_32 => {
                let (low_a, low_b) = (a & 0xffff_ffff, b & 0xffff_ffff);
                match (funct7, funct3) {
                    (0b000_0000, 0b000) => word(a.wrapping_add(b)),
                    (0b010_0000, 0b000) => word(a.wrapping_sub(b)),
                    (0b000_0000, 0b001) => word(low_a << (b & 0b1_1111)),
                    (0b000_0000, 0b101) => word(low_a >> (b & 0b1_1111)),
                    (0b010_0000, 0b101) => word(((word(a) as i64) >> (b & 0b1_1111)) as u64),
                    (0b000_0001, 0b000) => word(a.wrapping_mul(b)),
                    (0b000_0001, 0b100) => word(quotient(signed(word(a)), signed(word(b)))),
                    (0b000_0001, 0b101) => word(quotient(unsigned(low_a), unsigned(low_b))),
                    (0b000_0001, 0b110) => word(remainder(signed(word(a)), signed(word(b)))),
                    (0b000_0001, 0b111) => word(remainder(unsigned(low_a), unsigned(low_b))),
                    _ => bits::operate(w, a, b).ok_or(illegal)?,
                }
            }
            AMO => self.atomic(w, a, b, illegal)?,
            LOAD_FP | STORE_FP | MADD | MSUB | NMSUB | NMADD | OP_FP => {
                self.float(w, illegal)?;
                return Ok(following);
            }
            MISC_MEM if funct3 <= 1 => return Ok(following),
            SYSTEM => match funct3 {
                0b000 => return self.privileged(w, illegal),
                0b100 => return Err(illegal),
                _ => self.csr(w, a, Stop::Fault(ILLEGAL, bits))?,
            },
            _ => return Err(illegal),
        };
        self.x[rd] = result;
        Ok(following)
    }

    /// An instruction of `SYSTEM` without a CSR: where to go on.
    fn privileged(&mut self, w: u32, illegal: Stop) -> Result<u64, Stop> {
        match w {
            ECALL => Err(Stop::Exception(ENVIRONMENT_CALL, 0)),
            EBREAK => Err(Stop::Exception(BREAKPOINT, self.pc)),
            MRET if self.returns_to_machine => {
                self.returns_to_machine = false;
                Ok(self.mepc)
            }
            MRET | SRET | WFI => Err(Stop::NotMine),
            _ if w >> 25 == SFENCE_VMA => Err(Stop::NotMine),
            _ => Err(illegal),
        }
    }

    /// Reads and writes a CSR: what was there. `refused` is for what may not be done.
    fn csr(&mut self, w: u32, a: u64, refused: Stop) -> Result<u64, Stop> {
        let (number, field) = (w >> 20, w >> 15 & 0b1_1111);
        let operand = if w >> 14 & 1 == 1 { u64::from(field) } else { a };
        let operation = w >> 12 & 0b11;
        let writes = operation == 0b01 || field != 0;
        let old = match number {
            0x001..=0x003 if !self.has_floats => return Err(refused),
            0x001 => self.fcsr & 0b1_1111,
            0x002 => self.fcsr >> 5,
            0x003 => self.fcsr,
            0x340 => self.mscratch,
            0x341 => self.mepc,
            0x342 => self.mcause,
            0x343 => self.mtval,
            0xc00..=0xc02 if writes => return Err(refused),
            0xb00 | 0xc00 if !writes => self.icount,
            // The clock behind this instruction.
            0xc01 => ((self.icount + 1 - self.faults) << CLOCK_SHIFT) / TICK_NS,
            0xb02 | 0xc02 if !writes => self.instret,
            _ => return Err(Stop::NotMine),
        };
        let new = match operation {
            0b01 => operand,
            0b10 => old | operand,
            _ => old & !operand,
        };
        match number {
            _ if !writes => {}
            0x001 => self.fcsr = self.fcsr & !0b1_1111 | new & 0b1_1111,
            0x002 => self.fcsr = self.fcsr & 0b1_1111 | (new & 0b111) << 5,
            0x003 => self.fcsr = new & 0b1111_1111,
            0x340 => self.mscratch = new,
            // Instructions may begin at any even address.
            0x341 => self.mepc = new & !1,
            0x342 => self.mcause = new,
            _ => self.mtval = new,
        }
        Ok(old)
    }
}

pub fn sign_extend(value: u64, bits: u32) -> u64 {
    let sign = 1 << (bits - 1);
    let value = value & (sign | (sign - 1));
    (value ^ sign).wrapping_sub(sign)
}

/// The lower word, sign-extended.
pub fn word(value: u64) -> u64 {
    sign_extend(value, 32)
}

fn signed(value: u64) -> i128 {
    i128::from(value as i64)
}

fn unsigned(value: u64) -> i128 {
    i128::from(value)
}

/// The upper half of a product; at most 127 bits and a sign.
fn high(a: i128, b: i128) -> u64 {
    ((a * b) >> 64) as u64
}

/// All ones by zero; what overflows keeps its lower bits.
fn quotient(a: i128, b: i128) -> u64 {
    if b == 0 { u64::MAX } else { (a / b) as u64 }
}

fn remainder(a: i128, b: i128) -> u64 {
    if b == 0 { a as u64 } else { (a % b) as u64 }
}
