"""A guest that counts on its serial port and changes a little in each of its hot pages, over and over.

On every timer interrupt it takes the next pages of a ring in RAM, adds one to every `stride`-th byte of each, and writes
the next number, eight digits and a newline, to COM1. What the pages held before does not matter.
"""

from __future__ import annotations

from whimbrel_testing.guest import timer
from whimbrel_testing.guest.assembler import BootSector, flat_segment_table, imm16, imm32
from whimbrel_testing.guest.serial import print_routine, say_next_number, words

PAGE = 4096
RING = 16 << 20  #: address of the first page of the ring


def boot_sector(*, pages: int, pages_per_tick: int, stride: int = PAGE, hz: int = 1000) -> bytes:
    """The 512 bytes. `pages` long is the ring; hz interrupts a second write in `pages_per_tick` pages each."""
    if not (0 < pages_per_tick <= min(pages, 0xFFFF) and 0 < stride <= PAGE):
        raise ValueError(
            "the ring is at least as long as one tick's pages, a stride at most a page"
        )
    c = BootSector()
    timer.begin(c, hz)
    c.op("66 bf", "mov edi, RING   ; the page", imm32(RING))
    c.op("fb", "sti")

    c.label("tick")
    c.op("f4", "hlt")
    c.op("b9", "mov cx, pages_per_tick", imm16(pages_per_tick))
    c.label("page")
    c.op("66 89 fa", "mov edx, edi")
    c.op("bd", "mov bp, bytes a page", imm16(-(-PAGE // stride)))
    c.label("byte")
    c.op("26 67 fe 02", "inc byte [es:edx]")
    c.op("66 81 c2", "add edx, stride", imm32(stride))
    c.op("4d", "dec bp")
    c.near("75", "jnz byte", "byte")
    c.op("66 81 c7", "add edi, PAGE", imm32(PAGE))
    c.op("66 81 ff", "cmp edi, end of the ring", imm32(RING + pages * PAGE))
    c.near("72", "jb next", "next")
    c.op("66 bf", "mov edi, RING", imm32(RING))
    c.label("next")
    c.near("e2", "loop page", "page")

    say_next_number(c, "tick")
    print_routine(c)
    timer.handler(c)
    words(c, "never said")
    flat_segment_table(c)
    return c.image()
