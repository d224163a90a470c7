"""The disk of a stress machine: numbered writes with a hash chain of their own, through a BlockDevice."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from whimbrel_block import BlockDevice
from whimbrel_device import buffer, device, u64
from whimbrel_testing.proof import check_ram, replay
from whimbrel_testing.sequence import (
    BATCH,
    PAGE,
    U64,
    WORDS,
    Chain,
    Region,
    Sequence,
    check_sums,
)


@device("stress-disk", version_id=1)
class DiskWork:
    """How far the work on the disk is, and the hash chain over it."""

    batches: int = u64()
    chain: bytes = buffer(Chain.SIZE)


class StressDisk:
    """Filled at boot; then one batch after the other goes to its first `hot` bytes."""

    NAME = "stress.disk"

    def __init__(self, path: str | os.PathLike[str], *, size: int, hot: int, seed: int) -> None:
        pages = size // PAGE
        self.device = BlockDevice(self.NAME, path, create=size)
        self.work = DiskWork(chain=bytes(Chain.SIZE))
        self.sequence = Sequence(seed + 1, (Region(0, pages, hot // PAGE),), pages)
        self._new: U64 = np.empty((BATCH, WORDS), dtype=np.uint64)

    def boot(self) -> None:
        while self.work.batches * BATCH < self.sequence.filled:
            self.write_batch()

    def write_batch(self) -> None:
        """What its pages hold goes into the chain, then they are overwritten."""
        sequence, work = self.sequence, self.work
        batch = work.batches
        pages = sequence.pages_of(batch)
        raw = b"".join(self.device.pread(PAGE, int(p) * PAGE) for p in pages)
        old = check_sums(np.frombuffer(raw, np.uint64).reshape(BATCH, WORDS))
        new = sequence.contents(sequence.numbers(batch), self._new)
        for page, data in zip(pages, new, strict=True):
            self.device.pwrite(data.data, int(page) * PAGE)
        work.chain = Chain(work.chain).add(batch, pages, old)
        work.batches = batch + 1

    def faults(self) -> Iterator[str]:
        """What differs from a replay of all writes."""
        expected = replay(self.sequence, self.work.batches)
        if expected.chain != self.work.chain:
            yield f"the hash chain over the disk's {self.work.batches * BATCH:,} writes is not that of this sequence"
        raw = self.device.pread(self.device.size, 0)
        words = np.frombuffer(raw, np.uint64).reshape(-1, WORDS)
        yield from check_ram(self.sequence, [(self.NAME, words)], expected)
