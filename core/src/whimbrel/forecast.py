"""How a precopy will go, from what the machine writes and what the link takes. Pure: figures in, figures out.

The model (the writable working set of Clark et al., "Live Migration of Virtual Machines", NSDI 2005):

    d(t)         bytes of memory that are written at least once within t seconds. A page that is written again within that
                 time counts once, so d(t)/t falls as t grows, and d never exceeds the memory
    pass 1       sends what the machine has; pass n+1 sends what was written while pass n was sent:
                 left(n+1) = d(left(n) / bandwidth)      a geometric series while d is a straight line
    switchover   as soon as left / bandwidth <= downtime limit; it takes that long
    converges    where d(limit) <= bandwidth * limit: since d(t)/t falls, every longer pass then leaves less than it sent.
                 d(limit) / (bandwidth * limit) is by what factor it does not

Not in it: the time that devices, answers of the destination and the look for changes take, pages that shrink by xbzrle or
compression, and a CPU too slow for the link.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import attrs

#: Passes after which no end counts as one.
_MOST = 10_000


@attrs.frozen
class Writes:
    """d(t): the lowest of some straight lines, and of all memory. Made by of() or steady()."""

    #: (bytes at 0, bytes/s), each less steep than the one before; none: nothing is written.
    lines: tuple[tuple[float, float], ...]
    #: Bytes that can be written at all.
    memory: float

    @classmethod
    def of(cls, measured: Iterable[tuple[float, float]], memory: float) -> Writes:
        """From measurements (seconds, bytes written at least once within them): the lowest d that is nowhere below them,
        since measuring by samples is not exact. Behind the longest it goes on as between the last two; before the shortest
        it is a straight line, which is the least that d can be there.

        Raises ValueError for times that are not above 0 and bytes below it.
        """
        points = sorted(measured)
        if memory < 0 or any(t <= 0 or written < 0 for t, written in points):
            raise ValueError(f"{points} of {memory} bytes are no measurements")
        corners, most = [(0.0, 0.0)], 0.0
        for t, written in points:
            most = max(most, min(written, memory))
            while len(corners) > 1 and _slope(corners[-2], (t, most)) >= _slope(*corners[-2:]):
                corners.pop()
            if t > corners[-1][0]:
                corners.append((t, most))
        lines = []
        for (t, written), after in itertools.pairwise(corners):
            slope = _slope((t, written), after)
            lines.append((max(0.0, written - slope * t), slope))
        return cls(tuple(lines), float(memory))

    @classmethod
    def steady(cls, rate: float, memory: float) -> Writes:
        """Where no more is known than a rate, in bytes/s: a straight line, up to all of the memory."""
        return cls(((0.0, float(rate)),), float(memory))

    def within(self, seconds: float) -> float:
        """d(seconds)."""
        if not self.lines:
            return 0.0
        return min(self.memory, *(start + slope * seconds for start, slope in self.lines))

    def rate(self, seconds: float) -> float:
        """d(seconds)/seconds, in bytes/s; at 0 the steepest there is."""
        if seconds > 0:
            return self.within(seconds) / seconds
        return self.lines[0][1] if self.lines else 0.0

    def balance(self, bandwidth: float) -> float:
        """The shortest time in which no more is written than can be sent, in seconds: 0 where that is so at once."""
        if self.rate(0) <= bandwidth:
            return 0.0
        met = (start / (bandwidth - slope) for start, slope in self.lines if slope < bandwidth)
        return min([self.memory / bandwidth, *met])


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


@attrs.frozen(kw_only=True)
class Forecast:
    """What forecast() expects. Times in seconds."""

    #: Looks for changes to come, the last one, of the machine that stands still, included: query-migrate counts these, as
    #: dirty-sync-count.
    passes: int
    #: Until the machine stands still; None: it does not converge.
    switchover: float | None
    #: How long it stands still then. Where it does not converge: how long it would have to.
    downtime: float
    #: So many times as much is written as is sent, over the downtime limit: above 1 it does not converge.
    excess: float

    @property
    def total(self) -> float | None:
        """Until the end; None where there is none."""
        return None if self.switchover is None else self.switchover + self.downtime


def forecast(
    writes: Writes, *, to_send: float, bandwidth: float, downtime_limit: float, since: float = 0.0
) -> Forecast:
    """to_send: bytes of this pass; bandwidth: bytes/s; downtime_limit: seconds; since: seconds from the last look for
    changes to now.

    Raises ValueError for a bandwidth that is not above 0, and for what is below 0.
    """
    if bandwidth <= 0 or min(to_send, downtime_limit, since) < 0:
        raise ValueError("a forecast needs a bandwidth, and nothing below 0")
    excess = writes.rate(downtime_limit) / bandwidth
    left, now, fits = float(to_send), 0.0, bandwidth * downtime_limit
    for number in range(1, _MOST):
        now += left / bandwidth
        after = writes.within(since + left / bandwidth)
        if after <= fits:
            return Forecast(
                passes=number + 1, switchover=now, downtime=after / bandwidth, excess=excess
            )
        if number > 1 and after >= left * (1 - 1e-9):
            break  # no less than in the pass before: nor will it be
        left, since = after, 0.0
    stands_still = max(writes.balance(bandwidth), downtime_limit)
    return Forecast(passes=number, switchover=None, downtime=stands_still, excess=max(excess, 1.0))
