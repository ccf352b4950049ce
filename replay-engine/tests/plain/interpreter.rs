//! RV64IM, the atomics without reservations, and a few CSRs, in machine mode: written from
//! the specification alone, bit by bit as its tables have them, and slow.

/// Where RAM begins.
pub const BASE: u64 = 0x8000_0000;

/// What is left to the other: an instruction or an address that this interpreter has not.
pub struct NotMine;

/// An exception: cause and value.
struct Exception(u64, u64);

/// Why an instruction does not complete.
enum Stop {
    NotMine,
    Exception(u64, u64),
}

impl From<Exception> for Stop {
    fn from(Exception(cause, value): Exception) -> Stop {
        Stop::Exception(cause, value)
    }
}

/// The interpreter.
#[derive(Clone)]
pub struct Plain {
    pub x: [u64; 32],
    pub pc: u64,
    pub memory: Vec<u8>,
    /// Instructions executed.
    pub icount: u64,
    /// Those among them that raised no exception.
    pub instret: u64,
    pub mtvec: u64,
    pub mscratch: u64,
    pub mepc: u64,
    pub mcause: u64,
    pub mtval: u64,
}

impl Plain {
    /// Executes one instruction, or takes its exception.
    pub fn step(&mut self) -> Result<(), NotMine> {
        match self.instruction() {
            Ok(next) => {
                self.pc = next;
                self.instret += 1;
            }
            Err(Stop::NotMine) => return Err(NotMine),
            Err(Stop::Exception(cause, value)) => {
                self.mepc = self.pc;
                self.mcause = cause;
                self.mtval = value;
                self.pc = self.mtvec;
            }
        }
        self.x[0] = 0;
        self.icount += 1;
        Ok(())
    }

    /// Where `size` bytes at `address` are in memory; an exception of `cause` if nowhere.
    fn place(&self, address: u64, size: u64, cause: u64) -> Result<usize, Stop> {
        if (0x10_0000..BASE).contains(&address) {
            return Err(Stop::NotMine);
        }
        let end = BASE + self.memory.len() as u64;
        if address < BASE || address >= end || end - address < size {
            return Err(Stop::Exception(cause, address));
        }
        Ok((address - BASE) as usize)
    }

    fn load(&self, address: u64, size: u64, cause: u64) -> Result<u64, Stop> {
        let place = self.place(address, size, cause)?;
        let mut value = 0;
        for n in 0..size as usize {
            value |= u64::from(self.memory[place + n]) << (8 * n);
        }
        Ok(value)
    }

    fn store(&mut self, address: u64, size: u64, value: u64) -> Result<(), Stop> {
        let place = self.place(address, size, 7)?;
        for n in 0..size as usize {
            self.memory[place + n] = (value >> (8 * n)) as u8;
        }
        Ok(())
    }

