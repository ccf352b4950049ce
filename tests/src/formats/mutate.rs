//! Valid bytes made less so, in ways that decoders are known to stumble over.

use rand::{Rng, RngCore};
use rand_chacha::ChaCha8Rng;

/// Longest mutated input.
const BYTES_MAX: usize = 4 << 20;
/// Values at which arithmetic turns over.
const BYTES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xfe, 0xff, b'"', b'{'];
const NUMBERS: [u64; 10] =
    [0, 1, 0x7f, 0xffff, i32::MAX as u64, u32::MAX as u64, 1 << 32, i64::MAX as u64, u64::MAX - 1, u64::MAX];

/// One of the seeds, changed in one to four places.
pub fn mutate(rng: &mut ChaCha8Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[rng.gen_range(0..seeds.len())].clone();
    for _ in 0..rng.gen_range(1..=4) {
        change(rng, &mut bytes, seeds);
    }
    bytes.truncate(BYTES_MAX);
    bytes
}

fn change(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let at = place(rng, bytes);
    match rng.gen_range(0..10) {
        0 | 1 if !bytes.is_empty() => bytes[at] ^= 1u8 << rng.gen_range(0..8u32),
        2 if !bytes.is_empty() => bytes[at] = BYTES[rng.gen_range(0..BYTES.len())],
        3 if !bytes.is_empty() => {
            bytes[at] = if rng.gen_bool(0.5) { bytes[at].wrapping_add(1) } else { bytes[at].wrapping_sub(1) };
        }
        4 => bytes.truncate(at),
        5 => {
            let mut more = vec![0; rng.gen_range(1..64)];
            rng.fill_bytes(&mut more);
            bytes.extend(more);
        }
        6 => {
            let other = &seeds[rng.gen_range(0..seeds.len())];
            let from = place(rng, other);
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        7 => {
            let end = (at + rng.gen_range(1..200)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            let to = place(rng, bytes);
            bytes.splice(to..to, copy);
        }
        8 => {
            let end = (at + rng.gen_range(1..64)).min(bytes.len());
            bytes.drain(at..end);
        }
        _ => put_number(rng, bytes, at),
    }
}

/// A length or a count, as one of the sizes and orders that numbers have.
fn put_number(rng: &mut ChaCha8Rng, bytes: &mut [u8], at: usize) {
    let number = match rng.gen_range(0..NUMBERS.len() + 1) {
        i if i < NUMBERS.len() => NUMBERS[i],
        _ => bytes.len() as u64,
    };
    let len = (1usize << rng.gen_range(0..4u32)).min(bytes.len() - at);
    if rng.gen_bool(0.5) {
        bytes[at..at + len].copy_from_slice(&number.to_le_bytes()[..len]);
    } else {
        bytes[at..at + len].copy_from_slice(&number.to_be_bytes()[8 - len..]);
    }
}

/// Somewhere in the bytes: anywhere, near the beginning, or where they are not zero.
fn place(rng: &mut ChaCha8Rng, bytes: &[u8]) -> usize {
    if bytes.is_empty() {
        return 0;
    }
    match rng.gen_range(0..3) {
        0 => rng.gen_range(0..bytes.len()),
        1 => {
            let near = 1usize << rng.gen_range(2..10u32);
            rng.gen_range(0..bytes.len().min(near))
        }
        _ => {
            let mut tries = (0..64).map(|_| rng.gen_range(0..bytes.len()));
            tries.find(|at| bytes[*at] != 0).unwrap_or(0)
        }
    }
}
