"""The destination's side: listen, accept, load, and take over once the source has committed.

The machine starts only after the EOF byte. Whatever goes wrong before it, the machine here never starts and the
source is told (SHUT 1) where there is a way back.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, NoReturn

from whimbrel.arrivals import Arrivals
from whimbrel.channel import Channel, Role
from whimbrel.errors import (
    Cancelled,
    MachineError,
    MigrationError,
    StateError,
    StreamError,
)
from whimbrel.handle import as_migration_error
from whimbrel.machine import RunState
from whimbrel.run import Run
from whimbrel.savevm import LoadDriver, SaveVMHandler, load_cleanup
from whimbrel.state import Outcome, Status
from whimbrel.stream import InStream
from whimbrel.way_back import WayBack
from whimbrel.wire.items import SectionHeader

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel
    from whimbrel.route import Route

log = logging.getLogger("whimbrel.incoming")

#: After EOF the machine runs here whatever happens: how long to wait for the vmdescription behind it.
TAIL_PATIENCE = 5.0

#: Channels of sources that could not be told that the machine runs here.
_unconfirmed: list[Channel | None] = []


class Incoming(Run):
    """A migration that is waited for, or under way. Made by Kernel.incoming()."""

    def __init__(self, kernel: Kernel, handlers: list[SaveVMHandler]) -> None:
        super().__init__(kernel, handlers)
        self._machine.received_run_state = None
        #: Where the source can connect to, as URIs with the real port.
        self.addresses: tuple[str, ...] = ()
        #: The same as QMP's SocketAddress, where it listens on sockets.
        self.socket_addresses: tuple[dict[str, Any], ...] = ()
        self._arrivals: Arrivals | None = None
        self._way_back: WayBack | None = None

    def listen(self, route: Route) -> None:
        """Open the address; run() does the rest."""
        self.route = route
        listener = route.listen(self.kernel.context(Role.DESTINATION, self._cancel_fd))
        self._arrivals = Arrivals(
            listener, several=self.kernel.settings.opens_channels(), opened=self._opened
        )
        self.addresses = listener.addresses
        self.socket_addresses = listener.socket_addresses

    def _too_late(self) -> NoReturn:
        raise StateError(
            "too late to cancel: the source has handed over",
            hint="Stop the machine here, or migrate it back",
        )

    # ---- the thread

    def run(self) -> None:
        error: BaseException | None = None
        try:
            self.kernel.plugins.wrap_migration(self.kernel, self._receive)
        except BaseException as raised:
            error = as_migration_error(raised, "the incoming migration")
            log.debug("incoming migration failed", exc_info=raised)
            if self._was_cancelled():
                error = Cancelled("the incoming migration was cancelled")
        outcome = Outcome.COMPLETED
        if error is not None:
            outcome = Outcome.CANCELLED if isinstance(error, Cancelled) else Outcome.FAILED
            if self._way_back is not None:
                with contextlib.suppress(MigrationError):
                    self._way_back.refuse()
        self._end(outcome, error, "incoming migration", log)

    def _receive(self) -> None:
        assert self._arrivals is not None
        self._tell_handlers = self._clean_up
        for handler in self.handlers:
            handler.load_prepare()
        channel = self._arrivals.main()
        self._figures.started = time.monotonic()
        self._state.transition(Status.SETUP, Status.ACTIVE)
        inp = InStream(channel)
        self._way_back = WayBack(channel)
        driver = LoadDriver(
            self._machine,
            self.handlers,
            self.kernel.dialect,
            on_command=self._way_back.command,
            unknown_section=self._unknown_section,
            capabilities=self.kernel.settings.on_wire(),
            accept=self._arrivals.accept,
        )
        try:
            driver.load(inp)
        finally:
            self._figures.transferred = inp.position
        self._commit_point()
        self._take_over()
        # The machine is here now: nothing behind this line may undo that, nor let the source believe otherwise.
        with contextlib.suppress(Exception):
            if driver.dialect.vmdescription:
                inp.deadline = time.monotonic() + TAIL_PATIENCE
                driver.vmdescription(inp)
        self._figures.transferred = inp.position
        self._confirm(self._way_back)

    def _confirm(self, way_back: WayBack) -> None:
        """Say that the machine runs here. If that is not possible, the channel stays open as long as this process
        lives: its end without an answer would mean to the source that nobody runs the machine.
        """
        try:
            if way_back.shut(0):
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

    def _take_over(self) -> None:
        machine = self._machine
        generation = self._way_back.generation if self._way_back is not None else None
        if generation is None:
            generation = machine.generation + 1
        if machine.has("fence") and not machine.invoke("fence", generation):
            raise MachineError(
                f"the fence refused generation {generation}: the machine runs elsewhere",
            )
        machine.generation = generation
        for handler in self.handlers:
            handler.load_activate()
        machine.activate()
        sent = machine.received_run_state
        with machine.turn:
            if sent is not None and sent != RunState.RUNNING:
                machine.run_state = next((s for s in RunState if s == sent), RunState.PAUSED)
            elif self.kernel.autostart:
                self.kernel.plugins.notify("announce_self", kernel=self.kernel, machine=machine)
                with contextlib.suppress(MachineError):
                    machine.invoke("announce")
                machine.vm_start()
            else:
                machine.run_state = RunState.PAUSED

    def _clean_up(self, outcome: Outcome) -> None:
        assert self._arrivals is not None
        self._arrivals.close()  # who waits for a further channel is told
        load_cleanup(self.handlers, outcome)

    def _release(self) -> None:
        super()._release()
        if self._arrivals is not None:
            self._arrivals.close()
