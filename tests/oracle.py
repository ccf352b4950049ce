#!/usr/bin/env python3
"""Runs RISC-V programs on unicorn, one after the other, for tests/oracle.rs.

A request, and then its answer, all little-endian:

    u32 bytes of code   code   31 x   32 f   fcsr   scratch page
    u8 status           pc     31 x   32 f   fcsr   scratch page

x, f, fcsr and pc are u64. Status 0: pc has reached the code's end. 1: unicorn gave an
error, and the rest is what was there then; its text goes to standard error. Whatever
comes first on standard output is one line, "ready VERSION".
"""

import struct
import sys

import unicorn
from unicorn import riscv_const as riscv

CODE = 0x8000_0000
CODE_BYTES = 0x1_0000
SCRATCH = CODE + CODE_BYTES
PAGE = 4096
FLOATING_POINT_ON = 3 << 13

X = [getattr(riscv, f"UC_RISCV_REG_X{n}") for n in range(1, 32)]
F = [getattr(riscv, f"UC_RISCV_REG_F{n}") for n in range(32)]
REGISTERS = X + F + [riscv.UC_RISCV_REG_FCSR]
STATE = struct.Struct(f"<{len(REGISTERS)}Q{PAGE}s")
ANSWER = struct.Struct(f"<BQ{len(REGISTERS)}Q{PAGE}s")


def machine():
    uc = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
    uc.mem_map(CODE, CODE_BYTES)
    uc.mem_map(SCRATCH, PAGE)
    return uc


def run(uc, code, state):
    *registers, memory = STATE.unpack(state)
    uc.ctl_flush_tb()
    uc.mem_write(CODE, code)
    uc.mem_write(SCRATCH, memory)
    status = uc.reg_read(riscv.UC_RISCV_REG_MSTATUS)
    uc.reg_write(riscv.UC_RISCV_REG_MSTATUS, status | FLOATING_POINT_ON)
    for register, value in zip(REGISTERS, registers):
        uc.reg_write(register, value)
    failed = 0
    try:
        uc.emu_start(CODE, CODE + len(code))
    except unicorn.UcError as error:
        print(f"unicorn: {error}", file=sys.stderr)
        failed = 1
    after = [uc.reg_read(register) for register in REGISTERS]
    pc = uc.reg_read(riscv.UC_RISCV_REG_PC)
    return ANSWER.pack(failed, pc, *after, bytes(uc.mem_read(SCRATCH, PAGE)))


def main():
    source, target = sys.stdin.buffer, sys.stdout.buffer
    target.write(f"ready {unicorn.__version__}\n".encode())
    target.flush()
    uc = machine()
    while head := source.read(4):
        code = source.read(struct.unpack("<I", head)[0])
        answer = run(uc, code, source.read(STATE.size))
        target.write(answer)
        target.flush()
        if answer[0]:
            # What an exception leaves behind is nobody's business.
            uc = machine()


if __name__ == "__main__":
    main()
