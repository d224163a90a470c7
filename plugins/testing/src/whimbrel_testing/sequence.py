"""What the stress machine writes, as arithmetic: write number n goes to page p(n) with content f(n).

Everything follows from a seed, so that who knows the seed and the count of writes knows the whole RAM. The content is
    base(n) = mix(n xor key)          mix: a bijection of 64-bit words (the finaliser of MurmurHash3)
    word j of the page = base(n) + j * STEP  (mod 2^64)
Every word depends on n, and any word gives n back: a torn page tells where it is torn and between which two writes.
"""

from __future__ import annotations

import hashlib

import attrs
import numpy as np
import numpy.typing as npt

PAGE = 4096
WORDS = PAGE // 8
#: Writes in one batch: 256 KiB, which stays in the processor's cache.
BATCH = 64
BATCH_BYTES = BATCH * PAGE

U64 = npt.NDArray[np.uint64]

_MUL1, _MUL2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_UNMUL1, _UNMUL2 = pow(_MUL1, -1, 1 << 64), pow(_MUL2, -1, 1 << 64)
_STEP = 0x9E3779B97F4A7C15
_SHIFT = np.uint64(33)
#: j * STEP of the words of a page.
_STEPS: U64 = np.arange(WORDS, dtype=np.uint64) * np.uint64(_STEP)


def _mix(values: U64) -> U64:
    x = values ^ (values >> _SHIFT)
    x *= np.uint64(_MUL1)
    x ^= x >> _SHIFT
    x *= np.uint64(_MUL2)
    x ^= x >> _SHIFT
    return x


def _unmix(values: U64) -> U64:
    """The inverse of _mix (a shift by 33 or more is its own inverse)."""
    x = values ^ (values >> _SHIFT)
    x *= np.uint64(_UNMUL2)
    x ^= x >> _SHIFT
    x *= np.uint64(_UNMUL1)
    x ^= x >> _SHIFT
    return x


#: Weights of the words in the check sum of a page; without them symmetrical damage could cancel out.
_WEIGHTS: U64 = _mix(np.arange(1, WORDS + 1, dtype=np.uint64))
_WEIGHTS_SUM: np.uint64 = np.add.reduce(_WEIGHTS)
_STEPS_SUM: np.uint64 = np.add.reduce(_STEPS * _WEIGHTS)


def check_sums(pages: U64) -> U64:
    """The weighted sum, modulo 2^64, of the words of each page (shape (n, WORDS)); 0 for zeros."""
    sums: U64 = np.einsum("ij,j->i", pages, _WEIGHTS)
    return sums


def _key(seed: int, use: str) -> np.uint64:
    digest = hashlib.blake2b(f"{seed} {use}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


@attrs.frozen
class Region:
    """The pages of one RAM block, numbered from `start`; writes go to the first `hot` of them."""

    start: int
    pages: int
    hot: int


class Sequence:
    """The writes of one seed over `regions`. The first `filled` writes fill the first pages in order; after them one
    batch in SMALL goes to the last region (if there are two), the others to the first.
    """

    SMALL = 16

    def __init__(self, seed: int, regions: tuple[Region, ...], filled: int) -> None:
        if filled % BATCH or filled > regions[0].pages:
            raise ValueError(f"filled {filled} is not a number of batches within the first region")
        self.seed, self.regions, self.filled = seed, regions, filled
        self.pages = sum(r.pages for r in regions)
        self._key, self._page_key = _key(seed, "content"), _key(seed, "page")

    def region_of(self, batch: int) -> int:
        """Index of the region that this batch goes to."""
        if batch * BATCH < self.filled or len(self.regions) == 1:
            return 0
        return len(self.regions) - 1 if batch % self.SMALL == self.SMALL - 1 else 0

    def numbers(self, batch: int, count: int = 1) -> U64:
        return np.arange(batch * BATCH, (batch + count) * BATCH, dtype=np.uint64)

    def pages_of(self, batch: int) -> npt.NDArray[np.int64]:
        """p(n) of one batch, counted within its region. A page may come twice: the later write wins."""
        return self._place(self.numbers(batch), self.regions[self.region_of(batch)].hot)

    def _place(self, numbers: U64, hot: int) -> npt.NDArray[np.int64]:
        if numbers[0] < self.filled:
            return numbers.astype(np.int64)
        return (_mix(numbers ^ self._page_key) % np.uint64(hot)).astype(np.int64)

    def bases(self, numbers: U64) -> U64:
        return _mix(numbers ^ self._key)

    def contents(self, numbers: U64, out: U64) -> U64:
        """f(n) of each number as the rows of out, shape (len(numbers), WORDS)."""
        np.add(self.bases(numbers)[:, None], _STEPS, out=out)
        return out

    def sums(self, numbers: U64) -> U64:
        """check_sums() of f(n), for each n, without making the pages."""
        return self.bases(numbers) * _WEIGHTS_SUM + _STEPS_SUM

    def writers(self, page: U64) -> U64:
        """For each word of a page the number of the write that it would come from; garbage gives garbage."""
        return _unmix(page - _STEPS) ^ self._key

    def page_of(self, number: int) -> int:
        """The page of one write, counted over all regions."""
        region = self.regions[self.region_of(number // BATCH)]
        place = self._place(np.array([number], dtype=np.uint64), region.hot)
        return region.start + int(place[0])


class Chain:
    """blake2b over the batches: number, pages, and the sums of what the pages held before. A page that was lost, torn
    or written twice shows here for ever, also when a later write has covered it.
    """

    SIZE = 32

    def __init__(self, digest: bytes = bytes(SIZE)) -> None:
        self.digest = digest

    def add(self, batch: int, pages: npt.NDArray[np.int64], old_sums: U64) -> bytes:
        state = hashlib.blake2b(self.digest, digest_size=self.SIZE)
        state.update(batch.to_bytes(8, "little"))
        state.update(pages.tobytes())
        state.update(old_sums.tobytes())
        self.digest = state.digest()
        return self.digest
