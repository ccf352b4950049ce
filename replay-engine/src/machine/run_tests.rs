//! Runs that end about somewhere, and those that somebody wants to end.

use super::hart::Hart;
use super::harts::QUANTUM;
use super::ram::Ram;
use super::run::LOOK;
use super::{Exit, Machine, Nobody, Outside, RAM_BASE};
use crate::schedule::Seeded;
use heddle_proto::ClockKind;

/// Where the guest's data is, from RAM's begin.
const DATA: u64 = 0x10_0000;
/// Instructions by which a run may go on: all of the longest block but its first.
const OVER: u64 = 62;

/// Harts that all begin at the code's first word, each with registers of its own.
fn machine(code: &[u32], harts: u64) -> Machine {
    let mut ram = Ram::new(2 << 20);
    let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    assert!(ram.write(0, &bytes).is_some());
    let hart = |number: u64| {
        let mut hart = Hart::new(RAM_BASE);
        hart.x[4] = RAM_BASE + DATA;
        hart.x[8] = number;
        hart
    };
    let mut machine = Machine::new(ram, hart(0), 0, vec![]);
    (1..harts).for_each(|number| machine.add_hart(hart(number)));
    machine
}

/// j from behind so many words to the first of them.
fn back(words: usize) -> u32 {
    let to = (words as u32 * 4).wrapping_neg();
    (to >> 20 & 1) << 31 | (to >> 1 & 0x3ff) << 21 | (to >> 11 & 1) << 20 | (to >> 12 & 0xff) << 12 | 0x6f
}

/// A loop over two pages: straight code, short and long, each followed by a branch over one
/// instruction, and a `pause` in every 32nd round, so that turns end by that and by their length.
fn program(random: &mut Seeded) -> Vec<u32> {
    let mut code = vec![];
    for length in [1, 2, 150, 3, 63, 64, 20, 62, 700, 5, 130] {
        for _ in 0..length {
            let mut register = || 8 + random.below(8) as u32;
            let (rd, a, b) = (register(), register(), register());
            let at = random.below(256) as u32 * 8;
            code.push(match random.below(5) {
                0 => at << 20 | a << 15 | rd << 7 | 0x13,           // addi
                1 => b << 20 | a << 15 | rd << 7 | 0x33,            // add
                2 => b << 20 | a << 15 | 4 << 12 | rd << 7 | 0x33,  // xor
                3 => at << 20 | 4 << 15 | 3 << 12 | rd << 7 | 0x03, // ld, at x4
                _ => (at >> 5) << 25 | b << 20 | 4 << 15 | 3 << 12 | (at & 31) << 7 | 0x23, // sd
            });
        }
        // bltu x9, x8, .+8; addi x10, x10, 1
        code.extend([8 << 20 | 9 << 15 | 6 << 12 | 4 << 8 | 0x63, 1 << 20 | 10 << 15 | 10 << 7 | 0x13]);
    }
    // addi x5, x5, 1; andi x6, x5, 31; bnez x6, .+8; pause
    code.extend([1 << 20 | 5 << 15 | 5 << 7 | 0x13, 31 << 20 | 5 << 15 | 7 << 12 | 6 << 7 | 0x13]);
    code.extend([6 << 15 | 1 << 12 | 4 << 8 | 0x63, 0x0100_000f]);
    code.push(back(code.len()));
    code
}

fn run_to(machine: &mut Machine, icount: u64) {
    while machine.run(icount, &mut Nobody) == Exit::Work {}
    assert_eq!(machine.icount(), icount);
}

fn assert_same(a: &Machine, b: &Machine) {
    let icount = a.icount();
    assert_eq!((icount, a.turn()), (b.icount(), b.turn()));
    for (number, (one, other)) in a.all_harts().zip(b.all_harts()).enumerate() {
        assert_eq!(one.pc, other.pc, "hart {number} at icount {icount}");
        assert_eq!(one.x[..32], other.x[..32], "hart {number} at icount {icount}");
        assert_eq!((one.mcause, other.mcause), (0, 0), "hart {number} at icount {icount}");
    }
    let page = (DATA / 4096) as u32;
    assert!(a.ram().page(page) == b.ram().page(page), "data at icount {icount}");
}

#[test]
fn a_run_ends_about_where_it_should_and_in_the_state_that_is_there() {
    for harts in [1, 3] {
        let mut random = Seeded::new(harts);
        let code = program(&mut random);
        let (mut about, mut exact) = (machine(&code, harts), machine(&code, harts));
        let mut went_on = 0;
        for _ in 0..500 {
            let scale = random.below(14);
            let mut ahead = |from: u64, bound: u64| from + 1 + random.below(bound);
            let enough = ahead(about.icount(), 1 << scale);
            // Before it, in the midst of the block, and far away.
            let until = match enough % 3 {
                0 => ahead(about.icount(), 1 << scale),
                1 => ahead(enough, OVER) - 1,
                _ => enough + 100_000,
            };
            while about.run_about(enough, until, &mut Nobody) == Exit::Work {}
            let (least, most) = (enough.min(until), until.min(enough + OVER));
            let icount = about.icount();
            assert!((least..=most).contains(&icount), "{icount} is not in {least}..={most}");
            went_on += u64::from(icount > enough);
            run_to(&mut exact, icount);
            assert_same(&about, &exact);
        }
        assert!(went_on > 50, "{went_on} runs went on");
        assert!(about.icount() > 3 * QUANTUM, "every hart had its turn");
    }
}

/// Wants the run to end when it is asked so often.
struct StopsAt {
    asked: u64,
    at: u64,
}

impl Outside for StopsAt {
    fn read_clock(&mut self, _: ClockKind, _: i64, icount: u64, _: &Hart) -> i64 {
        icount as i64
    }

    fn must_stop(&mut self) -> bool {
        self.asked += 1;
        self.asked == self.at
    }
}

#[test]
fn a_run_is_asked_to_stop_in_time_and_stops_behind_a_block() {
    // A block of 63, and one of the others: addi x5, x5, 1, and back.
    let mut code = vec![1 << 20 | 5 << 15 | 5 << 7 | 0x13; 100];
    code.push(back(code.len()));
    let end = 250_000;
    for harts in [1, 3] {
        let mut uninterrupted = machine(&code, harts);
        run_to(&mut uninterrupted, end);
        for at in 2..7 {
            let mut m = machine(&code, harts);
            let mut outside = StopsAt { asked: 0, at };
            assert_eq!(m.run_about(200_000, 300_000, &mut outside), Exit::Stopped);
            assert_eq!(outside.asked, at);
            // The first look is before the first instruction.
            let icount = m.icount();
            assert!(icount <= (at - 1) * (LOOK + OVER), "stopped at {icount}, asked {at} times");
            if at == 2 || harts == 1 {
                assert!(icount >= (at - 1) * LOOK, "stopped at {icount}, asked {at} times");
                let begin = m.hart().pc - RAM_BASE;
                assert!([0, 4 * 63].contains(&begin), "stopped at {begin:#x}");
            }
            run_to(&mut m, end);
            assert_same(&m, &uninterrupted);
        }
    }
}
