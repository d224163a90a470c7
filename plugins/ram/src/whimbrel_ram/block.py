"""RAMBlock: a named piece of the machine's memory, and the marks that its owner sets on what he wrote.

No numpy here until a view is asked for: an app that only describes its machine does not pay for the import.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The low 10 bits of a page address carry flags on the wire, so no smaller page can be sent.
MIN_PAGE_SIZE = 1 << 10
MAX_PAGE_SIZE = 1 << 24
MAX_IDSTR = 255
HOST_PAGE = mmap.PAGESIZE


def check_idstr(idstr: str) -> bytes:
    """The name as on the wire. Raises ValueError."""
    if not idstr or not idstr.isascii() or not idstr.isprintable() or len(idstr) > MAX_IDSTR:
        raise ValueError(
            f"the idstr of a RAM block is 1 to {MAX_IDSTR} printable ASCII characters, not {idstr[:40]!r}"
        )
    return idstr.encode("ascii")


class RAMBlock:
    """`size` bytes of guest memory under the name `idstr`, equal on both sides.

    memory    None: a memfd of this process, mapped MAP_SHARED (attribute `fd`; another process can be given it).
              Otherwise the app's own: a writable C-contiguous buffer (mmap, numpy array, ctypes array, bytearray) that
              stays where it is as long as the block lives. Memory that does not begin and end on a page boundary of the
              host is accepted, but the kernel cannot track writes to it.
    page_size the target's page size in bytes (a power of two, 1 KiB to 16 MiB): the unit of what is sent.

    Kernel tracking sees writes through the mapping at `address` in this process, and system calls that write there.
    Whoever writes past it (another mapping of the same memory, another process, pwrite on the descriptor) calls
    mark_dirty() after the write. During an incoming migration the memory belongs to the migration: do not write to it.
    """

    def __init__(
        self,
        idstr: str,
        size: int | None = None,
        *,
        page_size: int = 4096,
        memory: Any = None,
    ) -> None:
        self.idstr = idstr
        self.wire_idstr = check_idstr(idstr)
        if page_size & (page_size - 1) or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size {page_size} is not a power of two from 1 KiB to 16 MiB")
        self.page_size = page_size
        #: Descriptor of the memfd, or None for the app's own memory.
        self.fd: int | None = None
        if memory is None:
            if size is None:
                raise ValueError(f"RAM block '{idstr}' needs a size")
            self._check_size(size)
            memory = self._allocate(size)
        #: What holds the bytes: our mmap or the app's object.
        self.memory = memory
        self.buffer = self._as_bytes(memory)
        self.size = self.buffer.nbytes
        if size is not None and size != self.size:
            raise ValueError(f"RAM block '{idstr}': memory of {self.size} bytes, but size={size}")
        self._check_size(self.size)
        self.pages = self.size // page_size
        first = ctypes.c_char.from_buffer(self.buffer)
        #: Where the bytes are in this process.
        self.address = ctypes.addressof(first)
        del first
        self._view: NDArray[np.uint8] | None = None
        self._marks: bytearray | None = None
        self._marks_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"RAMBlock({self.idstr!r}, {self.size})"

    def _check_size(self, size: int) -> None:
        if size <= 0 or size % self.page_size:
            raise ValueError(
                f"RAM block '{self.idstr}': a size of {size} bytes is not a multiple of its {self.page_size}-byte pages"
            )

    def _allocate(self, size: int) -> mmap.mmap:
        fd = os.memfd_create(self.idstr[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # Whoever is given the descriptor can neither cut the memory short nor grow it under us.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        return memory

    def _as_bytes(self, memory: Any) -> memoryview:
        try:
            view = memoryview(memory)
        except TypeError:
            raise TypeError(
                f"RAM block '{self.idstr}': {type(memory).__name__} is not a buffer (mmap, numpy array, ctypes array, ...)"
            ) from None
        if view.readonly:
            raise ValueError(f"RAM block '{self.idstr}': the memory is read-only")
        if not view.c_contiguous:
            raise ValueError(f"RAM block '{self.idstr}': the memory is not C-contiguous")
        return view.cast("B")

    # ---- looking at it

    @property
    def view(self) -> NDArray[np.uint8]:
        """All bytes as a numpy array over the same memory."""
        if self._view is None:
            import numpy as np

            self._view = np.frombuffer(self.buffer, np.uint8)
        return self._view

    @property
    def rows(self) -> NDArray[np.uint8]:
        """The same bytes, shaped (pages, page_size)."""
        return self.view.reshape(self.pages, self.page_size)

    @property
    def aligned(self) -> bool:
        """Begins and ends on a page boundary of the host: what kernel tracking needs."""
        return self.address % HOST_PAGE == 0 and self.size % HOST_PAGE == 0

    # ---- what its owner says of his writes

    def mark_dirty(self, offset: int, length: int) -> None:
        """These bytes were written. Call it after the write and before the machine has stopped; from any thread.

        Needed with the tracker `explicit`, and with any other for writes that it cannot see. Costs nothing while no
        migration is under way. Raises ValueError outside the block.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{offset}+{length} is not inside RAM block '{self.idstr}'")
        if self._marks is None or not length:
            return
        first, last = offset // self.page_size, (offset + length - 1) // self.page_size
        with self._marks_lock:
            if self._marks is not None:
                self._marks[first : last + 1] = b"\1" * (last + 1 - first)

    def discard(self, offset: int, length: int) -> None:
        """Fill whole pages with zero by giving them back to the host where that is possible, and mark them.

        The kernel does not report holes punched into shared memory as written: use this instead of madvise().
        """
        if offset % self.page_size or length % self.page_size:
            raise ValueError(f"discard works on whole pages of {self.page_size} bytes")
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"{offset}+{length} is not inside RAM block '{self.idstr}'")
        if self.fd is not None and offset % HOST_PAGE == 0 and length % HOST_PAGE == 0:
            self.memory.madvise(mmap.MADV_REMOVE, offset, length)
        else:
            ctypes.memset(self.address + offset, 0, length)
        self.mark_dirty(offset, length)

    def start_marks(self) -> None:
        """From now on marks are kept."""
        with self._marks_lock:
            self._marks = bytearray(self.pages)

    def take_marks(self) -> bytearray | None:
        """One byte a page, not 0 where it was marked since the last call; None if nothing was."""
        with self._marks_lock:
            marks = self._marks
            if marks is None or not marks.count(1):
                return None
            self._marks = bytearray(self.pages)
            return marks

    def stop_marks(self) -> None:
        with self._marks_lock:
            self._marks = None
