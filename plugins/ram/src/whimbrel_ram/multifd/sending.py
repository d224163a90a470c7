"""The source's channels: a thread each, which makes packets of pages and sends them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import numpy as np

from whimbrel.errors import Cancelled, MigrationError
from whimbrel_ram import native
from whimbrel_ram.multifd import packing, wire
from whimbrel_ram.multifd.wire import METHODS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.channel import Channel

#: Jobs that wait for one channel: one being sent, one being ready.
_DEPTH = 2
#: Packets of one job at first, and at most. The more there are, the less the threads of the channels meet; but one should
#: not take longer than some ten milliseconds, on whatever link and by whatever method.
PACKETS, _MOST = 8, 64
_SHORT, _LONG = 0.004, 0.016  # seconds of a job after which the next ones are longer, or shorter
_LOOK = 0.1  # seconds between two looks for a cancel


@attrs.frozen(kw_only=True)
class Job:
    """What becomes packets."""

    idstr: bytes = b""
    words: NDArray[np.uint64] | None = None  # the block as rows of words
    normal: NDArray[np.intp] = attrs.field(factory=lambda: np.empty(0, np.intp))
    zero: NDArray[np.intp] = attrs.field(factory=lambda: np.empty(0, np.intp))
    sync: bool = False


class Senders:
    """The channels of one migration. Its thread calls; the channels' own threads do the work."""

    def __init__(
        self,
        channels: list[Channel],
        *,
        page_size: int,
        uuid: bytes | None,
        method: str,
        level: int,
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Sends the init packets. Owns the channels from here on."""
        self._channels = channels
        self._page_size = page_size
        self._method, self._level = method, level
        self._is_cancelled = is_cancelled
        self._changed = threading.Condition()
        self._queues: list[deque[tuple[Job, int]]] = [deque() for _ in channels]
        self._busy = [False] * len(channels)
        self._error: BaseException | None = None
        self._closing = False
        self._next = 0
        self._number = 0
        self._sent = 0
        #: Pages of a job.
        self.most = PACKETS * wire.pages_of(page_size)
        #: Bytes of pages that were put in and have not been sent.
        self.waiting = 0
        self._new = self._owing = 0  # see take_sent()
        self._limit = self._limits = 0  # and how many there have been
        for number, channel in enumerate(channels):
            channel.send([wire.encode_init(uuid, number)])
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"whimbrel-multifd-{i}", daemon=True)
            for i in range(len(channels))
        ]
        for thread in self._threads:
            thread.start()

    # ---- the migration's thread

    @property
    def sent(self) -> int:
        """Bytes on all channels, headers included."""
        return self._sent

    def take_sent(self, limit: int) -> tuple[int, int]:
        """Bytes sent since the last call, and how many of them were put in under the limit that holds now: the others owe
        it nothing.
        """
        with self._changed:
            if limit != self._limit:
                self._limit, self._owing = limit, 0
                self._limits += 1
            new = self._new, self._owing
            self._new = self._owing = 0
            return new

    def put(self, job: Job) -> None:
        """To the next channel that has room, waiting for it. Raises the error of a channel, or Cancelled."""
        with self._changed:
            while True:
                self._check()
                index = self._with_room()
                if index is not None:
                    break
                self._changed.wait(_LOOK)
            self._put(index, job)

    def sync(self) -> None:
        """Everything before it on all channels, before anything behind it on any."""
        with self._changed:
            self._check()
            for index in range(len(self._channels)):
                self._put(index, Job(sync=True))

    def drain(self) -> None:
        """Wait until everything has been sent. Raises the error of a channel, or Cancelled."""
        with self._changed:
            while any(self._queues) or any(self._busy):
                self._check()
                self._changed.wait(_LOOK)
            self._check()

    def close(self, *, orderly: bool) -> None:
        """orderly: what was put in is sent, and the channels end as such; else they are torn down. Never raises."""
        with self._changed:
            self._closing = True
            if not orderly:
                for queue in self._queues:
                    queue.clear()
            self._changed.notify_all()
        for channel in () if orderly else self._channels:
            channel.abort()
        for thread in self._threads:
            thread.join()
        for channel in self._channels:
            if orderly:
                with contextlib.suppress(MigrationError):
                    channel.finish()
            channel.close()

    def _with_room(self) -> int | None:
        for step in range(len(self._channels)):
            index = (self._next + step) % len(self._channels)
            if len(self._queues[index]) + self._busy[index] < _DEPTH:
                self._next = index + 1
                return index
        return None

    def _put(self, index: int, job: Job) -> None:
        self._queues[index].append((job, self._limits))
        self.waiting += len(job.normal) * self._page_size
        self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._is_cancelled():
            raise Cancelled("the migration was cancelled")

    # ---- a channel's thread

    def _run(self, index: int) -> None:
        try:
            sender = _Sender(self._channels[index], self._page_size, self._method, self._level)
            while (taken := self._take(index)) is not None:
                job, limits = taken
                began = time.monotonic()
                size = sender.send(job, self._count(sender.packets(job)))
                with self._changed:
                    self._fit(len(job.normal), time.monotonic() - began)
                    self._busy[index] = False
                    self._sent += size
                    self._new += size
                    if limits == self._limits:
                        self._owing += size
                    self.waiting -= len(job.normal) * self._page_size
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                if isinstance(error, MigrationError):
                    error.message = f"multifd channel {index}: {error.message}"
                self._error = self._error or error
                self._busy[index] = False
                self._changed.notify_all()

    def _fit(self, pages: int, took: float) -> None:
        """Make jobs as long as they should be, by how long one took."""
        packet = wire.pages_of(self._page_size)
        if took > _LONG:
            self.most = max(self.most // 2, packet)
        elif took < _SHORT and pages >= self.most:
            self.most = min(self.most * 2, _MOST * packet)

    def _take(self, index: int) -> tuple[Job, int] | None:
        with self._changed:
            queue = self._queues[index]
            while not queue:
                if self._closing:
                    return None
                self._changed.wait()
            self._busy[index] = True
            return queue.popleft()

    def _count(self, packets: int) -> int:
        """The number of the first of so many."""
        with self._changed:
            first = self._number + 1
            self._number += packets
            return first


class _Sender:
    """One channel: jobs into bytes."""

    def __init__(self, channel: Channel, page_size: int, method: str, level: int) -> None:
        self._channel = channel
        self._page_size = page_size
        self._most = wire.pages_of(page_size)
        self._flags = METHODS[method]
        self._packer = packing.packer(method, level)
        self._staging = np.empty((self._most, page_size // 8), np.uint64)

    def packets(self, job: Job) -> int:
        """How many a job makes."""
        return max(1, -(-max(len(job.normal), len(job.zero)) // self._most))

    def send(self, job: Job, first: int) -> int:
        """Packets, numbered from `first`; how many bytes they had."""
        if (
            native.packets is not None
            and self._packer is None
            and len(job.normal)
            and not len(job.zero)
        ):
            with self._channel.lend("write") as fd:
                if fd is not None:
                    return int(
                        native.packets.send(
                            fd, job.idstr, job.words, job.normal, self._page_size, first
                        )
                    )
        size, step = 0, np.uint64(self._page_size)
        ready: list[bytes | bytearray | memoryview] = []
        for i in range(self.packets(job)):
            some = slice(i * self._most, (i + 1) * self._most)
            normal, zero = job.normal[some], job.zero[some]
            data, in_place = self._data(job, normal) if len(normal) else (b"", True)
            packet = wire.Packet(
                flags=wire.SYNC if job.sync else self._flags,
                number=first + i,
                idstr=job.idstr,
                normal=normal.astype(np.uint64) * step,
                zero=zero.astype(np.uint64) * step,
                size=len(data),
            )
            ready += wire.encode(packet, self._page_size), data
            if not in_place:  # the next would overwrite it
                size += self._flush(ready)
        return size + self._flush(ready)

    def _flush(self, ready: list[bytes | bytearray | memoryview]) -> int:
        self._channel.send(ready)
        size = sum(map(len, ready))
        ready.clear()
        return size

    def _data(self, job: Job, pages: NDArray[np.intp]) -> tuple[bytes | memoryview, bool]:
        """The bytes of those pages, and whether they stay as they are. What is one piece of memory is sent from where it is,
        but packed from a copy: the machine may write to it meanwhile.
        """
        assert job.words is not None
        n = len(pages)
        low, high = int(pages[0]), int(pages[-1])
        in_order = high - low == n - 1
        if in_order and self._packer is None:
            return job.words[low : high + 1].reshape(-1).view(np.uint8).data, True
        rows = self._staging[:n]
        if in_order:
            rows[:] = job.words[low : high + 1]
        else:
            np.take(job.words, pages, axis=0, out=rows, mode="clip")
        data = rows.reshape(-1).view(np.uint8).data
        return (data, False) if self._packer is None else (self._packer.pack(data), True)
