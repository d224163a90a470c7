"""The state of a migration: one table of edges, compare-and-set, and the figures that the kernel itself owns.

The states are those of QEMU's MigrationStatus. `python -m whimbrel.state` prints the table as a diagram for the docs.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable

import attrs

log = logging.getLogger("whimbrel.state")


class Status(enum.StrEnum):
    """MigrationStatus, in QEMU's words."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


S = Status
_FINAL = (S.NONE, S.COMPLETED, S.FAILED, S.CANCELLED)

#: Every edge there is. Both sides use the same table.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    **{s: frozenset({S.SETUP}) for s in _FINAL},
    S.SETUP: frozenset({S.ACTIVE, S.WAIT_UNPLUG, S.FAILED, S.CANCELLING, S.CANCELLED}),
    S.WAIT_UNPLUG: frozenset({S.ACTIVE, S.FAILED, S.CANCELLING, S.CANCELLED}),
    S.ACTIVE: frozenset(
        {
            S.PRE_SWITCHOVER,
            S.DEVICE,
            S.POSTCOPY_DEVICE,
            S.POSTCOPY_ACTIVE,
            S.COLO,
            S.COMPLETED,
            S.FAILED,
            S.CANCELLING,
            S.CANCELLED,
        }
    ),
    S.PRE_SWITCHOVER: frozenset({S.DEVICE, S.POSTCOPY_ACTIVE, S.FAILED, S.CANCELLING, S.CANCELLED}),
    S.DEVICE: frozenset(
        {
            S.COMPLETED,
            S.POSTCOPY_DEVICE,
            S.POSTCOPY_ACTIVE,
            S.COLO,
            S.FAILED,
            S.CANCELLING,
            S.CANCELLED,
        }
    ),
    S.POSTCOPY_DEVICE: frozenset({S.POSTCOPY_ACTIVE, S.FAILED, S.CANCELLING, S.CANCELLED}),
    S.POSTCOPY_ACTIVE: frozenset({S.COMPLETED, S.POSTCOPY_PAUSED, S.FAILED}),
    S.POSTCOPY_PAUSED: frozenset({S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER}),
    S.POSTCOPY_RECOVER_SETUP: frozenset({S.POSTCOPY_RECOVER, S.POSTCOPY_PAUSED}),
    S.POSTCOPY_RECOVER: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED}),
    S.COLO: frozenset({S.COMPLETED, S.FAILED, S.CANCELLING, S.CANCELLED}),
    S.CANCELLING: frozenset({S.CANCELLED}),
}


class Outcome(enum.StrEnum):
    """How a finished migration ended, for the question who may run the machine."""

    COMPLETED = "completed"  # the destination runs it
    FAILED = "failed"  # it stays here
    CANCELLED = "cancelled"  # it stays here, on request
    UNKNOWN = "unknown"  # the link was lost after the point of no return


@attrs.define(kw_only=True)
class RunParams:
    """Parameters of one run, given to migrate() and forgotten after it."""

    blk: bool = False
    inc: bool = False
    #: Sends what was written and waits for the PONG to a PING of that value, as many seconds at most; whether it came. For
    #: handlers, on the thread of the migration, from setup() on. None: there is no return path.
    wait_for_pong: Callable[[int, float], bool] | None = None


@attrs.define(kw_only=True)
class Figures:
    """What the kernel measures. Times in seconds, bandwidth in bytes per second, sizes in bytes."""

    started: float | None = None
    total_time: float | None = None
    setup_time: float | None = None
    downtime: float | None = None
    expected_downtime: float | None = None
    transferred: int = 0
    bandwidth: float = 0.0
    #: 10^6 bit per second in the last window, after the end over all; -1 before the first window closed.
    mbps: float = -1.0
    threshold: float = 0.0
    passes: int = 0
    #: None before the end; then whether the destination said that it has taken over.
    acknowledged: bool | None = None

    def times(self) -> dict[str, float | None]:
        """The times by their names in QMP."""
        total = self.total_time
        if total is None and self.started is not None:
            total = time.monotonic() - self.started
        return {
            "total-time": total,
            "setup-time": self.setup_time,
            "downtime": self.downtime,
            "expected-downtime": self.expected_downtime if self.downtime is None else None,
        }


class MigrationState:
    """The state of the one migration that a kernel can have at a time. Thread-safe."""

    def __init__(self, on_change: Callable[[Status, Status], None] | None = None) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._status = Status.NONE
        self._on_change = on_change
        self.error: BaseException | None = None
        self.outcome: Outcome | None = None
        self.params = RunParams()
        self.figures = Figures()

    @property
    def status(self) -> Status:
        return self._status

    @property
    def in_setup(self) -> bool:
        return self._status is S.SETUP

    @property
    def has_finished(self) -> bool:
        """Completed, failed or cancelled."""
        return self._status in (S.COMPLETED, S.FAILED, S.CANCELLED)

    @property
    def has_failed(self) -> bool:
        """Failed or cancelled: the machine is still here."""
        return self._status in (S.FAILED, S.CANCELLED)

    @property
    def is_running(self) -> bool:
        """A migration is under way, setup and cancelling included."""
        return self._status not in _FINAL

    def transition(self, expected: Status, new: Status) -> bool:
        """Compare and set: go to `new` if the status is `expected`, and say whether that happened.

        Raises ValueError for an edge that the table does not have. Observers are called after the change, outside the
        lock, by the thread that made it.
        """
        if new not in TRANSITIONS.get(expected, ()):
            raise ValueError(f"there is no transition from {expected} to {new}")
        with self._lock:
            if self._status is not expected:
                return False
            self._status = new
            self._changed.notify_all()
        log.info("migration %s -> %s", expected, new)
        if self._on_change is not None:
            self._on_change(expected, new)
        return True

    def leave(self, new: Status, *, only_from: frozenset[Status] | None = None) -> bool:
        """Go to `new` from whatever state allows it; False when none does (a final state is never changed)."""
        while True:
            current = self._status
            if current in _FINAL or new not in TRANSITIONS.get(current, ()):
                return False
            if only_from is not None and current not in only_from:
                return False
            if self.transition(current, new):
                return True

    def wait_for(self, predicate: Callable[[Status], bool], timeout: float | None = None) -> bool:
        """Wait until the status satisfies predicate; False after timeout seconds."""
        with self._lock:
            return self._changed.wait_for(lambda: predicate(self._status), timeout)

    def reset(self, params: RunParams) -> None:
        """Before a run: figures, error, outcome and the parameters of the run start anew."""
        with self._lock:
            self.error = None
            self.outcome = None
            self.params = params
            self.figures = Figures()


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    name = {s: s.value.replace("-", "_") for s in Status}
    lines += [f"    {name[a]} --> {name[b]}" for a, to in TRANSITIONS.items() for b in sorted(to)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
