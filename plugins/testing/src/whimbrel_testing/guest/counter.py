"""A guest that counts on its serial port and keeps dirtying memory, and that notices when memory was lost.

On every timer interrupt it takes the next pages of a ring in RAM. Each must still hold, in its first and in its last
word, the step at which it was written one lap ago (0 in the first lap); then it gets the present step. After the last
page of the interrupt the guest writes the next number, eight digits and a newline, to COM1. A page that holds anything
else makes it write BAD PAGE and stop for good.

What a migration must carry over for the numbers to go on: RAM (the ring, and the digits in the boot sector's own page),
the CPU's registers with a segment limit that no real-mode reset has (4 GiB in ES), interrupt controller, timer, UART.
"""

from __future__ import annotations

from whimbrel_testing.guest import timer
from whimbrel_testing.guest.assembler import BootSector, flat_segment_table, imm16, imm32
from whimbrel_testing.guest.serial import print_routine, say_next_number, words

PAGE = 4096
RING = 1 << 20  #: address of the first page of the ring
LINE = 9  #: bytes of a line: eight digits and a newline
BAD = "BAD PAGE"


def boot_sector(*, pages: int = 1024, pages_per_tick: int = 64, hz: int = 1000) -> bytes:
    """The 512 bytes. `pages` long is the ring; hz interrupts a second dirty `pages_per_tick` pages each."""
    if not 0 < pages_per_tick <= pages:
        raise ValueError("the ring is at least as long as one tick's pages")
    c = BootSector()
    timer.begin(c, hz)

    c.op("66 bb", "mov ebx, 1   ; the step", imm32(1))
    c.op("66 bf", "mov edi, RING   ; the page", imm32(RING))
    c.op("fb", "sti")

    c.label("tick")
    c.op("f4", "hlt")
    c.op("b9", "mov cx, pages_per_tick", imm16(pages_per_tick))
    c.label("step")
    c.op("66 89 d8", "mov eax, ebx")
    c.op("66 2d", "sub eax, pages   ; the step one lap ago", imm32(pages))
    c.near("77", "ja lapped", "lapped")
    c.op("66 31 c0", "xor eax, eax   ; first lap: the page was never written")
    c.label("lapped")
    c.op("26 67 66 39 07", "cmp [es:edi], eax")
    c.near("75", "jne bad", "bad")
    c.op("26 67 66 39 87", "cmp [es:edi + 0xffc], eax", imm32(PAGE - 4))
    c.near("75", "jne bad", "bad")
    c.op("26 67 66 89 1f", "mov [es:edi], ebx")
    c.op("26 67 66 89 9f", "mov [es:edi + 0xffc], ebx", imm32(PAGE - 4))
    c.op("66 43", "inc ebx")
    c.op("66 81 c7", "add edi, PAGE", imm32(PAGE))
    c.op("66 81 ff", "cmp edi, end of the ring", imm32(RING + pages * PAGE))
    c.near("72", "jb next", "next")
    c.op("66 bf", "mov edi, RING", imm32(RING))
    c.label("next")
    c.near("e2", "loop step", "step")

    say_next_number(c, "tick")

    print_routine(c)

    timer.handler(c)

    words(c, BAD)
    flat_segment_table(c)
    return c.image()
