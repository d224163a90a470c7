"""A guest that counts on its serial port and keeps writing to its disk, and that notices when a write was lost.

It boots from the disk. In each step it reads the next sector of a ring on the disk, which must hold the step at which it
was written one lap ago (0 in the first lap), writes the present step into it, through the BIOS, and then the next number,
eight digits and a newline, to COM1. A sector that holds anything else makes it write BAD SECT and stop for good.
"""

from __future__ import annotations

from whimbrel_testing.guest.assembler import BootSector, imm16, imm32

SECTOR = 512
RING = 2048  #: sector of the first one of the ring
BAD = "BAD SECT"

_BUFFER = 0x1000
_COM1, _COM1_STATUS = 0x3F8, 0x3FD


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
    c.address("be", "mov si, line", "line")
    c.call("print")
    c.address("be", "mov si, last_digit", "last_digit")
    c.label("digit")
    c.op("fe 04", "inc byte [si]")
    c.op("80 3c 39", "cmp byte [si], '9'")
    c.near("76", "jbe step", "step")
    c.op("c6 04 30", "mov byte [si], '0'   ; and carry")
    c.op("4e", "dec si")
    c.near("eb", "jmp digit", "digit")

    c.label("bad")
    c.address("be", "mov si, complaint", "complaint")
    c.call("print")
    c.op("fa f4", "cli; hlt")

    c.label("disk")
    c.op("66 60", "pushad")
    c.op("b2 80", "mov dl, 0x80   ; the first disk")
    c.address("be", "mov si, packet", "packet")
    c.op("cd 13", "int 0x13")
    c.op("66 61", "popad")
    c.near("72", "jc bad", "bad")
    c.op("c3", "ret")

    c.label("print")
    c.op("ba", "mov dx, COM1 line status", imm16(_COM1_STATUS))
    c.label("busy")
    c.op("ec a8 20", "in al, dx; test al, 0x20   ; room for a byte?")
    c.near("74", "jz busy", "busy")
    c.op("ba", "mov dx, COM1", imm16(_COM1))
    c.op("ac ee", "lodsb; out dx, al")
    c.op("3c 0a", "cmp al, newline")
    c.near("75", "jne print", "print")
    c.op("c3", "ret")

    c.label("packet")
    c.data(b"\x10\x00" + imm16(1) + imm16(_BUFFER) + imm16(0))
    c.label("lba")
    c.data(bytes(8))
    c.label("line")
    c.data(b"0000000")
    c.label("last_digit")
    c.data(b"1\n")
    c.label("complaint")
    c.data(BAD.encode() + b"\n")
    return c.image()
