# The least firmware that Linux boots on: it probes nothing, so that it does the same on harts
# that differ in what M-mode has. The kernel lies 2 MiB up. Its trap handler lies where the
# device tree, which must be of a machine of 248 MiB, says that no memory is.
    .equ kernel, 0x80200000
    .equ handler, 0x8f800000
    .equ scratch, 0x8f801000

    .globl _start
_start:
    .option norvc
    .option norelax
    csrr a0, mhartid
    la t1, trap
    la t2, end
    li t0, handler
1:  ld t3, 0(t1)
    sd t3, 0(t0)
    addi t0, t0, 8
    addi t1, t1, 8
    bltu t1, t2, 1b
    li t0, handler
    csrw mtvec, t0
    li t0, -1               # all memory is everybody's
    csrw pmpaddr0, t0
    li t0, 0x1f
    csrw pmpcfg0, t0
    li t0, 0xb109           # all exceptions are Linux's but its own calls
    csrw medeleg, t0
    li t0, 0x222
    csrw mideleg, t0
    li t0, 7                # cycle, time, instret
    csrw mcounteren, t0
    li t0, 1                # menvcfg.STCE
    slli t0, t0, 63
    csrs 0x30a, t0
    li t0, 0x1800           # to S-mode
    csrc mstatus, t0
    li t0, 0x0800
    csrs mstatus, t0
    li t0, kernel
    csrw mepc, t0
    csrw satp, zero
    li t0, scratch
    csrw mscratch, t0
    mret

# SBI's base extension says version 1.0 and that there is no other; every other call is not
# supported.
    .align 4
trap:
    csrrw t6, mscratch, t6
    sd t0, 0(t6)
    csrr t0, mcause
    addi t0, t0, -9
    bnez t0, bad
    csrr t0, mepc
    addi t0, t0, 4
    csrw mepc, t0
    li t0, 0x10
    bne a7, t0, 2f
    li a0, 0
    li a1, 0
    bnez a6, 3f
    li a1, 0x01000000
    j 3f
2:  li a0, -2
3:  ld t0, 0(t6)
    csrrw t6, mscratch, t6
    mret
bad:                        # off, with exit code 1
    li t0, 0x100000
    li t1, 0x13333
    sw t1, 0(t0)
    j bad
    .align 4
end:
