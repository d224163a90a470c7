"""A ROM for machines without a BIOS for disks (microvm): it does the little that a boot sector takes for granted."""

from __future__ import annotations

from whimbrel_testing.guest.assembler import (
    ORIGIN,
    SIZE,
    Program,
    flat_segment,
    flat_segment_table,
    imm16,
    imm32,
)

ROM_SIZE = 64 << 10  #: bytes: the last segment below 1 MiB
_SEGMENT = 0xF000
_RESET = 0xFFF0  #: offset at which the processor begins
#: The words that set an interrupt controller up: 8 vectors from the first number on, as a BIOS has them.
_CONTROLLERS = ((0x20, (0x11, 0x08, 0x04, 0x01)), (0xA0, (0x11, 0x70, 0x02, 0x01)))
#: Registers of the local APIC, and what lets the interrupts of the old controller through.
_APIC = ((0xFEE0_00F0, 0x1FF, "enabled"), (0xFEE0_0350, 0x700, "LINT0: external interrupts"))


def rom(sector: bytes) -> bytes:
    """The ROM that starts this boot sector where and as a BIOS does."""
    c = Program()
    c.op("fa fc", "cli; cld")
    c.op("8c c8 8e d8", "mov ax, cs; mov ds, ax")
    flat_segment(c)
    for register, value, meaning in _APIC:
        c.op(
            "26 67 66 c7 05",
            f"mov dword [es:{register:#x}], {value:#x}   ; {meaning}",
            imm32(register),
            imm32(value),
        )
    for port, words in _CONTROLLERS:
        for n, word in enumerate(words):
            c.op("b0", f"mov al, {word:#x}", bytes((word,)))
            c.op("e6", "out port, al", bytes((port + (n > 0),)))
    c.address("be", "mov si, sector", "sector")
    c.op("bf", "mov di, ORIGIN", imm16(ORIGIN))
    c.op("b9", "mov cx, half its size", imm16(SIZE // 2))
    c.op("f3 a5", "rep movsw")
    c.op("ea", "jmp 0:ORIGIN", imm16(ORIGIN), imm16(0))
    flat_segment_table(c, _SEGMENT << 4)
    c.label("sector")
    c.data(sector)
    jump = b"\xea" + imm16(0) + imm16(_SEGMENT)
    return c.code().ljust(_RESET, b"\0") + jump.ljust(ROM_SIZE - _RESET, b"\0")
