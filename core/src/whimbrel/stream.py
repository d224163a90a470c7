"""The migration stream over a channel: position, pace, and the first error, which stays.

OutStream collects small writes and passes large ones through. InStream reads ahead and shows what it holds, so that a
section can take runs of records from the buffer at once. Neither knows what the bytes mean.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import time
from collections.abc import Callable, Iterator, Sequence

from whimbrel.channel import Buffer, Channel
from whimbrel.errors import ChannelError, EndOfStream, MigrationError
from whimbrel.pace import Pace

#: Writes at least this long go to the channel as they are, behind what was collected before.
PASS_THROUGH = 16 << 10
COLLECT = 64 << 10
#: Small enough to stay in a processor's cache until what was read is put in place.
READ_BUFFER = 256 << 10
#: The kernel copies to addresses of this alignment two to three times faster than to others (x86 `rep movs`).
ALIGNMENT = 64
#: An unread rest up to this long is moved to get that alignment for what comes next.
SHORT_REST = 16 << 10
WINDOW = 0.1  # seconds: the period of the figures

_U16, _U32, _U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")


class _Latched:
    """The first error stays: whoever comes later gets the same."""

    error: MigrationError | None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def _latch(self) -> Iterator[None]:
        self.check()
        try:
            yield
        except MigrationError as error:
            self.error = error
            raise
        except OSError as error:
            self.error = ChannelError(str(error))
            raise self.error from error


class OutStream(_Latched):
    """The writing side. One thread writes."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        #: Writes wait for their time, and large ones go in pieces; None: as fast as they can.
        self.pace: Pace | None = None
        self._small = bytearray()
        self._sent = 0
        self._window_start = time.monotonic()
        self._window_base = 0

    # ---- writing

    @property
    def position(self) -> int:
        """Bytes written so far, those not yet passed to the channel included."""
        return self._sent + len(self._small)

    def write(self, data: Buffer) -> None:
        if len(data) >= PASS_THROUGH:
            self.write_all([data])
            return
        self._small += data
        if len(self._small) >= COLLECT:
            self.write_all([])

    def write_all(self, buffers: Sequence[Buffer]) -> None:
        """Send large buffers at once, in order, behind what was collected."""
        with self._latch():
            if self._small:
                buffers = [self._small, *buffers]
                self._small = bytearray()
            for some in [buffers] if self.pace is None else self._pieces(buffers, self.pace):
                self.channel.send(some)
                self.account(sum(memoryview(b).nbytes for b in some))

    def _pieces(self, buffers: Sequence[Buffer], pace: Pace) -> Iterator[Sequence[Buffer]]:
        """The same bytes, each piece when its time has come."""
        rest = [memoryview(b).cast("B") for b in buffers]
        while rest:
            pace.wait()
            most = pace.piece
            if most is None:
                yield rest
                return
            some: list[memoryview] = []
            while rest and most:
                head = rest[0][:most]
                some.append(head)
                most -= len(head)
                rest[:1] = [rest[0][len(head) :]] if len(head) < len(rest[0]) else []
            yield some

    def u8(self, value: int) -> None:
        self.write(bytes((value,)))

    def u16(self, value: int) -> None:
        self.write(_U16.pack(value))

    def u32(self, value: int) -> None:
        self.write(_U32.pack(value))

    def u64(self, value: int) -> None:
        self.write(_U64.pack(value))

    def flush(self) -> None:
        if self._small:
            self.write_all([])
        with self._latch():
            self.channel.flush()

    @contextlib.contextmanager
    def lend(self) -> Iterator[int | None]:
        """A socket, everything before it being sent, for native code that writes to it itself and then says how much by
        account(): see Channel.lend(). None where there is none: write to the stream instead.
        """
        self.flush()
        with self._latch(), self.channel.lend("write") as fd:
            yield fd

    def account(self, n: int, *, paid: int = 0) -> None:
        """Bytes were written, some of them past this stream: they count for position and pace. paid: those of them that
        were on their way when the limit was another.
        """
        self._sent += n
        if self.pace is not None:
            self.pace.charge(n - paid)

    def wait_for_turn(self) -> None:
        """Before bytes are written past this stream, until the pace allows it."""
        if self.pace is not None:
            self.pace.wait()

    # ---- what went out lately

    def start_window(self) -> None:
        """Begin a new period of the figures."""
        self._window_start = time.monotonic()
        self._window_base = self.position

    @property
    def window_bytes(self) -> int:
        """Bytes written since the window began."""
        return self.position - self._window_base

    @property
    def window_elapsed(self) -> float:
        return time.monotonic() - self._window_start

    @property
    def window_end(self) -> float:
        """When it is over, by time.monotonic()."""
        return self._window_start + WINDOW


