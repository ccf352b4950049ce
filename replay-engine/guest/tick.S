# The self-test guest for QEMU on x86: a multiboot program that does, in a second, what
# replays stumble over: timer interrupts out of HLT (warp), reads of the host's clock,
# serial output and input, computing over memory, and a switch-off by ACPI.
    .code32
    .section .multiboot, "a"
    .long 0x1BADB002, 0x00000003, -(0x1BADB002 + 0x00000003)

    .set ROUNDS, 16
    .set COM1, 0x3f8

    .text
    .globl _start
_start:
    cli
    movl $stack_top, %esp
    lgdt gdt_pointer
    ljmp $8, $1f
1:  movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    # Every vector ends at once but the timer's, 32.
    movl $idt, %edi
    movl $256, %ecx
2:  movl $ignore, %eax
    call gate
    loop 2b
    movl $idt + 32 * 8, %edi
    movl $timer, %eax
    call gate
    lidt idt_pointer
    # Both PICs: vectors 32 and 40, everything masked but the timer.
    movl $pic, %esi
3:  movzbl (%esi), %edx
    testl %edx, %edx
    jz 4f
    movb 1(%esi), %al
    outb %al, %dx
    addl $2, %esi
    jmp 3b
    # The PIT at 200 Hz.
4:  movb $0x34, %al
    outb %al, $0x43
    movb $(5966 & 255), %al
    outb %al, $0x40
    movb $(5966 >> 8), %al
    outb %al, $0x40
    # The UART's FIFO on.
    movw $COM1 + 2, %dx
    movb $1, %al
    outb %al, %dx
    movl $up, %esi
    call print
    movl $ROUNDS, %ebp
round:
    sti
    hlt
    cli
    # A read of the host's clock.
    xorb %al, %al
    outb %al, $0x70
    inb $0x71, %al
    movzbl %al, %eax
    addl %eax, sum
    # Computing: a pass over 256 KiB.
    movl $work, %edi
    movl $65536, %ecx
    movl sum, %eax
5:  imull $1664525, %eax, %eax
    addl $1013904223, %eax
    addl (%edi), %eax
    movl %eax, (%edi)
    addl $4, %edi
    loop 5b
    movl %eax, sum
    # Whatever was typed goes into the sum, too.
    movw $COM1 + 5, %dx
    inb %dx, %al
    testb $1, %al
    jz 6f
    movw $COM1, %dx
    inb %dx, %al
    movzbl %al, %eax
    addl %eax, sum
6:  movb $'.', %al
    call put
    decl %ebp
    jnz round
    movl $8, %ecx
    movl sum, %ebx
7:  roll $4, %ebx
    movb %bl, %al
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe 8f
    addb $39, %al
8:  call put
    loop 7b
    movl $done, %esi
    call print
    # ACPI: PIIX4's PM1a control block, S5.
    movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, %dx
9:  hlt
    jmp 9b

gate:
    movw %ax, (%edi)
    movw $8, 2(%edi)
    movw $0x8e00, 4(%edi)
    shrl $16, %eax
    movw %ax, 6(%edi)
    addl $8, %edi
    ret

print:
    lodsb
    testb %al, %al
    jz 1f
    call put
    jmp print
1:  ret

put:
    pushl %eax
    movw $COM1 + 5, %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    popl %eax
    movw $COM1, %dx
    outb %al, %dx
    ret

timer:
    pushl %eax
    incl ticks
    movb $0x20, %al
    outb %al, $0x20
    popl %eax
    iret
ignore:
    iret

    .section .rodata
up:   .asciz "tick: up "
done: .asciz " tick: done\r\n"
pic:  .byte 0x20, 0x11, 0xa0, 0x11, 0x21, 32, 0xa1, 40, 0x21, 4, 0xa1, 2, 0x21, 1, 0xa1, 1
      .byte 0x21, 0xfe, 0xa1, 0xff, 0
    .balign 8
gdt:  .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer: .word 23
    .long gdt
idt_pointer: .word 2047
    .long idt

    .bss
    .balign 4096
idt:   .skip 2048
sum:   .skip 4
ticks: .skip 4
    .balign 16
       .skip 4096
stack_top:
    .balign 4096
work:  .skip 262144
