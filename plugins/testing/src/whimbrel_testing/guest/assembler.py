"""Just enough of an assembler for a boot sector: machine code in hex, labels, and the two kinds of reference to them."""

from __future__ import annotations

import struct

#: Where a BIOS loads a boot sector, and the two bytes that make it one.
ORIGIN = 0x7C00
SIZE = 512
SIGNATURE = b"\x55\xaa"


class Program:
    """Code and data of 16 bits in the order they are given; code() fills in the references."""

    def __init__(self, origin: int = 0) -> None:
        """origin: where it will lie in its segment."""
        self._origin = origin
        self._code = bytearray()
        self._labels: dict[str, int] = {}
        self._references: list[tuple[int, str, str]] = []  # (offset, struct format, label)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def op(self, code: str, meaning: str, *operands: bytes) -> None:
        """One instruction: its bytes in hex, what they say in assembly language, immediate operands behind it."""
        assert meaning  # a listing of bare bytes could not be reviewed
        self._code += bytes.fromhex(code) + b"".join(operands)

    def data(self, raw: bytes) -> None:
        self._code += raw

    def near(self, code: str, meaning: str, label: str) -> None:
        """A jump or loop with an 8-bit distance."""
        self.op(code, meaning)
        self._refer("<b", label)

    def call(self, label: str) -> None:
        self.op("e8", f"call {label}")
        self._refer("<h", label)

    def address(self, code: str, meaning: str, label: str) -> None:
        """An instruction that ends with the 16-bit address of a label."""
        self.op(code, meaning)
        self.pointer(label)

    def pointer(self, label: str) -> None:
        """The 16-bit address of a label, as data."""
        self._refer("<H", label)

    def linear(self, label: str, base: int) -> None:
        """The 32-bit address of a label, as data: base is that of the segment."""
        self.pointer(label)
        self.data(imm16(base >> 16))

    def _refer(self, form: str, label: str) -> None:
        self._references.append((len(self._code), form, label))
        self._code += bytes(struct.calcsize(form))

    def code(self) -> bytes:
        """The finished bytes. Raises struct.error for a jump that is too far."""
        code = bytearray(self._code)
        for offset, form, label in self._references:
            relative = form != "<H"
            base = -(offset + struct.calcsize(form)) if relative else self._origin
            struct.pack_into(form, code, offset, self._labels[label] + base)
        return bytes(code)


class BootSector(Program):
    """A program that a BIOS starts."""

    def __init__(self) -> None:
        super().__init__(ORIGIN)

    def image(self) -> bytes:
        """The 512 bytes. Raises ValueError for code that is too long."""
        code = self.code()
        if len(code) > SIZE - len(SIGNATURE):
            raise ValueError(f"{len(code)} bytes do not fit a boot sector")
        return code.ljust(SIZE - len(SIGNATURE), b"\0") + SIGNATURE


def flat_segment(program: Program) -> None:
    """Into protected mode and back, so that ES reaches all 4 GiB: it keeps the limit that it was given there.

    Interrupts are off, and `flat_segment_table` follows somewhere behind the code. Changes AX, BX.
    """
    program.address("0f 01 16", "lgdt [gdtr]", "gdtr")
    program.op("0f 20 c0 0c 01 0f 22 c0", "mov eax, cr0; or al, 1; mov cr0, eax")
    program.op("bb 08 00 8e c3", "mov bx, 8; mov es, bx")
    program.op("24 fe 0f 22 c0", "and al, 0xfe; mov cr0, eax")
    program.op("31 db 8e c3", "xor bx, bx; mov es, bx")


def flat_segment_table(program: Program, segment: int = 0) -> None:
    """The descriptor table for it; segment: the base address of what the program's own addresses count from."""
    program.label("gdtr")
    program.data(imm16(15))
    program.linear("gdt", segment)
    program.label("gdt")
    # A null descriptor; then base 0, limit 4 GiB, writable data.
    program.data(bytes(8) + struct.pack("<HHBBBB", 0xFFFF, 0, 0, 0x92, 0x8F, 0))


def imm16(value: int) -> bytes:
    return struct.pack("<H", value)


def imm32(value: int) -> bytes:
    return struct.pack("<I", value)
