"""Target: a RAM block as pages are received into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from whimbrel_ram import xbzrle
from whimbrel_ram.zero import as_words, zero_map, zero_map_at

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Target:
    """A block that pages are received into."""

    def __init__(
        self, idstr: str, memory: memoryview, page_size: int, fresh: NDArray[np.bool_] | None = None
    ) -> None:
        self.idstr = idstr
        self.size = memory.nbytes
        self.memory = memory
        self._zero_page = bytes(page_size)
        self.rows = np.frombuffer(memory, np.uint8).reshape(-1, page_size)
        self.words = as_words(self.rows)
        #: 1 for each page that the host has never given memory for: it is zero, and looking would populate it.
        self.fresh = bytearray(len(self.rows))
        self.fresh_map = np.frombuffer(self.fresh, np.bool_)
        if fresh is not None:
            self.fresh_map[:] = fresh

    def put_zero(self, where: int, page: int, fill: int) -> None:
        """One page of equal bytes. Values other than 0 come from QEMU before 1.5 (and 7.2 takes them too)."""
        if fill:
            self.rows[page] = fill
            self.fresh[page] = 0
        elif not self.fresh[page]:
            memory = self.memory[where : where + len(self._zero_page)]
            if memory[0] or bytes(memory) != self._zero_page:
                memory[:] = self._zero_page

    def put_zeros(self, where: slice | NDArray[np.intp], fill: int) -> None:
        """Many pages of equal bytes. Zero is only written where something else is: a write takes memory of the host."""
        if fill:
            self.rows[where] = fill
            self.fresh_map[where] = False
            return
        fresh = self.fresh_map[where]
        pages = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        if fresh.any():
            where = pages = pages[~fresh]
        for i in range(0, len(pages), 256):
            if isinstance(where, slice):
                part: slice | NDArray[np.intp] = slice(
                    where.start + i, min(where.start + i + 256, where.stop)
                )
                used = ~zero_map(self.words[part])
                if used.all():
                    self.words[part] = 0
                    continue
                some = pages[i : i + 256]
            else:
                some = where[i : i + 256]
                used = ~zero_map_at(self.words, some)
            if used.any():
                self.words[some[used]] = 0

    def patch(
        self,
        data: NDArray[np.uint8],
        start: NDArray[np.int64],
        length: NDArray[np.int64],
        where: NDArray[np.int64],
    ) -> None:
        """Apply deltas to the pages at those offsets: see xbzrle.patch(). Raises BadDelta."""
        page_size = len(self._zero_page)
        xbzrle.patch(data, start, length, where, page_size, self.rows.reshape(-1))
        self.fresh_map[where // page_size] = False
