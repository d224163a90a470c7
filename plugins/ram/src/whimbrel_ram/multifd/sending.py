"""The source's channels: a thread each, which gathers the pages of a packet and sends them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import numpy as np

from whimbrel.errors import Cancelled, MigrationError
from whimbrel_ram.multifd import packing, wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.channel import Channel

#: Packets that wait for one channel: one being sent, one being ready.
_DEPTH = 2
_LOOK = 0.1  # seconds between two looks for a cancel


@attrs.frozen(kw_only=True)
class Job:
    """What becomes a packet."""

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
        self._queues: list[deque[Job]] = [deque() for _ in channels]
        self._busy = [False] * len(channels)
        self._error: BaseException | None = None
        self._closing = False
        self._next = 0
        self._number = 0
        self._sent = 0
        #: Bytes of pages that were put in and have not been sent.
        self.waiting = 0
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
        self._queues[index].append(job)
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
            while (job := self._take(index)) is not None:
                size = sender.send(job, self._count())
                with self._changed:
                    self._busy[index] = False
                    self._sent += size
                    self.waiting -= len(job.normal) * self._page_size
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                if isinstance(error, MigrationError):
                    error.message = f"multifd channel {index}: {error.message}"
                self._error = self._error or error
                self._busy[index] = False
                self._changed.notify_all()

    def _take(self, index: int) -> Job | None:
        with self._changed:
            queue = self._queues[index]
            while not queue:
                if self._closing:
                    return None
                self._changed.wait()
            self._busy[index] = True
            return queue.popleft()

    def _count(self) -> int:
        with self._changed:
            self._number += 1
            return self._number


class _Sender:
    """One channel: jobs into bytes."""

    def __init__(self, channel: Channel, page_size: int, method: str, level: int) -> None:
        self._channel = channel
        self._page_size = page_size
        self._flags = packing.flag(method)
        self._packer = packing.packer(method, level)
        self._staging = np.empty((wire.pages_of(page_size), page_size // 8), np.uint64)

    def send(self, job: Job, number: int) -> int:
        data: list[bytes | memoryview] = []
        size = 0
        if len(job.normal):
            pages = self._pages(job)
            data.append(pages if self._packer is None else self._packer.pack(pages))
            size = len(data[0])
        step = np.uint64(self._page_size)
        packet = wire.Packet(
            flags=wire.SYNC if job.sync else self._flags,
            number=number,
            idstr=job.idstr,
            normal=job.normal.astype(np.uint64) * step,
            zero=job.zero.astype(np.uint64) * step,
            size=size,
        )
        head = wire.encode(packet, self._page_size)
        self._channel.send([head, *data])
        return len(head) + size

    def _pages(self, job: Job) -> memoryview:
        """The bytes of its normal pages. What is one piece of memory is sent from where it is, but packed from a copy: the
        machine may write to it meanwhile.
        """
        assert job.words is not None
        n = len(job.normal)
        low, high = int(job.normal[0]), int(job.normal[-1])
        in_order = high - low == n - 1
        rows = job.words[low : high + 1] if in_order else self._staging[:n]
        if not in_order:
            np.take(job.words, job.normal, axis=0, out=rows, mode="clip")
        elif self._packer is not None:
            self._staging[:n] = rows
            rows = self._staging[:n]
        return rows.reshape(-1).view(np.uint8).data
