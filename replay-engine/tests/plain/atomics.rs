//! Atomics: read-modify-writes, and reservations.

use crate::interpreter::{LOAD_ACCESS, Plain, STORE_ACCESS, Stop, word};

const LOAD_MISALIGNED: u64 = 4;
const STORE_MISALIGNED: u64 = 6;

impl Plain {
    /// An instruction of opcode `AMO` on what is at `address`: the value for `rd`.
    pub fn atomic(&mut self, w: u32, address: u64, b: u64, illegal: Stop) -> Result<u64, Stop> {
        let size = match w >> 12 & 0b111 {
            0b010 => 4,
            0b011 => 8,
            _ => return Err(illegal),
        };
        match w >> 27 {
            0b00010 if w >> 20 & 0b1_1111 == 0 => self.load_reserved(address, size),
            0b00011 => self.store_conditional(address, size, b),
            function @ (0b00000 | 0b00001 | 0b00100 | 0b01000 | 0b01100) => {
                self.modify(function, address, size, b)
            }
            function @ (0b10000 | 0b10100 | 0b11000 | 0b11100) => self.modify(function, address, size, b),
            _ => Err(illegal),
        }
    }

    fn load_reserved(&mut self, address: u64, size: u64) -> Result<u64, Stop> {
        if address % size != 0 {
            return Err(Stop::Fault(LOAD_MISALIGNED, address));
        }
        let value = extended(self.load(address, size, LOAD_ACCESS)?, size);
        self.reservation = Some((address, value));
        Ok(value)
    }

    /// The specification leaves open what a reservation is of, and which of the hart's own
    /// accesses end it. Here it is of an address and the value there, and ends by being used.
    fn store_conditional(&mut self, address: u64, size: u64, b: u64) -> Result<u64, Stop> {
        if address % size != 0 {
            return Err(Stop::Fault(STORE_MISALIGNED, address));
        }
        let value = extended(self.load(address, size, STORE_ACCESS)?, size);
        let holds = self.reservation == Some((address, value));
        self.reservation = None;
        if holds {
            self.store(address, size, b)?;
        }
        Ok(u64::from(!holds))
    }

    fn modify(&mut self, function: u32, address: u64, size: u64, b: u64) -> Result<u64, Stop> {
        if address % size != 0 {
            return Err(Stop::Fault(STORE_MISALIGNED, address));
        }
        let mask = if size == 4 { 0xffff_ffff } else { u64::MAX };
        let old = self.load(address, size, STORE_ACCESS)?;
        let (signed_old, signed_b) = (extended(old, size) as i64, extended(b, size) as i64);
        let new = match function {
            0b00000 => old.wrapping_add(b),
            0b00001 => b,
            0b00100 => old ^ b,
            0b01000 => old | b,
            0b01100 => old & b,
            0b10000 => signed_old.min(signed_b) as u64,
            0b10100 => signed_old.max(signed_b) as u64,
            0b11000 => old.min(b & mask),
            _ => old.max(b & mask),
        };
        self.store(address, size, new)?;
        Ok(extended(old, size))
    }
}

/// A register's value of `size` bytes that were loaded.
fn extended(value: u64, size: u64) -> u64 {
    if size == 4 { word(value) } else { value }
}
