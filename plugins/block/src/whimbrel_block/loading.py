"""A disk while it is received: checked before the first write, marked until it is whole, synced as it grows."""

from __future__ import annotations

import threading

from whimbrel.errors import LocalError, StreamError
from whimbrel_block.codec import CHUNK
from whimbrel_block.device import BlockDevice

#: Bytes written before they are synced in the background, so that the sync at the end is short.
SYNC_EVERY = 64 << 20


def write_error(device: BlockDevice, offset: int, error: OSError) -> LocalError:
    return LocalError(
        f"disk '{device.name}' ({device.image.name}) cannot be written at byte {offset}: {error.strerror or error}",
        section="block",
        hint="Make room, or see to the disk; then receive the migration again",
    )


class Target:
    """One disk of the destination."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        #: It was half-written before this migration began.
        self._was_half = device.half_written
        self._received = bytearray(device.chunks)
        #: The source's size of it, as far as that is known.
        self._needed = 0
        self.begun = False

    def check(self, offset: int, at: int) -> None:
        """The source has a byte there: does the device? at: byte offset in the stream."""
        if offset >= self.device.size:
            raise StreamError(
                f"disk '{self.device.name}' is too small here",
                section="block",
                offset=at,
                expected=f"at least {offset + 512} bytes",
                found=self.device.size,
                hint=f"Enlarge {self.device.image.name}, or give the destination a disk of the source's size",
            )
        self._needed = max(self._needed, offset + 512)

    def begin(self) -> None:
        if not self.begun:
            self.device.begin_load()
            self.begun = True

    def put(self, offset: int, data: memoryview | None) -> int:
        """Write a chunk from offset on, as far as the device goes; None is zeros. Returns the bytes written."""
        self.begin()
        device = self.device
        length = min(CHUNK, device.size - offset)
        try:
            if data is None:
                device.image.zero(offset, length)
            else:
                device.image.write(data[:length], offset, bulk=True)
        except OSError as error:
            raise write_error(device, offset, error) from error
        if not offset % CHUNK:
            self._received[offset // CHUNK] = 1
        return length

    def activate(self) -> None:
        """The app's from now on."""
        try:
            self.device.activate_load()
        except OSError as error:
            raise LocalError(
                f"the mark of a half-written disk cannot be removed: {error}", section="block"
            ) from error

    def check_whole(self) -> None:
        """A half-written disk is mended by a full copy only."""
        missing = self._received.find(0)
        if self.begun and self._was_half and missing >= 0 and missing * CHUNK < self._needed:
            raise StreamError(
                f"disk '{self.device.name}' was half-written by an earlier migration, and this one does not send all of it",
                section="block",
                expected="every megabyte of the disk",
                found=f"none for byte {missing * CHUNK}",
                hint=f"Restore {self.device.image.name} from its base and remove {self.device.marker}, or copy in full",
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
        except OSError as error:
            self._error = LocalError(
                f"disk '{device.name}' ({device.image.name}) cannot be brought to stable storage:"
                f" {error.strerror or error}",
                section="block",
                hint="See to the disk; then receive the migration again",
            )
