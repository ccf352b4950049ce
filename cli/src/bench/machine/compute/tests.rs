//! What `bench.c` computes, in Rust, and that both come to the same.
#![allow(clippy::unwrap_used)]

use super::super::engine::{Guest, bare};
use super::checksum;
use heddle_replay_engine::bare::{Bare, Pause};

const TEXT: usize = 4096;
const SIDE: usize = 16;
const NODES: u64 = 256;
const EDITS: usize = 16;
const ALPHABET: &[u8; 32] = b"0123456789 loom heddle. weft. +\n";

/// The states of the scan, as `seen` counts them.
#[derive(Clone, Copy)]
enum State {
    Gap,
    Word,
    Number,
    Fraction,
    Bad,
}

struct Model {
    seed: u64,
    text: Vec<u8>,
    table: Vec<u32>,
    left: [[u32; SIDE]; SIDE],
    right: [[u32; SIDE]; SIDE],
    product: [[u32; SIDE]; SIDE],
    /// Each node's key, and its place in memory.
    list: Vec<(u64, u64)>,
    number: u64,
    total: u64,
    seen: [u64; 5],
}

impl Model {
    fn new() -> Model {
        let mut model = Model {
            seed: 0x68_6564_6c65,
            text: vec![],
            table: (0..256).map(table_entry).collect(),
            left: [[0; SIDE]; SIDE],
            right: [[0; SIDE]; SIDE],
            product: [[0; SIDE]; SIDE],
            list: vec![],
            number: 0,
            total: 0,
            seen: [0; 5],
        };
        for _ in 0..TEXT {
            let byte = model.letter();
            model.text.push(byte);
        }
        for i in 0..SIDE {
            for j in 0..SIDE {
                model.left[i][j] = model.draw() as u32;
                model.right[i][j] = model.draw() as u32;
            }
        }
        for i in 0..NODES {
            let key = model.draw();
            model.list.insert(0, (key, i * 167 % NODES));
        }
        model
    }

    fn draw(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    fn letter(&mut self) -> u8 {
        ALPHABET[(self.draw() & 31) as usize]
    }

    fn crc(&self, from: u32) -> u32 {
        let step = |crc: u32, byte: &u8| self.table[((crc ^ u32::from(*byte)) & 255) as usize] ^ (crc >> 8);
        !self.text.iter().fold(!from, step)
    }

    fn multiply(&mut self) -> u32 {
        let mut sum = 0u32;
        for i in 0..SIDE {
            for j in 0..SIDE {
                let cell = (0..SIDE)
                    .fold(0u32, |cell, k| cell.wrapping_add(self.left[i][k].wrapping_mul(self.right[k][j])));
                self.product[i][j] = cell;
                sum = sum.wrapping_mul(31).wrapping_add(cell);
            }
        }
        for i in 0..SIDE {
            for j in 0..SIDE {
                self.left[i][j] = self.left[i][j].wrapping_mul(5).wrapping_add(self.product[j][i]);
            }
        }
        sum
    }

    fn walk(&mut self) -> u64 {
        for (key, _) in &mut self.list {
            *key = key.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        }
        self.list.sort_by_key(|(key, _)| *key);
        let step =
            |sum: u64, (key, place): &(u64, u64)| sum.wrapping_mul(31).wrapping_add((key >> 7) ^ place);
        self.list.iter().fold(0, step)
    }

    fn scan(&mut self) -> u64 {
        let mut state = State::Gap;
        for at in 0..TEXT {
            self.seen[state as usize] += 1;
            state = self.after(state, self.text[at]);
        }
        self.seen.iter().fold(self.total, |sum, seen| sum.wrapping_mul(31).wrapping_add(*seen))
    }

    fn after(&mut self, state: State, byte: u8) -> State {
        let digit = u64::from(byte.wrapping_sub(b'0'));
        match (state, byte) {
            (State::Gap, b'0'..=b'9') => {
                self.number = digit;
                State::Number
            }
            (State::Number, b'0'..=b'9') => {
                self.number = self.number.wrapping_mul(10).wrapping_add(digit);
                State::Number
            }
            (State::Fraction, b'0'..=b'9') => {
                self.number = self.number.wrapping_mul(10).wrapping_add(digit);
                State::Fraction
            }
            (State::Number, b' ') => {
                self.total = self.total.wrapping_add(self.number % 9973);
                State::Gap
            }
            (State::Fraction, b' ') => {
                self.total = self.total.wrapping_add(self.number / 7);
                State::Gap
            }
            (State::Number, b'.') => State::Fraction,
            (State::Word, b'0'..=b'9' | b'a'..=b'z') | (State::Gap | State::Number, b'a'..=b'z') => {
                State::Word
            }
            (_, b' ') | (State::Word, b'.') => State::Gap,
            _ => State::Bad,
        }
    }

    fn compute(mut self, iterations: u64) -> u64 {
        let mut sum = 0;
        for i in 0..iterations {
            sum = mix(sum, u64::from(self.crc(i as u32)));
            sum = mix(sum, u64::from(self.multiply()));
            sum = mix(sum, self.walk());
            sum = mix(sum, self.scan());
            for _ in 0..EDITS {
                let at = (self.draw() % TEXT as u64) as usize;
                self.text[at] = self.letter();
            }
        }
        sum
    }
}

fn table_entry(index: u32) -> u32 {
    (0..8).fold(index, |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
}

fn mix(sum: u64, value: u64) -> u64 {
    let sum = (sum ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    sum ^ (sum >> 29)
}

#[test]
fn the_guest_computes_what_the_same_does_in_rust() {
    // From the same C on the host and, of 2 iterations, on QEMU: model and machine can't be wrong together.
    let cases =
        [(0, 0), (1, 0xb9b5_e957_f25b_b023), (2, 0xcd49_9527_115d_9510), (100, 0xf6be_2e14_1fbf_a823)];
    for (iterations, expected) in cases {
        assert_eq!(Model::new().compute(iterations), expected, "{iterations} iterations in Rust");
        let ran = bare(&Guest::compute(iterations)).unwrap();
        assert_eq!(checksum(&ran.console).unwrap(), expected, "{iterations} iterations, built-in");
    }
}

#[test]
fn a_nap_is_a_second_and_few_instructions() {
    let mut sleeper = Bare::new(Guest::idle(60).machine().unwrap(), 0);
    assert_eq!(sleeper.run(200_000), Pause::Off);
    let slept = sleeper.machine().virtual_now();
    assert!((60_000_000_000..61_000_000_000).contains(&slept), "{slept} ns");
}

#[test]
fn a_console_without_a_checksum_is_an_error() {
    assert_eq!(checksum("x\r\nchecksum 00000000000000ff\r\n").unwrap(), 255);
    assert!(checksum("check").unwrap_err().to_string().contains("no checksum"));
    assert!(checksum("checksum x").is_err());
}
