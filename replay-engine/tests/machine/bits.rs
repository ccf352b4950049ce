//! Zba, Zbb and Zbs.

use super::{Machine, machine, run};
use heddle_replay_engine::machine::decode::decode;
use heddle_replay_engine::machine::disasm::disassemble;

/// As the GNU assembler has them.
const INSTRUCTIONS: [(u32, &str); 40] = [
    (0x20c5_a533, "sh1add a0, a1, a2"),
    (0x20c5_c533, "sh2add a0, a1, a2"),
    (0x20c5_e533, "sh3add a0, a1, a2"),
    (0x08c5_853b, "add.uw a0, a1, a2"),
    (0x20c5_a53b, "sh1add.uw a0, a1, a2"),
    (0x20c5_c53b, "sh2add.uw a0, a1, a2"),
    (0x20c5_e53b, "sh3add.uw a0, a1, a2"),
    (0x0a15_951b, "slli.uw a0, a1, 33"),
    (0x40c5_f533, "andn a0, a1, a2"),
    (0x40c5_e533, "orn a0, a1, a2"),
    (0x40c5_c533, "xnor a0, a1, a2"),
    (0x6005_9513, "clz a0, a1"),
    (0x6015_9513, "ctz a0, a1"),
    (0x6025_9513, "cpop a0, a1"),
    (0x6005_951b, "clzw a0, a1"),
    (0x6015_951b, "ctzw a0, a1"),
    (0x6025_951b, "cpopw a0, a1"),
    (0x0ac5_c533, "min a0, a1, a2"),
    (0x0ac5_e533, "max a0, a1, a2"),
    (0x0ac5_d533, "minu a0, a1, a2"),
    (0x0ac5_f533, "maxu a0, a1, a2"),
    (0x6045_9513, "sext.b a0, a1"),
    (0x6055_9513, "sext.h a0, a1"),
    (0x0805_c53b, "zext.h a0, a1"),
    (0x60c5_9533, "rol a0, a1, a2"),
    (0x60c5_d533, "ror a0, a1, a2"),
    (0x63f5_d513, "rori a0, a1, 63"),
    (0x60c5_953b, "rolw a0, a1, a2"),
    (0x60c5_d53b, "rorw a0, a1, a2"),
    (0x61f5_d51b, "roriw a0, a1, 31"),
    (0x2875_d513, "orc.b a0, a1"),
    (0x6b85_d513, "rev8 a0, a1"),
    (0x28c5_9533, "bset a0, a1, a2"),
    (0x48c5_9533, "bclr a0, a1, a2"),
    (0x68c5_9533, "binv a0, a1, a2"),
    (0x48c5_d533, "bext a0, a1, a2"),
    (0x2bf5_9513, "bseti a0, a1, 63"),
    (0x4a05_9513, "bclri a0, a1, 32"),
    (0x6805_9513, "binvi a0, a1, 0"),
    (0x4a85_d513, "bexti a0, a1, 40"),
];

#[test]
fn instructions_decode() {
    for (word, text) in INSTRUCTIONS {
        assert_eq!(disassemble(&decode(word), 0), text, "{word:#010x}");
    }
    // What lies beside them: no rori of a word by 32, no zext.h of two operands, no clmul.
    for word in [0x63f5_d51b, 0x08c5_c53b, 0x0ac5_9533, 0x6035_9513, 0x4010_1013] {
        assert!(disassemble(&decode(word), 0).starts_with("illegal"), "{word:#010x}");
    }
}

/// What `name` makes of `a1` and `a2`.
fn result(name: &str, a: u64, b: u64) -> u64 {
    let matching = INSTRUCTIONS.iter().find(|(_, text)| text.split(' ').next() == Some(name));
    let mut m: Machine = machine(&[matching.unwrap().0], &[(11, a), (12, b)]);
    run(&mut m, 1);
    assert_eq!(m.hart().mcause, 0, "{name}");
    m.hart().x[10]
}

#[test]
fn results_at_their_edges() {
    let (min, max) = (i64::MIN as u64, i64::MAX as u64);
    let cases = [
        ("sh1add", 1 << 63 | 3, 1, 7),
        ("sh2add", 3, u64::MAX, 11),
        ("sh3add", 3, 1, 25),
        ("add.uw", u64::MAX, 1, 1 << 32),
        ("sh1add.uw", u64::MAX, 1, 0x1_ffff_ffff),
        ("sh2add.uw", 0xf_0000_0001, 1, 5),
        ("sh3add.uw", u64::MAX, 0, 0x7_ffff_fff8),
        ("slli.uw", u64::MAX, 0, 0xffff_fffe_0000_0000),
        ("andn", 0xff, 0x0f, 0xf0),
        ("orn", 0, 0x0f, !0x0f),
        ("xnor", 0xff, 0x0f, !0xf0),
        ("clz", 0, 0, 64),
        ("clz", 1, 0, 63),
        ("ctz", 0, 0, 64),
        ("ctz", min, 0, 63),
        ("cpop", u64::MAX, 0, 64),
        ("clzw", 1 << 32, 0, 32),
        ("clzw", 1, 0, 31),
        ("ctzw", 1 << 32, 0, 32),
        ("cpopw", u64::MAX, 0, 32),
        ("min", min, max, min),
        ("max", min, max, max),
        ("minu", min, max, max),
        ("maxu", min, max, min),
        ("sext.b", 0x180, 0, !0x7f),
        ("sext.h", 0x1_8000, 0, !0x7fff),
        ("zext.h", u64::MAX, 0, 0xffff),
        ("rol", min | 1, 65, 3),
        ("ror", 3, 65, min | 1),
        ("rori", 3, 0, 6),
        ("rolw", 0x8000_0000, 33, 1),
        ("rolw", 0x4000_0000, 1, 0xffff_ffff_8000_0000),
        ("rorw", 1, 33, 0xffff_ffff_8000_0000),
        ("roriw", 0x4000_0000, 0, 0xffff_ffff_8000_0000),
        ("orc.b", 0x0100_8000_0000_0010, 0, 0xff00_ff00_0000_00ff),
        ("rev8", 0x0102_0304_0506_0708, 0, 0x0807_0605_0403_0201),
        ("bset", 0, 127, min),
        ("bclr", u64::MAX, 64, !1),
        ("binv", 1, 0, 0),
        ("bext", min, 63, 1),
        ("bext", min, 62, 0),
        ("bseti", 0, 0, min),
        ("bclri", u64::MAX, 0, !(1 << 32)),
        ("binvi", 0, 0, 1),
        ("bexti", 1 << 40, 0, 1),
    ];
    for (name, a, b, expected) in cases {
        assert_eq!(result(name, a, b), expected, "{name} of {a:#x} and {b:#x}");
    }
}
