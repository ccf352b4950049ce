//! BLAKE3 of pages, many at a time.
//!
//! Most of what a digest or a snapshot costs is hashing. BLAKE3 cuts its input into chunks of
//! 1 KiB, so that a wide vector unit hashes up to sixteen of them at once; a page alone has
//! four. Here the first chunks of sixteen pages go together, then their second ones, and so on:
//! a page's hash is what [`Hash::of`] gives, in less than half the time where there is AVX-512.
//!
//! The tree is the BLAKE3 paper's (sections 2.1, 2.4 and 2.5): chunks with their number as
//! counter, parents of two chaining values, and `ROOT` for the topmost.

use crate::machine::ram::PAGE;
use blake3::platform::Platform;
use blake3::{CHUNK_LEN, IncrementCounter, OUT_LEN};
use heddle_proto::Hash;

/// Pages hashed together: as many chunks as the widest vectors have lanes.
const LANES: usize = 16;
const CHUNKS: usize = PAGE / CHUNK_LEN;
/// What a parent hashes: the chaining values of its two children.
const PARENT_LEN: usize = 2 * OUT_LEN;

/// The initial chaining value, SHA-256's.
const IV: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;

type ChainingValue = [u8; OUT_LEN];

/// The hash of a page's bytes: [`Hash::ZERO`], if they are all zero.
pub fn page_hash(bytes: &[u8]) -> Hash {
    if is_zero(bytes) { Hash::ZERO } else { Hash::of(bytes) }
}

/// The same of many, each with what the caller calls it by; in any order.
pub fn page_hashes<'a, K>(pages: impl IntoIterator<Item = (K, &'a [u8])>) -> Vec<(K, Hash)> {
    let platform = Platform::detect();
    let mut hashes = vec![];
    let mut names = Vec::with_capacity(LANES);
    let mut group: Vec<&[u8; PAGE]> = Vec::with_capacity(LANES);
    for (name, bytes) in pages {
        match bytes.try_into() {
            Ok(page) if !is_zero(bytes) => {
                names.push(name);
                group.push(page);
            }
            _ => hashes.push((name, page_hash(bytes))),
        }
        if group.len() == LANES {
            hashes.extend(names.drain(..).zip(together(platform, &group)));
            group.clear();
        }
    }
    hashes.extend(names.into_iter().zip(together(platform, &group)));
    hashes
}

/// The hashes of at most [`LANES`] pages; of those behind the last there is nothing to say.
fn together(platform: Platform, pages: &[&[u8; PAGE]]) -> [Hash; LANES] {
    let count = pages.len();
    // By chunk, then by page.
    let mut chunks = [[[0; OUT_LEN]; LANES]; CHUNKS];
    for (number, values) in chunks.iter_mut().enumerate() {
        let mut inputs = [&[0; CHUNK_LEN]; LANES];
        for (input, page) in inputs.iter_mut().zip(pages) {
            *input = &page.as_chunks().0[number];
        }
        let out = values.as_flattened_mut();
        let counter = number as u64;
        let (flags, first, last) = (0, CHUNK_START, CHUNK_END);
        platform.hash_many(&inputs[..count], &IV, counter, IncrementCounter::No, flags, first, last, out);
    }
    let [a, b, c, d] = &chunks;
    let left = parents(platform, [a, b], count, PARENT);
    let right = parents(platform, [c, d], count, PARENT);
    parents(platform, [&left, &right], count, PARENT | ROOT).map(Hash)
}

/// The parents of as many left and right children.
fn parents(
    platform: Platform,
    children: [&[ChainingValue; LANES]; 2],
    count: usize,
    flags: u8,
) -> [ChainingValue; LANES] {
    let mut pairs = [[0; PARENT_LEN]; LANES];
    for (pair, (left, right)) in pairs.iter_mut().zip(children[0].iter().zip(children[1])) {
        pair[..OUT_LEN].copy_from_slice(left);
        pair[OUT_LEN..].copy_from_slice(right);
    }
    let inputs = pairs.each_ref();
    let mut values = [[0; OUT_LEN]; LANES];
    let out = values.as_flattened_mut();
    platform.hash_many(&inputs[..count], &IV, 0, IncrementCounter::No, flags, 0, 0, out);
    values
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Seeded;

    /// Any number of pages, some of zeros, some short, has the hashes that BLAKE3 itself gives.
    #[test]
    fn hashes_are_those_of_blake3() {
        let mut random = Seeded::new(1);
        for count in 0..3 * LANES + 2 {
            let pages: Vec<Vec<u8>> = (0..count)
                .map(|_| match random.below(5) {
                    0 => vec![0; PAGE],
                    1 => (0..random.below(PAGE as u64)).map(|_| random.draw() as u8).collect(),
                    _ => (0..PAGE).map(|_| random.draw() as u8).collect(),
                })
                .collect();
            let mut hashes = page_hashes(pages.iter().map(Vec::as_slice).enumerate());
            hashes.sort_by_key(|(page, _)| *page);
            assert_eq!(hashes.len(), count);
            for ((number, hash), page) in hashes.into_iter().zip(&pages) {
                let expected = if is_zero(page) { Hash::ZERO } else { Hash::of(page) };
                assert_eq!(hash, expected, "page {number} of {count}");
            }
        }
    }

    /// What can hash here: of the widest vectors `detect` itself is the one to know.
    fn platforms() -> Vec<Platform> {
        let platforms = [
            Some(Platform::Portable),
            Some(Platform::detect()),
            #[cfg(target_arch = "x86_64")]
            Platform::sse2(),
            #[cfg(target_arch = "x86_64")]
            Platform::sse41(),
            #[cfg(target_arch = "x86_64")]
            Platform::avx2(),
        ];
        platforms.into_iter().flatten().collect()
    }

    /// Each kind of vectors, also where it has fewer lanes than there are pages, or more.
    #[test]
    fn every_platform_gives_the_same_hashes() {
        let mut random = Seeded::new(2);
        let pages: Vec<[u8; PAGE]> =
            (0..LANES).map(|_| std::array::from_fn(|_| random.draw() as u8)).collect();
        let expected: Vec<Hash> = pages.iter().map(|page| Hash::of(page)).collect();
        for platform in platforms() {
            for count in 1..=LANES {
                let group: Vec<&[u8; PAGE]> = pages[..count].iter().collect();
                let hashes = together(platform, &group);
                assert_eq!(hashes[..count], expected[..count], "{count} pages, {platform:?}");
            }
        }
    }
}
