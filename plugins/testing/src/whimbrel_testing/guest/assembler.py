"""Just enough of an assembler for a boot sector: machine code in hex, labels, and the two kinds of reference to them."""

from __future__ import annotations

import struct

#: Where a BIOS loads a boot sector, and the two bytes that make it one.
ORIGIN = 0x7C00
SIZE = 512
SIGNATURE = b"\x55\xaa"


class BootSector:
    """Code and data in the order they are given; image() fills in the references."""

    def __init__(self) -> None:
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

    def _refer(self, form: str, label: str) -> None:
        self._references.append((len(self._code), form, label))
        self._code += bytes(struct.calcsize(form))

    def image(self) -> bytes:
        """The 512 bytes. Raises struct.error for a jump that is too far, ValueError for code that is too long."""
        code = bytearray(self._code)
        for offset, form, label in self._references:
            relative = form != "<H"
            base = -(offset + struct.calcsize(form)) if relative else ORIGIN
            struct.pack_into(form, code, offset, self._labels[label] + base)
        if len(code) > SIZE - len(SIGNATURE):
            raise ValueError(f"{len(code)} bytes do not fit a boot sector")
        return bytes(code).ljust(SIZE - len(SIGNATURE), b"\0") + SIGNATURE


def imm16(value: int) -> bytes:
    return struct.pack("<H", value)


def imm32(value: int) -> bytes:
    return struct.pack("<I", value)
