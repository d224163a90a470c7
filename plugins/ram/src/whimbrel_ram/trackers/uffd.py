"""The tracker `uffd-wp`: asynchronous write-protection by userfaultfd, collected by PAGEMAP_SCAN.

The kernel resolves the fault of the first write to a protected page by itself and notes it: no handler thread, about one
microsecond for the writer. Needs Linux 6.7 and no privilege. It watches the mapping at the block's address in this
process: writes through another mapping of the same memory, by another process, by pwrite() to its descriptor, and holes
punched into it are not seen, and must be told by RAMBlock.mark_dirty() (or discard()).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from whimbrel_ram import kernelapi
from whimbrel_ram.block import HOST_PAGE, RAMBlock
from whimbrel_ram.memory import is_private_anonymous, per_page, untouched
from whimbrel_ram.trackers import DirtyTracker

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger("whimbrel.ram")


def probe(blocks: Sequence[RAMBlock]) -> str | None:
    """What is missing. Registers a bit of each block for a moment: only the kernel knows which memory it can track."""
    for block in blocks:
        if not block.aligned:
            return (
                f"RAM block '{block.idstr}' does not begin and end on a page boundary of {HOST_PAGE} bytes"
                f" (address {block.address:#x}, {block.size} bytes): allocate it with mmap, or let the framework allocate it"
            )
    try:
        fd = kernelapi.open_uffd(kernelapi.WP_FEATURES)
    except OSError as error:
        return why_not(error)
    try:
        return probe_scan(fd) or _probe_blocks(fd, blocks)
    finally:
        os.close(fd)


def why_not(error: OSError) -> str:
    """What an error of open_uffd() means."""
    if error.errno == errno.EINVAL:
        return "userfaultfd has no asynchronous write-protection here: that came with Linux 6.7"
    if error.errno == errno.ENOSYS:
        return "there is no userfaultfd here (Linux with CONFIG_USERFAULTFD)"
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"userfaultfd is not allowed here ({error.strerror}): a container's seccomp profile must permit it"
    return f"userfaultfd: {error.strerror}"


def probe_scan(uffd: int) -> str | None:
    """What is missing of PAGEMAP_SCAN, tried on a page of its own."""
    with mmap.mmap(-1, HOST_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        block = RAMBlock("probe", HOST_PAGE, memory=page, page_size=HOST_PAGE)
        try:
            kernelapi.register_wp(uffd, block.address, block.size)
            scan = kernelapi.PagemapScan()
            try:
                scan.protect_absent(block.address, block.size)
                block.buffer[0] = 1
                if not scan.take_written(block.address, block.size).all():
                    return "PAGEMAP_SCAN does not report a write"
            finally:
                scan.close()
        except OSError as error:
            return f"PAGEMAP_SCAN on /proc/self/pagemap: {error.strerror} (it came with Linux 6.7)"
        finally:
            block.buffer.release()
    return None


def _probe_blocks(uffd: int, blocks: Sequence[RAMBlock]) -> str | None:
    for block in blocks:
        try:
            for offset in (0, block.size - HOST_PAGE):
                kernelapi.register_wp(uffd, block.address + offset, HOST_PAGE)
                kernelapi.unregister(uffd, block.address + offset, HOST_PAGE)
        except OSError as error:
            why = {
                errno.EBUSY: "another userfaultfd watches it",
                errno.EINVAL: "this kernel does not track memory of that kind",
                errno.EPERM: "it is mapped without the right to write",
            }.get(error.errno or 0, error.strerror or "")
            return f"the memory of RAM block '{block.idstr}' cannot be tracked: {why}"
    return None


class UffdTracker(DirtyTracker):
    """One userfaultfd for all blocks. Only one consumer can collect: whoever scans clears what he saw."""

    def __init__(self) -> None:
        self._uffd = -1
        self._scan: kernelapi.PagemapScan | None = None
        self._untouched: dict[str, NDArray[np.bool_] | None] = {}

    def start(self, blocks: Sequence[RAMBlock]) -> None:
        self._uffd = kernelapi.open_uffd(kernelapi.WP_FEATURES)
        self._scan = kernelapi.PagemapScan()
        for block in blocks:
            kernelapi.register_wp(self._uffd, block.address, block.size)
            if is_private_anonymous(block):
                # Look and protect in one step, page by page: between two, a first write would go unseen. Protecting
                # what has memory afterwards tells which of the others were written meanwhile.
                absent = self._scan.protect_absent(block.address, block.size)
                written = self._scan.take_written(block.address, block.size)
                self._untouched[block.idstr] = per_page(block, absent & ~written, every=True)
            else:
                self._scan.protect(block.address, block.size)
                self._untouched[block.idstr] = untouched(block)

    def sync(self, block: RAMBlock) -> NDArray[np.bool_] | None:
        import numpy as np

        assert self._scan is not None
        try:
            written = self._scan.take_written(block.address, block.size)
        except OSError as error:
            # Somebody closed the userfaultfd, or mapped something else over the memory. What was written is not known.
            log.warning(
                "tracking of RAM block '%s' was lost (%s): all of it is sent again",
                block.idstr,
                error,
            )
            return np.ones(block.pages, np.bool_)
        return per_page(block, written, every=False)

    def untouched(self, block: RAMBlock) -> NDArray[np.bool_] | None:
        return self._untouched[block.idstr]

    def stop(self) -> None:
        if self._scan is not None:
            self._scan.close()
            self._scan = None
        if self._uffd >= 0:
            os.close(self._uffd)  # which ends all registrations
            self._uffd = -1
        self._untouched.clear()
