"""How far something is: written by whoever does it, read by whoever shows it, from another thread."""

from __future__ import annotations

import time
from collections.abc import Callable


def _nothing() -> int:
    return 0


class Progress:
    """The present phase of a job: its name, bytes done, bytes in all (None: unknown), seconds since it began."""

    def __init__(self) -> None:
        self.begin("starting")

    def begin(
        self, phase: str, done: Callable[[], int] = _nothing, total: int | None = None
    ) -> None:
        self._done = done
        self.total = total
        self.began = time.monotonic()
        self.phase = phase

    @property
    def done(self) -> int:
        return self._done()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began
