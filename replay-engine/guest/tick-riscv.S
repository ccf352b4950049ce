# The self-test guest for QEMU's riscv64 virt machine: what tick.S is for x86.
    .set UART, 0x10000000
    .set RTC, 0x101000
    .set FINISHER, 0x100000
    .set MTIME, 0x200bff8
    .set MTIMECMP, 0x2004000
    .set ROUNDS, 16
    .set PERIOD, 50000          # 5 ms at 10 MHz

    .section .text.start
    .globl _start
_start:
    la   sp, stack_top
    la   t0, timer
    csrw mtvec, t0
    la   a0, up
    call print
    li   s0, ROUNDS
    li   s1, 0                  # the sum
round:
    # The timer, 5 ms from now, and sleep until it comes.
    li   t0, MTIME
    ld   t1, 0(t0)
    li   t2, PERIOD
    add  t1, t1, t2
    li   t0, MTIMECMP
    sd   t1, 0(t0)
    li   t0, 0x80
    csrw mie, t0
    csrsi mstatus, 8
    wfi
    csrci mstatus, 8
    # A read of the host's clock.
    li   t0, RTC
    lw   t1, 0(t0)
    srli t1, t1, 30
    add  s1, s1, t1
    # Computing: a pass over 256 KiB.
    la   t0, work
    li   t1, 65536
    li   t2, 1664525
    li   t3, 1013904223
1:  mul  s1, s1, t2
    add  s1, s1, t3
    lw   t4, 0(t0)
    add  s1, s1, t4
    sw   s1, 0(t0)
    addi t0, t0, 4
    addi t1, t1, -1
    bnez t1, 1b
    # Whatever was typed goes into the sum, too.
    li   t0, UART
    lbu  t1, 5(t0)
    andi t1, t1, 1
    beqz t1, 2f
    lbu  t1, 0(t0)
    add  s1, s1, t1
2:  li   a0, '.'
    call put
    addi s0, s0, -1
    bnez s0, round
    li   s0, 8
3:  srliw a0, s1, 28
    slliw s1, s1, 4
    li   t0, 10
    addi a0, a0, '0'
    li   t0, '9'
    ble  a0, t0, 4f
    addi a0, a0, 39
4:  call put
    addi s0, s0, -1
    bnez s0, 3b
    la   a0, done
    call print
    li   t0, FINISHER
    li   t1, 0x5555
    sw   t1, 0(t0)
5:  wfi
    j    5b

print:
    mv   s2, ra
    mv   s3, a0
1:  lbu  a0, 0(s3)
    beqz a0, 2f
    call put
    addi s3, s3, 1
    j    1b
2:  jr   s2

put:
    li   t0, UART
1:  lbu  t1, 5(t0)
    andi t1, t1, 0x20
    beqz t1, 1b
    sb   a0, 0(t0)
    ret

    .balign 4
timer:
    # Once: the next round sets it again.
    csrw mie, zero
    mret

    .section .rodata
up:   .asciz "tick: up "
done: .asciz " tick: done\r\n"

    .bss
    .balign 4096
    .skip 4096
stack_top:
work: .skip 262144
