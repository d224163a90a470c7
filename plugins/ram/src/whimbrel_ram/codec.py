"""Page records of the ram section, encoded in batches and decoded in runs. Sans-I/O; nothing in Python per page.

Format (QEMU, ram version 4): each record starts with a big-endian u64, the page's byte offset in its block | flags.
    ZERO      W [u8 n, n bytes idstr] u8 fill        every byte of the page is `fill` (writers send 0)
    PAGE      W [u8 n, n bytes idstr] page           its bytes
    EOS       W                                      the payload of this section item ends
CONTINUE in the flags: the block is that of the record before (also across EOS), and there is no idstr. Exactly one kind
of record a word. A page may come any number of times; the last one wins.

A batch of equal records is an array with one row a record, so that numpy can build it and take it apart: the Encoder
gathers pages into a staging buffer laid out like that, and the Decoder guesses that what follows a few equal records is
more of them, checks the guess, and scatters what was right with one assignment. The guess doubles when it was right and
shrinks when it was not: a fixed one makes RAM of zero and other pages in turn three times slower.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from whimbrel.errors import StreamError
from whimbrel.wire.items import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

_U64 = struct.Struct(">Q")


class PageFlag(enum.IntFlag):
    """The flags in the low bits of a record's first word."""

    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


# Plain numbers for the loop.
_ZERO, _PAGE, _EOS, _CONTINUE = 0x02, 0x08, 0x10, 0x20
_KINDS = frozenset(flag.value for flag in PageFlag) - {_CONTINUE}
_ZERO_CONTINUE, _PAGE_CONTINUE = _ZERO | _CONTINUE, _PAGE | _CONTINUE
EOS_RECORD = _U64.pack(_EOS)

#: Who would understand a record that this codec does not.
NEEDS = {
    PageFlag.XBZRLE: "the capability xbzrle, which this receiver does not have",
    PageFlag.COMPRESS_PAGE: "the capability compress of QEMU 2.4 to 9.0, which this receiver does not have",
    PageFlag.HOOK: "the page transport of the rdma plugin",
    PageFlag.MULTIFD_FLUSH: "the page transport of multifd (capability multifd on both sides)",
}

#: Pages gathered at once: 256 KiB of 4 KiB pages stay in the L2 cache between gathering and sending.
_GATHER_BYTES = 256 << 10
#: Bytes of page records in one send.
SEND_BYTES = 1 << 20
#: Pages of at least this size are received straight into place instead of through the read buffer.
DIRECT_PAGE = 64 << 10


