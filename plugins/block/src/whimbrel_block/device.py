"""BlockDevice: a disk of the machine, through which its app reads and writes. No numpy."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from whimbrel.errors import LocalError, StateError
from whimbrel_block.chunks import Chunks
from whimbrel_block.codec import CHUNK, encode_device
from whimbrel_block.image import Image, RawImage


class BlockDevice:
    """A disk of the machine under the name `name`, which is equal on both sides (in QEMU: the id of the drive).

    image      a path (a raw image or a block device), or an Image
    base       path of a raw image that both sides have: an incremental migration sends what differs from it
    read_only  it is never written here, and does not move: both sides have it
    create     bytes of the sparse file that is made where there is none
    direct     a migration reads and writes past the page cache (O_DIRECT)
    marker     path of the file that says that a migration to here did not come to its end; by default the image's own
               path with `.incoming` behind it. A block device that receives must have one named.

    The app reads and writes through pread, pwrite, discard and flush, from any thread. Whoever writes past them calls
    mark_dirty() after the write and before the machine has stopped. While a migration comes in, and after one that did
    not come to its end, all four raise StateError: the disk belongs to the migration, or is half-written.
    """

    def __init__(
        self,
        name: str,
        image: str | os.PathLike[str] | Image,
        *,
        base: str | os.PathLike[str] | None = None,
        read_only: bool = False,
        create: int | None = None,
        direct: bool = False,
        marker: str | os.PathLike[str] | None = None,
    ) -> None:
        self.wire_name = encode_device(name)
        self.name = name
        if not isinstance(image, Image):
            image = RawImage(image, read_only=read_only, create=create, direct=direct)
        self.image = image
        self.size = image.size
        self.chunks = -(-image.size // CHUNK)
        self.base = None if base is None else Path(base)
        self.marker = image.marker if marker is None else Path(marker)
        self._tracked: Chunks | None = None
        self._lock = threading.Lock()
        self._unflushed = False
        self._refusal: str | None = None
        if self.half_written:
            self._refusal = self._half_written()

    def __repr__(self) -> str:
        return f"BlockDevice({self.name!r}, {self.image.name!r}, {self.size})"

    @property
    def read_only(self) -> bool:
        return self.image.read_only

    # ---- the app's access

    def pread(self, length: int, offset: int) -> bytes:
        """Bytes of the disk. Raises OSError, ValueError outside the disk, StateError while it is not the app's."""
        self._check(offset, length)
        data = bytearray(length)
        self.image.read_into(memoryview(data), offset)
        return bytes(data)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """Write, and return how much. Raises as pread; an OSError is the app's own affair, not the migration's."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view))
        self._unflushed = True
        try:
            self.image.write(view, offset)
        finally:
            self.mark_dirty(
                offset, len(view)
            )  # behind the write, and also where it failed half-way
        return len(view)

    def discard(self, offset: int, length: int) -> None:
        """Make it zero and give the room back where that is possible."""
        self._check(offset, length)
        self._unflushed = True
        try:
            self.image.zero(offset, length)
        finally:
            self.mark_dirty(offset, length)

    def flush(self) -> None:
        """What was written is on stable storage when this returns. Raises OSError."""
        self._check(0, 0)
        self._unflushed = False
        try:
            self.image.flush()
        except OSError:
            self._unflushed = True
            raise

    def mark_dirty(self, offset: int, length: int) -> None:
        """These bytes were written. Costs nothing while no migration is under way. Raises ValueError outside the disk."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{offset}+{length} is not inside disk '{self.name}'")
        tracked = self._tracked
        if tracked is not None and length:
            tracked.mark(offset // CHUNK, (offset + length - 1) // CHUNK)

    def close(self) -> None:
        self.image.close()

    def _check(self, offset: int, length: int) -> None:
        if self._refusal is not None:
            raise StateError(self._refusal)
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{offset}+{length} is not inside disk '{self.name}'")

    # ---- half-written

    @property
    def half_written(self) -> bool:
        """A migration to here began to write and did not come to its end."""
        return self.marker is not None and self.marker.exists()

    def forget_half_written(self) -> None:
        """Use the disk as it is: for whoever has restored it, or knows that it is whole. Raises OSError."""
        self._remove_marker()
        self._refusal = None

    def _half_written(self) -> str:
        return (
            f"disk '{self.name}' ({self.image.name}) is half-written by a migration that did not come to its end."
            f" Receive it again, or restore the image and remove {self.marker}"
        )

    def _remove_marker(self) -> None:
        if self.marker is not None:
            self.marker.unlink(missing_ok=True)

    # ---- for the handler: source

    def start_tracking(self) -> Chunks:
        """From now on writes are marked there."""
        with self._lock:
            if self._tracked is not None:
                raise StateError(f"disk '{self.name}' migrates already")
            self._tracked = Chunks(self.chunks)
            return self._tracked

    def stop_tracking(self) -> None:
        with self._lock:
            self._tracked = None

    @property
    def unflushed(self) -> bool:
        """Something was written since the last flush."""
        return self._unflushed

    # ---- for the handler: destination

    def begin_load(self) -> None:
        """Before the first byte is written: the app is kept out, and the image is marked on stable storage.

        Raises LocalError where that is not possible; nothing has been written then.
        """
        if self.read_only:
            raise LocalError(
                f"disk '{self.name}' is read-only here",
                hint="Open it for writing on the destination",
            )
        if self.marker is None:
            raise LocalError(
                f"disk '{self.name}' ({self.image.name}) has no place for the mark of a half-written disk",
                hint="Name a file that outlives a restart: BlockDevice(..., marker=PATH)",
            )
        before = self._refusal
        self._refusal = f"a migration to disk '{self.name}' is under way. Wait for its end"
        try:
            self._put_marker()
        except OSError as error:
            self._refusal = before
            raise LocalError(
                f"disk '{self.name}' cannot be marked as half-written: {error}",
                hint=f"Make {self.marker.parent} writable, or name another place: BlockDevice(..., marker=PATH)",
            ) from error

    def _put_marker(self) -> None:
        assert self.marker is not None
        fd = os.open(self.marker, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(f"{self._half_written()}.\n")
            file.flush()
            os.fsync(fd)
        self._sync_folder()

    def _sync_folder(self) -> None:
        assert self.marker is not None
        folder = os.open(self.marker.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def activate_load(self) -> None:
        """The disk is whole, and the machine is here: it is the app's from now on. Raises OSError."""
        self._remove_marker()
        self._refusal = None

    def end_load(self, *, whole: bool) -> None:
        """After it: the mark's absence is made durable, or the mark is made to stay."""
        if whole:
            self.activate_load()
            with contextlib.suppress(
                OSError
            ):  # the mark may come back after a power cut: refused, never wrong
                self._sync_folder()
            return
        self._refusal = self._half_written()
        if not self.half_written:
            self._put_marker()
