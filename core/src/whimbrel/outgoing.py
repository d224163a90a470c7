"""The source's side of a migration: one thread from connect to clean-up, and the commit in two phases.

The commit, with existing messages of the stream: after all state a PING goes out and the EOF byte is held back. The
PONG says that everything before was loaded. Then EOF is sent: the point of no return, since a destination starts only
after EOF. SHUT 0 says that it has taken over.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import struct
import threading
import time
from typing import TYPE_CHECKING, NoReturn

import attrs

from whimbrel.channel import Role
from whimbrel.errors import (
    Cancelled,
    ChannelError,
    DeadlineExceeded,
    EndOfStream,
    MigrationError,
    OutcomeUnknown,
    PeerError,
    StateError,
    StreamError,
)
from whimbrel.handle import as_migration_error
from whimbrel.machine import RunState
from whimbrel.notifiers import What
from whimbrel.pace import SLICE, Pace
from whimbrel.run import Run
from whimbrel.savevm import Budget, Mode, Pending, SaveDriver, SaveVMHandler
from whimbrel.state import Outcome, Status
from whimbrel.stream import WINDOW, InStream, OutStream
from whimbrel.wire.format import PING_COMMIT, PING_OPEN, PONG_RELAY, Answer, Command
from whimbrel.wire.items import Configuration
from whimbrel.wire.return_path import read_answer

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel
    from whimbrel.route import Route

log = logging.getLogger("whimbrel.outgoing")

#: Expected downtime is worked out anew only for windows that moved more than this many bytes.
SIGNIFICANT = 10_000
#: How long the source waits at the start for the answer that shows the length of the way; a destination need not give one.
ROUND_TRIP_PATIENCE = 1.0
_ITS_LOG = "Its own log says why"


class Outgoing(Run):
    """A migration to `uri`. Made by Kernel.migrate()."""

    def __init__(self, kernel: Kernel, route: Route, handlers: list[SaveVMHandler]) -> None:
        super().__init__(kernel, handlers)
        self.route = route
        self.uri = str(route.uri)
        self._figures.started = time.monotonic()
        self._answers: InStream | None = None
        self._relayed = False  # what the channel leads to is a relay
        self._stopped_from: RunState | None = None  # the run state to go back to
        self._go = threading.Event()  # out of pre-switchover
        self._stopped_at = 0.0
        self._round_trip = 0.0
        self._scan_time = 0.0
        self._whole = 0  # bytes of the live sections before the first pass
        self._dirty_rate: float | None = None
        #: The value of the last PONG: the destination had loaded everything before the PING of that value.
        self.last_pong: int | None = None

    @property
    def has_return_path(self) -> bool:
        """The destination was asked for answers."""
        return self._answers is not None

    def _too_late(self) -> NoReturn:
        raise StateError(
            "too late to cancel: the end of the stream was sent and the destination may run the machine",
            hint="Wait for its answer",
        )

    # ---- the thread

    def run(self) -> None:
        error: BaseException | None = None
        try:
            self.kernel.plugins.wrap_migration(self.kernel, self._migrate)
        except BaseException as raised:
            error = as_migration_error(raised, f"migration to {self.uri}")
            log.debug("migration failed", exc_info=raised)
        outcome = Outcome.COMPLETED
        if error is not None:
            error, outcome = self._settle(error)
        else:
            self._machine.run_state = RunState.POSTMIGRATE
        self._end(outcome, error, f"migration to {self.uri}", log)

    def _migrate(self) -> None:
        self._connect()
        self._setup()
        self._iterate()
        self._switch_over()

    def _connect(self) -> None:
        channel = self.route.connect(self.kernel.context(Role.SOURCE, self._cancel_fd))
        self._opened(channel)
        self._out = OutStream(channel)
        self._driver = SaveDriver(self._out, self._machine, self.handlers, self.kernel.dialect)
        self._tell_handlers = self._driver.cleanup

    def _setup(self) -> None:
        began = time.monotonic()
        settings = self.kernel.settings
        assert self._channel is not None
        self._driver.header(self._configuration())
        way_back = self._channel.return_path() if settings["return-path"] else None
        if way_back is not None:
            self._answers = InStream(way_back, buffer_size=4096)
            self._driver.command(Command.OPEN_RETURN_PATH)
            if not settings.opens_channels():
                self._measure_round_trip()
        answers = self._wait_for_pong if way_back is not None else None
        self._driver.setup(attrs.evolve(self._state.params, wait_for_pong=answers))
        if way_back is not None and settings.opens_channels():
            self._measure_round_trip()  # nobody answers before all channels are there
        self._figures.setup_time = time.monotonic() - began
        self._figures.expected_downtime = self._downtime_limit
        self._pass()
        self._check_cancelled()
        self._state.transition(Status.SETUP, Status.ACTIVE)

    def _configuration(self) -> Configuration:
        machine = self._machine
        return Configuration(
            machine_type=machine.machine_type,
            target_page_bits=(
                None
                if machine.target_page_bits == machine.legacy_page_bits
                else machine.target_page_bits
            ),
            capabilities=self.kernel.settings.on_wire() or None,
            uuid=machine.uuid,
        )

    def _measure_round_trip(self) -> None:
        """How long an answer takes: part of the downtime that no bandwidth shortens."""
        self._driver.command(Command.PING, struct.pack(">I", PING_OPEN))
        self._out.flush()
        began = time.monotonic()
        with contextlib.suppress(DeadlineExceeded):
            self._await_pong(PING_OPEN, began + ROUND_TRIP_PATIENCE)
            self._round_trip = time.monotonic() - began

    # ---- iterating

    def _iterate(self) -> None:
        out, figures = self._out, self._figures
        settings = self.kernel.settings
        out.pace = pace = Pace(lambda: int(settings["max-bandwidth"]), self._cancelled.wait)
        out.start_window()
        self._whole = self._driver.pending(exact=False).precopy
        while True:
            self._check_cancelled()
            if out.window_elapsed >= WINDOW:
                self._close_window()
            left = pace.left(out.window_end)
            if left == 0:
                self._cancelled.wait(max(0.0, min(SLICE, out.window_end - time.monotonic())))
                continue
            pending = self._pending()
            if pending.precopy and pending.precopy >= figures.threshold:
                budget = Budget(
                    bytes=left,
                    deadline=out.window_end,
                    cancelled=self._cancelled.is_set,
                )
                self._driver.iterate(budget)
                figures.transferred = out.position
            else:
                return

    def _pending(self) -> Pending:
        """What is left; looked at closely once the estimate falls below the threshold."""
        pending = self._driver.pending(exact=False)
        if self._must_look(pending.precopy):
            began = time.monotonic()
            pending = self._driver.pending(exact=True)
            self._scan_time = time.monotonic() - began
            self._pass()
        self._dirty_rate = pending.dirty_bytes_per_s
        return pending

    def _must_look(self, left: int) -> bool:
        """Nearly all is sent, and what was written meanwhile counts."""
        if not self._machine.is_running:
            return False  # nothing is written, and no downtime begins
        figures = self._figures
        if left:
            return left < figures.threshold
        # Not when the first pass went so fast that everything once more, zero pages in full, keeps the downtime limit.
        out = self._out
        within = max(0.0, self._downtime_limit - 2 * self._round_trip)
        in_first_window = figures.passes == 1 and figures.mbps < 0
        return not (
            in_first_window and self._whole * out.window_elapsed <= out.window_bytes * within
        )

    def _pass(self) -> None:
        self._figures.passes += 1
        self.kernel.notify(What.PASS, pass_number=self._figures.passes)

    @property
    def _downtime_limit(self) -> float:
        return float(self.kernel.settings["downtime-limit"]) / 1000

    def _close_window(self) -> None:
        out, figures = self._out, self._figures
        moved, elapsed = out.window_bytes, out.window_elapsed
        figures.bandwidth = moved / elapsed
        figures.mbps = figures.bandwidth * 8 / 1e6
        # At switchover come one more look for changes, and two answers of the destination (PONG, SHUT).
        overhead = self._scan_time + 2 * self._round_trip
        figures.threshold = figures.bandwidth * max(0.0, self._downtime_limit - overhead)
        if self._dirty_rate is not None and moved > SIGNIFICANT:
            figures.expected_downtime = self._dirty_rate / figures.bandwidth
        out.start_window()
        self._look_for_refusal()

    def _look_for_refusal(self) -> None:
        """Has the destination given up already?"""
        if self._answers is not None:
            with contextlib.suppress(DeadlineExceeded):
                self._note(*self._next_answer(time.monotonic()))

    # ---- switchover

    def _switch_over(self) -> None:
        self._check_cancelled()
        machine = self._machine
        with machine.turn:
            self._stopped_at = time.monotonic()
            machine.invoke("wakeup")
            before = machine.run_state
            self._global_state.state = str(before)
            machine.vm_stop(RunState.FINISH_MIGRATE)
            self._stopped_from = before
        settings = self.kernel.settings
        if settings["pause-before-switchover"]:
            self._wait_to_go_on()
        elif settings.profile.cancelling:
            self._state.transition(Status.ACTIVE, Status.DEVICE)
        self._check_cancelled()
        self._out.pace = None  # it stands still: as fast as the link can
        self._pass()
        self._driver.complete(Mode.PRECOPY)
        machine.invalidate()
        self._figures.transferred = self._out.position
        self._commit()

    def _wait_to_go_on(self) -> None:
        """In pre-switchover, for as long as it takes. Only a destination that gives up ends it, since the machine
        stands still.
        """
        self._state.transition(Status.ACTIVE, Status.PRE_SWITCHOVER)
        while not self._go.wait(WINDOW):
            self._look_for_refusal()
        self._check_cancelled()
        self._state.transition(Status.PRE_SWITCHOVER, Status.DEVICE)

    def go_on(self) -> None:
        """Out of pre-switchover. For Kernel.migrate_continue()."""
        self._go.set()

    def _wake(self) -> None:
        self._go.set()

    def stay_stopped(self) -> None:
        """Somebody stopped the machine while it stood still for the switchover: it is not to run afterwards. For
        Kernel.stop().
        """
        if self._stopped_from is RunState.RUNNING:
            self._stopped_from = RunState.PAUSED
            self._global_state.state = str(RunState.PAUSED)

    def _commit(self) -> None:
        assert self._channel is not None
        timeout = self.kernel.settings["commit-timeout"] / 1000
        generation = self._machine.generation + 1
        if self._answers is not None:
            value = PING_COMMIT | (generation & (PING_COMMIT - 1))
            self._driver.command(Command.PING, struct.pack(">I", value))
            self._out.flush()
            self._await_pong(value, time.monotonic() + timeout)
        tail = self._driver.tail()
        self._commit_point()
        # Before this line the destination cannot have started. Behind it, only proof lets this side run again.
        try:
            # A byte by itself behind what may be long: with it a filter ends what it began, and nothing follows.
            self._out.write(tail[:-1])
            self._out.write(tail[-1:])
            self._out.flush()
            if self._answers is None:
                # Completed means then that every byte was accepted and that the channel ended in order.
                self._channel.finish(time.monotonic() + timeout)
            else:
                self._await_shut(time.monotonic() + timeout)
            self._figures.acknowledged = self._answers is not None
        except PeerError:
            # It may have been claimed over there: not to be used twice.
            self._machine.generation = generation
            raise
        except Exception as error:
            self._judge(as_migration_error(error, "the commit"), generation)
        figures, now = self._figures, time.monotonic()
        figures.downtime = now - self._stopped_at
        figures.transferred = self._out.position
        if figures.started is not None and figures.setup_time is not None:
            elapsed = now - figures.started - figures.setup_time
            figures.mbps = figures.transferred * 8 / 1e6 / max(elapsed, 1e-6)
        self._machine.generation = generation
        if self._answers is not None:
            with contextlib.suppress(MigrationError):
                self._channel.finish(time.monotonic() + timeout)

    def _judge(self, error: BaseException, generation: int) -> None:
        """The link failed after the point of no return. Returns if the destination has the machine; raises the error
        if it is certain that it has not; raises OutcomeUnknown otherwise.
        """
        if self._peer_is_gone(error):
            self._machine.generation = generation
            raise error
        fenced = self._machine.ask_fence(generation)
        if fenced:
            self._machine.generation = generation
            raise error
        if fenced is False:
            log.warning("%s; the fence says that the destination has the machine", error)
            self._figures.acknowledged = False
            return
        raise OutcomeUnknown(
            f"the link was lost after the end of the stream was sent: {error}",
            hint="The destination may run the machine, or not. Look there; if it does not and never will, let it run"
            " here with resolve(run_here=True)",
        ) from error

    def _peer_is_gone(self, error: BaseException) -> bool:
        """Proof that the process at the other end is gone, so that nothing can run there."""
        assert self._channel is not None
        if self._answers is None or self._relayed or not self._channel.eof_means_peer_gone:
            return False  # a destination that cannot answer closes when it runs the machine, too
        if isinstance(error, EndOfStream):
            return True
        # A connection that timed out or lost its way is at its end too, as the system sees it: no proof of anything.
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.EPIPE, errno.ECONNRESET):
            return False
        try:
            return self._answers.channel.peek(1, time.monotonic() + 1.0) == b""
        except MigrationError:
            return False

    # ---- answers of the destination

    def _wait_for_pong(self, value: int, timeout: float) -> bool:
        """See RunParams."""
        self._out.flush()
        try:
            self._await_pong(value, time.monotonic() + timeout)
        except DeadlineExceeded:
            return False
        return True

    def _await_pong(self, value: int, deadline: float) -> None:
        while True:
            answer, data = self._next_answer(deadline)
            self._note(answer, data)
            if answer is Answer.PONG and struct.unpack(">I", data)[0] == value:
                return

    def _await_shut(self, deadline: float) -> None:
        while True:
            answer, data = self._next_answer(deadline)
            if answer is Answer.SHUT and not any(data):
                return
            self._note(answer, data)

    def _next_answer(self, deadline: float) -> tuple[Answer, bytes]:
        assert self._answers is not None
        self._answers.deadline = deadline
        try:
            return read_answer(self._answers)
        except EndOfStream as error:
            raise EndOfStream(
                "the destination closed the connection without an answer",
                hint=self._answers.channel.explain() or _ITS_LOG,
            ) from error

    def _note(self, answer: Answer, data: bytes) -> None:
        """An answer that nobody waits for: refusals end the migration."""
        log.debug("answer %s %s", answer.name, data.hex())
        assert self._answers is not None
        if answer is Answer.SHUT:
            status = struct.unpack(">I", data)[0]
            if status:
                raise PeerError(
                    f"the destination refused the migration (status {status})",
                    hint=self._answers.channel.explain() or _ITS_LOG,
                )
            raise StreamError("the destination said that it is done before the end of the stream")
        if answer is Answer.PONG:
            (value,) = struct.unpack(">I", data)
            if value == PONG_RELAY:
                self._relayed = True
            else:
                self.last_pong = value
        if answer not in (Answer.PONG, Answer.SWITCHOVER_ACK):
            raise StreamError(f"{answer.name} is not an answer of this kind of migration")

    # ---- afterwards

    def _settle(self, error: BaseException) -> tuple[BaseException, Outcome]:
        """Let the machine go on here, unless the destination may have it."""
        if isinstance(error, OutcomeUnknown):
            return error, Outcome.UNKNOWN
        outcome = Outcome.FAILED
        if self._was_cancelled():
            outcome = Outcome.CANCELLED
            if not isinstance(error, Cancelled):
                error = Cancelled("the migration was cancelled")
        elif isinstance(error, ChannelError) and not self._committed:
            error = self._reason_of_peer(error)
        try:
            self._resume()
        except MigrationError as failure:
            log.error("the machine could not go on: %s", failure)
            self._machine.run_state = RunState.INTERNAL_ERROR
        return error, outcome

    def _reason_of_peer(self, error: ChannelError) -> MigrationError:
        """A broken pipe is explained better by what the destination said before it closed."""
        if self._answers is not None:
            with contextlib.suppress(MigrationError):
                while True:
                    try:
                        self._note(*self._next_answer(time.monotonic() + 0.1))
                    except PeerError as refusal:
                        return refusal
        return error

    def resume_here(self) -> None:
        """Somebody has made sure that the destination does not run the machine. For Kernel.resolve()."""
        self._machine.claim()
        self._resume()

    def _resume(self) -> None:
        machine = self._machine
        with machine.turn:
            before = self._stopped_from
            if before is None:
                return
            if not machine.active:
                machine.activate()
            if before is RunState.RUNNING:
                machine.vm_start()
            else:
                machine.run_state = before
