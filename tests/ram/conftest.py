"""A second codec for page records, one record at a time, written from the format's description alone."""

import mmap
import struct
from types import SimpleNamespace

import attrs
import numpy as np
import pytest

from whimbrel.channel import MemoryChannel
from whimbrel.stream import InStream
from whimbrel.wire.format import ItemType
from whimbrel.wire.items import SectionHeader
from whimbrel_ram import native
from whimbrel_testing.peers import missing_peer

ZERO, MEM_SIZE, PAGE, EOS, CONTINUE, XBZRLE = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40


class Refused(Exception):
    """The slow decoder does not take this."""


@attrs.frozen
class Record:
    """One page record: a page number, its fill byte, its bytes or its changes, and whether the idstr is left out."""

    idstr: str
    page: int
    data: int | bytes | list[tuple[int, bytes]]
    short: bool


def slow_encode(records, page_size):
    out = bytearray()
    for r in records:
        flags = (ZERO if isinstance(r.data, int) else PAGE) | (CONTINUE if r.short else 0)
        out += struct.pack(">Q", r.page * page_size | flags)
        if not r.short:
            out += bytes([len(r.idstr)]) + r.idstr.encode()
        out += bytes([r.data]) if isinstance(r.data, int) else r.data
    return bytes(out)


def slow_decode(data, sizes, page_size, block=None):
    """Records up to EOS. Returns (records, bytes read, last block); raises Refused, or EOFError at the end of data."""
    at = 0

    def take(n):
        nonlocal at
        if at + n > len(data):
            raise EOFError
        at += n
        return data[at - n : at]

    records = []
    while True:
        (word,) = struct.unpack(">Q", take(8))
        flags, where = word % page_size, word - word % page_size
        short = bool(flags & CONTINUE)
        kind = flags & ~CONTINUE
        if kind == EOS:
            return records, at, block
        if kind not in (ZERO, PAGE, XBZRLE):
            raise Refused(f"flags {flags:#x}")
        if not short:
            name = take(take(1)[0]).decode("latin-1")
            if name not in sizes:
                raise Refused(f"block {name}")
            block = name
        if block is None:
            raise Refused("CONTINUE first")
        if kind == XBZRLE:
            encoding, length = struct.unpack(">BH", take(3))
            if encoding != 1 or length > page_size:
                raise Refused("head of a delta")
        if where >= sizes[block]:
            raise Refused(f"offset {where:#x}")
        if kind == XBZRLE:
            body = slow_changes(take(length), page_size)
        else:
            body = take(1)[0] if kind == ZERO else bytes(take(page_size))
        records.append(Record(block, where // page_size, body, short))


def slow_changes(delta, page_size):
    """(where in the page, new bytes) of a XBZRLE record. Raises Refused."""
    at = place = 0
    changes = []

    def uleb():
        nonlocal at
        if at == len(delta):
            raise Refused("a run is missing")
        value = delta[at]
        at += 1
        if value > 127:
            if at == len(delta):
                raise Refused("half a length")
            value = value & 127 | delta[at] << 7
            at += 1
        return value

    while at < len(delta):
        gap = uleb()
        if changes and not gap:
            raise Refused("an unchanged run of nothing")
        count = uleb()
        if not count or at + count > len(delta) or place + gap + count > page_size:
            raise Refused("a changed run of nothing, or too long")
        place += gap
        changes.append((place, bytes(delta[at : at + count])))
        place, at = place + count, at + count
    return changes


def slow_apply(records, memory, page_size):
    """Put records into memory: name → bytearray."""
    for r in records:
        if isinstance(r.data, list):
            for place, changed in r.data:
                start = r.page * page_size + place
                memory[r.idstr][start : start + len(changed)] = changed
            continue
        page = bytes([r.data]) * page_size if isinstance(r.data, int) else r.data
        memory[r.idstr][r.page * page_size : (r.page + 1) * page_size] = page


class Chunked(MemoryChannel):
    """Gives its bytes in pieces of the given sizes, over and over."""

    def __init__(self, data, sizes=(1 << 20,)):
        super().__init__(data)
        self._sizes = sizes
        self._next = 0

    def recv_into(self, view):
        n = self._sizes[self._next % len(self._sizes)]
        self._next += 1
        return super().recv_into(view[:n])


class Fenced:
    """Memory between canaries: `check()` fails if anything beside it was written."""

    FENCE = 8192

    def __init__(self, size):
        self.size = size
        self.space = mmap.mmap(-1, size + 2 * self.FENCE)
        self.everything = np.frombuffer(self.space, np.uint8)
        self.everything[:] = 0xC5
        self.memory = self.everything[self.FENCE : self.FENCE + size]
        self.memory[:] = 0

    def check(self):
        assert (self.everything[: self.FENCE] == 0xC5).all()
        assert (self.everything[self.FENCE + self.size :] == 0xC5).all()


def read_item(handler, inp, item=ItemType.SECTION_PART):
    handler.load(inp, SectionHeader(item, 1, "ram", 0, 4))


def in_stream(data, sizes=(1 << 20,), **options):
    return InStream(Chunked(data, sizes), **options)


@pytest.fixture(params=["numpy", "accel"], autouse=True)
def loops(request, monkeypatch):
    """All tests by numpy, and again by the loops of whimbrel-accel."""
    if request.param == "numpy":
        for name in ("deltas", "packets", "records"):
            monkeypatch.setattr(native, name, None)
    elif native.records is None:
        missing_peer("whimbrel-accel was built without a compiler: install gcc and python3-dev")


@pytest.fixture(scope="session")
def slow():
    return SimpleNamespace(
        Record=Record,
        Refused=Refused,
        encode=slow_encode,
        decode=slow_decode,
        apply=slow_apply,
        Fenced=Fenced,
        read_item=read_item,
        in_stream=in_stream,
        EOS=struct.pack(">Q", EOS),
    )
