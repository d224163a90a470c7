"""Pieces of a migration stream, written by hand: none of whimbrel's own encoders takes part.

The machine is `qemu-system-x86_64 -M none -m 1`, the smallest that a QEMU has: one RAM block, two devices.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any

import attrs

PAGE = 4096
RAM = 1 << 20  # bytes
MACHINE = "none"

HEADER = b"QEVM" + bytes((0, 0, 0, 3))
EOF = b"\0"
RAM_ID, TIMER_ID, STATE_ID = 2, 0, 4

ZERO, MEM_SIZE, PAGE_FLAG, EOS_FLAG, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
OPEN_RETURN_PATH, PING, ADVISE, LISTEN, RUN, DISCARD, PACKAGED, COLO, RESUME, BITMAP, SWITCHOVER = (
    range(1, 12)
)


@attrs.frozen
class Bad:
    """The bytes that are wrong; none: something is missing here."""

    data: bytes = b""


#: Bytes of a stream, one part of which may be Bad.
Piece = bytes | Bad | Iterable["Piece"]


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def counted(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return bytes((len(raw),)) + raw


def configuration(name: str | bytes = MACHINE, *subsections: bytes) -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    return b"\7" + u32(len(raw)) + raw + b"".join(subsections)


def subsection(name: str, payload: bytes = b"", version: int = 1) -> bytes:
    return b"\5" + counted(name) + u32(version) + payload


# ---- sections


def head(
    kind: int, section_id: int, name: str | bytes, instance: int = 0, version: int = 1
) -> bytes:
    """What a START (1) or a FULL (4) begins with."""
    return bytes((kind,)) + u32(section_id) + counted(name) + u32(instance) + u32(version)


def footer(section_id: int) -> bytes:
    return b"\x7e" + u32(section_id)


def full(section_id: int, name: str, payload: bytes, instance: int = 0, version: int = 1) -> bytes:
    return head(4, section_id, name, instance, version) + payload + footer(section_id)


def start(payload: bytes, instance: int = 0, version: int = 4, kind: int = 1) -> bytes:
    return head(kind, RAM_ID, "ram", instance, version) + payload + footer(RAM_ID)


def part(payload: bytes, section_id: int = RAM_ID) -> bytes:
    return b"\2" + u32(section_id) + payload + footer(section_id)


def end(payload: bytes, section_id: int = RAM_ID) -> bytes:
    return b"\3" + u32(section_id) + payload + footer(section_id)


def command(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return b"\x08" + u16(number) + u16(len(data) if length is None else length) + data


# ---- RAM


def entry(name: str | bytes, length: int) -> bytes:
    return counted(name) + u64(length)


def setup(*entries: bytes, total: int = RAM) -> bytes:
    """The setup record, with the EOS behind it."""
    return u64(total | MEM_SIZE) + b"".join(entries) + EOS


def zero(page: int, name: str | None = None, fill: int = 0) -> bytes:
    """The record of a page of equal bytes; without a name: of the same block as before."""
    return record(ZERO, page * PAGE, name) + bytes((fill,))


def page(number: int, name: str | None = None, fill: int = 0x5A) -> bytes:
    return record(PAGE_FLAG, number * PAGE, name) + bytes((fill,)) * PAGE


def record(flags: int, offset: int = 0, name: str | bytes | None = None) -> bytes:
    """The first word of a record and the name of the block."""
    if name is None:
        return u64(offset | flags | CONTINUE)
    return u64(offset | flags) + counted(name)


def delta(data: bytes) -> bytes:
    """What follows the first word of a XBZRLE record."""
    return b"\1" + u16(len(data)) + data


EOS = u64(EOS_FLAG)
PAGES = zero(0, "ram") + page(1) + zero(2)

# ---- devices

TIMER_PAYLOAD = u64(1000) + bytes(8) + u64(2000)
TIMER = full(TIMER_ID, "timer", TIMER_PAYLOAD, version=2)


def state(text: bytes = b"prelaunch", size: int | None = None) -> bytes:
    """Payload of globalstate."""
    return u32(len(text) + 1 if size is None else size) + text.ljust(100, b"\0")


STATE = full(STATE_ID, "globalstate", state())

TIMER_TEXT: dict[str, Any] = {
    "name": "timer",
    "instance_id": 0,
    "vmsd_name": "timer",
    "version": 2,
    "fields": [
        {"name": "cpu_ticks_offset", "type": "int64", "size": 8},
        {"name": "unused", "type": "unused_buffer", "size": 8},
        {"name": "cpu_clock_offset", "type": "int64", "size": 8},
    ],
}
STATE_TEXT: dict[str, Any] = {
    "name": "globalstate",
    "instance_id": 0,
    "vmsd_name": "globalstate",
    "version": 1,
    "fields": [
        {"name": "size", "type": "uint32", "size": 4},
        {"name": "runstate", "type": "buffer", "size": 100},
    ],
}


def opaque(name: str, size: int, instance: int = 0) -> dict[str, Any]:
    """The description of a device whose payload nobody took apart."""
    fields = [{"name": "data", "size": size, "type": "buffer"}]
    return {"name": name, "instance_id": instance, "size": size, "fields": fields}


def text(*devices: dict[str, Any]) -> bytes:
    return json.dumps({"page_size": PAGE, "devices": devices}).encode()


def description(*devices: dict[str, Any]) -> bytes:
    return described(text(*devices))


def described(raw: bytes, length: int | None = None) -> bytes:
    return b"\6" + u32(len(raw) if length is None else length) + raw


# ---- the whole

START = start(setup(entry("ram", RAM)))
PART = part(PAGES + EOS)
END = end(EOS)
GOOD: dict[str, Piece] = {
    "header": HEADER,
    "configuration": configuration(),
    "commands": b"",
    "start": START,
    "part": PART,
    "end": END,
    "timer": TIMER,
    "state": STATE,
    "eof": EOF,
    "description": description(TIMER_TEXT, STATE_TEXT),
}


def flatten(piece: Piece) -> list[bytes | Bad]:
    if isinstance(piece, bytes | Bad):
        return [piece]
    return [flat for inner in piece for flat in flatten(inner)]


def stream(**instead: Piece) -> tuple[bytes | Bad, ...]:
    """The good stream with some of its parts replaced; `stops` ends it, the rest does not come."""
    stops = instead.pop("stops", None)
    unknown = set(instead) - set(GOOD)
    assert not unknown, f"the stream has no part {unknown}"
    parts: list[bytes | Bad] = []
    last = stops if isinstance(stops, str) else None
    for name, usual in GOOD.items():
        parts += flatten(instead.get(name, usual))
        if name == last:
            break
    return tuple(parts)
