"""A disk while it is received: checked before the first write, marked until it is whole, synced as it grows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from whimbrel.errors import LocalError, StreamError
from whimbrel_block.codec import CHUNK, SECTOR
from whimbrel_block.device import BlockDevice

#: Bytes written before they are synced in the background, so that the sync at the end is short.
SYNC_EVERY = 64 << 20


class Target:
    """One disk of the destination."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self._was_half = device.half_written
        self._received = bytearray(device.chunks)
        #: The source's size of it, where that is known: a whimbrel tells it.
        self._size: int | None = None
        self.begun = False

    def announce(self, offset: int, at: int) -> None:
        """The source's disk ends behind the sector at offset. at: byte offset in the stream."""
        self._fits(offset + SECTOR, at)
        self._size = offset + SECTOR

    def check(self, offset: int, at: int) -> None:
        """A chunk comes. From an odd place, it is the last megabyte of the source's disk; else it may be padded."""
        if offset % CHUNK:
            self._fits(offset + CHUNK, at)
            self._size = offset + CHUNK
        else:
            self._fits(offset + SECTOR, at)

    def _fits(self, needed: int, at: int) -> None:
        if needed > self.device.size:
            raise StreamError(
                f"disk '{self.device.name}' is too small here",
                section="block",
                offset=at,
                expected=f"at least {needed} bytes",
                found=self.device.size,
                hint=f"Enlarge {self.device.image.name}, or give the destination a disk of the source's size",
            )

    def begin(self) -> None:
        if not self.begun:
            self.device.begin_load()
            self.begun = True

    def put(self, offset: int, data: memoryview) -> int:
        """Write a chunk from offset on, as far as the device goes. Returns the bytes written. Raises LocalError."""
        data = data[: self.device.size - offset]
        with self._writing(offset):
            self.device.image.write(data, offset, bulk=True)
        self._note(offset, len(data))
        return len(data)

    def zero(self, offset: int, length: int) -> None:
        """Make that much zero, as far as the device goes. Raises LocalError."""
        length = min(length, self.device.size - offset)
        with self._writing(offset):
            self.device.image.zero(offset, length)
        self._note(offset, length)

    @contextlib.contextmanager
    def _writing(self, offset: int) -> Iterator[None]:
        self.begin()
        try:
            yield
        except OSError as error:
            device = self.device
            raise LocalError(
                f"disk '{device.name}' ({device.image.name}) cannot be written at byte {offset}:"
                f" {error.strerror or error}",
                section="block",
                hint="Make room, or see to the disk; then receive the migration again",
            ) from error

    def _note(self, offset: int, length: int) -> None:
        """These bytes have come."""
        end = offset + length
        first = -(-offset // CHUNK)
        last = self.device.chunks if end == self.device.size else end // CHUNK
        if first < last:
            self._received[first:last] = bytes((1,)) * (last - first)

    def activate(self) -> None:
        """The app's from now on."""
        try:
            self.device.activate_load()
        except OSError as error:
            raise LocalError(
                f"the mark of a half-written disk cannot be removed: {error}", section="block"
            ) from error

    def check_whole(self) -> None:
        """All of the disk has come, unless it has a base: then only what differs from it need come. A base is of no use
        behind a migration that was broken off.

        QEMU 7.2 ends its first copy early, and says nothing, where the link is faster than it had thought.
        """
        if self.device.base is not None and not self._was_half:
            return
        size = self.device.size if self._size is None else self._size
        missing = self._received.find(0) * CHUNK
        if not 0 <= missing < size:
            return
        name, device = self.device.image.name, self.device
        raise StreamError(
            f"the source sent only a part of disk '{device.name}'",
            section="block",
            expected=f"all of its {size} bytes",
            found=f"nothing for byte {missing}",
            hint=(
                f"It was half-written before: restore {name} from its base and remove {device.marker}, or copy in full"
                if device.base is not None
                else "If it was to send what differs from a base, name that: BlockDevice(..., base=PATH). The disk must be as"
                " large as the source's; and QEMU 7.2 may end its copy too early unless downtime-limit is 1"
            ),
        )


class Syncer:
    """Syncs what was written, a part at a time, on a thread of its own that is started when there is enough."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: BlockDevice | None = None
        self._unsynced = 0
        self._error: LocalError | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def wrote(self, device: BlockDevice, n: int) -> None:
        """Raises the error of a sync that failed: the kernel tells it only once."""
        if self._error is not None:
            raise self._error
        self._unsynced += n
        if self._unsynced < SYNC_EVERY:
            return
        with self._changed:
            # One that is still at it holds the source back: no more than twice as much waits for the disk.
            self._changed.wait_for(lambda: self._due is None)
            self._due, self._unsynced = device, 0
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="whimbrel-disk-syncer", daemon=True
            )
            self._thread.start()

    def finish(self, devices: list[BlockDevice]) -> None:
        """All of it is on stable storage when this returns. Raises LocalError."""
        with self._changed:
            self._changed.wait_for(lambda: self._due is None)
        for device in devices:
            self._sync(device)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due is not None or self._closed)
                device = self._due
            if device is None:
                return
            self._sync(device)
            with self._changed:
                self._due = None
                self._changed.notify_all()

    def _sync(self, device: BlockDevice) -> None:
        try:
            device.image.flush()
        except (
            Exception
        ) as error:  # whatever an Image raises: the source is not to hear that all is well
            self._error = LocalError(
                f"disk '{device.name}' ({device.image.name}) cannot be brought to stable storage:"
                f" {getattr(error, 'strerror', None) or error}",
                section="block",
                hint="See to the disk; then receive the migration again",
            )
