//! F and D in the machine: registers, boxes, `fcsr` and `mstatus.FS`.

use super::{Machine, RAM_BASE, csr, i, machine, run};
use heddle_replay_engine::machine::decode::decode;
use heddle_replay_engine::machine::disasm::disassemble;
use heddle_replay_engine::machine::float::flag::{DZ, NV, NX, UF};
use heddle_replay_engine::machine::hart::status;

const ILLEGAL: u64 = 2;
const FFLAGS: u32 = 1;
const FRM: u32 = 2;
const FCSR: u32 = 3;
/// `mstatus.FS` as software sets it first.
const INITIAL: u64 = 1 << 13;
const DYNAMIC: u32 = 7;
const BOX: u64 = 0xffff_ffff << 32;
const NAN_SINGLE: u64 = 0x7fc0_0000;
const NAN_DOUBLE: u64 = 0x7ff8 << 48;

/// As the GNU assembler has them.
const INSTRUCTIONS: [(u32, &str); 38] = [
    (0xffc1_2507, "flw fa0, -4(sp)"),
    (0x7f84_bf87, "fld ft11, 2040(s1)"),
    (0x8085_2027, "fsw fs0, -2048(a0)"),
    (0x0110_3427, "fsd fa7, 8(zero)"),
    (0x68c5_f543, "fmadd.s fa0, fa1, fa2, fa3"),
    (0x1a20_9047, "fmsub.d ft0, ft1, ft2, ft3, rtz"),
    (0xc19d_7dcb, "fnmsub.s fs11, fs10, fs9, fs8"),
    (0xfac5_f54f, "fnmadd.d fa0, fa1, fa2, ft11"),
    (0x00c5_f553, "fadd.s fa0, fa1, fa2"),
    (0x0ac5_b553, "fsub.d fa0, fa1, fa2, rup"),
    (0x10c5_c553, "fmul.s fa0, fa1, fa2, rmm"),
    (0x1ac5_f553, "fdiv.d fa0, fa1, fa2"),
    (0x5805_f553, "fsqrt.s fa0, fa1"),
    (0x5a05_a553, "fsqrt.d fa0, fa1, rdn"),
    (0x20c5_8553, "fsgnj.s fa0, fa1, fa2"),
    (0x22c5_9553, "fsgnjn.d fa0, fa1, fa2"),
    (0x20c5_a553, "fsgnjx.s fa0, fa1, fa2"),
    (0x28c5_8553, "fmin.s fa0, fa1, fa2"),
    (0x2ac5_9553, "fmax.d fa0, fa1, fa2"),
    (0x4015_f553, "fcvt.s.d fa0, fa1"),
    (0x4205_8553, "fcvt.d.s fa0, fa1, rne"),
    (0xc005_9053, "fcvt.w.s zero, fa1, rtz"),
    (0xc215_f553, "fcvt.wu.d a0, fa1"),
    (0xc025_f553, "fcvt.l.s a0, fa1"),
    (0xc235_f553, "fcvt.lu.d a0, fa1"),
    (0xd005_f553, "fcvt.s.w fa0, a1"),
    (0xd215_8553, "fcvt.d.wu fa0, a1, rne"),
    (0xd025_f553, "fcvt.s.l fa0, a1"),
    (0xd235_f553, "fcvt.d.lu fa0, a1"),
    (0xe005_8553, "fmv.x.w a0, fa1"),
    (0xe205_8553, "fmv.x.d a0, fa1"),
    (0xf005_8553, "fmv.w.x fa0, a1"),
    (0xf205_8553, "fmv.d.x fa0, a1"),
    (0xa0c5_a553, "feq.s a0, fa1, fa2"),
    (0xa2c5_9553, "flt.d a0, fa1, fa2"),
    (0xa0c5_8553, "fle.s a0, fa1, fa2"),
    (0xe005_9553, "fclass.s a0, fa1"),
    (0xe205_9553, "fclass.d a0, fa1"),
];

#[test]
fn instructions_decode() {
    for (word, text) in INSTRUCTIONS {
        assert_eq!(disassemble(&decode(word), 0), text, "{word:#010x}");
    }
    // fadd.s rounding as 5 and 6; binary16 and binary128; fcvt.s.s; fsgnj with f3 of 3; flh.
    for word in [0x00c5_d553, 0x00c5_e553, 0x04c5_f553, 0x06c5_f553, 0x4005_f553, 0x20c5_b553, 0x0001_1507] {
        assert!(disassemble(&decode(word), 0).starts_with("illegal"), "{word:#010x}");
    }
}

