"""Callbacks that are told of every change of a migration, and when the machine stops and runs. They outlive migrations."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from whimbrel.state import MigrationState, Status

log = logging.getLogger("whimbrel.notifiers")


class What(enum.StrEnum):
    """What a notifier is told of."""

    SETUP = "setup"  # accepted; the migration thread does not exist yet
    STATE = "state"  # the status changed
    PASS = "pass"  # noqa: S105 - a pass over what the machine has written begins (source)
    ERROR = "error"  # the start failed
    CLEANUP = "cleanup"  # everything is released; the last notification of a run
    STOP = "stop"  # the machine ran and stands still now, whoever stopped it
    RESUME = "resume"  # it stood still and runs now


@attrs.frozen
class Notification:
    """What happened, with the state as it is now. `old` and `new` are set for STATE, `pass_number` (from 1) for PASS."""

    what: What
    state: MigrationState
    old: Status | None = None
    new: Status | None = None
    pass_number: int | None = None


Notifier = Callable[[Notification], object]


class Notifiers:
    """Called in the order of adding, on the thread where the change happened. One that raises is logged, no more.
    A notifier may add and remove notifiers, itself included.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notifiers: list[Notifier] = []

    def add(self, notifier: Notifier) -> Notifier:
        with self._lock:
            self._notifiers.append(notifier)
        return notifier

    def remove(self, notifier: Notifier) -> None:
        """Nothing happens if it is not there."""
        with self._lock:
            if notifier in self._notifiers:
                self._notifiers.remove(notifier)

    def notify(self, notification: Notification) -> None:
        with self._lock:
            notifiers = tuple(self._notifiers)
        for notifier in notifiers:
            try:
                notifier(notification)
            except Exception:
                log.exception("notifier %r failed at %s", notifier, notification.what)
