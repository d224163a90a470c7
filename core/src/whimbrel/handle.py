"""What migrate() and incoming() return: a run that goes on by itself, to wait for, await or cancel. And what monitor()
returns.
"""

from __future__ import annotations

import abc
import contextlib
import os
import threading
from collections.abc import Callable, Generator
from typing import Any, Protocol

import attrs

from whimbrel.errors import MigrationError
from whimbrel.state import Figures, Outcome


@attrs.frozen(kw_only=True)
class Result:
    """How a run ended. Times in seconds."""

    outcome: Outcome
    error: BaseException | None
    #: The destination said that it has taken over; False where there was no return path to say so.
    acknowledged: bool
    figures: Figures


class Handle(abc.ABC):
    """One run, outgoing or incoming. Thread-safe."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._result: Result | None = None
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._cancel_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def done(self) -> bool:
        """Over, clean-up included."""
        return self._finished.is_set()

    @property
    def result(self) -> Result | None:
        """How it ended, or None while it goes on. Never raises."""
        return self._result

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end, clean-up included.

        Raises TimeoutError, or the MigrationError that the run ended with (Cancelled, OutcomeUnknown, ...).
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the migration is not over after {timeout} s")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        assert self._result is not None
        if self._result.error is not None:
            raise self._result.error
        return self._result

    def __await__(self) -> Generator[Any, None, Result]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> Result:
        import asyncio

        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(over.set)

        self.add_done_callback(tell)
        await over.wait()
        return self.wait()

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Called once the run is over, on its thread; at once if it is over already."""
        with self._lock:
            if not self.done:
                self._callbacks.append(callback)
                return
        callback()

    @abc.abstractmethod
    def cancel(self) -> None:
        """Stop the run within a second, whatever the peer does. Nothing happens when it is over already.

        Raises StateError after the point of no return.
        """

    def _finish(self, result: Result) -> None:
        with self._lock:
            self._result = result
            self._finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            with contextlib.suppress(Exception):
                callback()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._cancel_fd)


class Monitor(Protocol):
    """What Kernel.monitor() returns: a monitor that listens, made by a plugin."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where clients can connect to, with the real port."""

    def close(self) -> None:
        """End it and its connections, from any thread, once or more often; closed when this returns."""


def as_migration_error(error: BaseException, doing: str) -> BaseException:
    """An error of this project as it is; anything else (a handler's bug) with what was being done."""
    if isinstance(error, MigrationError):
        return error
    wrapped = MigrationError(f"{doing} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