/// f3 (or x3) = f1 op f2, of opcode OP-FP.
fn op(f7: u32, rs2: u32, rm: u32) -> u32 {
    f7 << 25 | rs2 << 20 | 1 << 15 | rm << 12 | 3 << 7 | 0x53
}

/// A machine about to execute `code` with floating point on, and these in f1, f2 and so on.
fn float(code: &[u32], registers: &[(usize, u64)], floats: &[u64]) -> Machine {
    let mut machine = machine(code, registers);
    machine.hart_mut().mstatus |= INITIAL;
    machine.hart_mut().f[1..=floats.len()].copy_from_slice(floats);
    machine
}

fn double(number: f64) -> u64 {
    number.to_bits()
}

fn single(number: f32) -> u64 {
    BOX | u64::from(number.to_bits())
}

/// The registers after one instruction: f3, x3 and `fcsr`.
fn one(code: u32, x1: u64, floats: &[u64]) -> (u64, u64, u8) {
    let mut m = float(&[code], &[(1, x1)], floats);
    run(&mut m, 1);
    assert_eq!(m.hart().mcause, 0, "{code:#010x}");
    (m.hart().f[3], m.hart().x[3], m.hart().fcsr)
}

#[test]
fn nothing_runs_while_it_is_off() {
    let load = i(0, 1, 2, 3, 0x07);
    let words = [
        load,
        op(1, 2, DYNAMIC),
        op(0x70, 0, 0),
        csr(2, FFLAGS, 0, 5),
        csr(1, FRM, 1, 0),
        csr(5, FCSR, 3, 0),
    ];
    for word in words {
        let mut m = machine(&[word], &[(1, RAM_BASE)]);
        run(&mut m, 1);
        assert_eq!((m.hart().mcause, m.hart().mtval), (ILLEGAL, u64::from(word)), "{word:#010x}");
        assert_eq!((m.hart().fcsr, m.hart().f[3]), (0, 0));
    }
    // c.fld: the trap value has its 16 bits.
    let mut m = machine(&[0x24ec], &[]);
    run(&mut m, 1);
    assert_eq!((m.hart().mcause, m.hart().mtval), (ILLEGAL, 0x24ec));
}

#[test]
fn what_is_written_is_dirty() {
    let read = |number| csr(2, number, 0, 5);
    // Neither reading nor a comparison that raises nothing makes it dirty.
    let mut m = float(&[op(0x51, 2, 2), csr(2, FCSR, 0, 6), read(0x300)], &[], &[double(1.0), double(1.0)]);
    run(&mut m, 3);
    assert_eq!((m.hart().x[3], m.hart().x[5] & (status::SD | status::FS)), (1, INITIAL));
    let writes =
        [op(1, 2, DYNAMIC), op(0x79, 0, 0), csr(1, FFLAGS, 0, 0), csr(6, FRM, 1, 0), csr(1, FCSR, 1, 0)];
    for write in writes {
        for number in [0x100, 0x300] {
            let mut m = float(&[write, read(number)], &[], &[]);
            run(&mut m, 2);
            let dirty = status::SD | status::FS;
            assert_eq!(m.hart().x[5] & dirty, dirty, "{write:#010x} {number:#x}");
        }
    }
    // A comparison that raises a flag does. SD can't be written; FS can, in sstatus too.
    let code = [op(0x51, 2, 1), read(0x300), csr(3, 0x100, 1, 0), csr(2, 0x300, 0, 6)];
    let mut m = float(&code, &[(1, status::SD | status::FS)], &[NAN_DOUBLE, double(1.0)]);
    run(&mut m, 4);
    assert_eq!(m.hart().x[5] & (status::SD | status::FS), status::SD | status::FS);
    assert_eq!(m.hart().x[6] & (status::SD | status::FS), 0);
    assert_eq!(m.hart().fcsr, NV);
}

#[test]
fn misa_has_f_and_d() {
    let mut m = machine(&[csr(2, 0x301, 0, 5)], &[]);
    run(&mut m, 1);
    let letters: String =
        (0..26u8).filter(|n| m.hart().x[5] >> n & 1 != 0).map(|n| char::from(b'a' + n)).collect();
    assert_eq!(letters, "acdfimsu");
}

