"""The pace of a stream under a limit: every byte has a time before which it does not go.

That time is absolute and moves on by what is written, so that a late wake-up, or a write that was larger than asked for,
is made good by what follows. The limit is asked again at least once a slice.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds: as far as writes run ahead of their time, and the longest sleep.
SLICE = 0.01
#: Seconds of the limit that somebody who was held up may make good: no larger burst than QEMU's at each window.
CREDIT = 0.1
#: Bytes: a large write is not cut into smaller pieces than that.
SMALLEST = 16 << 10


class Pace:
    """One for all that a migration sends, on whichever channel. Used by its thread."""

    def __init__(
        self, limit: Callable[[], int], pause: Callable[[float], object] = time.sleep
    ) -> None:
        """limit: bytes per second, 0 is unlimited; asked again and again. pause: sleeps so many seconds; what it returns
        is true when there is no reason to wait any more.
        """
        self._limit = limit
        self._pause = pause
        self._rate = 0
        self._due = time.monotonic()  # when what was written is paid for

    @property
    def rate(self) -> int:
        """The limit now. A change of it begins anew: nothing is owed, or left over, from before."""
        limit = self._limit()
        if limit != self._rate:
            self._rate, self._due = limit, time.monotonic()
        return self._rate

    @property
    def piece(self) -> int | None:
        """The most to write at once, in bytes; None without a limit."""
        rate = self.rate
        return max(SMALLEST, int(rate * SLICE / 2)) if rate else None

    def left(self, until: float) -> int | None:
        """Bytes that may be written before that time (time.monotonic()); None without a limit."""
        rate = self.rate
        if not rate:
            return None
        return max(0, int((until - max(self._due, time.monotonic() - CREDIT)) * rate))

    def charge(self, n: int) -> None:
        """So many bytes were written."""
        rate = self.rate
        if rate:
            self._due = max(self._due, time.monotonic() - CREDIT) + n / rate

    def wait(self) -> None:
        """Before a write: until its time has come, where that is further away than a slice."""
        within = SLICE
        while self.rate:
            rest = self._due - time.monotonic()
            if rest <= within or self._pause(min(rest, SLICE)):
                return
            # Once it waits, it waits for all: a hundred short sleeps cost more than one.
            within = 0.0
