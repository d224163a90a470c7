"""The setup record of the ram section: which blocks there are, and how long. Sans-I/O.

Format (QEMU, ram version 4; all integers big-endian):
    u64  sum of all lengths | 0x04
    per block, until the lengths add up to the sum:   u8 n, n bytes idstr, u64 length
There is no count, and nothing announces the further fields that some capabilities add (x-ignore-shared, mapped-ram).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from whimbrel.errors import StreamError
from whimbrel.wire.items import counted, read_name

if TYPE_CHECKING:
    from whimbrel.wire.items import Reader

_U64 = struct.Struct(">Q")
MEM_SIZE = 0x04
#: Blocks in one record; QEMU guests have tens.
MAX_BLOCKS = 65536
#: The sum of lengths that one record may claim: what x86 can address.
MAX_TOTAL = 1 << 52


@attrs.frozen
class BlockEntry:
    """One block of a setup record: its name, and its length in bytes."""

    idstr: str
    length: int


def encode_setup(entries: Iterable[BlockEntry]) -> bytes:
    entries = list(entries)
    total = sum(e.length for e in entries)
    parts = [_U64.pack(total | MEM_SIZE)]
    parts += [counted(e.idstr) + _U64.pack(e.length) for e in entries]
    return b"".join(parts)


def read_setup(
    reader: Reader, total: int, page_size: int, max_total: int = MAX_TOTAL
) -> list[BlockEntry]:
    """The entries behind the first word, which said that their lengths add up to `total` bytes.

    Raises StreamError for lengths that are no multiple of page_size or do not add up, and for names given twice.
    """
    offset = reader.position - 8
    if total > max_total:
        raise StreamError(
            "the RAM of the source is larger than this side accepts",
            section="ram",
            offset=offset,
            expected=f"at most {max_total} bytes",
            found=total,
        )
    entries: dict[str, BlockEntry] = {}
    left = total
    while left:
        offset = reader.position
        idstr = read_name(reader, "a RAM block", section="ram")
        length = int(_U64.unpack(reader.read(8))[0])
        if idstr in entries:
            raise StreamError(
                f"RAM block '{idstr}' is listed twice",
                section="ram",
                offset=offset,
                expected="each block once",
            )
        if not 0 < length <= left or length % page_size:
            raise StreamError(
                f"bad length of RAM block '{idstr}'",
                section="ram",
                offset=offset,
                expected=f"a multiple of {page_size}, at most {left}",
                found=length,
            )
        if len(entries) == MAX_BLOCKS:
            raise StreamError(
                "too many RAM blocks",
                section="ram",
                offset=offset,
                expected=f"at most {MAX_BLOCKS}",
            )
        entries[idstr] = BlockEntry(idstr, length)
        left -= length
    return list(entries.values())
