"""Decoder: records into pages, in runs. Sans-I/O; of records that come in runs, nothing in Python per page.

It guesses that what follows a few equal records is more of them, checks the guess, and scatters what was right with one
assignment. The guess doubles when it was right and shrinks when it was not: a fixed one makes RAM of zero and other pages
in turn three times slower.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from whimbrel.errors import StreamError
from whimbrel.wire.items import shown
from whimbrel_ram import native, xbzrle
from whimbrel_ram.records import CONTINUE, EOS, KINDS, NEEDS, PAGE, U64, XBZRLE, ZERO, PageFlag
from whimbrel_ram.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.stream import InStream

_DELTA = struct.Struct(">BH")
#: Pages of at least this size are received straight into place instead of through the read buffer.
DIRECT_PAGE = 64 << 10


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
    #: Deltas taken apart together.
    _DELTAS = 1024

    def __init__(self, page_size: int, find: Callable[[str], Target | None]) -> None:
        self.page_size = page_size
        self.need = 8
        self.total = 0
        self.flag = PageFlag(0)
        self.fill = memoryview(b"")
        self.normal = self.duplicate = self.deltas = 0
        self._find = find
        self._targets: dict[bytes, Target] = {}
        self._block: Target | None = None
        self._mask = page_size - 1
        self._direct = page_size >= DIRECT_PAGE
        self._native = None if self._direct else native.records
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
        unpack = U64.unpack_from
        while True:
            left = size - offset
            if left < 8:
                self.need = 8
                return offset, Event.MORE
            (word,) = unpack(buffer, offset)
            flags = word & self._mask
            kind = flags & ~CONTINUE
            if kind not in (PAGE, ZERO):
                if kind != XBZRLE:
                    return self._other(word, offset, position)
                if not (taken := self._deltas(buffer, offset, position)):
                    return offset, Event.MORE
                offset += taken
                continue
            head = 8
            if flags & CONTINUE:
                block = self._same_block(flags, position + offset)
                if self._native is not None and (taken := self._taken(block, buffer[offset:])):
                    offset += taken
                    continue
            else:
                if left < 9 or left < (head := 9 + buffer[offset + 8]):
                    self.need = max(9, head)
                    return offset, Event.MORE
                block = self._target(buffer, offset, head, position)
            body = 1 if kind == ZERO else self.page_size
            if self._direct and kind == PAGE:
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
            if kind == ZERO:
                block.put_zero(where, page, buffer[offset + head])
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

    def _taken(self, block: Target, buffer: memoryview) -> int:
        """Let the loop in C take what it can of the records of this block; their bytes."""
        assert self._native is not None
        taken, normal, zero = self._native.take(buffer, block.memory, block.fresh, self.page_size)
        self.normal += normal
        self.duplicate += zero
        return int(taken)

    def receive(self, inp: InStream) -> bool:
        """Let the loop in C receive and take records of the block that is being received, while nothing else comes. False:
        it took none.
        """
        if self._native is None or self._block is None:
            return False
        before = inp.position
        receive, block = self._native.receive, self._block

        def loop(fd: int, buffer: memoryview, start: int, end: int) -> tuple[int, int, int]:
            start, end, taken, normal, zero = receive(
                fd, buffer, start, end, block.memory, block.fresh, self.page_size
            )
            self.normal += normal
            self.duplicate += zero
            return start, end, taken

        inp.run(loop)
        return inp.position > before

    # ---- single records

    def _same_block(self, flags: int, offset: int) -> Target:
        if self._block is None:
            raise self._error(
                "a page record without a block: CONTINUE comes first",
                offset,
                expected="a record with the name of its block",
                found=f"{flags:#05x}",
            )
        return self._block

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
        kind = flags & ~CONTINUE
        if kind == EOS:
            return offset + 8, Event.EOS
        where = position + offset
        if kind not in KINDS:
            raise self._error(
                "unknown combination of flags in a page record",
                where,
                expected="one of ZERO 0x002, PAGE 0x008, EOS 0x010, XBZRLE 0x040, MEM_SIZE 0x004",
                found=f"{flags:#05x}",
            )
        self.flag = PageFlag(kind)
        if self.flag is PageFlag.MEM_SIZE:
            self.total = word - flags
            return offset + 8, Event.SETUP
        if self.flag is PageFlag.COMPRESS_PAGE:
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

    # ---- deltas

    def _deltas(self, buffer: memoryview, offset: int, position: int) -> int:
        """Take XBZRLE records from offset on, as many as are complete and name different pages of one block; their bytes.
        0: not even the first is complete, and `need` says how much that takes.

        Only their heads are looked at one by one: each says where the next record is. It costs a thirtieth of the rest.
        """
        start: list[int] = []
        length: list[int] = []
        where: dict[int, int] = {}  # page → offset of its record
        at, size = offset, len(buffer)
        block = self._block
        while len(start) < self._DELTAS:
            if size - at < 8:
                self.need = at - offset + 8
                break
            (word,) = U64.unpack_from(buffer, at)
            flags = word & self._mask
            if flags & ~CONTINUE != XBZRLE:
                break
            head = 8
            if flags & CONTINUE:
                block = self._same_block(flags, position + at)
            else:
                if start:
                    break
                if size - at < 9 or size - at < (head := 9 + buffer[at + 8]):
                    self.need = max(9, head)
                    break
                self._block = block = self._target(buffer, at, head, position)
            body = at + head + xbzrle.HEAD
            if size < body:
                self.need = body - offset
                break
            encoding, count = _DELTA.unpack_from(buffer, at + head)
            if encoding != xbzrle.ENCODING or count > self.page_size:
                raise self._error(
                    "bad head of a XBZRLE record",
                    position + at + head,
                    expected=f"encoding {xbzrle.ENCODING}, at most {self.page_size} bytes",
                    found=f"encoding {encoding}, {count} bytes",
                )
            page = word - flags
            if page >= block.size:
                raise self._beyond(block, page, position + at)
            if size < body + count:
                self.need = body + count - offset
                break
            if page in where:
                break
            where[page] = at
            start.append(body)
            length.append(count)
            at = body + count
        if start:
            assert block is not None
            self._patch(block, buffer, start, length, where=where, position=position)
            self.deltas += len(start)
            self._kind, self._streak = -1, 0
        return at - offset

    def _patch(
        self,
        block: Target,
        buffer: memoryview,
        start: list[int],
        length: list[int],
        *,
        where: dict[int, int],
        position: int,
    ) -> None:
        data = np.frombuffer(buffer, np.uint8, start[-1] + length[-1] - start[0], start[0])
        try:
            block.patch(
                data,
                np.array(start) - start[0],
                np.array(length),
                np.fromiter(where, np.int64, len(where)),
            )
        except xbzrle.BadDelta as error:
            raise self._error(
                f"a XBZRLE record cannot be decoded: {error}",
                position + list(where.values())[error.index],
                expected="unchanged and changed runs in turn, within the page",
            ) from error

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
        if kind == ZERO:
            unlike |= raw[:, head] != raw[0, head]
        if not in_order or kind == ZERO or head > 8:
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
        if kind == ZERO:
            block.put_zeros(where, int(raw[0, head]))
            self.duplicate += good
        else:
            block.rows[where] = raw[:, head:]
            block.fresh_map[where] = False
            self.normal += good
        return good * stride
