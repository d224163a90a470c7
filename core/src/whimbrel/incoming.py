"""The destination's side: listen, accept, load, and take over once the source has committed.

The machine starts only after the EOF byte. Whatever goes wrong before it, the machine here never starts and the
source is told (SHUT 1) where there is a way back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from typing import TYPE_CHECKING

from whimbrel.channel import Channel, Listener, Role
from whimbrel.errors import (
    Cancelled,
    MachineError,
    MigrationError,
    StateError,
    StreamError,
)
from whimbrel.globalstate import GlobalState
from whimbrel.handle import Handle, Result, as_migration_error
from whimbrel.machine import RunState
from whimbrel.notifiers import What
from whimbrel.savevm import LoadDriver, SaveVMHandler
from whimbrel.state import Outcome, Status
from whimbrel.stream import InStream
from whimbrel.wire.format import PING_COMMIT, Command
from whimbrel.wire.items import SectionHeader
from whimbrel.wire.return_path import encode_pong, encode_shut

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel
    from whimbrel.route import Route

log = logging.getLogger("whimbrel.incoming")

#: After EOF the machine runs here whatever happens: how long to wait for the vmdescription behind it.
TAIL_PATIENCE = 5.0

#: Channels of sources that could not be told that the machine runs here.
_unconfirmed: list[Channel | None] = []


class Incoming(Handle):
    """A migration that is waited for, or under way. Made by Kernel.incoming()."""

    def __init__(self, kernel: Kernel, handlers: list[SaveVMHandler], *, autostart: bool) -> None:
        super().__init__()
        self.kernel = kernel
        self.autostart = autostart
        self._state = kernel.state
        self._machine = kernel.machine
        self._figures = kernel.state.figures
        if kernel.dialect.globalstate:
            handlers = [*handlers, GlobalState(self._machine)]
        self.handlers = handlers
        #: Where the source can connect to, as URIs with the real port.
        self.addresses: tuple[str, ...] = ()
        self._listener: Listener | None = None
        self._channel: Channel | None = None
        self._way_back: Channel | None = None
        self._driver: LoadDriver | None = None
        self._generation: int | None = None
        self._committed = False

    def listen(self, route: Route) -> None:
        """Open the address; run() does the rest."""
        self._listener = route.listen(self.kernel.context(Role.DESTINATION, self._cancel_fd))
        self.addresses = self._listener.addresses

    # ---- from other threads

    def cancel(self) -> None:
        with self._lock:
            if self.done or self._state.has_finished:
                return
            if self._committed:
                raise StateError(
                    "too late to cancel: the source has handed over",
                    hint="Stop the machine here, or migrate it back",
                )
            self._cancelled.set()
            os.eventfd_write(self._cancel_fd, 1)
            channel = self._channel
        self._state.leave(Status.CANCELLING)
        if channel is not None:
            channel.abort()

    # ---- the thread

    def run(self) -> None:
        error: BaseException | None = None
        try:
            self.kernel.plugins.wrap_migration(self.kernel, self._receive)
        except BaseException as raised:
            error = as_migration_error(raised, "the incoming migration")
            log.debug("incoming migration failed", exc_info=raised)
            if self._cancelled.is_set() and not self._committed:
                error = Cancelled("the incoming migration was cancelled")
        self._end(error)

    def _receive(self) -> None:
        assert self._listener is not None
        channel = self._listener.accept()
        with self._lock:
            self._channel = channel
        if self._cancelled.is_set():
            raise Cancelled("the incoming migration was cancelled")
        self._figures.started = time.monotonic()
        self._state.transition(Status.SETUP, Status.ACTIVE)
        inp = InStream(channel)
        self._driver = driver = LoadDriver(
            self._machine,
            self.handlers,
            self.kernel.dialect,
            on_command=self._command,
            unknown_section=self._unknown_section,
        )
        try:
            driver.load(inp)
        finally:
            self._figures.transferred = inp.position
        with self._lock:
            if self._cancelled.is_set():
                raise Cancelled("the incoming migration was cancelled")
            self._committed = True
        self._take_over()
        # The machine is here now: nothing behind this line may undo that, nor let the source believe otherwise.
        with contextlib.suppress(Exception):
            if driver.dialect.vmdescription:
                inp.deadline = time.monotonic() + TAIL_PATIENCE
                driver.vmdescription(inp)
        self._figures.transferred = inp.position
        self._confirm()

    def _confirm(self) -> None:
        """Say that the machine runs here. If that is not possible, the channel stays open as long as this process
        lives: its end without an answer would mean to the source that nobody runs the machine.
        """
        if self._way_back is None:
            return
        try:
            self._way_back.send([encode_shut(0)])
            self._figures.acknowledged = True
        except Exception as error:
            log.error("the machine was taken over, but the source could not be told: %s", error)
            _unconfirmed.append(self._channel)
            self._channel = None

    def _unknown_section(self, header: SectionHeader, inp: InStream) -> SaveVMHandler | None:
        answers = [
            (info, handler)
            for info, handler in self.kernel.plugins.each(
                "unknown_section", kernel=self.kernel, header=header, inp=inp
            )
            if handler is not None
        ]
        if len(answers) > 1:
            names = " and ".join(info.source for info, _ in answers)
            raise StreamError(f"section {header} is claimed by {names}", section=header.idstr)
        return answers[0][1] if answers else None

    def _command(self, command: Command, data: bytes, inp: InStream) -> None:
        assert self._channel is not None
        if command is Command.OPEN_RETURN_PATH:
            self._way_back = self._channel.return_path()
            if self._way_back is None:
                raise StreamError(
                    f"the source wants answers, but {self._channel.name} has no way back",
                    offset=inp.position,
                    hint="Set return-path off on the source",
                )
        elif command is Command.PING:
            if self._way_back is None:
                raise StreamError("PING without a return path", offset=inp.position)
            value = struct.unpack(">I", data)[0]
            if value & PING_COMMIT:
                self._generation = value & (PING_COMMIT - 1)
            self._way_back.send([encode_pong(value)])
        elif command is not Command.SWITCHOVER_START:
            raise StreamError(
                f"command {command.name} needs a capability that this side does not have",
                offset=inp.position,
                hint="Switch that capability off on the source",
            )

    def _take_over(self) -> None:
        machine = self._machine
        generation = self._generation
        if generation is None:
            generation = machine.generation + 1
        if machine.has("fence") and not machine.invoke("fence", generation):
            raise MachineError(
                f"the fence refused generation {generation}: the machine runs elsewhere",
            )
        machine.generation = generation
        machine.invoke("activate")
        sent = machine.received_run_state
        runs = sent is None or sent == RunState.RUNNING
        if runs and self.autostart:
            self.kernel.plugins.notify("announce_self", kernel=self.kernel, machine=machine)
            with contextlib.suppress(MachineError):
                machine.invoke("announce")
            machine.vm_start()
        elif runs:
            machine.run_state = RunState.PAUSED
        else:
            machine.run_state = next((s for s in RunState if s == sent), RunState.PAUSED)

    def _end(self, error: BaseException | None) -> None:
        state, figures = self._state, self._figures
        if figures.started is not None:
            figures.total_time = time.monotonic() - figures.started
        if error is not None and self._way_back is not None:
            with contextlib.suppress(MigrationError):
                self._way_back.send([encode_shut(1)])
        outcome = Outcome.COMPLETED
        final = Status.COMPLETED
        if error is not None:
            cancelled = isinstance(error, Cancelled)
            outcome = Outcome.CANCELLED if cancelled else Outcome.FAILED
            final = Status.CANCELLED if cancelled else Status.FAILED
            log.log(logging.INFO if cancelled else logging.ERROR, "incoming migration: %s", error)
        state.error, state.outcome = error, outcome
        if not state.leave(final):
            state.leave(Status.CANCELLED)
        if self._driver is not None:
            self._driver.cleanup(outcome)
        for thing in (self._channel, self._listener):
            if thing is not None:
                thing.close()
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
