"""Records of the block section. Sans-I/O.

Format (QEMU, block version 1): each record starts with a big-endian u64, a sector of 512 bytes << 9 | flags.
    DEVICE_BLOCK                W [u8 n, n bytes name] chunk    1 MiB from that sector on, padded at the end of the device
    DEVICE_BLOCK | ZERO_BLOCK   W [u8 n, n bytes name]          1 MiB of zeros, without them
    PROGRESS                    W                               the sector field is a percentage
    EOS                         W                               the payload of this section item ends
A chunk may come any number of times; the last one wins.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable

import attrs

from whimbrel.errors import StreamError
from whimbrel.wire.items import Reader, counted, read_name

_U64 = struct.Struct(">Q")
SECTOR_BITS = 9
SECTOR = 1 << SECTOR_BITS
#: Bytes of disk in one record, and the unit in which writes are tracked.
CHUNK = 1 << 20


class BlockFlag(enum.IntFlag):
    """The flags in the low bits of a record's first word."""

    DEVICE_BLOCK = 0x01
    EOS = 0x02
    PROGRESS = 0x04
    ZERO_BLOCK = 0x08


_FLAGS = SECTOR - 1
_LAST = 2**64 - SECTOR  # the last offset that a record can name
# Plain numbers for the loop.
_CHUNK, _ZERO_CHUNK, _EOS, _PROGRESS = 0x01, 0x09, 0x02, 0x04
EOS_RECORD = _U64.pack(_EOS)


@attrs.frozen
class Chunk:
    """Up to 1 MiB of a device, from the byte `offset` on. Unless it is zero, its CHUNK bytes follow the record."""

    device: str
    offset: int
    zero: bool = False


@attrs.frozen
class Progress:
    """How far the source has come with the first copy of all disks."""

    percent: int


def encode_device(name: str) -> bytes:
    """The name as on the wire. Raises ValueError."""
    if not name or not name.isascii() or not name.isprintable():
        raise ValueError(
            f"the name of a disk is 1 to 255 printable ASCII characters, not {name[:40]!r}"
        )
    return counted(name)


def encode_chunk(device: bytes, offset: int, *, zero: bool = False) -> bytes:
    """What stands before the bytes of a chunk; device: from encode_device()."""
    return _U64.pack(offset | (_ZERO_CHUNK if zero else _CHUNK)) + device


def encode_zeros(device: bytes, offsets: Iterable[int]) -> bytes:
    """Records of chunks that are zero."""
    return b"".join([_U64.pack(offset | _ZERO_CHUNK) + device for offset in offsets])


def zeros_behind(buffer: memoryview, device: bytes, offset: int) -> int:
    """How many records at the front of buffer say that the chunks behind the one at offset are zero as well.

    A sparse disk has one for each megabyte that it does not hold: they are taken at once.
    """
    size, n = 8 + len(device), 0
    for at in range(0, len(buffer) - size + 1, size):
        offset += CHUNK
        if offset > _LAST or buffer[at : at + size] != encode_chunk(device, offset, zero=True):
            break
        n += 1
    return n


def encode_progress(percent: int) -> bytes:
    return _U64.pack(percent << SECTOR_BITS | _PROGRESS)


def read_record(reader: Reader) -> Chunk | Progress | None:
    """The next record up to, not including, the bytes of a chunk; None for EOS. Raises StreamError."""
    at = reader.position
    word = int(_U64.unpack(reader.read(8))[0])
    flags = word & _FLAGS
    if flags in (_CHUNK, _ZERO_CHUNK):
        name = read_name(reader, "a disk", section="block")
        return Chunk(name, word & ~_FLAGS, flags == _ZERO_CHUNK)
    if flags == _PROGRESS:
        return Progress(min(100, word >> SECTOR_BITS))
    if word == _EOS:
        return None
    raise StreamError(
        "unknown combination of flags in a disk record",
        section="block",
        offset=at,
        expected="DEVICE_BLOCK 0x01 (with ZERO_BLOCK 0x08 perhaps), EOS 0x02, PROGRESS 0x04",
        found=f"{word:#x}" if flags == _EOS else f"{flags:#05x}",
    )
