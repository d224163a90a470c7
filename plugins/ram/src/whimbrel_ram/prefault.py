"""Memory of the host behind every page of a destination's RAM, taken while nobody has connected yet.

The first touch of a page costs more than what is then written to it. madvise(MADV_POPULATE_WRITE), Linux 5.14, takes many
pages at once and leaves what is in them.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Iterable

from whimbrel_ram.block import HOST_PAGE, RAMBlock

log = logging.getLogger("whimbrel.ram")

MADV_POPULATE_WRITE = 23
#: Bytes a call: a stop waits for one of them, and the memory map of the process is held for as long.
STEP = 4 << 20


class Prefault:
    """Of these blocks, one after the other, by a thread of its own. A failure is logged: then pages are taken when they
    are written.
    """

    def __init__(self, blocks: Iterable[RAMBlock]) -> None:
        self._blocks = list(blocks)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="whimbrel-prefault", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No further step. Returns at once."""
        self._stopping.set()

    def close(self) -> None:
        """stop(), and wait for the step that is being done."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        # mmap.madvise() would hold the interpreter lock, and there is memory that is no mmap.
        libc = ctypes.CDLL(None, use_errno=True)
        for block in self._blocks:
            low = -(-block.address // HOST_PAGE) * HOST_PAGE
            high = (block.address + block.size) // HOST_PAGE * HOST_PAGE
            for start in range(low, high, STEP):
                if self._stopping.is_set():
                    return
                size = min(STEP, high - start)
                while libc.madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_POPULATE_WRITE
                ):
                    number = ctypes.get_errno()
                    if number in (errno.EINTR, errno.EAGAIN):
                        continue
                    log.warning(
                        "RAM block '%s' is not prefaulted: %s", block.idstr, os.strerror(number)
                    )
                    return
        log.info("the RAM is prefaulted")
