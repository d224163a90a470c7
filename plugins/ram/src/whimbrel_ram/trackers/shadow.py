"""The tracker `shadow`: compare with a copy of what was last sent.

What is sent is the copy, not the memory: a page that changes and changes back between comparing and sending would
otherwise be sent in its middle state and look unchanged ever after.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from whimbrel_ram.block import RAMBlock
from whimbrel_ram.memory import untouched
from whimbrel_ram.trackers import DirtyTracker
from whimbrel_ram.zero import as_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes compared at a time: both pieces and the result fit the L2 cache.
_STEP = 128 << 10


def probe(blocks: Sequence[RAMBlock]) -> str | None:
    need = sum(b.size for b in blocks)
    have = _available()
    if have is not None and need > have:
        return f"the copy needs {need >> 20} MiB, and {have >> 20} MiB are available"
    return None


def _available() -> int | None:
    try:
        with open("/proc/meminfo", "rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


class ShadowTracker(DirtyTracker):
    """Takes no memory for the copy of pages that were never touched."""

    def __init__(self) -> None:
        self._copies: dict[str, NDArray[np.uint8]] = {}
        self._used: dict[str, NDArray[np.bool_]] = {}

    def start(self, blocks: Sequence[RAMBlock]) -> None:
        for block in blocks:
            memory = mmap.mmap(-1, block.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            copy = np.frombuffer(memory, np.uint8).reshape(block.pages, block.page_size)
            fresh = untouched(block)
            used = np.ones(block.pages, np.bool_) if fresh is None else ~fresh
            step = max(1, (1 << 20) // block.page_size)
            for i in range(0, block.pages, step):
                some = used[i : i + step]
                if some.all():
                    copy[i : i + step] = block.rows[i : i + step]
                elif some.any():
                    pages = np.flatnonzero(some) + i
                    copy[pages] = block.rows[pages]
            self._copies[block.idstr], self._used[block.idstr] = copy, used

    def sync(self, block: RAMBlock) -> NDArray[np.bool_] | None:
        copy, memory = as_words(self._copies[block.idstr]), as_words(block.rows)
        before = self._used[block.idstr]
        fresh = untouched(block)
        now = np.ones(block.pages, np.bool_) if fresh is None else ~fresh
        look = before | now
        dirty = np.zeros(block.pages, np.bool_)
        step = max(1, _STEP // block.page_size)
        differ = np.empty((step, copy.shape[1]), np.bool_)
        for i in range(0, block.pages, step):
            some = look[i : i + step]
            if not some.any():
                continue
            n = len(some)
            if some.all():
                np.not_equal(memory[i : i + n], copy[i : i + n], out=differ[:n])
                changed = np.flatnonzero(differ[:n].any(axis=1)) + i
            else:
                pages = np.flatnonzero(some) + i
                changed = pages[(memory[pages] != copy[pages]).any(axis=1)]
            if len(changed):
                copy[changed] = memory[changed]
                dirty[changed] = True
        self._used[block.idstr] = look
        return dirty

    def source(self, block: RAMBlock) -> NDArray[np.uint8]:
        return self._copies[block.idstr]

    def untouched(self, block: RAMBlock) -> NDArray[np.bool_] | None:
        used = self._used[block.idstr]
        return None if used.all() else ~used

    def stop(self) -> None:
        self._copies.clear()
        self._used.clear()
