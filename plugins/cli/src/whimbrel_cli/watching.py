"""A migration followed to its end: what is shown, when it is stopped, and what Ctrl-C asks."""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import click

from whimbrel.errors import OutcomeUnknown
from whimbrel_cli import units
from whimbrel_cli.control import cancel_and_wait
from whimbrel_cli.exits import NotConverging
from whimbrel_cli.monitor import Gone
from whimbrel_cli.progress import ENDED, Estimator, Reading

if TYPE_CHECKING:
    from whimbrel_cli.display import Display
    from whimbrel_cli.monitor import Monitor

_POLL = 0.1  # seconds


class OnTimeout(enum.StrEnum):
    CANCEL = "cancel"
    PAUSE = "pause"
    IGNORE = "ignore"


@attrs.frozen(kw_only=True)
class Limits:
    """Seconds; None: no limit."""

    timeout: float | None = None
    on_timeout: OnTimeout = OnTimeout.CANCEL
    stall: float | None = None


class Detached(Exception):
    """The operator leaves it to itself."""


class _Interrupts:
    """Notes Ctrl-C and SIGTERM until close(), so that no request to the monitor is cut in two.

    By a descriptor: a handler that takes a lock, as threading.Event does, waits for ever when it interrupts who holds it.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        os.eventfd_write(self._fd, 1)

    def wait(self, timeout: float) -> bool:
        """Whether one came, since the last call that said so, or within timeout seconds."""
        if not select.select([self._fd], [], [], timeout)[0]:
            return False
        os.eventfd_read(self._fd)
        return True

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._fd)


def follow(
    monitor: Monitor,
    display: Display,
    limits: Limits,
    begin: Callable[[], object],
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Begin a migration, show it until it ended, and return query-migrate's last answer. between() is called between two
    looks at it.

    An interrupt waits until it has begun: none goes on unseen.
    Raises what begin() and between() raise, NotConverging, OutcomeUnknown (the monitor is gone), Detached.
    """
    with contextlib.closing(_Interrupts()) as interrupted:
        following = _Following(monitor, display, limits, interrupted, between)
        begin()
        return following.run()


class _Following:
    def __init__(
        self,
        monitor: Monitor,
        display: Display,
        limits: Limits,
        interrupted: _Interrupts,
        between: Callable[[], None],
    ) -> None:
        self._monitor, self._display, self._limits = monitor, display, limits
        self._interrupted, self._between = interrupted, between
        self._estimator = Estimator(monitor.parameters().get("downtime-limit", 300) / 1000)
        self._began = time.monotonic()
        self._timed_out = False
        self._cancelled = False
        self._told_divergence = False

    def run(self) -> dict[str, Any]:
        status = "setup"
        while True:
            try:
                migration = self._monitor.migration()
                status = migration.get("status", status)
                reading = self._estimator.feed(migration, time.monotonic())
                self._display.show(reading)
                if status in ENDED:
                    if (
                        self._cancelled and status == "failed"
                    ):  # a QEMU that cannot write fails then
                        return {**migration, "status": "cancelled"}
                    return migration
                self._between()
                self._obey_limits(reading)
                if self._interrupted.wait(_POLL):
                    self._ask()
            except Gone as error:
                raise OutcomeUnknown(
                    f"the source is gone in the state '{status}' of its migration: {error}",
                    hint="Look at both sides: the destination may run the machine, or not",
                ) from error

    def _obey_limits(self, reading: Reading) -> None:
        from whimbrel_cli.display import divergence

        now = time.monotonic()
        if reading.excess is not None and not self._told_divergence:
            self._told_divergence = True
            self._display.note(divergence(reading))
        stall = self._limits.stall
        if stall is not None and self._estimator.stalled_for(now) > stall:
            self._give_up(f"no progress for {units.time(stall)}", reading)
        timeout = self._limits.timeout
        if timeout is None or self._timed_out or now - self._began <= timeout:
            return
        self._timed_out = True
        late = f"not done after {units.time(timeout)}"
        if self._limits.on_timeout is OnTimeout.CANCEL:
            self._give_up(late, reading)
        elif self._limits.on_timeout is OnTimeout.PAUSE:
            self._monitor.execute("stop")
            self._display.note(f"{late}: the machine is paused, so that it ends; it arrives paused")
        else:
            self._display.note(late)

    def _give_up(self, why: str, reading: Reading) -> None:
        from whimbrel_cli.display import divergence

        self._display.hide()
        if cancel_and_wait(self._monitor).startswith("completed"):
            return  # it was faster
        raise NotConverging(
            f"{why}: cancelled" + (f"; {divergence(reading)}" if reading.excess else ""),
            hint="The machine runs on at the source. More bandwidth, a longer downtime, auto-converge=on or"
            " --on-timeout pause would let it end",
        )

    def _ask(self) -> None:
        """Without a terminal nobody can be asked, and a migration that nobody watches should not go on unknown."""
        self._display.hide()
        answer = "c"
        if sys.stdin.isatty() and sys.stderr.isatty():
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                answer = click.prompt(
                    "\n(c)ancel the migration, (d)etach and let it go on, or (w)atch on?",
                    type=click.Choice(["c", "d", "w"]),
                    default="w",
                    show_choices=False,
                    err=True,
                )
            except click.Abort:
                answer = "d"
            finally:
                signal.signal(signal.SIGINT, before)
        if answer == "c":
            cancel_and_wait(self._monitor)
            self._cancelled = True
        elif answer == "d":
            raise Detached
