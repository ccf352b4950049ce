//! A guest of any number of harts, which count together and wake each other.

use super::{RAM_BASE, machine};
use heddle_replay_engine::machine::Machine;

const CLINT: u64 = 0x200_0000;
const RTC: u64 = 0x10_1000;
const PLIC: u64 = 0xc00_0000;
const UART: u64 = 0x1000_0000;
const FINISHER: u64 = 0x10_0000;

/// Offsets in RAM of what they count: by AMO, by LR and SC, their software interrupts, what
/// they read (summed), and how many are done.
pub const BY_AMO: u64 = 0x1_0000;
pub const BY_LR: u64 = BY_AMO + 64;
pub const IPIS: u64 = BY_AMO + 128;
const READ: u64 = BY_AMO + 192;
pub const DONE: u64 = BY_AMO + 256;
/// Where each hart reads the wall clock, once a round.
pub const READS_CLOCK: u64 = RAM_BASE + 0x120;

/// So many harts that do so many rounds each, and count so often in each of them.
pub fn weaving(harts: usize, rounds: u64, counts: u64) -> Machine {
    let data = [(8, BY_AMO), (25, BY_LR), (26, IPIS), (27, READ), (4, DONE)];
    let mut registers: Vec<(usize, u64)> = data.map(|(register, at)| (register, RAM_BASE + at)).to_vec();
    registers.extend([(9, CLINT), (20, RTC), (21, PLIC), (22, UART), (3, FINISHER)]);
    registers.extend([(18, rounds), (19, harts as u64), (23, counts), (24, 1)]);
    machine(&CODE, harts, &registers, 3)
}

const CODE: [u32; 90] = [
    0xf140_2573, //   0  csrr a0, mhartid
    0x0025_1613, //   4  slli a2, a0, 2
    0x0096_0633, //   8  add a2, a2, s1
    0x0035_1593, //   c  slli a1, a0, 3
    0x0095_85b3, //  10  add a1, a1, s1
    0x0000_42b7, //  14  lui t0, 4
    0x0055_85b3, //  18  add a1, a1, t0
    0x0015_0693, //  1c  addi a3, a0, 1
    0x0136_e463, //  20  bltu a3, s3, 0x28
    0x0000_0693, //  24  li a3, 0
    0x0026_9693, //  28  slli a3, a3, 2
    0x0096_86b3, //  2c  add a3, a3, s1
    0x3044_5073, //  30  csrwi mie, 8
    0x0405_0063, //  34  beqz a0, 0x74
    // Harts but the first wait until it wakes them.
    0x1050_0073, //  38  wfi
    0x3440_22f3, //  3c  csrr t0, mip
    0x0082_f293, //  40  andi t0, t0, 8
    0xfe02_8ae3, //  44  beqz t0, 0x38
    0x0006_2023, //  48  sw zero, 0(a2)
    // The second one gets the UART's interrupts.
    0x0010_0313, //  4c  li t1, 1
    0x0465_1063, //  50  bne a0, t1, 0x90
    0x026a_a423, //  54  sw t1, 40(s5)
    0x0000_23b7, //  58  lui t2, 2
    0x1003_839b, //  5c  addiw t2, t2, 256
    0x0153_83b3, //  60  add t2, t2, s5
    0x4000_0293, //  64  li t0, 1024
    0x0053_a023, //  68  sw t0, 0(t2)
    0x006b_00a3, //  6c  sb t1, 1(s6)
    0x0200_006f, //  70  j 0x90
    // The first one wakes the others.
    0x0010_0313, //  74  li t1, 1
    0x0133_7c63, //  78  bgeu t1, s3, 0x90
    0x0023_1393, //  7c  slli t2, t1, 2
    0x0093_83b3, //  80  add t2, t2, s1
    0x0183_a023, //  84  sw s8, 0(t2)
    0x0013_0313, //  88  addi t1, t1, 1
    0xfedf_f06f, //  8c  j 0x78
    // All wake for software, timer and devices.
    0x0000_12b7, //  90  lui t0, 1
    0x8882_8293, //  94  addi t0, t0, -1912
    0x3042_9073, //  98  csrw mie, t0
    0x0000_0713, //  9c  li a4, 0
    // A round: a timer, and two counts of the same.
    0xc010_22f3, //  a0  rdtime t0
    0x0055_1313, //  a4  slli t1, a0, 5
    0x0062_82b3, //  a8  add t0, t0, t1
    0x0282_8293, //  ac  addi t0, t0, 40
    0x0055_b023, //  b0  sd t0, 0(a1)
    0x000b_8393, //  b4  mv t2, s7
    0x0184_302f, //  b8  amoadd.d zero, s8, (s0)
    0x100c_be2f, //  bc  lr.d t3, (s9)
    0x001e_0e13, //  c0  addi t3, t3, 1
    0x19cc_beaf, //  c4  sc.d t4, t3, (s9)
    0xfe0e_9ae3, //  c8  bnez t4, 0xbc
    0xfff3_8393, //  cc  addi t2, t2, -1
    0xfe03_94e3, //  d0  bnez t2, 0xb8
    // Waits for the timer, and serves what comes meanwhile.
    0x1050_0073, //  d4  wfi
    0x3440_22f3, //  d8  csrr t0, mip
    0x0082_f313, //  dc  andi t1, t0, 8
    0x0003_0663, //  e0  beqz t1, 0xec
    0x0006_2023, //  e4  sw zero, 0(a2)
    0x018d_302f, //  e8  amoadd.d zero, s8, (s10)
    0x0342_9313, //  ec  slli t1, t0, 52
    0x0203_5263, //  f0  bgez t1, 0x114
    0x0020_23b7, //  f4  lui t2, 514
    0x0043_839b, //  f8  addiw t2, t2, 4
    0x0153_83b3, //  fc  add t2, t2, s5
    0x0003_ae03, // 100  lw t3, 0(t2)
    0x000b_4e83, // 104  lbu t4, 0(s6)
    0x01db_0023, // 108  sb t4, 0(s6)
    0x01dd_b02f, // 10c  amoadd.d zero, t4, (s11)
    0x01c3_a023, // 110  sw t3, 0(t2)
    0x0802_f313, // 114  andi t1, t0, 128
    0xfa03_0ee3, // 118  beqz t1, 0xd4
    // Wakes the next hart, and reads the wall clock.
    0x0186_a023, // 11c  sw s8, 0(a3)
    0x000a_2303, // 120  lw t1, 0(s4)
    0x006d_b02f, // 124  amoadd.d zero, t1, (s11)
    0x0017_0713, // 128  addi a4, a4, 1
    0xf727_1ae3, // 12c  bne a4, s2, 0xa0
    // Done. The first one waits for all, and switches off.
    0xfff0_0293, // 130  li t0, -1
    0x0055_b023, // 134  sd t0, 0(a1)
    0x0182_302f, // 138  amoadd.d zero, s8, (tp)
    0x0205_1063, // 13c  bnez a0, 0x15c
    0x0100_000f, // 140  pause
    0x0002_3283, // 144  ld t0, 0(tp)
    0xff32_9ce3, // 148  bne t0, s3, 0x140
    0x0000_52b7, // 14c  lui t0, 5
    0x5552_829b, // 150  addiw t0, t0, 1365
    0x0051_a023, // 154  sw t0, 0(gp)
    0x0000_006f, // 158  j 0x158
    0x3040_5073, // 15c  csrwi mie, 0
    0x1050_0073, // 160  wfi
    0xff9f_f06f, // 164  j 0x15c
];