    /// Executes the instruction at pc: where the next one is.
    fn instruction(&mut self) -> Result<u64, Stop> {
        if self.pc % 4 != 0 {
            return Err(Stop::NotMine);
        }
        let w = self.load(self.pc, 4, 1)? as u32;
        if w & 3 != 3 {
            return Err(Stop::NotMine);
        }
        let illegal = Exception(2, u64::from(w));
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
        let following = self.pc.wrapping_add(4);
        let result = match w & 0b111_1111 {
            0b011_0111 => imm_u,
            0b001_0111 => self.pc.wrapping_add(imm_u),
            0b110_1111 => {
                let target = self.pc.wrapping_add(imm_j);
                self.x[rd] = following;
                return Ok(target);
            }
            0b110_0111 if funct3 == 0 => {
                let target = a.wrapping_add(imm_i) & !1;
                self.x[rd] = following;
                return Ok(target);
            }
            0b110_0111 => return Err(illegal.into()),
            0b110_0011 => {
                let is_taken = match funct3 {
                    0b000 => a == b,
                    0b001 => a != b,
                    0b100 => (a as i64) < (b as i64),
                    0b101 => (a as i64) >= (b as i64),
                    0b110 => a < b,
                    0b111 => a >= b,
                    _ => return Err(illegal.into()),
                };
                return Ok(if is_taken { self.pc.wrapping_add(imm_b) } else { following });
            }
            0b000_0011 => {
                let address = a.wrapping_add(imm_i);
                match funct3 {
                    0b000 => sign_extend(self.load(address, 1, 5)?, 8),
                    0b001 => sign_extend(self.load(address, 2, 5)?, 16),
                    0b010 => sign_extend(self.load(address, 4, 5)?, 32),
                    0b011 => self.load(address, 8, 5)?,
                    0b100 => self.load(address, 1, 5)?,
                    0b101 => self.load(address, 2, 5)?,
                    0b110 => self.load(address, 4, 5)?,
                    _ => return Err(illegal.into()),
                }
            }
            0b010_0011 => {
                if funct3 > 0b011 {
                    return Err(illegal.into());
                }
                self.store(a.wrapping_add(imm_s), 1 << funct3, b)?;
                return Ok(following);
            }
            0b001_0011 => {
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
                    _ => return Err(Stop::NotMine),
                }
            }
            0b001_1011 => {
                let shift = w >> 20 & 0b1_1111;
                match (funct3, funct7) {
                    (0b000, _) => word(a.wrapping_add(imm_i)),
                    (0b001, 0b000_0000) => word(u64::from((a as u32) << shift)),
                    (0b101, 0b000_0000) => word(u64::from((a as u32) >> shift)),
                    (0b101, 0b010_0000) => word(((a as i32) >> shift) as u64),
                    _ => return Err(Stop::NotMine),
                }
            }
            0b011_0011 => match (funct7, funct3) {
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
                _ => return Err(Stop::NotMine),
            },
            0b011_1011 => {
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
                    _ => return Err(Stop::NotMine),
                }
            }
            0b010_1111 => self.atomic(w, a, b)?,
            0b000_1111 if funct3 <= 1 => return Ok(following),
            0b111_0011 => match funct3 {
                0 if w == 0b0000_0000_0000_0000_0000_0000_0111_0011 => return Err(Stop::Exception(11, 0)),
                0 if w == 0b0000_0000_0001_0000_0000_0000_0111_0011 => {
                    return Err(Stop::Exception(3, self.pc));
                }
                0 | 4 => return Err(Stop::NotMine),
                _ => self.csr(w, a)?,
            },
            _ => return Err(Stop::NotMine),
        };
        self.x[rd] = result;
        Ok(following)
    }

    /// A read-modify-write of memory: what was there.
    fn atomic(&mut self, w: u32, address: u64, b: u64) -> Result<u64, Stop> {
        let (size, mask) = match w >> 12 & 0b111 {
            0b010 => (4, 0xffff_ffff),
            0b011 => (8, u64::MAX),
            _ => return Err(Stop::NotMine),
        };
        let extended = |value: u64| if size == 4 { word(value) } else { value };
        let function = w >> 27;
        if ![0, 1, 4, 8, 12, 16, 20, 24, 28].contains(&function) {
            return Err(Stop::NotMine);
        }
        if address % size != 0 {
            return Err(Stop::Exception(6, address));
        }
        let old = self.load(address, size, 7)?;
        let (signed_old, signed_b) = (extended(old) as i64, extended(b) as i64);
        let new = match function {
            0b00000 => old.wrapping_add(b),
            0b00001 => b,
            0b00100 => old ^ b,
            0b01000 => old | b,
            0b01100 => old & b,
            0b10000 => signed_old.min(signed_b) as u64,
            0b10100 => signed_old.max(signed_b) as u64,
            0b11000 => (old & mask).min(b & mask),
            _ => (old & mask).max(b & mask),
        };
        self.store(address, size, new)?;
        Ok(extended(old))
    }

    /// Reads and writes a CSR: what was there.
    fn csr(&mut self, w: u32, a: u64) -> Result<u64, Stop> {
        let (number, field) = (w >> 20, w >> 15 & 0b1_1111);
        let operand = if w >> 14 & 1 == 1 { u64::from(field) } else { a };
        let operation = w >> 12 & 0b11;
        let writes = operation == 0b01 || field != 0;
        let old = match number {
            0x340 => self.mscratch,
            0x341 => self.mepc,
            0x342 => self.mcause,
            0x343 => self.mtval,
            0xb02 if !writes => self.instret,
            _ => return Err(Stop::NotMine),
        };
        let new = match operation {
            0b01 => operand,
            0b10 => old | operand,
            _ => old & !operand,
        };
        match number {
            _ if !writes => {}
            0x340 => self.mscratch = new,
            // Instructions may begin at any even address.
            0x341 => self.mepc = new & !1,
            0x342 => self.mcause = new,
            _ => self.mtval = new,
        }
        Ok(old)
    }
}

fn sign_extend(value: u64, bits: u32) -> u64 {
    let sign = 1 << (bits - 1);
    let value = value & (sign | (sign - 1));
    (value ^ sign).wrapping_sub(sign)
}

/// The lower word, sign-extended.
fn word(value: u64) -> u64 {
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
