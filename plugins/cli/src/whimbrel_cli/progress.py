"""How far a migration is, from what query-migrate answers again and again. Pure: figures in, figures out.

Work is counted in bytes of memory dealt with, zero pages included. What is still to come is not what is left of this pass:
with r the dirty rate over the rate at which memory is dealt with, each pass leaves r times its size to the next. Of what
is left and what got dirty since the pass began, (left + dirty)/(1 - r) comes (a geometric series, without an end where
r >= 1), less the tail that is never sent because the machine stands still for the last pass.
"""

from __future__ import annotations

import collections
from typing import Any

import attrs

#: Seconds of the past that rates are taken over.
_WINDOW = 5.0
#: A rate of less than this time is noise.
_SHORTEST = 0.5
#: r from which on no end is in sight: the series says nothing that one could count on.
_STEEP = 0.95
#: Of all memory, so much is taken to come again while the first pass has not shown how much.
_COMES_AGAIN = 0.1
#: Passes before it is said that there will be no end: the first sees no dirty rate, the second an early one.
_PASSES = 3
ENDED = ("completed", "failed", "cancelled")


@attrs.frozen(kw_only=True)
class Reading:
    """One look at a migration. Sizes in bytes, rates in bytes/s, times in seconds; None: not known (yet)."""

    status: str
    elapsed: float
    number: int  # of the pass
    sent: int
    remaining: int
    total: int
    throughput: float | None
    dirty_rate: float | None
    expected_downtime: float | None
    fraction: float  # of the estimated work, never less than before
    eta: float | None
    eta_range: tuple[float, float] | None  # from nothing gets dirty any more, to slower and dirtier
    excess: (
        float | None
    )  # memory is written so many times as fast as it is sent: it does not converge
    throttle: int | None  # percent


class Estimator:
    """Feed it what query-migrate answers, in order."""

    def __init__(self, downtime_limit: float = 0.3) -> None:
        """downtime_limit: seconds."""
        self._limit = downtime_limit
        self._pass_began = 0.0
        self._past: collections.deque[tuple[float, int, int]] = collections.deque()
        self._pass = 0
        self._fraction = 0.0
        self._began: float | None = None
        self._least: int | None = None
        self._progressed: float | None = None

    def feed(self, migration: dict[str, Any], now: float) -> Reading:
        """now: seconds of a monotonic clock."""
        self._began = now if self._began is None else self._began
        ram = migration.get("ram", {})
        page = ram.get("page-size", 4096)
        number = ram.get("dirty-sync-count", 0)
        if number > self._pass:
            if self._pass <= 1:
                self._past.clear()  # the first pass skims over memory that was never written
            self._pass, self._pass_began = number, now
        pages = ram.get("normal", 0) + ram.get("duplicate", 0)
        done = page * (pages + migration.get("xbzrle-cache", {}).get("pages", 0))
        sent, remaining = ram.get("transferred", 0), ram.get("remaining", 0)
        status = migration.get("status", "none")
        rates = self._rates(now, done, sent)
        self._watch_progress(remaining, now)
        dirty = float(ram.get("dirty-pages-rate", 0) * page)
        ratio = dirty / rates[0] if rates is not None and rates[0] > 0 else 0.0
        rate = rates[0] if rates is not None else None
        to_come = self._to_come(ram, dirty, ratio, now)
        self._advance(status, done, to_come)
        eta, eta_range = None, None
        if rate and to_come is not None:
            worse = (
                self._to_come(ram, dirty * 1.25, min(ratio * 1.25, _STEEP - 0.01), now) or to_come
            )
            eta, eta_range = to_come / rate, (remaining / rate, worse / rate / 0.8)
        total_time = migration.get("total-time")
        downtime = migration.get("expected-downtime", migration.get("downtime"))
        return Reading(
            status=status,
            elapsed=now - self._began if total_time is None else total_time / 1000,
            number=number,
            sent=sent,
            remaining=remaining,
            total=ram.get("total", 0),
            throughput=None if rates is None else rates[1],
            dirty_rate=dirty if number > 1 else None,
            expected_downtime=None if downtime is None else downtime / 1000,
            fraction=self._fraction,
            eta=eta,
            eta_range=eta_range,
            excess=ratio if ratio >= _STEEP and number >= _PASSES and status == "active" else None,
            throttle=migration.get("cpu-throttle-percentage"),
        )

    def stalled_for(self, now: float) -> float:
        """Seconds since less was left than ever before."""
        return 0.0 if self._progressed is None else now - self._progressed

    def _rates(self, now: float, done: int, sent: int) -> tuple[float, float] | None:
        """Memory dealt with and bytes sent, a second."""
        past = self._past
        past.append((now, done, sent))
        while len(past) > 2 and now - past[1][0] >= _WINDOW:
            past.popleft()
        then, done_then, sent_then = past[0]
        if now - then < _SHORTEST:
            return None
        return (done - done_then) / (now - then), (sent - sent_then) / (now - then)

    def _watch_progress(self, remaining: int, now: float) -> None:
        if self._least is None or remaining < self._least or self._pass <= 1:
            self._least, self._progressed = remaining, now

    def _to_come(self, ram: dict[str, Any], dirty: float, ratio: float, now: float) -> float | None:
        """Bytes of memory to deal with until the end; None where there is none in sight."""
        left, total = ram.get("remaining", 0), ram.get("total", 0)
        if self._pass <= 1:
            return float(left + total * _COMES_AGAIN)
        if ratio >= _STEEP:
            return None
        again = min(dirty * (now - self._pass_began), total)
        unsent = dirty * self._limit  # r times what the last pass, at most, sends
        return float(max(left, (left + again - unsent) / (1 - ratio)))

    def _advance(self, status: str, done: int, to_come: float | None) -> None:
        if status == "completed":
            self._fraction = 1.0
        elif done and to_come is not None:
            self._fraction = max(self._fraction, min(done / (done + to_come), 0.99))
