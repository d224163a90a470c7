"""Auto-converge: a machine that writes its memory faster than it can be sent is slowed down, step by step, until it fits.

The rule and the parameters are QEMU's (its documentation of migrate-set-parameters): where in two periods in a row the
machine wrote more than throttle-trigger-threshold percent of what was sent, it shall rest cpu-throttle-initial percent of
its time, and cpu-throttle-increment more each time that it happens again, up to max-cpu-throttle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from whimbrel.errors import MigrationError

log = logging.getLogger("whimbrel.ram")

#: Seconds of a period at least: a look that comes sooner is added to the one before.
_PERIOD = 1.0
#: Periods in a row.
_PATIENCE = 2
_MOST = 99  # percent


@attrs.frozen(kw_only=True)
class Rules:
    """Percent, but for tailslow."""

    trigger: int = 50
    initial: int = 20
    increment: int = 10
    most: int = 99
    #: Grow by less than `increment` where that makes the machine write no more than it may.
    tailslow: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any] | Any) -> Rules:
        """Those of a kernel's settings."""
        return cls(
            trigger=settings["throttle-trigger-threshold"],
            initial=settings["cpu-throttle-initial"],
            increment=settings["cpu-throttle-increment"],
            most=settings["max-cpu-throttle"],
            tailslow=settings["cpu-throttle-tailslow"],
        )


class AutoConverge:
    """One migration's. Used by its thread; `percent` by any."""

    def __init__(
        self,
        rules: Callable[[], Rules],
        throttle: Callable[[int], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """rules: asked each time, since they may change. throttle: the machine's, 0 to lift it."""
        self._rules = rules
        self._throttle = throttle
        self._clock = clock
        self._began: float | None = None
        self._written = 0
        self._sent = 0
        self._times = 0
        self._touched = False  # also by a call that failed: it may have done something
        self.percent = 0

    def synced(self, written: int, sent: int) -> None:
        """After a look for changes: bytes that were written since the one before, and bytes sent since the start."""
        now = self._clock()
        if self._began is None:
            self._began, self._sent = now, sent
            return
        self._written += written
        if now - self._began < _PERIOD:
            return
        written, moved = self._written, sent - self._sent
        self._began, self._sent, self._written = now, sent, 0
        rules = self._rules()
        allowed = moved * rules.trigger / 100
        self._times = self._times + 1 if written > allowed else 0
        if self._times >= _PATIENCE:
            self._times = 0
            self._set(self._next(rules, written, allowed))

    def _next(self, rules: Rules, written: int, allowed: float) -> int:
        if not self.percent:
            return min(rules.initial, rules.most, _MOST)
        step = rules.increment
        if rules.tailslow:
            # It works 100 - percent of its time, and would write just what is allowed in that part of it:
            ideal = 100 - (100 - self.percent) * allowed / written
            step = min(step, max(1, round(ideal - self.percent)))
        return min(self.percent + step, rules.most, _MOST)

    def lift(self) -> None:
        """Let it run freely again. Never raises."""
        if self._touched:
            self._set(0)

    def _set(self, percent: int) -> None:
        if percent and percent == self.percent:
            return
        self._touched = True
        try:
            self._throttle(percent)
        except (
            MigrationError
        ) as error:  # it goes on at its own pace: no reason to give up the migration
            log.warning("the machine is not throttled by %d %%: %s", percent, error)
            return
        log.info("the machine is throttled by %d %%", percent)
        self.percent = percent
        self._touched = percent > 0

    def query(self) -> dict[str, Any]:
        """Its member of query-migrate."""
        return {"cpu-throttle-percentage": self.percent} if self.percent else {}


class Throttle:
    """A ready-made throttle for a program in Python: `set` is the machine's callback, and the program calls checkpoint()
    in its loop, every few milliseconds. Its stop() calls wake(), so that it does not wait for the end of a rest.

        throttle = Throttle()
        machine = Machine("app-1.0", throttle=throttle.set, ...)
        while running:
            work()
            throttle.checkpoint()
    """

    _LONGEST = 1.0  # seconds of a rest

    def __init__(self) -> None:
        self._percent = 0
        self._worked_since = time.monotonic()
        self._wake = threading.Event()

    @property
    def percent(self) -> int:
        """How much of its time the program rests."""
        return self._percent

    def set(self, percent: int) -> None:
        """0 to 99, from any thread; ends a rest. Raises ValueError."""
        if not 0 <= percent <= _MOST:
            raise ValueError(f"a throttle of {percent} % is not within 0 to {_MOST}")
        self._percent = percent
        self._wake.set()

    def wake(self) -> None:
        """End a rest, from any thread."""
        self._wake.set()

    def checkpoint(self) -> None:
        """Rest for the share of the time since the last rest that is due. Returns at once when not throttled."""
        if self._percent:
            self._wake.clear()
            percent = self._percent
            worked = time.monotonic() - self._worked_since
            self._wake.wait(min(worked * percent / (100 - percent), self._LONGEST))
        self._worked_since = time.monotonic()
