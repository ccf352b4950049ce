//! Operands worth trying: special values, and seeded ones near where rounding is hard.

use crate::model::Layout;
use rand::RngCore;
use rand_chacha::ChaCha8Rng;

impl Layout {
    /// The number `1.fraction * 2^exponent`, or the subnormal one where that is too small.
    fn make(self, exponent: i64, fraction: u64) -> u64 {
        let field = (exponent + self.exponent_max()).clamp(0, 2 * self.exponent_max() + 1) as u64;
        field << (self.precision - 1) | fraction & self.fractions()
    }

    fn fractions(self) -> u64 {
        (1 << (self.precision - 1)) - 1
    }

    /// About sixty values, each with both signs.
    pub fn specials(self) -> Vec<u64> {
        let ones = self.fractions();
        let (top, least) = (self.exponent_max(), 1 - self.exponent_max());
        let precision = i64::from(self.precision);
        let quiet = 1 << (self.precision - 2);
        let mut positive = vec![
            0,
            self.infinity(),
            self.nan(),
            self.nan() | 5,
            self.infinity() | 1,
            self.infinity() | (quiet - 1),
            // Subnormal.
            1,
            2,
            3,
            quiet,
            quiet - 1,
            ones - 1,
            ones,
            // The smallest normal numbers, and half and double of them.
            self.make(least, 0),
            self.make(least, 1),
            self.make(least, ones),
            self.make(least + 1, 0),
            self.make(least + 1, ones),
            // The largest.
            self.make(top, 0),
            self.make(top, ones),
            self.make(top, ones - 1),
            self.make(top - 1, ones),
            // Around one.
            self.make(-1, 0),
            self.make(-1, ones),
            self.make(-1, ones - 1),
            self.make(0, 0),
            self.make(0, 1),
            self.make(0, 2),
            self.make(0, quiet),
            self.make(0, quiet | 1),
            self.make(0, ones),
            self.make(1, 0),
            self.make(1, quiet),
            self.make(2, quiet / 2),
        ];
        // Powers that meet the last place, the half of it, and the bounds of integers.
        for exponent in [precision, precision - 1, precision - 2, 30, 31, 32, 62, 63, 64] {
            positive.extend([self.make(exponent, 0), self.make(exponent, ones)]);
        }
        for exponent in [-precision, 1 - precision, top / 2, least / 2, least + precision, top - precision] {
            positive.push(self.make(exponent, 3));
        }
        let negative: Vec<u64> = positive.iter().map(|bits| bits | self.sign(true)).collect();
        positive.into_iter().chain(negative).collect()
    }

    /// A random operand, seldom an ordinary one.
    pub fn operand(self, rng: &mut ChaCha8Rng) -> u64 {
        let top = self.exponent_max();
        let fraction = self.fraction(rng);
        let near = |rng: &mut ChaCha8Rng, exponent: i64| exponent + (rng.next_u64() % 9) as i64 - 4;
        let magnitude = match rng.next_u64() % 8 {
            0 => {
                let specials = self.specials();
                return specials[rng.next_u64() as usize % specials.len()];
            }
            1 => fraction,
            2 => self.make(near(rng, 2 - top), fraction),
            3 => self.make(near(rng, top - 3), fraction),
            4 | 5 => self.make(near(rng, 0), fraction),
            6 => {
                let middle = [0, top / 2, -top / 2][rng.next_u64() as usize % 3];
                self.make(near(rng, middle), fraction)
            }
            _ => rng.next_u64() & (self.sign(true) - 1),
        };
        magnitude | self.sign(rng.next_u64() % 2 == 0)
    }

    /// Often all zeros or all ones but for a few bits.
    fn fraction(self, rng: &mut ChaCha8Rng) -> u64 {
        let bit = |rng: &mut ChaCha8Rng| 1u64 << (rng.next_u64() % u64::from(self.precision - 1));
        let fraction = match rng.next_u64() % 4 {
            0 => bit(rng) | bit(rng),
            1 => !(bit(rng) | bit(rng)),
            2 => rng.next_u64() & (bit(rng) | bit(rng)).wrapping_neg(),
            _ => rng.next_u64(),
        };
        fraction & self.fractions()
    }

    /// Two operands, and one near their sum's, product's or quotient's hard places.
    pub fn operands(self, rng: &mut ChaCha8Rng) -> [u64; 3] {
        let (a, b) = (self.operand(rng), self.operand(rng));
        let (x, y) = (self.to_host(a), self.to_host(b));
        let step = rng.next_u64() % 5;
        let beside =
            |bits: u64| bits.wrapping_add(step).wrapping_sub(2) & (self.sign(true) << 1).wrapping_sub(1);
        let smallest = self.to_host(self.make(1 - self.exponent_max(), 0));
        match rng.next_u64() % 9 {
            // A sum whose second term is about half of the first one's last place.
            0 => {
                let half = self.to_host(self.make(-i64::from(self.precision), 0));
                [a, beside(self.host_bits(x * half)), b]
            }
            // Cancellation.
            1 => [a, beside(self.host_bits(-x)), b],
            // The term of a fused operation takes the product away.
            2 | 3 => [a, b, beside(self.host_bits(-x * y))],
            // A product at the edge of the normal range, and one of the largest numbers.
            4 => [a, beside(self.host_bits(smallest / x)), b],
            5 => [a, beside(self.host_bits(self.to_host(self.infinity() - 1) / x)), b],
            // A square, or beside one.
            6 => [beside(self.host_bits(x * x)), b, a],
            // A quotient beside an operand, which is often at an edge.
            7 => [beside(self.host_bits(x * y)), b, a],
            _ => [a, b, self.operand(rng)],
        }
    }

    /// The host's number; for operands and for what it computes as we do.
    pub fn to_host(self, bits: u64) -> f64 {
        if self.width == 32 { f64::from(f32::from_bits(bits as u32)) } else { f64::from_bits(bits) }
    }

    /// The host's number in this format.
    fn host_bits(self, number: f64) -> u64 {
        if self.width == 32 { u64::from((number as f32).to_bits()) } else { number.to_bits() }
    }
}
