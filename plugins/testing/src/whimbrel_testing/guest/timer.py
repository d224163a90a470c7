"""How guests that work on every interrupt of the timer begin, and their interrupt handler."""

from __future__ import annotations

from whimbrel_testing.guest.assembler import BootSector, flat_segment, imm16

_PIT_HZ = 1_193_182


def begin(c: BootSector, hz: int) -> None:
    """All 4 GiB in ES, hz interrupts a second by the label `irq0`; interrupts are still off. Changes AX, BX.

    `handler` and `flat_segment_table` follow somewhere behind the code. Raises ValueError for a rate that the timer has not.
    """
    divisor = _PIT_HZ // hz
    if not 0 < divisor <= 0xFFFF:
        raise ValueError("19 Hz is the slowest")
    c.op("fa", "cli")
    c.op("31 c0", "xor ax, ax")
    c.op("8e d8", "mov ds, ax")
    c.op("8e d0", "mov ss, ax")
    c.op("bc", "mov sp, 0x7c00", imm16(0x7C00))
    c.op("e4 92 0c 02 e6 92", "in al, 0x92; or al, 2; out 0x92, al   ; address line 20")

    flat_segment(c)
    c.address("c7 06 20 00", "mov word [8 * 4], irq0", "irq0")
    c.op("89 1e 22 00", "mov [8 * 4 + 2], bx")
    c.op("b0 34 e6 43", "mov al, 0x34; out 0x43, al   ; timer 0: rate generator")
    c.op("b0", "mov al, low byte of the divisor", bytes((divisor & 0xFF,)))
    c.op("e6 40", "out 0x40, al")
    c.op("b0", "mov al, its high byte", bytes((divisor >> 8,)))
    c.op("e6 40", "out 0x40, al")
    c.op("b0 fe e6 21", "mov al, 0xfe; out 0x21, al   ; the timer is the only interrupt")
    c.op("b0 ff e6 a1", "mov al, 0xff; out 0xa1, al")


def handler(c: BootSector) -> None:
    """`irq0`: take note, no more."""
    c.label("irq0")
    c.op("50 b0 20 e6 20 58 cf", "push ax; mov al, 0x20; out 0x20, al; pop ax; iret")
