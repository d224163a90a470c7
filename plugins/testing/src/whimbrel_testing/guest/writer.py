"""A guest that counts on its serial port and keeps writing to its disk, and that notices when a write was lost.

It boots from the disk. In each step it reads the next sector of a ring on the disk, which must hold the step at which it
was written one lap ago (0 in the first lap), writes the present step into it, through the BIOS, and then the next number,
eight digits and a newline, to COM1. A sector that holds anything else makes it write BAD SECT and stop for good.
"""

from __future__ import annotations

from whimbrel_testing.guest.assembler import BootSector, imm16, imm32
from whimbrel_testing.guest.serial import print_routine, say_next_number, words

SECTOR = 512
RING = 2048  #: sector of the first one of the ring
BAD = "BAD SECT"

_BUFFER = 0x1000


def boot_sector(*, sectors: int = 64, stride: int = 40) -> bytes:
    """The 512 bytes: the ring has so many sectors, each `stride` sectors behind the one before it."""
    c = BootSector()
    c.op("31 c0", "xor ax, ax")
    c.op("8e d8", "mov ds, ax")
    c.op("8e c0", "mov es, ax")
    c.op("8e d0", "mov ss, ax")
    c.op("bc", "mov sp, 0x7c00", imm16(0x7C00))
    c.op("fb fc", "sti; cld")
    c.op("66 bb", "mov ebx, 1   ; the step", imm32(1))
    c.op("66 bd", "mov ebp, RING   ; the sector", imm32(RING))

    c.label("step")
    c.address("66 89 2e", "mov [lba], ebp", "lba")
    c.op("b4 42", "mov ah, 0x42   ; read")
    c.call("disk")
    c.op("66 89 d8", "mov eax, ebx")
    c.op("66 2d", "sub eax, sectors   ; the step one lap ago", imm32(sectors))
    c.near("77", "ja lapped", "lapped")
    c.op("66 31 c0", "xor eax, eax   ; first lap: the sector was never written")
    c.label("lapped")
    c.op("66 39 06", "cmp [BUFFER], eax", imm16(_BUFFER))
    c.near("75", "jne bad", "bad")
    c.op("66 39 06", "cmp [BUFFER + 508], eax", imm16(_BUFFER + SECTOR - 4))
    c.near("75", "jne bad", "bad")
    c.op("66 89 d8", "mov eax, ebx")
    c.op("bf", "mov di, BUFFER", imm16(_BUFFER))
    c.op("b9", "mov cx, 128", imm16(SECTOR // 4))
    c.op("66 f3 ab", "rep stosd")
    c.op("b8 00 43", "mov ax, 0x4300   ; write")
    c.call("disk")
    c.op("66 43", "inc ebx")
    c.op("66 81 c5", "add ebp, stride", imm32(stride))
    c.op("66 81 fd", "cmp ebp, end of the ring", imm32(RING + sectors * stride))
    c.near("72", "jb next", "next")
    c.op("66 bd", "mov ebp, RING", imm32(RING))
    c.label("next")
    say_next_number(c, "step")

    c.label("disk")
    c.op("66 60", "pushad")
    c.op("b2 80", "mov dl, 0x80   ; the first disk")
    c.address("be", "mov si, packet", "packet")
    c.op("cd 13", "int 0x13")
    c.op("66 61", "popad")
    c.near("72", "jc bad", "bad")
    c.op("c3", "ret")

    print_routine(c)

    c.label("packet")
    c.data(b"\x10\x00" + imm16(1) + imm16(_BUFFER) + imm16(0))
    c.label("lba")
    c.data(bytes(8))
    words(c, BAD)
    return c.image()
