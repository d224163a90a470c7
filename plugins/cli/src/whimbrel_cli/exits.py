"""The exit statuses of migctl, in one table."""

from __future__ import annotations

import enum

from whimbrel.errors import BlockedError, Cancelled, LocalError, MigrationError, OutcomeUnknown


class Exit(enum.IntEnum):
    """What a shell script branches on."""

    DONE = 0
    FAILED = 1
    USAGE = 2  # the command line is wrong
    BLOCKED = 3  # there are reasons against it; nothing was begun
    NOT_CONVERGING = 4  # the machine writes its memory faster than it can be sent, or time is up
    CANCELLED = 5
    UNKNOWN = 6  # the other side may run the machine, or not
    DEFECT = 70
    INTERRUPTED = 130


class NotConverging(LocalError):
    """It would not end, or not in time, and was stopped."""


#: The first that fits.
_BY_ERROR: tuple[tuple[type[MigrationError], Exit], ...] = (
    (OutcomeUnknown, Exit.UNKNOWN),
    (Cancelled, Exit.CANCELLED),
    (NotConverging, Exit.NOT_CONVERGING),
    (BlockedError, Exit.BLOCKED),
)


def status_of(error: MigrationError) -> Exit:
    return next((status for kind, status in _BY_ERROR if isinstance(error, kind)), Exit.FAILED)