#[test]
fn singles_are_boxed() {
    let (one_and_a_half, unboxed) = (single(1.5), u64::from(1.5f32.to_bits()));
    assert_eq!(one(op(0, 2, DYNAMIC), 0, &[one_and_a_half, one_and_a_half]).0, single(3.0));
    // Not boxed: the canonical NaN, quiet, in whatever reads a single.
    let bad = BOX << 1 | unboxed;
    assert_eq!(one(op(0, 2, DYNAMIC), 0, &[bad, one_and_a_half]), (BOX | NAN_SINGLE, 0, 0));
    assert_eq!(one(op(0x10, 2, 0), 0, &[unboxed, single(-1.0)]).0, BOX | NAN_SINGLE | 1 << 31);
    assert_eq!(one(op(0x10, 2, 1), 0, &[single(-1.0), unboxed]).0, single(-1.0));
    assert_eq!(one(op(0x14, 2, 0), 0, &[unboxed, one_and_a_half]).0, one_and_a_half);
    assert_eq!(one(op(0x70, 0, 1), 0, &[unboxed]).1, 1 << 9);
    assert_eq!(one(op(0x21, 0, 0), 0, &[unboxed]).0, NAN_DOUBLE);
    assert_eq!(one(op(0x60, 0, 1), 0, &[unboxed]), (0, 0x7fff_ffff, NV));
    // Moves and stores take the bits as they are; moves and loads box.
    assert_eq!(one(op(0x70, 0, 0), 0, &[0x8000_0001]).1, 0xffff_ffff_8000_0001);
    assert_eq!(one(op(0x71, 0, 0), 0, &[0x8000_0001]).1, 0x8000_0001);
    assert_eq!(one(op(0x78, 0, 0), 0x1234_5678_9abc_def0, &[]).0, BOX | 0x9abc_def0);
    assert_eq!(one(op(0x79, 0, 0), 0x1234_5678_9abc_def0, &[]).0, 0x1234_5678_9abc_def0);
    let at = RAM_BASE + 0x1000;
    let (store, load) = (1 << 20 | 1 << 15 | 2 << 12 | 0x27, i(0, 1, 2, 3, 0x07));
    let mut m = float(&[store, load], &[(1, at)], &[0x1234_5678_9abc_def0]);
    run(&mut m, 2);
    assert_eq!(m.ram().slice(0x1000, 8).unwrap(), [0xf0, 0xde, 0xbc, 0x9a, 0, 0, 0, 0]);
    assert_eq!(m.hart().f[3], BOX | 0x9abc_def0);
}

#[test]
fn rounding_is_the_instructions_or_frm() {
    // 1/3 in each mode, named in the instruction and by frm; then -1/3.
    let third = |down: bool| double(1.0 / 3.0) + u64::from(!down);
    for (mode, positive, negative) in
        [(0, true, true), (1, true, true), (2, true, false), (3, false, true), (4, true, true)]
    {
        let operands = [double(1.0), double(3.0)];
        assert_eq!(one(op(0x0d, 2, mode), 0, &operands), (third(positive), 0, NX));
        for (first, expected) in [(1.0, third(positive)), (-1.0, third(negative) | 1 << 63)] {
            let code = [csr(5, FRM, mode, 0), op(0x0d, 2, DYNAMIC)];
            let mut m = float(&code, &[], &[double(first), double(3.0)]);
            run(&mut m, 2);
            assert_eq!(m.hart().f[3], expected, "frm {mode}");
            assert_eq!(u32::from(m.hart().fcsr), mode << 5 | u32::from(NX));
        }
    }
    // A reserved frm is illegal where it is used, and only there.
    for mode in 5..8 {
        let code = [csr(5, FRM, mode, 0), op(1, 2, 0), op(0x15, 2, 1), op(0x69, 0, DYNAMIC)];
        let mut m = float(&code, &[], &[double(1.0), double(2.0)]);
        run(&mut m, 3);
        assert_eq!((m.hart().mcause, m.hart().f[3]), (0, double(2.0)));
        run(&mut m, 1);
        assert_eq!((m.hart().mcause, m.hart().mtval), (ILLEGAL, u64::from(code[3])));
    }
}