def zero_map(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows are all zero. Looks at one word of each, at two more where that is zero, and only then at the rest."""
    zero: NDArray[np.bool_] = words[:, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates) == len(words):
        zero[:] = np.bitwise_or.reduce(words, axis=1) == 0
    elif len(candidates):
        zero[candidates] = _zero_behind_the_first(words, candidates)
    return zero


def zero_map_at(words: NDArray[np.uint64], pages: NDArray[np.intp]) -> NDArray[np.bool_]:
    """zero_map() of scattered rows, without copying those that the first look settles."""
    zero: NDArray[np.bool_] = words[pages, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates):
        zero[candidates] = _zero_behind_the_first(words, pages[candidates])
    return zero


def _zero_behind_the_first(words: NDArray[np.uint64], pages: NDArray[np.intp]) -> NDArray[np.bool_]:
    last = words.shape[1] - 1
    zero: NDArray[np.bool_] = (words[pages, last] | words[pages, last * 2 // 5]) == 0
    candidates = np.flatnonzero(zero)
    for i in range(0, len(candidates), 64):  # gathered in pieces that stay in the cache
        some = candidates[i : i + 64]
        zero[some] = np.bitwise_or.reduce(words[pages[some]], axis=1) == 0
    return zero


def as_words(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The same pages as rows of 8-byte words (whatever their alignment)."""
    return rows.view(np.uint64)


class Encoder:
    """Turns pages of one block into buffers for the stream. What it returns is valid until the next call."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        #: Bytes of one page record with CONTINUE.
        self.record = 8 + page_size
        #: Most pages that pages() takes at once.
        self.batch = max(1, SEND_BYTES // page_size)
        self._gather = max(1, _GATHER_BYTES // page_size)
        words = page_size // 8
        self._staging = np.empty((self.batch, 1 + words), np.uint64)
        self._bytes = self._staging.reshape(-1).view(np.uint8).data
        self._block: bytes | None = None

    def restart(self) -> None:
        """The next record names its block."""
        self._block = None

    def _head(self, idstr: bytes, kind: int, page: int) -> bytes:
        """First word and idstr of a record that starts a block."""
        self._block = idstr
        return _U64.pack(page * self.page_size | kind) + bytes((len(idstr),)) + idstr

    def zeros(self, idstr: bytes, pages: NDArray[np.intp]) -> list[bytes | memoryview]:
        """Records for pages that are zero."""
        buffers: list[bytes | memoryview] = []
        if self._block != idstr:
            buffers.append(self._head(idstr, _ZERO, int(pages[0])) + b"\0")
            pages = pages[1:]
        records = np.zeros((len(pages), 9), np.uint8)
        words = pages.astype(np.uint64) * np.uint64(self.page_size) | np.uint64(_ZERO_CONTINUE)
        records[:, :8] = words.astype(">u8").view(np.uint8).reshape(-1, 8)
        buffers.append(records.reshape(-1).data)
        return buffers

    def pages(
        self, idstr: bytes, source: NDArray[np.uint64], pages: NDArray[np.intp]
    ) -> list[bytes | memoryview]:
        """Records with the bytes of these pages (ascending, at most `batch`); source is the block as rows of words."""
        buffers: list[bytes | memoryview] = []
        if self._block != idstr:
            first = int(pages[0])
            buffers += [self._head(idstr, _PAGE, first), source[first].tobytes()]
            pages = pages[1:]
        n = len(pages)
        out = self._staging
        words = pages.astype(np.uint64) * np.uint64(self.page_size) | np.uint64(_PAGE_CONTINUE)
        out[:n, 0] = words.astype(">u8").view(np.uint64)
        for i in range(0, n, self._gather):
            j = min(i + self._gather, n)
            low, high = int(pages[i]), int(pages[j - 1])
            if high - low == j - 1 - i:  # they ascend, so this is one piece of memory
                out[i:j, 1:] = source[low : high + 1]
            else:
                out[i:j, 1:] = source[pages[i:j]]
        buffers.append(self._bytes[: n * self.record])
        return buffers


class Target:
    """A block that pages are received into."""

    def __init__(
        self, idstr: str, memory: memoryview, page_size: int, fresh: NDArray[np.bool_] | None = None
    ) -> None:
        self.idstr = idstr
        self.size = memory.nbytes
        self.memory = memory
        self.rows = np.frombuffer(memory, np.uint8).reshape(-1, page_size)
        self.words = as_words(self.rows)
        #: 1 for each page that the host has never given memory for: it is zero, and looking would populate it.
        self.fresh = bytearray(len(self.rows))
        self.fresh_map = np.frombuffer(self.fresh, np.bool_)
        if fresh is not None:
            self.fresh_map[:] = fresh


class Event(enum.Enum):
    """Why feed() came back."""

    MORE = "more"  # needs at least `need` bytes
    EOS = "eos"
    SETUP = "setup"  # the first word of a setup record was taken; its total is in `total`
    FILL = "fill"  # the page's bytes come next: read them into `fill`
    OTHER = "other"  # a record of another kind was taken; it is in `flag`


class Decoder:
    """Takes records out of a buffer and puts pages into their targets. Errors are StreamErrors with the byte offset.

    feed() never looks behind the end of this section's payload for more than a check of a guess, and never takes a byte
    of it. Every offset is checked before it is used.
    """

    #: Equal records in a row before a run is guessed: at first, and at most, where guesses came to little.
    _STREAK, _LONGEST_STREAK = 4, 64
    #: Records in the first guess, and in the longest.
    _GUESS, _LONGEST = 16, 8192
    #: What a run must have for its price to be worth paying, in records taken one by one.
    _WORTH = 16

    def __init__(self, page_size: int, find: Callable[[str], Target | None]) -> None:
        self.page_size = page_size
        self.need = 8
        self.total = 0
        self.flag = PageFlag(0)
        self.fill = memoryview(b"")
        self.normal = self.duplicate = 0
        self._find = find
        self._targets: dict[bytes, Target] = {}
        self._block: Target | None = None
        self._mask = page_size - 1
        self._zero_page = bytes(page_size)
        self._direct = page_size >= DIRECT_PAGE
        self._kind = -1  # what the last record was, and how many like it came in a row
        self._streak = 0
        self._patience = self._STREAK
        self._guess = self._GUESS
        self._steps = np.arange(self._LONGEST, dtype=np.uint64) * np.uint64(page_size)

    def restart(self) -> None:
        """Forget the blocks: the list of them has changed."""
        self._targets.clear()
        self._block = None

    def feed(self, buffer: memoryview, position: int) -> tuple[int, Event]:
        """Take what is complete in buffer, whose first byte is at `position` in the stream.

        Returns the bytes taken and why it stopped.
        """
        offset, size = 0, len(buffer)
        unpack = _U64.unpack_from
        while True:
            left = size - offset
            if left < 8:
                self.need = 8
                return offset, Event.MORE
            (word,) = unpack(buffer, offset)
            flags = word & self._mask
            kind = flags & ~_CONTINUE
            if kind not in (_PAGE, _ZERO):
                return self._other(word, offset, position)
            head = 8
            if flags & _CONTINUE:
                block = self._block
                if block is None:
                    raise self._error(
                        "a page record without a block: CONTINUE comes first",
                        position + offset,
                        expected="a record with the name of its block",
                        found=f"{flags:#05x}",
                    )
            else:
                if left < 9 or left < (head := 9 + buffer[offset + 8]):
                    self.need = max(9, head)
                    return offset, Event.MORE
                block = self._target(buffer, offset, head, position)
            body = 1 if kind == _ZERO else self.page_size
            if self._direct and kind == _PAGE:
                body = 0
            if left < head + body:
                self.need = head + body
                return offset, Event.MORE
            where = word - flags
            if where >= block.size:
                raise self._beyond(block, where, position + offset)
            self._block = block
            if flags == self._kind:
                self._streak += 1
                if self._streak >= self._patience and left >= 8 * (head + body) and body:
                    offset += self._run(buffer, offset, position, block, kind, head, body)
                    continue
            else:
                self._kind, self._streak = flags, 1
            page = where // self.page_size
            if kind == _ZERO:
                self._put_zero(block, where, page, buffer[offset + head])
                self.duplicate += 1
            else:
                block.fresh[page] = 0
                self.normal += 1
                if not body:
                    self.fill = block.memory[where : where + self.page_size]
                    return offset + head, Event.FILL
                start = offset + head
                block.memory[where : where + body] = buffer[start : start + body]
            offset += head + body

    # ---- single records

    def _put_zero(self, block: Target, where: int, page: int, fill: int) -> None:
        """One page of equal bytes. Values other than 0 come from QEMU before 1.5 (and 7.2 takes them too)."""
        if fill:
            block.rows[page] = fill
            block.fresh[page] = 0
        elif not block.fresh[page]:
            memory = block.memory[where : where + self.page_size]
            if memory[0] or bytes(memory) != self._zero_page:
                memory[:] = self._zero_page

    def _target(self, buffer: memoryview, offset: int, head: int, position: int) -> Target:
        name = bytes(buffer[offset + 9 : offset + head])
        target = self._targets.get(name)
        if target is None:
            idstr = shown(name)
            target = self._find(idstr) if idstr.encode() == name else None
            if target is None:
                raise self._error(
                    f"unknown RAM block '{idstr}'",
                    position + offset + 8,
                    expected="a block of the setup record",
                    found=repr(idstr),
                )
            self._targets[name] = target
        return target

    def _other(self, word: int, offset: int, position: int) -> tuple[int, Event]:
        flags = word & self._mask
        kind = flags & ~_CONTINUE
        if kind == _EOS:
            return offset + 8, Event.EOS
        where = position + offset
        if kind not in _KINDS:
            raise self._error(
                "unknown combination of flags in a page record",
                where,
                expected="one of ZERO 0x002, PAGE 0x008, EOS 0x010, MEM_SIZE 0x004",
                found=f"{flags:#05x}",
            )
        self.flag = PageFlag(kind)
        if self.flag is PageFlag.MEM_SIZE:
            self.total = word - flags
            return offset + 8, Event.SETUP
        if self.flag in (PageFlag.XBZRLE, PageFlag.COMPRESS_PAGE):
            raise self.refuse(self.flag, where)
        return offset + 8, Event.OTHER

    @staticmethod
    def refuse(flag: PageFlag, offset: int) -> StreamError:
        """The error for a record that nobody here understands."""
        return StreamError(
            f"a {flag.name} record needs {NEEDS[flag]}",
            section="ram",
            offset=offset,
            expected="ZERO, PAGE or EOS",
            found=f"{flag.value:#05x}",
            hint="Switch that capability off on the source, or install the plugin",
        )

    @staticmethod
    def _error(message: str, offset: int, **facts: object) -> StreamError:
        return StreamError(message, section="ram", offset=offset, **facts)  # type: ignore[arg-type]

    def _beyond(self, block: Target, where: int, offset: int) -> StreamError:
        return self._error(
            f"a page behind the end of RAM block '{block.idstr}'",
            offset,
            expected=f"an offset below {block.size:#x}",
            found=f"{where:#x}",
        )

    # ---- runs

    def _run(  # noqa: PLR0917 - the state of feed(), which is not worth a record per run
        self,
        buffer: memoryview,
        offset: int,
        position: int,
        block: Target,
        kind: int,
        head: int,
        body: int,
    ) -> int:
        """Take the records from offset on that are like the first one there; returns their bytes (one at least)."""
        stride = head + body
        n = min((len(buffer) - offset) // stride, self._guess, len(self._steps))
        raw = np.frombuffer(buffer, np.uint8, n * stride, offset).reshape(n, stride)
        words = np.ascontiguousarray(raw[:, :8]).view(">u8").ravel().astype(np.uint64)
        first = int(words[0])
        unlike = words != self._steps[:n] + words[0]
        good = int(unlike.argmax())  # the first is like itself, so 0 is: all
        in_order = (
            not good or good >= self._WORTH
        )  # one page after the other; else at least the same flags
        if not in_order:
            mask = np.uint64(self._mask)
            unlike = (words & mask) != (words[0] & mask)
        if head > 8:
            unlike |= (raw[:, 8:head] != raw[0, 8:head]).any(axis=1)
        if kind == _ZERO:
            unlike |= raw[:, head] != raw[0, head]
        if not in_order or kind == _ZERO or head > 8:
            good = int(unlike.argmax())
        if good:
            self._guess = max(self._GUESS, 2 * good)
            self._streak = 0  # what comes next is something else
            if good < self._WORTH:
                self._patience = min(2 * self._patience, self._LONGEST_STREAK)
            words, raw = words[:good], raw[:good]
        else:
            good = n
            self._guess = min(2 * self._guess, len(self._steps))
            self._patience = self._STREAK
        low = first // self.page_size
        where: slice | NDArray[np.intp]
        if in_order:
            inside = len(block.rows) - low
            if good > inside:
                beyond = (low + inside) * self.page_size
                raise self._beyond(block, beyond, position + offset + inside * stride)
            where = slice(low, low + good)
        else:
            offsets = words - np.uint64(first & self._mask)
            outside = offsets >= np.uint64(block.size)
            if outside.any():
                bad = int(outside.argmax())
                raise self._beyond(block, int(offsets[bad]), position + offset + bad * stride)
            where = (offsets // np.uint64(self.page_size)).astype(np.intp)
        if kind == _ZERO:
            self._put_zeros(block, where, int(raw[0, head]))
            self.duplicate += good
        else:
            block.rows[where] = raw[:, head:]
            block.fresh_map[where] = False
            self.normal += good
        return good * stride

    def _put_zeros(self, block: Target, where: slice | NDArray[np.intp], fill: int) -> None:
        """Many pages of equal bytes. Zero is only written where something else is: a write takes memory of the host."""
        if fill:
            block.rows[where] = fill
            block.fresh_map[where] = False
            return
        fresh = block.fresh_map[where]
        pages = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        if fresh.any():
            where = pages = pages[~fresh]
        for i in range(0, len(pages), 256):
            if isinstance(where, slice):
                part: slice | NDArray[np.intp] = slice(
                    where.start + i, min(where.start + i + 256, where.stop)
                )
                used = ~zero_map(block.words[part])
                if used.all():
                    block.words[part] = 0
                    continue
                some = pages[i : i + 256]
            else:
                some = where[i : i + 256]
                used = ~zero_map_at(block.words, some)
            if used.any():
                block.words[some[used]] = 0
