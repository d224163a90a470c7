"""The proof that a stress machine is whole: its writes are replayed from the first and compared with what it holds.

What is compared: every page of RAM with the last write that went to it (or zeros), the hash chain over all batches, and
the serial log line by line. Each fault says where it is and what it must be.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel_testing.sequence import BATCH, U64, WORDS, Chain, Sequence

#: Pages compared at a time: 1 MiB.
_CHUNK = 256
#: Faults that are told in full, and runs of words told of one page.
_TOLD, _RUNS = 20, 4
#: A word that would come from a write beyond this number comes from no write.
_PLAUSIBLE = 1 << 48


@attrs.frozen(kw_only=True)
class Proof:
    """What was compared, and what was found to be wrong."""

    writes: int
    pages: int
    lines: int
    #: To the disk, beside those to RAM.
    disk_writes: int = 0
    faults: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        if self.holds:
            disk = f" the disk holds its {self.disk_writes:,}," if self.disk_writes else ""
            return (
                f"{self.pages:,} pages hold exactly their last of {self.writes:,} writes,{disk} the hash chain over all of them"
                f" is whole, and the serial log runs on over {self.lines:,} lines"
            )
        return "\n".join(self.faults)


@attrs.frozen
class Replay:
    """What the first writes of a sequence leave behind."""

    #: For each page, over all regions, the number of its last write; -1 where there was none.
    last: npt.NDArray[np.int64]
    chain: bytes
    #: The chain after as many batches as was asked for.
    chain_at: dict[int, bytes]


def replay(sequence: Sequence, batches: int, marks: Iterable[int] = ()) -> Replay:
    last = np.full(sequence.pages, -1, dtype=np.int64)
    chain = Chain()
    wanted = set(marks)
    chain_at = {0: chain.digest}
    for batch in range(batches):
        region = sequence.regions[sequence.region_of(batch)]
        pages = sequence.pages_of(batch)
        places = pages + region.start
        before = last[places]
        old = sequence.sums(before.astype(np.uint64))
        old[before < 0] = 0
        chain.add(batch, pages, old)
        last[places] = sequence.numbers(batch).astype(np.int64)
        if batch + 1 in wanted:
            chain_at[batch + 1] = chain.digest
    return Replay(last, chain.digest, chain_at)


# ---- RAM


def check_ram(
    sequence: Sequence, views: Iterable[tuple[str, U64]], expected: Replay
) -> Iterator[str]:
    """Faults of the RAM. `views` are (block name, words of shape (pages, WORDS)) in the order of the regions."""
    scratch = np.empty((_CHUNK, WORDS), dtype=np.uint64)
    for (name, view), region in zip(views, sequence.regions, strict=True):
        for first in range(0, region.pages, _CHUNK):
            found = view[first : first + _CHUNK]
            last = expected.last[region.start + first : region.start + first + len(found)]
            wanted = sequence.contents(last.astype(np.uint64), scratch[: len(found)])
            wanted[last < 0] = 0
            for row in np.flatnonzero((found != wanted).any(axis=1)):
                place = region.start + first + int(row)
                what = _describe(sequence, found[row], place, int(last[row]))
                yield f"page {first + row} of block {name}: {what}"


def _describe(sequence: Sequence, page: U64, place: int, last: int) -> str:
    due = f"its last write is #{last:,}" if last >= 0 else "it was never written"
    runs = list(_runs(sequence, page))
    if len(runs) > 1:
        told = "; ".join(f"words {a}-{b - 1} of {_origin(w)}" for a, b, w in runs[:_RUNS])
        more = f"; {len(runs) - _RUNS} more runs" if len(runs) > _RUNS else ""
        return f"torn: {told}{more} ({due})"
    writer = runs[0][2]
    if writer is None:
        return f"holds zeros, but {due}: the write is lost"
    if writer >= _PLAUSIBLE:
        return f"holds what no write makes (first word {int(page[0]):#018x}), but {due}"
    if sequence.page_of(writer) != place:
        return f"holds write #{writer:,}, which belongs to another page, but {due}"
    if writer > last:
        return f"holds write #{writer:,}, but {due}: written after the machine's state was saved"
    return f"holds write #{writer:,}, but {due}: the write is lost"


def _runs(sequence: Sequence, page: U64) -> Iterator[tuple[int, int, int | None]]:
    """(first word, word behind, writer) of the runs of words that come from one write; None: zeros."""
    writers = sequence.writers(page)
    zero = page == 0
    same = (writers[1:] == writers[:-1]) & ~zero[1:] & ~zero[:-1] | (zero[1:] & zero[:-1])
    edges = [0, *(np.flatnonzero(~same) + 1).tolist(), WORDS]
    for a, b in itertools.pairwise(edges):
        yield a, b, None if zero[a] else int(writers[a])


def _origin(writer: int | None) -> str:
    if writer is None:
        return "zeros"
    return f"write #{writer:,}" if writer < _PLAUSIBLE else "no write"


# ---- the serial log


@attrs.frozen
class Line:
    """`number monotonic_ns batches chain pid`: what the machine says on its serial port."""

    number: int
    monotonic_ns: int
    batches: int
    chain: str
    pid: int

    CHAIN_DIGITS = 16

    def encode(self) -> bytes:
        return (
            f"{self.number} {self.monotonic_ns} {self.batches} {self.chain} {self.pid}\n".encode()
        )

    @classmethod
    def decode(cls, line: bytes) -> Line:
        number, when, batches, chain, pid = line.split()
        return cls(int(number), int(when), int(batches), chain.decode(), int(pid))


def add_line(digest: bytes, line: bytes) -> bytes:
    """The digest of the log with one more line."""
    return hashlib.blake2b(digest + line, digest_size=len(digest)).digest()


def read_lines(log: bytes) -> tuple[list[Line], list[str]]:
    """The lines of a log and the faults of their form."""
    lines, faults = [], []
    for index, raw in enumerate(log.splitlines(keepends=True)):
        try:
            if not raw.endswith(b"\n"):
                raise ValueError
            lines.append(Line.decode(raw))
        except ValueError:
            faults.append(f"line {index} of the serial log is damaged: {raw[:60]!r}")
    return lines, faults


def check_log(
    lines: list[Line], log: bytes, digest: bytes, count: int, expected: Replay
) -> Iterator[str]:
    """Faults of the log: `digest` and `count` are what the machine remembers of it."""
    previous: Line | None = None
    for index, line in enumerate(lines):
        due = previous.number + 1 if previous else 0
        if line.number != due:
            how = "repeated" if line.number < due else "lost"
            yield (
                f"line {index} of the serial log has number {line.number}, due was {due}: lines are {how}"
                f" (written by process {line.pid}{f', before it {previous.pid}' if previous else ''})"
            )
        if previous and line.monotonic_ns < previous.monotonic_ns:
            yield f"line {index} of the serial log is older than the line before it"
        right = expected.chain_at.get(line.batches)
        if right is None:
            yield (
                f"line {index} of the serial log tells of batch {line.batches:,}, beyond the last one of the machine"
            )
        elif right.hex()[: Line.CHAIN_DIGITS] != line.chain:
            since = previous.batches if previous else 0
            yield (
                f"the hash chain broke between write #{since * BATCH:,} and #{line.batches * BATCH:,} (serial log, line"
                f" {index}, process {line.pid}): a page held what it must not when it was written"
            )
            return  # every later line would say so again
        previous = line
    if len(lines) != count:
        yield f"the serial log has {len(lines):,} lines, the machine remembers {count:,}"
    own = bytes(len(digest))
    for raw in log.splitlines(keepends=True):
        own = add_line(own, raw)
    if own != digest:
        yield "the serial log is not what the machine wrote: its digest differs"


def told(faults: Iterable[str]) -> tuple[str, ...]:
    """The first faults in full, the others counted."""
    listed = list(faults)
    if len(listed) <= _TOLD:
        return tuple(listed)
    return (*listed[:_TOLD], f"and {len(listed) - _TOLD:,} more faults")
