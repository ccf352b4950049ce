# The bench's guest begins here. Its parameters are where they can be patched: iterations, naps
# of a second, pages. With pages it does nothing else than to write to so many, every third one,
# over and over: 5 instructions a page and 3 more each time. There has to be memory for them.
    .section .start
    .globl _start, parameters
_start:
    j 1f
    .balign 16
parameters:
    .dword 0, 0, 0
1:  la sp, stack_top
    la t0, parameters
    ld a2, 16(t0)
    bnez a2, touch
    call main
touch:
    la a1, touched
    li a5, 3 * 4096
sweep:
    mv a4, a1
    mv a3, a2
2:  add a6, a6, a3
    sd a6, 0(a4)
    add a4, a4, a5
    addi a3, a3, -1
    bnez a3, 2b
    j sweep
