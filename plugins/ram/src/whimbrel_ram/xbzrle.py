"""XBZRLE: a page as what changed in it since it was last sent. Sans-I/O; nothing in Python per byte or run.

Deltas are made and applied by numpy, or in C where the package whimbrel-accel is installed; the bytes are the same.

Format (QEMU, since 1.2), behind the first word and the idstr of a record:
    u8 1, u16 n, n bytes:  (unchanged run, changed run)*
    unchanged run          uleb128 length; 0 at the start of the page only
    changed run            uleb128 length, not 0; then its new bytes
A trailing unchanged run is left out. A uleb128 has one byte, or two: 14 bits. A delta is right only where the destination
has exactly the bytes that it was taken against: those of the last record of that page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from whimbrel_ram import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The only encoding there is.
ENCODING = 1
#: Bytes of a record between its first word (with the idstr) and the delta.
HEAD = 3
#: Two bytes of uleb128 hold no longer run.
MAX_PAGE = 1 << 14
_NO_PAGE = -1


def encode(
    old: NDArray[np.uint64], new: NDArray[np.uint64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Deltas of pages, given as rows of words: all of them one behind the other, and the length of each in bytes.

    A length of 0 says that nothing changed. One of a whole page says that the delta would be no shorter: it is left out.
    """
    if native.deltas is None:
        return _encode(old, new)
    pages, words = old.shape
    out, length = np.empty(old.nbytes, np.uint8), np.empty(pages, np.int64)
    before, now = np.ascontiguousarray(old), np.ascontiguousarray(new)
    used = native.deltas.encode(before, now, 8 * words, out, length)
    return out[:used], length


