"""QEMU's RDMA protocol, version 1: what is said beside the RDMA WRITEs. Sans-I/O; all numbers are big-endian.

Private data of the connection, both ways: u32 version, u32 flags.
A control message is one SEND: u32 length of the data, u32 kind, u32 repeat, u32 unused, then the data.
Whoever wants a message says READY first, which entitles the other side to exactly one; a reply needs no READY.
Offsets are in the destination's RAM space: each block has its place there, told in RAM_BLOCKS_RESULT.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence

import attrs

from whimbrel.errors import StreamError

VERSION = 1
#: Flag of the private data: all of RAM is registered before the first page.
PIN_ALL = 0x01

#: Registered as a piece, unless all of RAM is.
CHUNK = 1 << 20
#: The most data of a message, and of one of kind QEMU_FILE.
MAX_DATA = 512 << 10
MAX_FILE = 32 << 10
MAX_REPEAT = 4096

_PRIVATE = struct.Struct(">II")
_HEADER = struct.Struct(">IIII")
HEADER = _HEADER.size
_BLOCK = struct.Struct(">QQQI4x")
_ZERO = struct.Struct(">IIQQ")
_REGISTER = struct.Struct(">QI4xQ")
_RESULT = struct.Struct(">I4xQ")


class Kind(enum.IntEnum):
    """Of a control message."""

    ERROR = 1
    READY = 2
    QEMU_FILE = 3
    RAM_BLOCKS_REQUEST = 4
    RAM_BLOCKS_RESULT = 5
    COMPRESS = 6
    REGISTER_REQUEST = 7
    REGISTER_RESULT = 8
    REGISTER_FINISHED = 9
    UNREGISTER_REQUEST = 10
    UNREGISTER_FINISHED = 11


#: Kinds whose data are `repeat` records of that size.
_RECORDS = {
    Kind.COMPRESS: _ZERO.size,
    Kind.REGISTER_REQUEST: _REGISTER.size,
    Kind.REGISTER_RESULT: _RESULT.size,
    Kind.UNREGISTER_REQUEST: _REGISTER.size,
}
_WITH_DATA = {*_RECORDS, Kind.QEMU_FILE, Kind.RAM_BLOCKS_RESULT}


@attrs.frozen
class Message:
    """A control message."""

    kind: Kind
    data: bytes = b""
    repeat: int = 1

    def encode(self) -> bytes:
        return _HEADER.pack(len(self.data), self.kind, self.repeat, 0) + self.data


@attrs.frozen
class BlockInfo:
    """One block in RAM_BLOCKS_RESULT: where it is in the destination's process and in its RAM space."""

    address: int
    offset: int
    length: int
    rkey: int = 0


@attrs.frozen
class ZeroRange:
    """COMPRESS: `length` bytes from `offset` (RAM space) on, in block `index`, are `value`."""

    index: int
    offset: int
    length: int
    value: int = 0


@attrs.frozen
class Register:
    """Of REGISTER_REQUEST: the chunk at `at` (RAM space) in block `index`, and `extra` behind it.

    In UNREGISTER_REQUEST `at` is the number of the chunk in its block.
    """

    at: int
    index: int
    extra: int = 0


@attrs.frozen
class Registered:
    """Of REGISTER_RESULT: the key of a chunk, and the address of its block."""

    rkey: int
    address: int


# ---- private data


def encode_private(flags: int) -> bytes:
    return _PRIVATE.pack(VERSION, flags)


def decode_private(data: bytes) -> int:
    """The flags that both sides may know. Raises StreamError for another version."""
    if len(data) < _PRIVATE.size:
        raise StreamError(
            "the connection carries no private data of a migration",
            expected=f"{_PRIVATE.size} bytes",
            found=len(data),
        )
    version, flags = _PRIVATE.unpack_from(data)
    if version != VERSION:
        raise StreamError(
            "another version of QEMU's RDMA protocol", expected=VERSION, found=version
        )
    return int(flags) & PIN_ALL


# ---- messages


def decode_message(data: bytes) -> Message:
    """One SEND taken apart. Raises StreamError: kind, lengths and repeat are right in what it returns."""
    if len(data) < HEADER:
        raise StreamError(
            "an RDMA control message without its header",
            expected=f"at least {HEADER} bytes",
            found=len(data),
        )
    length, number, repeat, _ = _HEADER.unpack_from(data)
    try:
        kind = Kind(number)
    except ValueError:
        raise StreamError(
            "unknown RDMA control message", expected="kind 1 to 11", found=number
        ) from None
    if length > MAX_DATA or length != len(data) - HEADER:
        raise StreamError(
            f"RDMA control message {kind.name} has the wrong length",
            expected=min(len(data) - HEADER, MAX_DATA),
            found=length,
        )
    if repeat > MAX_REPEAT:
        raise StreamError(
            f"RDMA control message {kind.name} repeats too often",
            expected=f"at most {MAX_REPEAT}",
            found=repeat,
        )
    _check_length(kind, length, repeat)
    return Message(kind, data[HEADER:], repeat)


