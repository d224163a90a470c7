"""Machines looked at again and again by their monitors, each on a thread of its own.

A QEMU's monitor serves one program at a time. So each look connects, asks, and leaves: whoever wants to drive a machine
that is watched gets in between two looks, and a monitor that somebody else holds is said to be taken.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import attrs

from whimbrel_cli.monitor import Gone, Monitor, Refused, Taken
from whimbrel_cli.progress import ENDED, Estimator, Reading

log = logging.getLogger("whimbrel.cli")

_PATIENCE = 3.0  # seconds for a monitor's answer


@attrs.frozen(kw_only=True)
class Look:
    """One look at a machine: its run state and its migration, or the trouble that there was."""

    address: str
    run_state: str | None = None
    reading: Reading | None = None  # None: no migration yet
    reason: str | None = None  # why a migration failed
    trouble: str | None = None

    @property
    def state(self) -> tuple[str | None, str | None, int, str | None]:
        """What a change of is worth a line."""
        reading = self.reading
        number = 0 if reading is None else reading.number
        return self.run_state, None if reading is None else reading.status, number, self.trouble

    @property
    def migrates(self) -> bool:
        return self.reading is not None and self.reading.status not in (*ENDED, "none")


class Watched:
    """One machine. look() is called by one thread, again and again."""

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self._clock = clock
        self._estimator: Estimator | None = None
        self._last: Reading | None = None

    def look(self) -> Look:
        try:
            with Monitor(self.address, patience=_PATIENCE) as monitor:
                run_state, migration = monitor.run_state(), monitor.migration()
                if not migration.get("status"):
                    self._estimator = self._last = None
                    return Look(address=self.address, run_state=run_state)
                return Look(
                    address=self.address,
                    run_state=run_state,
                    reading=self._read(monitor, migration),
                    reason=migration.get("error-desc"),
                )
        except (Gone, Refused) as error:
            # One that comes back may be another process, with figures that begin anew; one that is only taken goes on.
            if isinstance(error, Gone) and not isinstance(error, Taken):
                self._estimator = self._last = None
            return Look(address=self.address, trouble=error.reason)
        except Exception as error:
            # Whatever one machine answers, the others are looked at.
            log.debug("%s", self.address, exc_info=error)
            return Look(
                address=self.address, trouble=f"odd answer: {type(error).__name__}: {error}"
            )

    def _read(self, monitor: Monitor, migration: dict[str, Any]) -> Reading:
        if self._estimator is None or (self._last is not None and _another(self._last, migration)):
            limit = monitor.parameters().get("downtime-limit", 300)
            self._estimator = Estimator(limit / 1000)
        self._last = self._estimator.feed(migration, self._clock())
        return self._last


def _another(last: Reading, migration: dict[str, Any]) -> bool:
    """Is it a migration that began after the last look?"""
    if last.status in ENDED:
        return migration["status"] not in ENDED
    passes: int = migration.get("ram", {}).get("dirty-sync-count", 0)
    return 0 < passes < last.number


class Looker:
    """Looks at machines every `interval` seconds until it is left; tells of each look, from threads of its own."""

    def __init__(
        self, addresses: Sequence[str], interval: float, tell: Callable[[Look], None]
    ) -> None:
        self._machines = [Watched(address) for address in addresses]
        self._interval, self._tell = interval, tell
        self._left = threading.Event()

    def __enter__(self) -> Self:
        for machine in self._machines:
            threading.Thread(target=self._run, args=(machine,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Does not wait for a look that hangs: the threads end with the process."""
        self._left.set()

    def _run(self, machine: Watched) -> None:
        while not self._left.is_set():
            look = machine.look()
            if not self._left.is_set():
                self._tell(look)
            self._left.wait(self._interval)