def _encode(
    old: NDArray[np.uint64], new: NDArray[np.uint64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    pages, words = old.shape
    page_size = 8 * words
    changed = (old ^ new).reshape(-1)
    word = np.flatnonzero(changed)
    if not len(word):
        return np.empty(0, np.uint8), np.zeros(pages, np.int64)
    byte = np.flatnonzero(changed[word].view(np.uint8))
    position = (word[byte >> 3] << 3) + (byte & 7)  # of each changed byte
    begins = np.empty(len(position), np.bool_)
    begins[0] = True
    np.not_equal(position[1:], position[:-1] + 1, out=begins[1:])
    begins |= position % page_size == 0  # no run goes on into the next page
    first = np.flatnonzero(begins)
    start = position[first]
    length = np.diff(first, append=len(position))
    page = start // page_size
    before = page * page_size  # where the unchanged run in front begins
    same_page = page[1:] == page[:-1]
    before[1:][same_page] = (start[:-1] + length[:-1])[same_page]
    gap = start - before

    gap_width, length_width = 1 + (gap > 127), 1 + (length > 127)
    size = gap_width + length_width + length
    offset = np.cumsum(size) - size
    out = np.empty(int(offset[-1] + size[-1]), np.uint8)
    literal = np.ones(len(out), np.bool_)
    _put_uleb(out, literal, offset, gap)
    _put_uleb(out, literal, offset + gap_width, length)
    out[literal] = new.reshape(-1).view(np.uint8)[position]
    delta = np.bincount(page, size, pages).astype(np.int64)
    shorter = delta < page_size
    if not shorter.all():
        out = out[np.repeat(shorter, delta)]
    return out, np.minimum(delta, page_size)


def _put_uleb(
    out: NDArray[np.uint8],
    literal: NDArray[np.bool_],
    offset: NDArray[np.intp],
    value: NDArray[np.intp],
) -> None:
    long = value > 127
    out[offset] = np.where(long, value & 127 | 128, value)
    literal[offset] = False
    out[offset[long] + 1] = value[long] >> 7
    literal[offset[long] + 1] = False


class BadDelta(ValueError):
    """What is wrong, in delta number `index`."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(what)
        self.index = index


def patch(  # noqa: PLR0917 - what a delta is, and where it goes
    data: NDArray[np.uint8],
    start: NDArray[np.int64],
    length: NDArray[np.int64],
    where: NDArray[np.int64],
    page_size: int,
    memory: NDArray[np.uint8],
) -> None:
    """Apply deltas: number i is length[i] bytes of data from start[i] on, for the page at byte where[i] of memory.

    Raises BadDelta, before anything has been written.
    """
    if native.deltas is None:
        _patch(data, start, length, where, page_size, memory)
        return
    wrong = native.deltas.patch(data, start, length, where, page_size, memory)
    if wrong is not None:
        index, reason = wrong
        raise BadDelta(index, native.deltas.REASONS[reason])


def _patch(  # noqa: PLR0917 - as patch()
    data: NDArray[np.uint8],
    start: NDArray[np.int64],
    length: NDArray[np.int64],
    where: NDArray[np.int64],
    page_size: int,
    memory: NDArray[np.uint8],
) -> None:
    """Step k looks at run k of every delta; then all runs are copied."""
    padded = np.append(
        data, np.zeros(4, np.uint8)
    )  # a look behind the end of the last is a look at 0
    at, end = start.copy(), start + length
    done = np.zeros(len(start), np.intp)  # bytes of the page
    source, target, count = [], [], []
    live = np.flatnonzero(length > 0)
    first = True
    while len(live):
        gap, cursor = _uleb(padded, at[live])
        if not first:
            _check(live, gap == 0, "an unchanged run of 0 bytes inside a page")
        _check(live, cursor >= end[live], "it ends with an unchanged run")
        run, cursor = _uleb(padded, cursor)
        _check(live, run == 0, "a changed run of 0 bytes")
        _check(live, cursor + run > end[live], "a run goes on behind the end of the delta")
        begin = done[live] + gap
        _check(live, begin + run > page_size, "a run goes on behind the end of the page")
        source.append(cursor)
        target.append(where[live] + begin)
        count.append(run)
        done[live] = begin + run
        at[live] = cursor = cursor + run
        live = live[cursor < end[live]]
        first = False
    if not count:
        return
    runs = np.concatenate(count)
    within = np.arange(int(runs.sum())) - np.repeat(np.cumsum(runs) - runs, runs)
    memory[np.repeat(np.concatenate(target), runs) + within] = data[
        np.repeat(np.concatenate(source), runs) + within
    ]


def _uleb(
    data: NDArray[np.uint8], at: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The value at each position, and the position behind it. A second byte that says that a third follows makes a value
    larger than any page that is encoded.
    """
    value = data[at].astype(np.intp)
    long = value > 127
    if long.any():
        value[long] = value[long] & 127 | data[at[long] + 1].astype(np.intp) << 7
    return value, at + 1 + long


def _check(live: NDArray[np.intp], wrong: NDArray[np.bool_], what: str) -> None:
    if wrong.any():
        raise BadDelta(int(live[wrong.argmax()]), what)


def _place(numbers: NDArray[np.intp]) -> slice | NDArray[np.intp]:
    """The same places, as a slice where they follow each other: that is copied faster."""
    n = len(numbers)
    if n and numbers[-1] - numbers[0] == n - 1 and bool((numbers[1:] > numbers[:-1]).all()):
        return slice(int(numbers[0]), int(numbers[0]) + n)
    return numbers


def rows_of(
    words: NDArray[np.uint64],
    numbers: NDArray[np.intp],
    out: NDArray[np.uint64],
    *,
    in_place: bool = False,
) -> NDArray[np.uint64]:
    """Rows copied to the begin of out; in_place: or where they are, if that is one piece."""
    place, n = _place(numbers), len(numbers)
    if isinstance(place, slice):
        if in_place:
            return words[place]
        out[:n] = words[place]
    else:
        np.take(words, numbers, axis=0, out=out[:n], mode="clip")
    return out[:n]


class Cache:
    """Pages as they were last sent, each in the one slot that its number has.

    A page that is in use keeps its slot: another takes it only when it was not sent in the last round.
    """

    def __init__(self, size: int, page_size: int) -> None:
        """size: bytes, a power of two, of at least one page."""
        self.size = size
        self.slots = size // page_size
        self._words = page_size // 8
        self._page = np.full(self.slots, _NO_PAGE, np.intp)
        self._age = np.zeros(self.slots, np.intp)
        self._rows = np.empty((self.slots, self._words), np.uint64)  # memory comes when used

    def holds(self, pages: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of the pages are here."""
        held: NDArray[np.bool_] = self._page[pages % self.slots] == pages
        return held

    def get(self, pages: NDArray[np.intp], out: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Pages that are here: where they are, or gathered in out. Valid until the next put()."""
        return rows_of(self._rows, pages % self.slots, out, in_place=True)

    def put(self, pages: NDArray[np.intp], rows: NDArray[np.uint64] | int, now: int) -> None:
        """Keep what is sent of those pages, as far as they are here or their slots are free. No two share a slot."""
        slot = pages % self.slots
        owner = self._page[slot]
        free = (owner == pages) | (owner == _NO_PAGE) | (self._age[slot] + 2 <= now)
        if not free.all():
            slot, pages = slot[free], pages[free]
            rows = rows if isinstance(rows, int) else rows[free]
        self._rows[_place(slot)] = rows
        self._page[slot] = pages
        self._age[slot] = now

    def resized(self, size: int) -> Cache:
        """Another of that size, with what of this one fits; of two for one slot, the younger."""
        other = Cache(size, 8 * self._words)
        mine = np.flatnonzero(self._page != _NO_PAGE)
        mine = mine[np.argsort(self._age[mine], kind="stable")]
        slot = self._page[mine] % other.slots
        other._page[slot] = self._page[mine]  # the last one wins
        mine = mine[other._page[slot] == self._page[mine]]
        slot = self._page[mine] % other.slots
        other._rows[slot], other._age[slot] = self._rows[mine], self._age[mine]
        return other


class Stats:
    """In QEMU's words (XBZRLECacheStats). Rates are those of the last finished round."""

    def __init__(self) -> None:
        self.pages = self.bytes = self.miss = self.overflow = 0
        self._miss_rate = self._encoding_rate = 0.0
        self._before = (0, 0, 0, 0)
        self._seen = 0

    def count(self, *, seen: int, miss: int, deltas: int, size: int, overflow: int) -> None:
        """seen: pages that are not zero. size: bytes of the deltas, heads included."""
        self._seen += seen
        self.miss += miss
        self.pages += deltas
        self.bytes += size
        self.overflow += overflow

    def round_ended(self, page_size: int) -> None:
        now = (self._seen, self.miss, self.pages, self.bytes)
        seen, miss, pages, size = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        self._miss_rate = miss / seen if seen else 0.0
        self._encoding_rate = pages * page_size / size if size else 0.0

    def query(self, cache_size: int) -> dict[str, Any]:
        return {
            "cache-size": cache_size,
            "bytes": self.bytes,
            "pages": self.pages,
            "cache-miss": self.miss,
            "cache-miss-rate": round(self._miss_rate, 4),
            "encoding-rate": round(self._encoding_rate, 4),
            "overflow": self.overflow,
        }
