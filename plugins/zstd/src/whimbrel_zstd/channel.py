"""The filter zstd, and its channel."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from whimbrel import (
    Channel,
    ChannelError,
    DeadlineExceeded,
    EndOfStream,
    Filter,
    MigrationError,
    Role,
    TransportContext,
)
from whimbrel.channel import Buffer, WrappedChannel
from whimbrel_zstd.frames import MAX_BLOCK, MAX_PIECE, Packer, Unpacker
from whimbrel_zstd.pace import START, Pace
from whimbrel_zstd.plugin import AUTO

if TYPE_CHECKING:
    from whimbrel.settings import Settings

log = logging.getLogger("whimbrel.zstd")

#: Bytes that are compressed between two looks at the link: a harder level takes some tens of milliseconds for them.
PIECE = 1 << 20
#: Less than that ends its frame.
SHORT = MAX_BLOCK
#: Compressed bytes that are read at once.
READ = 256 << 10


@attrs.define
class Flow:
    """Bytes of one direction, before and after compression."""

    plain: int = 0
    compressed: int = 0

    @property
    def ratio(self) -> float:
        return self.plain / self.compressed if self.compressed else 1.0


@attrs.define
class Statistics:
    """Of one channel, which they outlive. Each flow is written by one thread."""

    sent: Flow = attrs.field(factory=Flow)
    received: Flow = attrs.field(factory=Flow)
    #: Last sent with.
    level: int = START


class ZstdFilter(Filter):
    """Of all channels of one side."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._role = Role.SOURCE
        self._statistics: list[Statistics] = []

    def begin(self, ctx: TransportContext) -> None:
        self._settings, self._role = ctx.settings, ctx.role

    def wrap(self, channel: Channel, role: Role) -> ZstdChannel:
        wrapped = ZstdChannel(channel, self, role)
        self._statistics.append(wrapped.statistics)
        return wrapped

    def fixed_level(self) -> int | None:
        """The level that the user has set, or None for the one that the channel finds."""
        level = AUTO if self._settings is None else self._settings.get("zstd-level", AUTO)
        return None if level == AUTO else int(level)

    def query(self) -> dict[str, Any]:
        """Of the direction from source to destination; the level is the main channel's, on the source."""
        if not self._statistics:
            return {}
        sends = self._role is Role.SOURCE
        flows = [each.sent if sends else each.received for each in self._statistics]
        total = Flow(sum(f.plain for f in flows), sum(f.compressed for f in flows))
        members = attrs.asdict(total) | {"ratio": round(total.ratio, 2)}
        if sends:
            members["level"] = self._statistics[0].level
        return {"x-zstd": members}


