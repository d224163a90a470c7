"""How far a migration is, from what query-migrate answers again and again. Pure: figures in, figures out.

Work is counted in bytes of memory dealt with, zero pages included. What is still to come is not what is left of this pass:
with r the dirty rate over the rate at which memory is dealt with, each pass leaves r times its size to the next, until that
is little enough for the machine to stand still (whimbrel.forecast). Where r >= 1 there is no end.

Block migration (member `disk`) sends the disks once before it begins with memory: their bytes are work like any other.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import attrs

from whimbrel.forecast import Forecast, Writes, forecast

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
#: A pass that begins with less than so much of an earlier one is progress.
_NOISE = 0.95
ENDED = ("completed", "failed", "cancelled")


@attrs.frozen
class Disk:
    """What block migration has to do, in bytes."""

    remaining: int
    total: int


@attrs.frozen(kw_only=True)
class Reading:
    """One look at a migration. Sizes in bytes, rates in bytes/s, times in seconds; None: not known (yet)."""

    status: str
    elapsed: float
    number: int  # of the pass
    sent: int
    remaining: int
    total: int
    disk: Disk | None  # of all that: the disks
    throughput: float | None
    dirty_rate: float | None
    expected_downtime: float | None
    fraction: float  # of the estimated work, never less than before
    eta: float | None  # until the end
    eta_range: tuple[float, float] | None  # from nothing gets dirty any more, to slower and dirtier
    switchover: float | None  # until the machine stands still
    downtime: float | None  # how long it will, by the same forecast
    #: It does not converge: memory gets dirty so many times as fast as it is sent. A little over 1 where every page that
    #: is written at all is written within each pass, for a page counts once, however often it was written.
    excess: float | None
    #: What a pass leaves takes so many times as long as the machine may stand still.
    overdue: float | None
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
        self._disk: Disk | None = None
        self._progress = _Progress()

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
        status = migration.get("status", "none")
        disk = self._read_disk(migration, status)
        pages = ram.get("normal", 0) + ram.get("duplicate", 0)
        pages += migration.get("xbzrle-cache", {}).get("pages", 0)
        stored = 0 if disk is None else disk.total - disk.remaining
        done, sent = page * pages + stored, ram.get("transferred", 0) + stored
        remaining = ram.get("remaining", 0) + (0 if disk is None else disk.remaining)
        rates = self._rates(now, done, sent)
        self._progress.note(status, number, remaining, now)
        dirty = float(ram.get("dirty-pages-rate", 0) * page)
        rate = rates[0] if rates is not None and rates[0] > 0 else None
        ratio = None if rate is None else dirty / rate
        likely = worse = to_come = eta = eta_range = None
        if self._pass <= 1:  # nobody knows how much will come again
            to_come = remaining + ram.get("total", 0) * _COMES_AGAIN
        elif rate is not None and ratio is not None and ratio < _STEEP:
            likely = self._forecast(ram, remaining, rate, dirty, now)
            steeper = min(ratio * 1.25, _STEEP - 0.01)
            worse = self._forecast(ram, remaining, rate, steeper * rate, now)
            to_come = likely.total and likely.total * rate
        self._advance(status, done, to_come)
        if rate is not None and to_come is not None and status not in ENDED:
            eta = to_come / rate
            worst = eta if worse is None or worse.total is None else worse.total
            eta_range = min(remaining / rate, eta), max(worst / 0.8, eta)
        total_time = migration.get("total-time")
        downtime = migration.get("expected-downtime", migration.get("downtime"))
        excess = ratio if number >= _PASSES and status == "active" else None
        if excess is not None and excess < _STEEP:
            excess = None
        return Reading(
            status=status,
            elapsed=now - self._began if total_time is None else total_time / 1000,
            number=number,
            sent=sent,
            remaining=remaining,
            total=ram.get("total", 0) + (0 if disk is None else disk.total),
            disk=disk,
            throughput=None if rates is None else rates[1],
            dirty_rate=dirty if number > 1 else None,
            expected_downtime=None if downtime is None else downtime / 1000,
            fraction=self._fraction,
            eta=eta,
            eta_range=eta_range,
            switchover=likely.switchover if likely is not None and eta is not None else None,
            downtime=likely.downtime if likely is not None and eta is not None else None,
            excess=excess,
            overdue=downtime / 1000 / self._limit
            if excess is not None and downtime and self._limit
            else None,
            throttle=migration.get("cpu-throttle-percentage"),
        )

    def stalled_for(self, now: float) -> float:
        """Seconds since there was progress: less left to send, in a pass that began with less than all before it."""
        return self._progress.since(now)

    def _read_disk(self, migration: dict[str, Any], status: str) -> Disk | None:
        """The member goes when the migration has ended; what it said does not."""
        if disk := migration.get("disk"):
            self._disk = Disk(disk.get("remaining", 0), disk.get("total", 0))
        elif status == "completed" and self._disk is not None:
            self._disk = Disk(0, self._disk.total)
        return self._disk

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

    def _forecast(
        self, ram: dict[str, Any], left: int, rate: float, dirty: float, now: float
    ) -> Forecast:
        """rate: of dealing with memory, in bytes/s, above 0; dirty: the dirty rate."""
        return forecast(
            Writes.steady(dirty, ram.get("total", 0)),
            to_send=left,
            bandwidth=rate,
            downtime_limit=self._limit,
            since=now - self._pass_began,
        )

    def _advance(self, status: str, done: int, to_come: float | None) -> None:
        if status == "completed":
            self._fraction = 1.0
        elif done > 0 and to_come is not None:
            self._fraction = max(self._fraction, min(done / (done + to_come), 0.99))


def outlook(migration: dict[str, Any], downtime_limit: float) -> Forecast | None:
    """The forecast from a single answer of query-migrate; None while that does not tell enough.

    downtime_limit: seconds.
    """
    ram = migration.get("ram", {})
    bandwidth, number = ram.get("mbps", 0) * 1e6 / 8, ram.get("dirty-sync-count", 0)
    if migration.get("status") != "active" or bandwidth <= 0 or number < 2:
        return None
    rate = ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)
    found = forecast(
        Writes.steady(rate, ram.get("total", 0)),
        to_send=ram.get("remaining", 0),
        bandwidth=bandwidth,
        downtime_limit=downtime_limit,
    )
    if rate < bandwidth * _STEEP:
        return found
    if number < _PASSES:
        return None
    # Where it settles, each pass leaves what it sent: what that takes, the machine says itself.
    down = migration.get("expected-downtime", 0) / 1000 or found.downtime
    return attrs.evolve(found, switchover=None, downtime=down)


class _Progress:
    """Since when there was none. Each pass ends with next to nothing left, and the next begins with what got dirty: what
    counts is that passes begin with less and less, by more than noise.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._pass = 0
        self._began_with = self._left = 0
        self._smallest = math.inf  # what the last pass that was progress began with

    def note(self, status: str, number: int, left: int, now: float) -> None:
        self._last = now if self._last is None else self._last
        if begins := number > self._pass:
            if self._pass and self._smaller:
                self._smallest = self._began_with
            self._pass, self._began_with, self._left = number, left, left
        counts = self._smaller or status.startswith("postcopy")
        if counts and (begins or left < self._left):
            self._last = now
        self._left = min(left, self._left)

    @property
    def _smaller(self) -> bool:
        return self._began_with < self._smallest * _NOISE

    def since(self, now: float) -> float:
        return 0.0 if self._last is None else now - self._last
