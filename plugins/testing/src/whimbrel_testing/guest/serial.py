"""What guests that count do on their serial port: the parts of their code that are the same."""

from __future__ import annotations

from whimbrel_testing.guest.assembler import BootSector, imm16

_COM1, _COM1_STATUS = 0x3F8, 0x3FD


def say_next_number(c: BootSector, again: str) -> None:
    """Print the line, add one to it, and go on at the label `again`; behind it `bad`: complain, and stop for good."""
    c.address("be", "mov si, line", "line")
    c.call("print")
    c.address("be", "mov si, last_digit", "last_digit")
    c.label("digit")
    c.op("fe 04", "inc byte [si]")
    c.op("80 3c 39", "cmp byte [si], '9'")
    c.near("76", f"jbe {again}", again)
    c.op("c6 04 30", "mov byte [si], '0'   ; and carry")
    c.op("4e", "dec si")
    c.near("eb", "jmp digit", "digit")

    c.label("bad")
    c.address("be", "mov si, complaint", "complaint")
    c.call("print")
    c.op("fa f4", "cli; hlt")


def print_routine(c: BootSector) -> None:
    """`print`: from [si] on, to the newline, to COM1."""
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


def words(c: BootSector, complaint: str) -> None:
    """The line with the first number, and the complaint."""
    c.label("line")
    c.data(b"0000000")
    c.label("last_digit")
    c.data(b"1\n")
    c.label("complaint")
    c.data(complaint.encode() + b"\n")