def _check_length(kind: Kind, length: int, repeat: int) -> None:
    if kind in _RECORDS:
        right, expected = length == repeat * _RECORDS[kind] > 0, repeat * _RECORDS[kind]
    elif kind is Kind.RAM_BLOCKS_RESULT:
        right, expected = length % _BLOCK.size == 0, length // _BLOCK.size * _BLOCK.size
    elif kind is Kind.QEMU_FILE:
        right, expected = 0 < length <= MAX_FILE, min(max(length, 1), MAX_FILE)
    else:
        right, expected = length == 0, 0
    if not right:
        raise StreamError(
            f"RDMA control message {kind.name} has data of the wrong length",
            expected=expected,
            found=length,
        )


def encode_blocks(blocks: Iterable[BlockInfo]) -> Message:
    """Raises StreamError where they do not fit into one message."""
    data = b"".join(_BLOCK.pack(b.address, b.offset, b.length, b.rkey) for b in blocks)
    if len(data) > MAX_DATA:
        raise StreamError(
            "too many RAM blocks for RDMA",
            expected=f"at most {MAX_DATA // _BLOCK.size}",
            found=len(data) // _BLOCK.size,
        )
    return Message(Kind.RAM_BLOCKS_RESULT, data)


def decode_blocks(message: Message) -> list[BlockInfo]:
    return [BlockInfo(*fields) for fields in _BLOCK.iter_unpack(message.data)]


def encode_zero(zero: ZeroRange) -> Message:
    return Message(Kind.COMPRESS, _ZERO.pack(zero.value, zero.index, zero.offset, zero.length))


def decode_zeros(message: Message) -> list[ZeroRange]:
    """Raises StreamError for a fill that is not zero: no source sends one."""
    found = []
    for value, index, offset, length in _ZERO.iter_unpack(message.data):
        if value:
            raise StreamError("COMPRESS with a value other than zero", expected=0, found=value)
        found.append(ZeroRange(index, offset, length))
    return found


def encode_register(kind: Kind, requests: Sequence[Register]) -> Message:
    data = b"".join(_REGISTER.pack(r.at, r.index, r.extra) for r in requests)
    return Message(kind, data, len(requests))


def decode_register(message: Message) -> list[Register]:
    return [Register(*fields) for fields in _REGISTER.iter_unpack(message.data)]


def encode_result(results: Sequence[Registered]) -> Message:
    data = b"".join(_RESULT.pack(r.rkey, r.address) for r in results)
    return Message(Kind.REGISTER_RESULT, data, len(results))


def decode_result(message: Message, count: int) -> list[Registered]:
    """Raises StreamError unless there is one for each of `count` requests."""
    if message.repeat != count:
        raise StreamError(
            "REGISTER_RESULT does not answer what was asked", expected=count, found=message.repeat
        )
    return [Registered(*fields) for fields in _RESULT.iter_unpack(message.data)]


# ---- places


class RamSpace:
    """Blocks one behind the other: the places that the destination tells, and the checks of what comes back."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = tuple(lengths)
        self.offsets: list[int] = []
        end = 0
        for length in self.lengths:
            self.offsets.append(end)
            end += length

    def chunks(self, index: int) -> int:
        """How many chunks the block has; the last may be short."""
        return -(-self.lengths[index] // CHUNK)

    def locate(self, index: int, offset: int, length: int) -> int:
        """Where in block `index` a range of the RAM space is. Raises StreamError outside the block."""
        self._check_index(index)
        where = offset - self.offsets[index]
        if where < 0 or where + length > self.lengths[index]:
            raise StreamError(
                f"a range outside RAM block {index}",
                section="ram",
                expected=f"within {self.offsets[index]}+{self.lengths[index]}",
                found=f"{offset}+{length}",
            )
        return where

    def chunk_range(self, index: int, first: int, extra: int) -> tuple[int, int]:
        """Where in its block the chunks begin, and their bytes. Raises StreamError."""
        self._check_index(index)
        if first + extra >= self.chunks(index):
            raise StreamError(
                f"a chunk outside RAM block {index}",
                section="ram",
                expected=f"at most {self.chunks(index) - 1}",
                found=first + extra,
            )
        start = first * CHUNK
        return start, min((first + extra + 1) * CHUNK, self.lengths[index]) - start

    def _check_index(self, index: int) -> None:
        if index >= len(self.lengths):
            raise StreamError(
                "no such RAM block",
                section="ram",
                expected=f"an index below {len(self.lengths)}",
                found=index,
            )
