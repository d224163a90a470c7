"""How much a machine writes, measured by sampling: pages are looked at now, and once more some time later.

Nothing is switched on for it and nothing is left behind: no tracker, no protected pages. What is only read cannot disturb
the machine, nor a migration of it. A page that holds at the end what it held at first counts as not written.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from whimbrel.errors import LocalError
from whimbrel_ram.block import RAMBlock
from whimbrel_ram.memory import untouched
from whimbrel_ram.zero import as_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.kernel import Kernel

log = logging.getLogger("whimbrel.ram")

#: Of pages per GiB, as in QEMU.
DEFAULT_SAMPLES = 512
#: Pages of a block at least, where it has so many: a share of fewer says little.
_LEAST = 2048
_GIB = 1 << 30
#: Pages read at a time.
_STEP = 256


@attrs.frozen(kw_only=True)
class Written:
    """What was found. Sizes in bytes, time in seconds."""

    seconds: float
    #: Written at least once meanwhile.
    size: float
    memory: int
    #: Of the memory: pages that were not zero.
    used: float

    @property
    def rate(self) -> float:
        """Bytes/s."""
        return self.size / self.seconds


class _Sample:
    """Some pages of a block, by chance, of those that have memory behind them: reading others would take some."""

    def __init__(self, block: RAMBlock, per_gib: int, rng: np.random.Generator) -> None:
        self._block = block
        fresh = untouched(block)
        self._touched = block.pages if fresh is None else int(np.count_nonzero(~fresh))
        wanted = max(_LEAST, per_gib * block.size // _GIB)
        if wanted >= self._touched:
            self._pages = np.arange(block.pages) if fresh is None else np.flatnonzero(~fresh)
        else:
            chosen = rng.integers(self._touched, size=wanted)
            self._pages = np.unique(chosen if fresh is None else np.flatnonzero(~fresh)[chosen])
        # Odd: a change of one word in a page always changes its sum.
        self._factors = rng.integers(1 << 63, size=block.page_size // 8, dtype=np.uint64) * 2 + 1
        self._sums, self._zero = self._look()

    def _look(self) -> tuple[NDArray[np.uint64], int]:
        """A sum of each page, and how many are zero."""
        words, zero = as_words(self._block.rows), 0
        sums = np.empty(len(self._pages), np.uint64)
        for i in range(0, len(self._pages), _STEP):
            pages = words[self._pages[i : i + _STEP]]
            sums[i : i + _STEP] = (pages * self._factors).sum(axis=1, dtype=np.uint64)
            zero += int(np.count_nonzero(~pages.any(axis=1)))
        return sums, zero

    def written(self) -> tuple[float, float]:
        """Bytes of the block that were written since it was made, and bytes that were not zero then."""
        page, count = self._block.page_size, len(self._pages)
        if not count:
            changed = used = 0.0
        else:
            changed = np.count_nonzero(self._look()[0] != self._sums) / count
            used = 1 - self._zero / count
        fresh = untouched(self._block)
        touched = self._block.pages if fresh is None else int(np.count_nonzero(~fresh))
        new = max(0, touched - self._touched)  # first written meanwhile
        return (changed * self._touched + new) * page, used * self._touched * page


def measure(
    blocks: Sequence[RAMBlock],
    seconds: float,
    per_gib: int = DEFAULT_SAMPLES,
    wait: Callable[[float], object] = time.sleep,
) -> Written:
    """Look, wait, look again."""
    rng = np.random.default_rng()
    began = time.monotonic()
    samples = [_Sample(block, per_gib, rng) for block in blocks]
    wait(max(0.0, seconds - (time.monotonic() - began)))
    elapsed = time.monotonic() - began
    found = [sample.written() for sample in samples]
    return Written(
        seconds=elapsed,
        size=sum(size for size, _ in found),
        memory=sum(block.size for block in blocks),
        used=sum(used for _, used in found),
    )


class DirtyRate:
    """The measurements of a kernel's machine, one at a time. Any thread may ask."""

    def __init__(self, blocks: Callable[[], Sequence[RAMBlock]]) -> None:
        """blocks: those of the machine when a measurement begins."""
        self._blocks = blocks
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        #: Of the last one; None: there was none, it is under way, or it failed.
        self.written: Written | None = None
        #: As it was asked for: seconds, and pages per GiB; when it began, in seconds since 1970.
        self.seconds, self.samples, self.began = 0.0, 0, 0

    @property
    def is_measuring(self) -> bool:
        return self._thread is not None

    def begin(self, seconds: float, samples: int = DEFAULT_SAMPLES) -> None:
        """Measure for that time, on a thread of its own. samples: pages per GiB. Raises LocalError while one is under way."""
        with self._lock:
            if self.is_measuring:
                raise LocalError("the dirty rate is already being measured.")
            self.seconds, self.samples, self.began = seconds, samples, int(time.time())
            self.written = None
            self._thread = threading.Thread(
                target=self._run, name="whimbrel-dirty-rate", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        written = None
        try:
            written = measure(list(self._blocks()), self.seconds, self.samples)
        except Exception:
            log.exception("the dirty rate could not be measured")
        with self._lock:
            self.written, self._thread = written, None


_OF: weakref.WeakKeyDictionary[Kernel, DirtyRate] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def of(kernel: Kernel) -> DirtyRate:
    """That of a kernel."""
    machine = kernel.machine
    with _LOCK:
        return _OF.setdefault(kernel, DirtyRate(lambda: machine.parts(RAMBlock)))
