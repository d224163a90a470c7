"""Reasons why the machine must not be migrated now. They outlive migrations; removing is by identity."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import attrs

from whimbrel.errors import StateError


@attrs.frozen(eq=False)
class Blocker:
    """One reason. Two blockers with equal text are two blockers."""

    reason: str


class Blockers:
    """The blockers of one kernel."""

    def __init__(self, is_running: Callable[[], bool]) -> None:
        self._is_running = is_running
        self._lock = threading.Lock()
        self._blockers: list[Blocker] = []

    def add(self, reason: str | Blocker) -> Blocker:
        """Block migration until the returned blocker is removed. Raises StateError while a migration runs."""
        blocker = reason if isinstance(reason, Blocker) else Blocker(reason)
        with self._lock:
            if self._is_running():
                raise StateError(
                    f"a migration is in progress: too late to block it ({blocker.reason})",
                    hint="Cancel it first",
                )
            if not any(b is blocker for b in self._blockers):
                self._blockers.append(blocker)
        return blocker

    def remove(self, blocker: Blocker) -> None:
        """Take this very blocker away; nothing happens if it is not there."""
        with self._lock:
            self._blockers = [b for b in self._blockers if b is not blocker]

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons, newest first."""
        with self._lock:
            return tuple(b.reason for b in reversed(self._blockers))

    def __len__(self) -> int:
        return len(self._blockers)

    def __iter__(self) -> Iterator[Blocker]:
        return iter(tuple(self._blockers))
