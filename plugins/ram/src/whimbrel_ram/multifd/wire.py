"""What goes over a multifd channel. Sans-I/O.

Format (QEMU, version 1), all big-endian:
    init packet    64 bytes, first on each channel: u32 magic, u32 1, uuid[16], u8 channel id, 39 zero bytes
    packet         a header of 320 + 8 * P bytes, always whole, where P = 512 KiB / page size, then `next` bytes of data:
                   u32 magic, u32 1, u32 flags, u32 P, u32 normal, u32 next, u64 number, u32 zero, 28 zero bytes,
                   idstr[256], u64 offsets: first those of the normal pages, then those of the zero pages
SYNC in the flags: what comes on any channel behind it must not be put in place before what came before it on all. It may
come with pages: they are before it. `next`, idstr and offsets mean nothing where there are no normal (no zero) pages.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, NoReturn

import attrs
import numpy as np

from whimbrel.errors import StreamError
from whimbrel.wire.items import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = 0x11223344
VERSION = 1
SYNC = 0x01
#: Which method the data is packed by. QEMU knows more, with hardware.
METHODS = {"none": 0x00, "zlib": 0x02, "zstd": 0x04}
METHOD_MASK = 0x3E
DEVICE_STATE = 0x40

#: Bytes of pages in a packet.
PACKET = 512 << 10
_INIT = struct.Struct(">II16sB39x")
INIT_SIZE = _INIT.size
#: Of a destination that does not know which machine will come.
ANY_UUID = b""
_HEAD = struct.Struct(">IIIIIIQI28x256s")
#: Packed data may be a little larger than what is in it, and never much.
_MOST_PACKED = PACKET + PACKET // 2


def pages_of(page_size: int) -> int:
    """P: the most pages of one packet."""
    return max(1, PACKET // page_size)


def header_size(page_size: int) -> int:
    return _HEAD.size + 8 * pages_of(page_size)


def encode_init(uuid: bytes | None, channel: int) -> bytes:
    return _INIT.pack(MAGIC, VERSION, uuid or bytes(16), channel)


def decode_init(data: bytes | memoryview, uuid: bytes | None, count: int) -> int:
    """The number of the channel. Raises StreamError."""
    magic, version, sent, channel = _INIT.unpack(data)
    if magic != MAGIC or version != VERSION:
        _refuse(
            "a further connection is no multifd channel",
            f"{MAGIC:#x}, version {VERSION}",
            f"{magic:#x}, version {version}",
        )
    if uuid != ANY_UUID and sent != (uuid or bytes(16)):
        _refuse("a multifd channel of another machine", (uuid or bytes(16)).hex(), sent.hex())
    if channel >= count:
        _refuse(
            "a multifd channel too many",
            f"a number below {count}",
            channel,
            "Set multifd-channels alike on both sides",
        )
    return int(channel)


@functools.cache
def _ramp(page_size: int) -> NDArray[np.uint64]:
    """The offsets of as many pages as a packet may have, from the first one on."""
    return np.arange(pages_of(page_size), dtype=np.uint64) * np.uint64(page_size)


@attrs.frozen(kw_only=True)
class Packet:
    """A header. Offsets are in bytes of the block."""

    flags: int = 0
    number: int = 0
    idstr: bytes = b""
    normal: NDArray[np.uint64] = attrs.field(factory=lambda: np.empty(0, np.uint64))
    zero: NDArray[np.uint64] = attrs.field(factory=lambda: np.empty(0, np.uint64))
    #: Bytes of data that follow; 0 where there are no normal pages.
    size: int = 0

    @property
    def sync(self) -> bool:
        return bool(self.flags & SYNC)

    def run(self, page_size: int) -> int | None:
        """The first offset of the normal pages where each comes right behind the one before, as they mostly do."""
        first = self.normal[0]
        in_row = _ramp(page_size)[: len(self.normal)]
        return int(first) if ((self.normal - first) == in_row).all() else None


def encode(packet: Packet, page_size: int) -> bytearray:
    """The header."""
    out = bytearray(header_size(page_size))
    _HEAD.pack_into(
        out,
        0,
        *(MAGIC, VERSION, packet.flags, pages_of(page_size), len(packet.normal), packet.size),
        *(packet.number, len(packet.zero), packet.idstr),
    )
    offsets = np.frombuffer(out, ">u8", offset=_HEAD.size)
    n = len(packet.normal)
    offsets[:n] = packet.normal
    offsets[n : n + len(packet.zero)] = packet.zero
    return out


def decode(data: bytes | bytearray | memoryview, page_size: int, method: int) -> Packet:
    """A header that was received. Offsets are not compared with any block yet. Raises StreamError."""
    magic, version, flags, alloc, normal, size, number, zero, idstr = _HEAD.unpack_from(data)
    most = pages_of(page_size)
    if magic != MAGIC or version != VERSION:
        _refuse(
            "a multifd packet does not begin as one",
            f"{MAGIC:#x}, version {VERSION}",
            f"{magic:#x}, version {version}",
        )
    if flags & ~(SYNC | METHOD_MASK):
        what = "device state" if flags & DEVICE_STATE else "a flag that is not known here"
        _refuse(f"a multifd packet with {what}", f"{SYNC | METHOD_MASK:#x}", f"{flags:#x}")
    if alloc > most or normal > alloc or zero > alloc - normal:
        _refuse(
            "a multifd packet with too many pages",
            f"at most {most}",
            f"{normal} and {zero} zero of {alloc}",
        )
    if normal and flags & METHOD_MASK != method:
        _refuse(
            "a multifd packet packed by another method",
            f"{method:#x}",
            f"{flags & METHOD_MASK:#x}",
            "Set multifd-compression alike on both sides",
        )
    if not normal:
        size = 0
    elif method == METHODS["none"] and size != normal * page_size:
        _refuse("the data of a multifd packet does not fit its pages", normal * page_size, size)
    elif size > _MOST_PACKED:
        _refuse("the data of a multifd packet is too long", f"at most {_MOST_PACKED} bytes", size)
    offsets = np.frombuffer(data, ">u8", normal + zero, _HEAD.size).astype(np.uint64)
    return Packet(
        flags=flags,
        number=number,
        idstr=idstr.split(b"\0", 1)[0],
        normal=offsets[:normal],
        zero=offsets[normal:],
        size=size,
    )


def memory_of(offset: int, pages: int, block_size: int, page_size: int, idstr: bytes) -> slice:
    """The bytes of so many pages from that offset on. Raises StreamError if they are not all in the block."""
    end = offset + pages * page_size
    if offset % page_size or end > block_size:
        fine = offset % page_size == 0 and offset < block_size
        _refuse_page(block_size if fine else offset, block_size, page_size, idstr)
    return slice(offset, end)


def page_numbers(
    offsets: NDArray[np.uint64], block_size: int, page_size: int, idstr: bytes
) -> NDArray[np.intp]:
    """Pages at those offsets. Raises StreamError for one that is not in the block."""
    wrong = (offsets >= np.uint64(block_size)) | (offsets % np.uint64(page_size) != 0)
    if wrong.any():
        _refuse_page(int(offsets[wrong.argmax()]), block_size, page_size, idstr)
    return (offsets // np.uint64(page_size)).astype(np.intp)


def _refuse_page(offset: int, block_size: int, page_size: int, idstr: bytes) -> NoReturn:
    _refuse(
        f"a multifd packet with a page that is not in RAM block '{shown(idstr)}'",
        f"a multiple of {page_size} below {block_size:#x}",
        f"{offset:#x}",
    )


def _refuse(what: str, expected: object, found: object, hint: str | None = None) -> NoReturn:
    raise StreamError(what, section="ram", expected=expected, found=found, hint=hint)
