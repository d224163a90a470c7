"""What the two sides of a migration have in common: cancelling, and the order in which a run ends."""

from __future__ import annotations

import abc
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from whimbrel.channel import Channel
from whimbrel.errors import Cancelled
from whimbrel.globalstate import GlobalState
from whimbrel.handle import Handle, Result
from whimbrel.notifiers import What
from whimbrel.savevm import SaveVMHandler
from whimbrel.state import Outcome, Status
from whimbrel.turns import TURNS
from whimbrel.wire.format import GlobalStateForm

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel
    from whimbrel.route import Route

#: Seconds that a cancelled run waits for the notifiers of `cancelling`.
_PATIENCE = 1.0
_FINAL = {
    Outcome.COMPLETED: Status.COMPLETED,
    Outcome.CANCELLED: Status.CANCELLED,
    Outcome.FAILED: Status.FAILED,
    Outcome.UNKNOWN: Status.FAILED,
}


class Run(Handle):
    """One run of a kernel. Its thread calls run(), which ends with _end()."""

    route: Route

    def __init__(self, kernel: Kernel, handlers: list[SaveVMHandler]) -> None:
        super().__init__()
        self.kernel = kernel
        self._state = kernel.state
        self._machine = kernel.machine
        self._figures = kernel.state.figures
        self._global_state = GlobalState(self._machine, kernel.dialect.globalstate)
        if kernel.dialect.globalstate is not GlobalStateForm.NEVER:
            handlers = [*handlers, self._global_state]
        self.handlers = handlers
        self._channel: Channel | None = None
        self._short_turns = False
        #: Past the point of no return: cancelling is refused.
        self._committed = False
        self._cancel_told = threading.Event()
        #: Tells the handlers the outcome; there are none to tell before a driver exists.
        self._tell_handlers: Callable[[Outcome], None] = lambda _: None

    @abc.abstractmethod
    def run(self) -> None:
        """The whole run, on its thread. Never raises."""

    @abc.abstractmethod
    def _too_late(self) -> NoReturn:
        """Refuse a cancel after the point of no return."""

    def cancel(self) -> None:
        with self._lock:
            if self.done or self._state.has_finished:
                return
            if self._committed:
                self._too_late()
            self._cancelled.set()
        try:
            profile = self.kernel.settings.profile
            self._state.leave(Status.CANCELLING if profile.cancelling else Status.CANCELLED)
        finally:
            self._cancel_told.set()
            self._wake()
            os.eventfd_write(self._cancel_fd, 1)
            with self._lock:
                channel = self._channel
            if channel is not None:
                channel.abort()

    def _wake(self) -> None:
        """Wake the thread from what is not a descriptor."""

    def _was_cancelled(self) -> bool:
        """A cancel came before the point of no return, and everybody was told of it: first, since the machine may run
        again as its consequence.
        """
        if not self._cancelled.is_set() or self._committed:
            return False
        self._cancel_told.wait(_PATIENCE)
        return True

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the migration was cancelled")

    def _opened(self, channel: Channel) -> None:
        """From here on a cancel aborts the channel; one that came before is noticed."""
        with self._lock:
            self._channel = channel
        if not self._short_turns:
            TURNS.hold()
            self._short_turns = True
        self._check_cancelled()

    def _commit_point(self) -> None:
        """The point of no return. Raises Cancelled if a cancel was first."""
        with self._lock:
            self._check_cancelled()
            self._committed = True

    def _end(
        self, outcome: Outcome, error: BaseException | None, what: str, log: logging.Logger
    ) -> None:
        """The final state, then clean-up, then whoever waits."""
        state, figures = self._state, self._figures
        if figures.started is not None:
            figures.total_time = time.monotonic() - figures.started
        state.error, state.outcome = error, outcome
        if not state.leave(_FINAL[outcome]):
            state.leave(Status.CANCELLED)  # cancelling, when the error came first
        if error is not None:
            level = logging.INFO if outcome is Outcome.CANCELLED else logging.ERROR
            log.log(level, "%s: %s", what, error)
        self._tell_handlers(outcome)
        self._release()
        self.kernel.run_ended(self)
        self.kernel.notify(What.CLEANUP)
        self._finish(
            Result(
                outcome=outcome,
                error=error,
                acknowledged=bool(figures.acknowledged),
                figures=figures,
            )
        )

    def _release(self) -> None:
        if self._short_turns:
            TURNS.release()
            self._short_turns = False
        if self._channel is not None:
            self._channel.close()
