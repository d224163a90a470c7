"""The sections of a stream that passes by: checked, held back where they could start the destination, never kept."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

from whimbrel.channel import Buffer
from whimbrel.errors import DeadlineExceeded, EndOfStream
from whimbrel.savevm import SaveVMHandler, TailTaken
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.format import ItemType
from whimbrel.wire.items import SectionHeader
from whimbrel_qemu.tail import PATIENCE, Tail, TailReader
from whimbrel_ram.check import RamChecker

#: Seconds of silence after which a last byte 00 of what came is looked at more closely.
_SILENCE = 0.05
#: Seconds of silence behind a vmdescription that does not fit, after which it is taken for the end.
_DOUBT = 1.0
_POLL = 0.2  # seconds between looks whether the destination has decided
#: What of a pipe was peeked is read before anything else: a byte at a time would be read so as well.
_CHUNK = 64 << 10

#: What an end with a vmdescription looks like: EOF, its type, its length, its first character.
_END = re.compile(rb"\x00\x06.{4}\{", re.DOTALL)
#: A command whose package may hold one that starts the machine.
_PACKAGED = re.compile(rb"\x08\x00\x07\x00\x04")
#: The beginning of one of them at the end of what came.
_BEGUN = re.compile(rb"(?:\x00(?:\x06.{0,4})?|\x08(?:\x00(?:\x07\x00?)?)?)\Z", re.DOTALL)
_BEGUN_LENGTH = 6

_PING = rb"\x08\x00\x02\x00\x04.{4}"
#: A footer, and the header of the section behind it: its id.
_NEXT = re.compile(rb"\x7e(?=.{4}(?:" + _PING + rb")?\x04(.{4}))", re.DOTALL)
#: A footer of the id, and behind it or behind a question what would be the EOF byte.
_LAST = re.compile(rb"\x7e(?=(.{4})(" + _PING + rb")?\x00)", re.DOTALL)
_LOOK_BEHIND = 18  # bytes: less than the longest of these by one
#: A footer and a question at the very end: the source waits for the answer.
_ASKS = re.compile(rb"\x7e.{4}" + _PING + rb"\Z", re.DOTALL)
_ASKS_LENGTH = 14
_PINGS = re.compile(_PING + rb"\Z", re.DOTALL)
_PING_LENGTH = 9
#: More ids than any machine has devices.
_MAX_IDS = 65536


class _PossibleEnd:
    """Where the EOF byte may be among device sections, before a vmdescription has told: behind the footer of one."""

    def __init__(self, section_id: bytes, position: int) -> None:
        """section_id: of the first section, as on the wire. position: of the next byte."""
        self.first: int | None = None
        self._ids = {section_id}
        self._position = position
        self._rest = b""

    def feed(self, chunk: Buffer) -> None:
        data = self._rest + bytes(chunk)
        base = self._position - len(self._rest)
        self._position += len(chunk)
        self._rest = data[-_LOOK_BEHIND:]
        if self.first is None:
            self.first = self._look(data, base)
        if self.first is not None and _ASKS.search(data[-_ASKS_LENGTH:]):
            self.first = None  # the stream goes on: it was none

    def _look(self, data: bytes, base: int) -> int | None:
        for found in _NEXT.finditer(data):
            if len(self._ids) < _MAX_IDS:
                self._ids.add(found[1])
        for found in _LAST.finditer(data):
            if found[1] in self._ids or len(self._ids) == _MAX_IDS:
                return base + found.start() + 1 + len(found[1]) + len(found[2] or b"")
        return None

    def before(self, settled: int) -> int:
        """How many of the first `settled` bytes come before it."""
        return settled if self.first is None else min(settled, self.first)


class _Passing(SaveVMHandler):
    """Of a stream that is loaded nowhere: any version will do, and there is nothing to save."""

    version_id = 0xFFFFFFFF
    minimum_version_id = 0

    def save(self, out: OutStream) -> None:
        raise NotImplementedError("what passes by is not saved")


class PassingRam(RamChecker):
    """RAM: every record is checked, and counted. on_start is called when the blocks are known; it may raise."""

    def __init__(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        """on_end is called when the first byte of its END came: the source has stopped its machine."""
        super().__init__()
        self._on_start = on_start
        self._on_end = on_end
        self.bytes = 0
        #: More than its START has come: device sections from here on are those behind RAM.
        self.went_on = False
        self._started = False

    def load(self, inp: InStream, header: SectionHeader) -> None:
        begin = inp.position
        if header.type is ItemType.SECTION_END:
            self._on_end()
        super().load(inp, header)
        self.bytes += inp.position - begin
        self.went_on = self._started or header.type is ItemType.SECTION_FULL
        if header.type in (ItemType.SECTION_START, ItemType.SECTION_FULL):
            self._started = True
            self._on_start()


class PassingDevices(_Passing):
    """All device sections, to the end of the stream; load() raises TailTaken.

    What may be the EOF byte is held back, and what is behind it, until a vmdescription came that fits everything
    before: the destination starts its machine after EOF only. Where the machine type sends no vmdescription there is
    nothing to check by.
    """

    idstr = "(devices)"

    def __init__(
        self,
        forward: Callable[[Buffer], None],
        commit: Callable[[Buffer], None],
        *,
        footers: bool,
        described: bool,
        over: Callable[[], bool],
    ) -> None:
        """forward: sends what may go on; commit: the same for what begins with the EOF byte. described: a vmdescription
        must come. over: whether the destination has decided.
        """
        self.tail: Tail | None = None
        #: The idstr of the first.
        self.first = ""
        self._forward = forward
        self._commit = commit
        self._footers = footers
        self._described = described
        self._over = over
        self._held = bytearray()
        self._forwarded = 0
        #: What may be the EOF byte has gone on, and silence behind it is no fault.
        self._ended = False

    def load(self, inp: InStream, header: SectionHeader) -> None:
        inp.close_tap()  # the header has gone on; the rest goes by what is said below
        self.first = header.idstr
        first = items.encode_section_header(header)
        reader = TailReader(inp.position - len(first), footers=self._footers)
        reader.feed(first)
        end = _PossibleEnd(first[1:5], len(first))
        self._forwarded = len(first)
        try:
            while reader.tail is None:
                self._wait(inp, reader)
                chunk = inp.buffered(1)
                reader.feed(chunk)
                self._held += chunk
                if self._footers:
                    end.feed(chunk)
                inp.consume(len(chunk))
                if reader.tail is None:
                    self._pass_on(end.before(reader.settled))
        except EndOfStream as error:
            if not reader.end_without_description():
                raise reader.no_end("the stream ended") from error
        self.tail = reader.tail
        if self._held:
            self._commit(self._held[: len(self._held) - reader.surplus])
        raise TailTaken

    def _wait(self, inp: InStream, reader: TailReader) -> None:
        """For the next bytes. Those held go on meanwhile where they may be the end of a stream that nothing describes."""
        if inp.buffered():
            return
        try:
            if self._held and not self._described:
                with contextlib.suppress(DeadlineExceeded):
                    inp.channel.peek(_CHUNK, time.monotonic() + _SILENCE)
                    return
                self._commit(self._held)
                self._forwarded += len(self._held)
                self._held.clear()
                self._ended = True
            if self._ended:
                _wait_or_over(inp, self._over)
            else:
                patience = PATIENCE if reader.rejected is None else _DOUBT
                inp.channel.peek(_CHUNK, time.monotonic() + patience)
        except DeadlineExceeded as error:
            raise reader.no_end("nothing more came") from error

    def _pass_on(self, settled: int) -> None:
        n = settled - self._forwarded
        if n > 0:
            self._forward(self._held[:n])
            del self._held[:n]
            self._forwarded += n


class PassingRest(_Passing):
    """The rest of a stream, from a live section on that nobody here can read; load() raises TailTaken at its end."""

    idstr = "(verbatim)"

    def __init__(
        self, on_end: Callable[[], None], *, described: bool, over: Callable[[], bool]
    ) -> None:
        """on_end is called before anything goes on behind which a destination may start its machine: at once where the
        stream need not have a vmdescription. over: whether the destination has decided.
        """
        self._on_end = on_end
        self._described = described
        self._over = over
        self._seen = False

    def load(self, inp: InStream, header: SectionHeader) -> None:
        if not self._described:
            self._end()
        held = 0
        while True:
            try:
                more = _wait_or_over(inp, self._over, held)
                chunk = inp.buffered(held + more)
            except EndOfStream:
                if self._seen:
                    raise TailTaken from None
                raise
            if more:
                held = self._hold(chunk)
            else:  # the EOF byte, and no vmdescription?
                self._on_end()
                held = 0
            inp.consume(len(chunk) - held)

    def _hold(self, chunk: memoryview) -> int:
        """How many of the last bytes must wait until it shows what they are."""
        if not self._seen and _END.search(chunk):
            self._end()
        elif not self._seen and _PACKAGED.search(chunk):
            self._on_end()
        if self._seen or _PINGS.search(chunk[-_PING_LENGTH:]):
            return 0
        begun = _BEGUN.search(chunk[-_BEGUN_LENGTH:])
        return 0 if begun is None else len(begun[0])

    def _end(self) -> None:
        self._seen = True
        self._on_end()


def _wait_or_over(inp: InStream, over: Callable[[], bool], held: int = 0) -> bool:
    """For more of the stream than is held back, what was read having gone on; False if something is held back, and nothing
    came for a while. Raises TailTaken if the destination decides before.
    """
    inp.drain_tap()
    silent_at = time.monotonic() + _DOUBT
    while len(inp.buffered()) <= held:
        if over():
            raise TailTaken
        if held and time.monotonic() >= silent_at:
            return False
        with contextlib.suppress(DeadlineExceeded):
            inp.channel.peek(_CHUNK, time.monotonic() + _POLL)
            break
    return True