class ZstdChannel(WrappedChannel):
    """Compresses in both directions.

    What send() was given can be unpacked at the other end when it returns. A short one also ends its frame, and so does
    each answer of a destination: all before it has been compared with its checksum when the other side has it, and no byte
    follows what may be the last thing that the other side reads. Frames go on over long ones, RAM, since what
    repeats is found within a frame only.
    """

    def __init__(self, inner: Channel, owner: ZstdFilter, role: Role) -> None:
        super().__init__(inner)
        self.role = role
        self.statistics = Statistics()
        self._owner = owner
        self._gone: str | None = None
        self._packer, self._pace = Packer(), Pace()
        self._unpacker = Unpacker()
        self._buffer = memoryview(bytearray(READ + MAX_PIECE))
        self._start = self._end = 0
        self._ready = memoryview(b"")  # unpacked, and not yet received
        # Of the input; raised when what came before it was received.
        self._error: MigrationError | None = None

    def rewrap(self, channel: Channel) -> Channel:
        return self if channel is self.inner else self._owner.wrap(channel, self.role)

    def _check(self) -> None:
        if self._gone is not None:
            raise ChannelError(f"{self.name} {self._gone}")

    # ---- writing

    def send(self, buffers: Sequence[Buffer]) -> None:
        self._check()
        flow, fixed = self.statistics.sent, self._owner.fixed_level()
        for pieces in _portions(buffers):
            level = self._pace.level if fixed is None else fixed
            self.statistics.level = level
            plain = sum(map(len, pieces))
            began = time.monotonic()
            packed = self._packer.pack(
                pieces, level, end=plain < SHORT or self.role is Role.DESTINATION
            )
            compressed = time.monotonic()
            self.inner.send(packed)
            sent = time.monotonic()
            small = sum(map(len, packed))
            flow.plain += plain
            flow.compressed += small
            self._pace.account(compressed - began, sent - compressed, plain, small)

    def finish(self, deadline: float | None = None) -> None:
        self._check()
        end = self._packer.finish()
        if end:
            self.inner.send([end])
            self.statistics.sent.compressed += len(end)
        self.inner.finish(deadline)

    # ---- reading

    def recv_into(self, view: memoryview) -> int:
        self._check()
        view = view.cast("B")
        if not self._ready and not self._fill(None):
            return 0
        got = 0
        while True:
            n = min(len(view) - got, len(self._ready))
            view[got : got + n] = self._ready[:n]
            self._ready = self._ready[n:]
            got += n
            # An error in what follows is for the next call.
            with contextlib.suppress(MigrationError):
                if got < len(view) and self._unpack():
                    continue
            return got

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        self._check()
        if not self._ready:
            self._fill(deadline)
        elif len(self._ready) < n:
            with contextlib.suppress(MigrationError):
                self._fill(time.monotonic())
        return bytes(self._ready[:n])

    def _fill(self, deadline: float | None) -> bool:
        """Wait until there is more that is ready; False at the end."""
        late = False
        while not self._unpack():
            if late:
                raise DeadlineExceeded(f"timed out waiting for {self.name}")
            if deadline is not None:
                self.inner.peek(1, deadline)
            self._make_room()
            n = self.inner.recv_into(self._buffer[self._end :])
            self._check()
            if not n:
                self._ended()
                return False
            self._end += n
            self.statistics.received.compressed += n
            late = deadline is not None and time.monotonic() >= deadline
        return True

    def _unpack(self) -> bool:
        """More is ready, of what has arrived."""
        if self._error is not None:
            raise self._error
        while self._start < self._end:
            try:
                taken = self._unpacker.take(self._buffer[self._start : self._end])
            except MigrationError as error:
                self._error = error
                error.message = f"{self.name}: {error.message}"
                raise
            if taken is None:
                return False
            size, unpacked = taken
            self._start += size
            if unpacked:
                self._ready = memoryview(bytes(self._ready) + unpacked if self._ready else unpacked)
                self.statistics.received.plain += len(unpacked)
                return True
        return False

    def _make_room(self) -> None:
        rest = self._end - self._start
        if len(self._buffer) - self._end < READ:
            self._buffer[:rest] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, rest

    def _ended(self) -> None:
        if self._unpacker.in_frame or self._start < self._end:
            self._error = EndOfStream(
                f"{self.name} ended within a zstd frame",
                offset=self._unpacker.offset + self._end - self._start,
                expected="the rest of it",
                hint="The link was cut, or the sender is gone",
            )
            raise self._error

    # ---- ending

    def abort(self) -> None:
        self._gone = self._gone or "was aborted"
        self.inner.abort()

    def close(self) -> None:
        first, self._gone = self._gone != "is closed", "is closed"
        self.inner.close()
        if first:
            of = self.statistics
            for what, flow in (("sent", of.sent), ("received", of.received)):
                log.info("%s: %d bytes %s as %d", self.name, flow.plain, what, flow.compressed)


def _portions(buffers: Sequence[Buffer]) -> Iterator[list[memoryview]]:
    """The buffers in order, in lists of PIECE bytes and less."""
    portion: list[memoryview] = []
    room = PIECE
    for buffer in buffers:
        todo = memoryview(buffer).cast("B")
        while len(todo):
            piece, todo = todo[:room], todo[room:]
            portion.append(piece)
            room -= len(piece)
            if not room:
                yield portion
                portion, room = [], PIECE
    if portion:
        yield portion
