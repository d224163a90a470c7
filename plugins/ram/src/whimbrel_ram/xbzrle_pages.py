"""XbzrlePages: records in the stream, and from the second round on, deltas of pages that were sent before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from whimbrel.errors import LocalError
from whimbrel_ram import xbzrle
from whimbrel_ram.transport import Phase, SaveBlock, Sent, StreamPages, zero_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.savevm import Budget
    from whimbrel.stream import OutStream


_BATCH_BYTES = 512 << 10
#: When the pages of the first round were sent, for the cache: so long ago that any other page may have their place.
_FIRST = -1


class XbzrlePages(StreamPages):
    """The capability xbzrle of a source.

    Every page that is sent is kept in the cache, if it has room, and one that is there already is sent as what changed, or
    not at all where nothing did. What is sent is always a copy, and the same copy is what the cache holds: the machine may
    write the page meanwhile. Of the first round, which sends all there is, only what is not zero is kept, and it gives way
    to any page that is written later. In the last round the cache stays as it is.
    """

    def __init__(self, page_size: int, cache_size: Callable[[], int]) -> None:
        """cache_size: bytes, a power of two; asked again and again, since it may change."""
        super().__init__(page_size)
        self._page_size = page_size
        self._wanted = cache_size
        self._cache: xbzrle.Cache | None = None
        self._stats = xbzrle.Stats()
        self._base: dict[int, int] = {}  # block → the number of its first page
        # What is sent of pages, and what was sent of them before: a batch each, which stays in the processor's cache.
        self._batch = max(1, _BATCH_BYTES // page_size)
        self._now, self._before = np.empty((2, self._batch, page_size // 8), np.uint64)
        self._most = 0  # bytes of a cache that has a slot for every page
        self._round = 0  # how often all blocks have been gone through
        self._last = False

    def begin(self, blocks: Sequence[SaveBlock], out: OutStream) -> None:
        super().begin(blocks, out)
        if self._page_size > xbzrle.MAX_PAGE:
            raise LocalError(
                f"xbzrle cannot tell the runs of pages of {self._page_size} bytes",
                section="ram",
                expected=f"pages of at most {xbzrle.MAX_PAGE} bytes",
                hint="Switch xbzrle off",
            )
        first = 0
        for block in blocks:
            self._base[block.index] = first
            first += block.block.pages
        self._most = self._page_size << (first - 1).bit_length()
        self._fit_cache()

    def round_begin(self, out: OutStream, phase: Phase) -> None:
        self._last = phase is Phase.COMPLETE

    def sync(self, out: OutStream) -> None:
        self._round += 1
        self._stats.round_ended(self._page_size)

    def query(self) -> dict[str, Any]:
        cache = self._cache
        if cache is None:
            return {}
        size = cache.size if cache.size < self._most else self._wanted()
        return {"xbzrle-cache": self._stats.query(size)}

    def send(
        self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream, budget: Budget
    ) -> Sent:
        cache = self._fit_cache()
        start = out.position
        done = zero = deltas = 0
        while done < len(pages) and not (done and budget.spent(out.position - start)):
            some = pages[done : done + self._batch]
            some = some[some < some[0] + cache.slots]  # no two in one slot
            is_zero = zero_pages(block, some)
            if is_zero.any():
                self._send_zeros(block, some[is_zero], out, cache)
            deltas += self._send_others(block, some[~is_zero], out, cache)
            done += len(some)
            zero += int(np.count_nonzero(is_zero))
        return Sent(done, zero, deltas)

    def _fit_cache(self) -> xbzrle.Cache:
        size = min(max(self._wanted(), self._page_size), self._most)
        if self._cache is None:
            self._cache = xbzrle.Cache(size, self._page_size)
        elif self._cache.size != size:
            self._cache = self._cache.resized(size)
        return self._cache

    def _send_zeros(
        self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream, cache: xbzrle.Cache
    ) -> None:
        for buffer in self._encoder.zeros(block.block.wire_idstr, pages):
            out.write(buffer)
        # Or the next delta would be taken against what the destination no longer has.
        if self._round and not self._last:
            cache.put(self._base[block.index] + pages, 0, self._round)

    def _send_others(
        self, block: SaveBlock, pages: NDArray[np.intp], out: OutStream, cache: xbzrle.Cache
    ) -> int:
        """Pages that are not zero; how many of them went as deltas, or not at all."""
        if not len(pages):
            return 0
        encoder, idstr = self._encoder, block.block.wire_idstr
        number = self._base[block.index] + pages
        rows = xbzrle.rows_of(block.words, pages, self._now)
        hit = cache.holds(number)
        plain = ~hit
        overflow = deltas = size = 0
        if hit.any():
            before = cache.get(number[hit], self._before)
            data, length = xbzrle.encode(before, rows if hit.all() else rows[hit])
            too_long = length == self._page_size
            plain[hit] = too_long
            overflow = int(np.count_nonzero(too_long))
            changed = (length > 0) & ~too_long
            deltas = int(np.count_nonzero(changed))
            if deltas:
                size = len(data) + xbzrle.HEAD * deltas
                out.write_all(encoder.deltas(idstr, pages[hit][changed], data, length[changed]))
        if plain.any():
            out.write_all(encoder.copies(idstr, rows[plain], pages[plain]))
        if not self._last:
            cache.put(number, rows, self._round or _FIRST)
        if not self._round:
            return 0
        self._stats.count(
            seen=len(pages),
            miss=int(np.count_nonzero(~hit)),
            deltas=deltas,
            size=size,
            overflow=overflow,
        )
        return len(pages) - int(np.count_nonzero(plain))
