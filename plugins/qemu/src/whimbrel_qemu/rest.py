"""The rest of a stream, taken as it is: from a live section that nobody here can read, to the end.

Such a section has no length, so RAM and devices behind it cannot be told from it either. Where the stream ends, its
vmdescription tells, seen from behind.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import attrs

from whimbrel.channel import Buffer
from whimbrel.errors import ChannelError, DeadlineExceeded, EndOfStream, StreamError
from whimbrel.savevm import Budget, LiveSaveVMHandler, Mode, Pending, SaveVMHandler, TailTaken
from whimbrel.state import RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.items import SectionHeader
from whimbrel_qemu.milestones import Milestones
from whimbrel_qemu.tail import Tail, find_tail, write_sections

#: Seconds of silence behind what looks like the end. Guest memory may hold the end of another stream.
SILENCE = 1.0
#: Seconds of silence anywhere.
PATIENCE = 60.0
#: Device sections and vmdescription are looked for in as many bytes at the end.
WINDOW = 16 << 20
_CHUNK = 1 << 20


@attrs.frozen(kw_only=True)
class Rest:
    """What of a stream could not be taken apart, because of a live section that nobody here can read."""

    section: str
    #: All sections, the one that is unknown and RAM included, up to the EOF byte.
    data: memoryview


class RestTaker(SaveVMHandler):
    """Takes the rest of a stream, such a section being the first of it; load() raises TailTaken when it has ended."""

    idstr = "(verbatim)"
    version_id = 0xFFFFFFFF
    minimum_version_id = 0

    def __init__(self, fd: int, *, items_at: int, footers: bool) -> None:
        """fd: the file that holds the stream. items_at: where its first section begins."""
        self._fd = fd
        self._items_at = items_at
        self._footers = footers
        self._eof = 0
        self.tail: Tail | None = None

    def _find_end(self, size: int) -> bool:
        """Do these first bytes of the file end with a vmdescription that fits?"""
        if os.pread(self._fd, 1, size - 1) != b"}":
            return False
        start = max(0, size - WINDOW)
        found = find_tail(os.pread(self._fd, size - start, start), footers=self._footers)
        if found is None:
            return False
        self.tail = found.tail
        self._eof = start + found.eof
        return True

    def rest(self, section: str) -> Rest:
        """What was taken, once load() has ended; it stays readable when the descriptor is closed."""
        data = mmap.mmap(self._fd, self._eof, prot=mmap.PROT_READ)
        return Rest(section=section, data=memoryview(data)[self._items_at :])

    def save(self, out: OutStream) -> None:
        raise NotImplementedError("the rest of a stream is sent by RestSender")

    def _no_end(self, offset: int, what: str) -> StreamError:
        return StreamError(
            f"{what} before a vmdescription that fits the device sections",
            offset=offset,
            hint="The source broke off, or its machine sends no vmdescription: then a live section that nobody here can"
            " read cannot be kept",
        )


class FileRest(RestTaker):
    """The rest of a stream that is a file already."""

    def load(self, inp: InStream, header: SectionHeader) -> None:
        if not self._find_end(os.fstat(self._fd).st_size):
            raise self._no_end(inp.position, "the file ends")
        raise TailTaken


class RestKeeper(RestTaker):
    """Writes the rest of a stream to a file as it comes."""

    def __init__(self, fd: int, head: bytes, *, items_at: int, footers: bool) -> None:
        """fd: empty, to read and write. head: what of the stream comes before the section that is unknown."""
        super().__init__(fd, items_at=items_at, footers=footers)
        self.size = 0
        self._write(head)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        self._write(items.encode_section_header(header))
        quiet = 0.0
        while True:
            try:
                if not inp.buffered():
                    inp.channel.peek(_CHUNK, time.monotonic() + SILENCE)
                chunk = inp.buffered(1)
            except EndOfStream as error:
                if self._find_end(self.size):
                    raise TailTaken from None
                raise self._no_end(inp.position, "the stream ended") from error
            except DeadlineExceeded:
                if self._find_end(self.size):
                    raise TailTaken from None
                quiet += SILENCE
                if quiet >= PATIENCE:
                    raise self._no_end(inp.position, f"nothing came for {PATIENCE:.0f} s") from None
                continue
            quiet = 0.0
            self._write(chunk)
            inp.consume(len(chunk))

    def _write(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            try:
                n = os.pwrite(self._fd, view[:_CHUNK], self.size)
            except OSError as error:
                raise ChannelError(
                    f"the stream could not be written: {error.strerror}", hint="Nothing was kept"
                ) from error
            self.size += n
            view = view[n:]


class RestSender(LiveSaveVMHandler):
    """Sends what RestKeeper kept: all sections, headers and footers included. The machine stands still."""

    idstr = "(verbatim)"
    verbatim = True

    def __init__(self, data: memoryview, tail: Tail, milestones: Milestones | None = None) -> None:
        """data: from the first section to the last one, the EOF byte not included. tail: the device sections that
        should end it. milestones: ask before each of those that is sent.
        """
        self._tail = tail if data[-len(tail.sections) :] == tail.sections else None
        self._data = data if self._tail is None else data[: -len(tail.sections)]
        self._milestones = milestones
        self._sent = 0
        self.vmdescription = tail.vmdescription or b""

    def setup(self, out: OutStream, params: RunParams) -> None:
        self._sent = 0

    def pending(self, exact: bool) -> Pending:
        return Pending(precopy=len(self._data) - self._sent)

    def iterate(self, out: OutStream, budget: Budget) -> bool:
        start = out.position
        while self._sent < len(self._data):
            if budget.spent(out.position - start):
                return False
            self._step(out)
        return True

    def complete(self, out: OutStream, mode: Mode) -> None:
        while self._sent < len(self._data):
            self._step(out)
        if self._tail is not None:
            write_sections(self._tail, out, self._milestones)

    def _step(self, out: OutStream) -> None:
        piece = self._data[self._sent : self._sent + _CHUNK]
        out.write_all([piece])
        self._sent += len(piece)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        raise NotImplementedError("the rest of a stream is taken by RestKeeper")

    def query(self) -> dict[str, Any]:
        return {
            "ram": {
                "transferred": self._sent,
                "total": len(self._data),
                "remaining": len(self._data) - self._sent,
            }
        }
