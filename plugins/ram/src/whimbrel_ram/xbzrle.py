"""XBZRLE: a page as what changed in it since it was last sent. Sans-I/O; nothing in Python per byte or run.

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
) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Deltas of pages, given as rows of words: all of them one behind the other, and the length of each in bytes.

    A length of 0 says that nothing changed. One that is not shorter than the page is no gain.
    """
    pages, words = old.shape
    page_size = 8 * words
    changed = (old ^ new).reshape(-1)
    word = np.flatnonzero(changed)
    if not len(word):
        return np.empty(0, np.uint8), np.zeros(pages, np.intp)
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
    return out, np.bincount(page, size, pages).astype(np.intp)


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


class Patches:
    """The changed runs of some deltas: where their bytes are, where they go, and how many."""

    def __init__(
        self, source: NDArray[np.intp], target: NDArray[np.intp], length: NDArray[np.intp]
    ) -> None:
        self._source, self._target, self._length = source, target, length

    def apply(self, data: NDArray[np.uint8], memory: NDArray[np.uint8]) -> None:
        """Copy them from data, which was decoded, into memory, whose bytes the targets count."""
        total = int(self._length.sum())
        within = np.arange(total) - np.repeat(np.cumsum(self._length) - self._length, self._length)
        memory[np.repeat(self._target, self._length) + within] = data[
            np.repeat(self._source, self._length) + within
        ]


def decode(
    data: NDArray[np.uint8],
    start: NDArray[np.intp],
    length: NDArray[np.intp],
    where: NDArray[np.intp],
    page_size: int,
) -> Patches:
    """Take deltas apart: number i is length[i] bytes of data from start[i] on, for the page at where[i].

    Step k looks at run k of every delta. Raises BadDelta, before anything has been written anywhere.
    """
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
    empty: list[NDArray[np.intp]] = [np.empty(0, np.intp)]
    return Patches(*(np.concatenate(some or empty) for some in (source, target, count)))


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

    def get(self, pages: NDArray[np.intp]) -> NDArray[np.uint64]:
        """A copy of pages that are here."""
        rows: NDArray[np.uint64] = self._rows[pages % self.slots]
        return rows

    def put(self, pages: NDArray[np.intp], rows: NDArray[np.uint64] | int, now: int) -> None:
        """Keep what is sent of those pages, as far as they are here or their slots are free. No two share a slot."""
        slot = pages % self.slots
        owner = self._page[slot]
        free = (owner == pages) | (owner == _NO_PAGE) | (self._age[slot] + 2 <= now)
        if not free.all():
            slot, pages = slot[free], pages[free]
            rows = rows if isinstance(rows, int) else rows[free]
        self._rows[slot] = rows
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
