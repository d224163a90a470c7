"""Where the bytes of a disk are: the interface, and a raw file or block device. No numpy."""

from __future__ import annotations

import abc
import ctypes
import errno
import functools
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

from whimbrel_block.codec import SECTOR

#: Memory, offset and length of direct I/O are multiples of this.
DIRECT_ALIGNMENT = mmap.PAGESIZE
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_ZEROS = bytes(1 << 20)


class Image(abc.ABC):
    """The bytes of one disk. Called from several threads at once; raises OSError for what fails.

    bulk says that a migration reads or writes: page-aligned memory and offset, each byte seldom twice.
    """

    #: For messages.
    name: str
    #: Bytes: a multiple of SECTOR.
    size: int
    read_only: bool = False
    #: Where a file can stand that marks the image as half-written; None: nowhere near.
    marker: Path | None = None

    @abc.abstractmethod
    def read_into(self, view: memoryview, offset: int, *, bulk: bool = False) -> None:
        """Fill view with the bytes from offset on."""

    @abc.abstractmethod
    def write(self, view: memoryview, offset: int, *, bulk: bool = False) -> None:
        """All of view."""

    @abc.abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make these bytes zero, without storing them where that is possible."""

    @abc.abstractmethod
    def flush(self) -> None:
        """What was written is on stable storage when this returns."""

    def next_data(self, offset: int) -> int:
        """The first byte at or behind offset that may be other than zero; `size` if none is."""
        return offset

    @abc.abstractmethod
    def close(self) -> None:
        """Idempotent."""


class RawImage(Image):
    """A raw image file, sparse or not, or a block device.

    create   bytes of the sparse file that is made where there is none
    direct   a migration reads and writes past the page cache (O_DIRECT); the app's own access stays as it is
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        create: int | None = None,
        direct: bool = False,
    ) -> None:
        """Raises OSError (FileNotFoundError without create; EINVAL where direct I/O is not possible), ValueError."""
        self.path = Path(path)
        self.name = str(path)
        self.read_only = read_only
        self._fd = self._direct = -1
        try:
            self._open(create, direct=direct)
        except BaseException:
            self.close()
            raise

    def _open(self, create: int | None, *, direct: bool) -> None:
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.read_only else os.O_RDWR)
        try:
            self._fd = os.open(self.path, flags)
        except FileNotFoundError:
            if create is None:
                raise
            _check_size(self.name, create)
            self._fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            os.ftruncate(self._fd, create)
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ValueError(f"{self.name} is neither a file nor a block device")
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        _check_size(self.name, self.size)
        if stat.S_ISREG(mode):  # /dev forgets files at the next start
            self.marker = self.path.with_name(self.path.name + ".incoming")
        if direct:
            self._direct = os.open(self.path, flags | os.O_DIRECT)

    def _fd_for(self, view: memoryview, offset: int, *, bulk: bool) -> int:
        aligned = not (len(view) % DIRECT_ALIGNMENT or offset % DIRECT_ALIGNMENT)
        return self._direct if bulk and aligned and self._direct >= 0 else self._fd

    def read_into(self, view: memoryview, offset: int, *, bulk: bool = False) -> None:
        fd = self._fd_for(view, offset, bulk=bulk)
        while len(view):
            n = os.preadv(fd, [view], offset)
            if n == 0:
                raise OSError(errno.EIO, f"the image ends at byte {offset}")
            view, offset = view[n:], offset + n

    def write(self, view: memoryview, offset: int, *, bulk: bool = False) -> None:
        fd = self._fd_for(view, offset, bulk=bulk)
        while len(view):
            n = os.pwritev(fd, [view], offset)
            view, offset = view[n:], offset + n

    def zero(self, offset: int, length: int) -> None:
        if self.next_data(offset) >= offset + length:
            return
        try:
            _fallocate()(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            while length:
                n = min(length, len(_ZEROS))
                self.write(memoryview(_ZEROS)[:n], offset)
                offset, length = offset + n, length - n

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def next_data(self, offset: int) -> int:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            # ENXIO: none up to the end, unless somebody has cut the image short. Others: the file system cannot tell.
            whole = os.lseek(self._fd, 0, os.SEEK_END) >= self.size
            return self.size if error.errno == errno.ENXIO and whole else offset

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


def _check_size(name: str, size: int) -> None:
    if size <= 0 or size % SECTOR:
        raise ValueError(f"{name}: {size} bytes are not a number of sectors of {SECTOR}")


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], None]:
    """fallocate(2), which os does not have: raises OSError."""
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if call(fd, mode, offset, length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    return fallocate