class InStream(_Latched):
    """The reading side: a buffer of READ_BUFFER bytes that is refilled from the channel."""

    def __init__(
        self,
        channel: Channel,
        *,
        buffer_size: int = READ_BUFFER,
        tap: Callable[[memoryview], object] | None = None,
    ) -> None:
        """tap: is given every byte that was consumed, in order, before the stream waits for more and at drain_tap()."""
        self.channel = channel
        self._tap = tap
        self._tapped = 0  # what the tap has not yet been given begins here
        self._capacity = buffer_size
        # Anonymous memory begins on a page boundary.
        memory = mmap.mmap(-1, buffer_size + ALIGNMENT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(memory)
        self._start = self._end = 0
        self._consumed = 0
        #: Reading raises DeadlineExceeded when nothing came before this time (time.monotonic()); reading may go on
        #: after that.
        self.deadline: float | None = None

    @property
    def position(self) -> int:
        """Byte offset in the stream of the next byte."""
        return self._consumed

    @property
    def capacity(self) -> int:
        """The most that buffered() can be asked for."""
        return self._capacity

    def buffered(self, need: int = 0) -> memoryview:
        """What has arrived and was not consumed, after waiting until it is at least `need` bytes (at most capacity).

        Valid until the next call that reads. Raises EndOfStream when the channel ends before.
        """
        while self._end - self._start < need:
            self._refill(need)
        return self._view[self._start : self._end]

    def consume(self, n: int) -> None:
        """Drop n of the buffered bytes."""
        if n > self._end - self._start:
            raise ValueError("more than was buffered")
        self._start += n
        self._consumed += n

    def read(self, n: int) -> bytes:
        if n <= self._capacity:
            data = bytes(self.buffered(n)[:n])
            self.consume(n)
            return data
        whole = bytearray()
        while len(whole) < n:  # allocated as it arrives: a length is a claim of the peer's
            whole += self.read(min(n - len(whole), self._capacity))
        return bytes(whole)

    def read_into(self, view: memoryview) -> None:
        """Fill view, the large part straight from the channel."""
        have = min(len(view), self._end - self._start)
        if self._tap is not None:
            raise ValueError("a tapped stream is read through its buffer")
        view[:have] = self._view[self._start : self._start + have]
        self.consume(have)
        with self._latch():
            while have < len(view):
                n = self.channel.recv_into(view[have:])
                if n == 0:
                    self._raise_end(len(view) - have)
                have += n
                self._consumed += n

    def drain_tap(self) -> None:
        """Give the tap what was consumed by now."""
        if self._tap is not None and self._start > self._tapped:
            done, self._tapped = self._view[self._tapped : self._start], self._start
            self._tap(done)

    def close_tap(self) -> None:
        """Drain the tap, for good: what is consumed from here on is the reader's own business."""
        self.drain_tap()
        self._tap = None

    def at_end(self) -> bool:
        """Nothing is buffered and the channel has ended; waits until that is known."""
        if self._end > self._start:
            return False
        try:
            self._refill(1)
        except EndOfStream:
            self.error = None
            return True
        return False

    def u8(self) -> int:
        return self.read(1)[0]

    def u16(self) -> int:
        return int(_U16.unpack(self.read(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.read(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.read(8))[0])

    def run(self, loop: Callable[[int, memoryview, int, int], tuple[int, int, int]]) -> None:
        """Let native code go on by itself, where the channel has a socket to lend. loop(fd, buffer, start, end) takes from
        what lies in the buffer from start to end, receives more into it, and returns where start and end are then and how
        many bytes were taken. An end of the channel it leaves to the next who reads.
        """
        if self._tap is not None or self.deadline is not None:
            return
        with self._latch(), self.channel.lend("read") as fd:
            if fd is not None:
                self._start, self._end, taken = loop(fd, self._view, self._start, self._end)
                self._consumed += taken

    def _refill(self, need: int) -> None:
        if need > self._capacity:
            raise ValueError(f"{need} bytes do not fit the buffer of {self._capacity}")
        self.drain_tap()
        if self.deadline is not None:
            self.check()
            self.channel.peek(PASS_THROUGH, self.deadline)
        with self._latch():
            self._make_room(need)
            self._tapped = self._start
            n = self.channel.recv_into(self._view[self._end :])
            if n == 0:
                self._raise_end(need - (self._end - self._start))
            self._end += n

    def _make_room(self, need: int) -> None:
        """Move the rest to the front where it is short or in the way, so that it ends on an aligned address."""
        rest, room = self._end - self._start, len(self._view) - self._end
        front = -rest % ALIGNMENT
        if rest > SHORT_REST and rest + room >= need and room >= self._capacity // 8:
            return
        if self._start > front:
            kept = bytes(self._view[self._start : self._end])
            self._view[front : front + rest] = kept
            self._start, self._end = front, front + rest

    def _raise_end(self, missing: int) -> None:
        raise EndOfStream(
            "the stream ended early",
            offset=self._consumed + (self._end - self._start),
            expected=f"at least {missing} more bytes",
        )
