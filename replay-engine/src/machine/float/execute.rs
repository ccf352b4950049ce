//! Executing F and D: registers, NaN boxes, `fcsr` and `mstatus.FS`.

use super::super::decode::{Code, Op};
use super::super::hart::{Trap, status};
use super::super::{Machine, Outside};
use super::convert::Integer;
use super::decode::DYNAMIC;
use super::{Double, Environment, Format, Rounding, Single, arithmetic, compare, convert, flag};

/// The upper half of a register that holds a binary32.
const BOX: u64 = 0xffff_ffff << 32;

/// A format as registers hold it.
trait Register: Format {
    /// The number in register value `bits`.
    fn unboxed(bits: u64) -> u64;
    /// The register value that holds `bits`.
    fn boxed(bits: u64) -> u64;
}

impl Register for Single {
    fn unboxed(bits: u64) -> u64 {
        if bits & BOX == BOX { bits & !BOX } else { Single::NAN }
    }
    fn boxed(bits: u64) -> u64 {
        bits | BOX
    }
}

impl Register for Double {
    fn unboxed(bits: u64) -> u64 {
        bits
    }
    fn boxed(bits: u64) -> u64 {
        bits
    }
}

impl Machine {
    /// Executes an instruction of F or D. Apart from `execute`, so that integer code stays small.
    #[inline(never)]
    pub(in crate::machine) fn execute_float(
        &mut self,
        op: Op,
        pc: u64,
        next: u64,
        outside: &mut dyn Outside,
    ) -> Result<u64, Trap> {
        if self.hart.mstatus & status::FS == 0 {
            return Err(self.illegal(pc));
        }
        let at = self.x(op.rs1).wrapping_add(op.imm as i64 as u64);
        match op.code {
            Code::Flw => {
                let bits = self.load::<4>(at, outside)?;
                self.set_f(op.rd, Single::boxed(bits));
            }
            Code::Fld => {
                let bits = self.load::<8>(at, outside)?;
                self.set_f(op.rd, bits);
            }
            Code::Fsw => self.store::<4>(at, self.f(op.rs2) & !BOX, outside)?,
            Code::Fsd => self.store::<8>(at, self.f(op.rs2), outside)?,
            _ => {
                let Some(rounding) = self.rounding(op) else {
                    return Err(self.illegal(pc));
                };
                let is_inexact = self.hart.fcsr & flag::NX != 0;
                let mut env = Environment { is_inexact, ..Environment::new(rounding) };
                if op.is_double() {
                    self.operate::<Double, Single>(op, &mut env);
                } else {
                    self.operate::<Single, Double>(op, &mut env);
                }
                if env.flags != 0 {
                    self.hart.fcsr |= env.flags;
                    self.hart.mstatus |= status::FS;
                }
            }
        }
        Ok(next)
    }

    fn rounding(&self, op: Op) -> Option<Rounding> {
        match op.rounding() {
            DYNAMIC => Rounding::from_bits(self.hart.fcsr >> 5),
            rm => Rounding::from_bits(rm),
        }
    }

    #[inline]
    fn f(&self, n: u8) -> u64 {
        self.hart.f[n as usize & 31]
    }

    #[inline]
    fn set_f(&mut self, n: u8, value: u64) {
        self.hart.f[n as usize & 31] = value;
        self.hart.mstatus |= status::FS;
    }

    /// An operation on format `F`; `G` is the other one.
    #[rustfmt::skip]
    fn operate<F: Register, G: Register>(&mut self, op: Op, env: &mut Environment) {
        use Code::*;
        let (raw, x) = (self.f(op.rs1), self.x(op.rs1));
        let (a, b) = (F::unboxed(raw), F::unboxed(self.f(op.rs2)));
        let c = F::unboxed(self.f(op.rs3()));
        // Fused, with either term's sign turned.
        let fused = |product: u64, term: u64, env: &mut Environment| {
            arithmetic::multiply_add::<F>(a ^ product, b, c ^ term, env)
        };
        let result = match op.code {
            Fmadd => fused(0, 0, env),
            Fmsub => fused(0, F::SIGN, env),
            Fnmsub => fused(F::SIGN, 0, env),
            Fnmadd => fused(F::SIGN, F::SIGN, env),
            Fadd => arithmetic::add::<F>(a, b, env),
            Fsub => arithmetic::subtract::<F>(a, b, env),
            Fmul => arithmetic::multiply::<F>(a, b, env),
            Fdiv => arithmetic::divide::<F>(a, b, env),
            Fsqrt => arithmetic::square_root::<F>(a, env),
            Fsgnj => a & !F::SIGN | b & F::SIGN,
            Fsgnjn => a & !F::SIGN | !b & F::SIGN,
            Fsgnjx => a ^ b & F::SIGN,
            Fmin => compare::minimum::<F>(a, b, env),
            Fmax => compare::maximum::<F>(a, b, env),
            FcvtFormat => convert::to_format::<G, F>(G::unboxed(raw), env),
            FcvtFromW => convert::from_integer::<F>(x, Integer::WORD, env),
            FcvtFromWu => convert::from_integer::<F>(x, Integer::WORD_UNSIGNED, env),
            FcvtFromL => convert::from_integer::<F>(x, Integer::LONG, env),
            FcvtFromLu => convert::from_integer::<F>(x, Integer::LONG_UNSIGNED, env),
            FmvFromX => x,
            _ => return self.set(op.rd, integer::<F>(op.code, raw, b, env)),
        };
        self.set_f(op.rd, F::boxed(result));
    }
}

/// The operations that give an integer.
#[rustfmt::skip]
fn integer<F: Register>(code: Code, raw: u64, b: u64, env: &mut Environment) -> u64 {
    use Code::*;
    let a = F::unboxed(raw);
    match code {
        FcvtW => convert::to_integer::<F>(a, Integer::WORD, env),
        FcvtWu => convert::to_integer::<F>(a, Integer::WORD_UNSIGNED, env),
        FcvtL => convert::to_integer::<F>(a, Integer::LONG, env),
        FcvtLu => convert::to_integer::<F>(a, Integer::LONG_UNSIGNED, env),
        // The bits as they are, boxed or not.
        FmvX if F::WIDTH == 32 => raw as i32 as u64,
        FmvX => raw,
        Feq => u64::from(compare::equal::<F>(a, b, env)),
        Flt => u64::from(compare::less::<F>(a, b, env)),
        Fle => u64::from(compare::less_or_equal::<F>(a, b, env)),
        Fclass => compare::class::<F>(a),
        _ => unreachable!("{code:?} is not an operation"),
    }
}