#[test]
fn flags_accumulate_until_they_are_written() {
    let code = [
        op(0x0d, 0, DYNAMIC), // f1 / f0: by zero
        op(0x0d, 2, DYNAMIC), // f1 / f2: inexact
        csr(2, FFLAGS, 0, 5),
        csr(7, FFLAGS, u32::from(DZ), 6),
        csr(1, FCSR, 7, 0),
        csr(2, FRM, 0, 8),
        csr(2, FFLAGS, 0, 9),
    ];
    let mut m = float(&code, &[(7, u64::MAX << 8 | 0x65)], &[double(1.0), double(3.0)]);
    run(&mut m, 4);
    assert_eq!((m.hart().x[5], m.hart().x[6], m.hart().fcsr), (u64::from(DZ | NX), u64::from(DZ | NX), NX));
    run(&mut m, 3);
    assert_eq!((m.hart().x[8], m.hart().x[9], m.hart().fcsr), (3, 5, 0x65));
}

#[test]
fn flags_are_found_also_after_inexact_results() {
    let (quotient, product) = (op(0x0d, 2, DYNAMIC), op(0x09, 4, DYNAMIC));
    let code = [quotient, quotient, product, csr(1, FCSR, 0, 0), quotient];
    let (tenth, least) = (0.1, f64::MIN_POSITIVE);
    let mut m = float(&code, &[], &[double(tenth), double(3.0), 0, double(least)]);
    run(&mut m, 2);
    assert_eq!((m.hart().f[3], m.hart().fcsr), (double(tenth / 3.0), NX));
    run(&mut m, 1);
    assert_eq!((m.hart().f[3], m.hart().fcsr), (double(tenth * least), NX | UF));
    // Cleared, a flag is raised anew.
    run(&mut m, 2);
    assert_eq!((m.hart().f[3], m.hart().fcsr), (double(tenth / 3.0), NX));
}

#[test]
fn fused_operations_negate_what_they_say() {
    let fused = |opcode: u32| 4 << 27 | 1 << 25 | 2 << 20 | 1 << 15 | DYNAMIC << 12 | 3 << 7 | opcode;
    let cases = [(0x43, 10.0), (0x47, 2.0), (0x4b, -2.0), (0x4f, -10.0)];
    for (opcode, expected) in cases {
        let found = one(fused(opcode), 0, &[double(2.0), double(3.0), 0, double(4.0)]).0;
        assert_eq!(found, double(expected), "{opcode:#x}");
    }
}

#[test]
fn conversions_fill_registers() {
    assert_eq!(one(op(0x61, 1, 1), 0, &[double(3e9)]).1, 3_000_000_000u32 as i32 as u64);
    assert_eq!(one(op(0x61, 1, 1), 0, &[double(-1.0)]), (0, 0, NV));
    assert_eq!(one(op(0x69, 0, 0), 0xffff_ffff, &[]).0, double(-1.0));
    assert_eq!(one(op(0x69, 1, 0), u64::MAX, &[]).0, double(4294967295.0));
    assert_eq!(one(op(0x68, 3, 0), u64::MAX, &[]), (single(18446744073709551616.0), 0, NX));
    assert_eq!(one(op(0x20, 1, 0), 0, &[double(1e300)]).0, single(f32::INFINITY));
    assert_eq!(one(op(0x21, 0, 0), 0, &[single(1.5)]).0, double(1.5));
    // An integer destination x0 swallows the result.
    let mut m = float(&[op(0x51, 1, 2) & !(31 << 7)], &[], &[double(1.0)]);
    run(&mut m, 1);
    assert_eq!(m.hart().x[0], 0);
    // f0 is a register like any other.
    let mut m = float(&[op(0x69, 0, 0) & !(31 << 7)], &[(1, 7)], &[]);
    run(&mut m, 1);
    assert_eq!(m.hart().f[0], double(7.0));
}

#[test]
fn compressed_loads_and_stores_make_the_round() {
    // c.fsd fa0, 200(s1); c.fld fa1, 200(s1); c.fsdsp ft1, 328(sp); c.fldsp ft0, 328(sp)
    let halves = [0xa4e8u32, 0x24ec, 0xa686, 0x2036];
    let code = [halves[0] | halves[1] << 16, halves[2] | halves[3] << 16];
    let mut m = float(&code, &[(2, RAM_BASE + 0x2000), (9, RAM_BASE + 0x1000)], &[double(0.5)]);
    m.hart_mut().f[10] = 0x0123_4567_89ab_cdef;
    run(&mut m, 4);
    assert_eq!((m.hart().f[11], m.hart().f[0]), (0x0123_4567_89ab_cdef, double(0.5)));
    assert_eq!(m.ram().load::<8>(0x1000 + 200), Some(0x0123_4567_89ab_cdef));
    assert_eq!(m.ram().load::<8>(0x2000 + 328), Some(double(0.5)));
    assert_eq!(m.hart().pc, RAM_BASE + 8);
}
