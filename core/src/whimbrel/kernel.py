"""The kernel: one machine, one migration at a time, and the rules for starting one."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from whimbrel.blockers import Blockers
from whimbrel.channel import Role, TransportContext
from whimbrel.errors import BlockedError, LocalError, MigrationError, PluginError, StateError
from whimbrel.incoming import Incoming
from whimbrel.machine import Machine, RunState
from whimbrel.notifiers import Notification, Notifiers, What
from whimbrel.outgoing import Outgoing
from whimbrel.plugins import Plugins
from whimbrel.query import migration_info
from whimbrel.route import Route
from whimbrel.run import Run
from whimbrel.savevm import SaveVMHandler
from whimbrel.settings import KERNEL_SETTINGS, PROFILES, TODAY, Profile, Settings
from whimbrel.state import MigrationState, Outcome, RunParams, Status
from whimbrel.wire import dialects

if TYPE_CHECKING:
    from whimbrel.handle import Monitor
    from whimbrel.wire.format import Dialect

log = logging.getLogger("whimbrel.kernel")
R = TypeVar("R", bound=Run)
#: Seconds that a new migration waits for the clean-up of the one before.
_PATIENCE = 1.0


class Kernel:
    """The migration engine of one machine.

    machine   what migrates; may be left out by a program that only looks at plugins and settings.
    profile   defaults: 'today', '2013', or a Profile.
    dialect   the form of the stream; None: that of the profile or else of the machine type (whimbrel.wire.dialects).
    plugins   Plugins.shared() unless given.

    Settings, blockers and notifiers outlive migrations; figures, error and run parameters do not. Thread-safe.
    """

    _default: Kernel | None = None
    _default_lock = threading.Lock()

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        profile: Profile | str = TODAY,
        dialect: Dialect | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        if isinstance(profile, str):
            profile = PROFILES[profile]
        self.machine = machine if machine is not None else Machine("none")
        self.plugins = plugins if plugins is not None else Plugins.shared()
        self._dialect = dialect
        self.state = MigrationState(self._state_changed)
        self.settings = Settings(profile, lambda: self.state.is_running)
        self.settings.declare(KERNEL_SETTINGS)
        for info, declared in self.plugins.settings():
            try:
                self.settings.declare(declared, by=info.source)
            except MigrationError as error:
                log.warning("the settings of plugin %s are left out: %s", info.source, error)
        self.settings.attach(self)
        self.blockers = Blockers(lambda: self.state.is_running)
        self.notifiers = Notifiers()
        self.named_fds: dict[str, int] = {}
        self._lock = threading.RLock()
        self._run_ended = threading.Condition(self._lock)
        self._run: Run | None = None  # until its clean-up has ended
        self._last_run: Run | None = None
        self._unresolved: Outgoing | None = None
        #: The machine starts here after a migration of a running one; incoming(), stop() and cont() decide.
        self.autostart = True
        self.machine.observe(self._machine_changed)

    @classmethod
    def default(cls) -> Kernel:
        """The process-wide kernel, made at first use; a program may set its own by set_default()."""
        with cls._default_lock:
            if cls._default is None:
                cls._default = cls()
            return cls._default

    @classmethod
    def set_default(cls, kernel: Kernel | None) -> None:
        with cls._default_lock:
            cls._default = kernel

    @property
    def dialect(self) -> Dialect:
        """The form of the stream that both sides must know beforehand."""
        chosen = self._dialect or self.settings.profile.dialect
        return dialects.for_machine(self.machine.machine_type) if chosen is None else chosen

    # ---- outgoing

    def migrate(self, uri: str, *, blk: bool = False, inc: bool = False) -> Outgoing:
        """Begin to move the machine to uri; returns at once.

        Raises StateError (one runs already, not in this state), BlockedError (all reasons), UriError or PluginError (the
        scheme), before anything has started. What fails later is the handle's to tell.
        """
        with self._lock:
            self._let_clean_up_end()
            handlers = self._check_may_migrate(uri)
            if (blk or inc) and not any(h.copies_disks for h in handlers):
                raise BlockedError(["the machine has no disk that could be copied"])
            return self._begin(
                lambda: Outgoing(self, self.route(uri), handlers),
                handlers,
                RunParams(blk=blk, inc=inc),
                "migration",
            )

    def _check_may_migrate(self, uri: str) -> list[SaveVMHandler]:
        """The refusals, in their order."""
        run_state = self.machine.run_state
        if run_state is RunState.INMIGRATE:
            raise StateError("the machine is waiting for an incoming migration")
        if self.state.is_running:
            raise StateError(
                "there is a migration process in progress", hint="Wait for its end or cancel it"
            )
        if self._run is not None:
            raise StateError("the previous migration is still being cleaned up", hint="Wait for it")
        if run_state is RunState.POSTMIGRATE:
            raise StateError(
                "the machine is paused due to previous migration: a second copy of it would come into being",
                hint="Let it run here first, with cont(), if the copy does not run",
            )
        self._check_resolved()
        handlers = self.collect_handlers()
        fixed = [f"{h.idstr}: {h.unmigratable}" for h in handlers if h.unmigratable is not None]
        if fixed:
            raise BlockedError([f"the machine cannot be migrated: {', '.join(fixed)}"])
        if self.blockers:
            raise BlockedError(self.blockers.reasons)
        reasons = [
            r
            for _, some in self.plugins.each("preflight", kernel=self, uri=uri)
            for r in some or ()
        ]
        if reasons:
            raise BlockedError(reasons)
        return handlers

    def _check_resolved(self) -> None:
        if self._unresolved is not None:
            raise StateError(
                "it is unknown whether the previous migration's destination runs the machine",
                hint="Settle that first with resolve()",
            )

    def collect_handlers(self) -> list[SaveVMHandler]:
        """The machine's own section handlers, then those that plugins contribute for its parts.

        Raises PluginError when two claim one section.
        """
        handlers = list(self.machine.handlers)
        owner = {(h.idstr, h.instance_id): "the machine" for h in handlers}
        for info, some in self.plugins.each("savevm_handlers", kernel=self, machine=self.machine):
            for handler in some or ():
                key = (handler.idstr, handler.instance_id)
                if key in owner:
                    raise PluginError(
                        f"section '{key[0]}' instance {key[1]} is claimed by {owner[key]} and {info.source}"
                    )
                owner[key] = info.source
                handlers.append(handler)
        return handlers

    # ---- incoming

    def incoming(self, uri: str, *, autostart: bool | None = None) -> Incoming:
        """Listen at uri for a migration; returns once connections are possible (see Incoming.addresses).

        autostart=False: leave the machine paused after a migration of a running one. None: as cont() or stop() said
        while it was waiting, else start it.

        Raises StateError, UriError, PluginError, ChannelError. A failed load is the handle's to tell; another
        incoming() may follow.
        """
        with self._lock:
            self._let_clean_up_end()
            if isinstance(self._run, Incoming):
                raise StateError(
                    "the incoming migration has already been started", hint="Wait for its end"
                )
            self.defer_incoming()
            if autostart is not None:
                self.autostart = autostart
            handlers = self.collect_handlers()

            def listening() -> Incoming:
                run = Incoming(self, handlers)
                run.listen(self.route(uri))
                return run

            return self._begin(listening, handlers, RunParams(), "incoming")

    def defer_incoming(self) -> None:
        """Put the machine into `inmigrate`; a later incoming() says where to listen (QEMU's -incoming defer)."""
        with self._lock:
            if self.state.is_running or self._run is not None:
                raise StateError("there is a migration process in progress")
            if self.machine.run_state is not RunState.INMIGRATE:
                self.autostart = True
                self.machine.run_state = RunState.INMIGRATE

    # ---- both

    def _begin(
        self, make: Callable[[], R], handlers: list[SaveVMHandler], params: RunParams, name: str
    ) -> R:
        """From setup to a running thread. What make() raises leaves `failed`, and is told and raised."""
        previous = self.state.status
        self.state.reset(params)
        self._last_run = None
        self.state.transition(previous, Status.SETUP)
        self.notify(What.SETUP)
        try:
            run = make()
        except Exception as error:
            self.state.error = error
            self.state.outcome = Outcome.FAILED
            self.state.leave(Status.FAILED)
            self.notify(What.ERROR)
            raise
        self._run = self._last_run = run
        run._thread = threading.Thread(target=run.run, name=f"whimbrel-{name}", daemon=True)
        run._thread.start()
        return run

    def run_ended(self, run: Run) -> None:
        """A run's clean-up has ended. For the runs themselves."""
        with self._lock:
            if isinstance(run, Outgoing) and self.state.outcome is Outcome.UNKNOWN:
                self._unresolved = run
            self._run = None
            self._run_ended.notify_all()

    def _let_clean_up_end(self) -> None:
        """A migration whose status is final is over, for whoever sees that: the next may begin. Not waited for on the
        thread of that run, which a notifier or handler is called on.
        """
        run = self._run
        if run is not None and run._thread is not threading.current_thread():
            self._run_ended.wait_for(
                lambda: self._run is None or not self.state.has_finished, _PATIENCE
            )

    def cancel(self) -> None:
        """Cancel what runs, if anything does. Raises StateError after the point of no return."""
        run = self._run
        if run is not None:
            run.cancel()

    def migrate_continue(self, state: str) -> None:
        """Go on from pre-switchover, where a migration waits with the capability pause-before-switchover.

        Raises StateError unless `state` is the status of the migration.
        """
        status = self.state.status
        if status != state:
            raise StateError(f"Migration not in expected state: {status}")
        run = self._run
        if status is Status.PRE_SWITCHOVER and isinstance(run, Outgoing):
            run.go_on()

    def stop(self) -> None:
        """Stop the machine, if it runs. While it stands still for a switchover: it is not to run afterwards, on either
        side. While it waits for a migration: it is not to start after it.

        Raises MachineError, and StateError while somebody else is stopping or starting it.
        """
        machine = self.machine
        with self._turn():
            run = self._run
            if machine.run_state is RunState.INMIGRATE:
                self.autostart = False
            elif machine.run_state is RunState.FINISH_MIGRATE and isinstance(run, Outgoing):
                run.stay_stopped()
            elif machine.is_running:
                machine.vm_stop()

    def cont(self) -> None:
        """Let the machine run, if it does not. While it waits for a migration: it is to start after it.

        After a migration (postmigrate) this takes the machine back: only after making sure that the copy does not run.
        A fence, where the machine has one, is asked; otherwise, as with resolve(), the caller answers for it.

        Raises MachineError; StateError during a switchover, while it is unknown whether the destination runs the
        machine, after a shutdown, and while somebody else is stopping or starting it.
        """
        machine = self.machine
        with self._turn():
            if machine.run_state is RunState.INMIGRATE:
                self.autostart = True
                return
            self._check_resolved()
            if machine.run_state is RunState.FINISH_MIGRATE:
                raise StateError("Migration is not finalized yet", hint="Wait for its end")
            if machine.run_state is RunState.SHUTDOWN:
                raise StateError("Resetting the Virtual Machine is required")
            if machine.is_running or machine.run_state is RunState.SUSPENDED:
                return
            if not machine.active:
                machine.claim()
                machine.activate()
            machine.vm_start()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The right to stop and start the machine. Not waited for: a callback may need the thread that would wait."""
        if not self.machine.turn.acquire(blocking=False):
            raise StateError("the machine is just being stopped or started", hint="Try again")
        try:
            yield
        finally:
            self.machine.turn.release()

    def resolve(self, *, run_here: bool) -> None:
        """Settle an outcome that is unknown: the machine runs here, or it has gone.

        Only after making sure: run_here=True while the destination runs makes two running machines.
        Raises StateError when nothing is unknown or somebody else is stopping or starting the machine, MachineError when it does not start or when the machine's fence says
        that the other side has it.
        """
        with self._lock, self._turn():
            run = self._unresolved
            if run is None:
                raise StateError("there is no migration of unknown outcome")
            if run_here:
                run.resume_here()
            else:
                self.machine.run_state = RunState.POSTMIGRATE
            self.state.outcome = Outcome.FAILED if run_here else Outcome.COMPLETED
            self._unresolved = None

    def query(self) -> dict[str, Any]:
        """The migration in the form of QMP's query-migrate: times in ms, no member that has no value."""
        info: dict[str, Any] = {}
        if self.blockers:
            info["blocked-reasons"] = list(self.blockers.reasons)
        return info | migration_info(self.state, self._last_run)

    # ---- for runs and tools

    def route(self, uri: str) -> Route:
        """The transport, address and filters of a URI. Raises UriError and PluginError."""
        return Route.resolve(self.plugins, uri)

    def context(self, role: Role, cancel_fd: int | None = None) -> TransportContext:
        """What a transport is given to connect or listen."""
        return TransportContext(
            role=role,
            kernel=self,
            machine=self.machine,
            settings=self.settings,
            named_fds=self.named_fds,
            cancel_fd=cancel_fd,
        )

    def register_fd(self, name: str, fd: int) -> None:
        """Give a descriptor a name for fd:NAME; one that had the name before is closed. The migration that uses it takes
        it over.
        """
        before = self.named_fds.get(name, fd)
        self.named_fds[name] = fd
        if before != fd:
            os.close(before)

    def close_fd(self, name: str) -> None:
        """Close a descriptor that no migration has used. Raises LocalError for a name that is not known."""
        fd = self.named_fds.pop(name, None)
        if fd is None:
            raise LocalError(f"File descriptor named '{name}' not found")
        os.close(fd)

    def monitor(self, address: str) -> Monitor:
        """Open a monitor for this kernel at address, such as unix:/run/app.qmp, by the plugin that serves one there.

        Raises PluginError when none does, or more than one; and what the plugin's opening raises.
        """
        answers = [
            (info, serve)
            for info, serve in self.plugins.each("monitors", kernel=self, address=address)
            if serve is not None
        ]
        if not answers:
            raise PluginError(
                f"no plugin serves a monitor at '{address}'",
                hint="Install whimbrel-monitor, and write unix:PATH or tcp:HOST:PORT",
            )
        if len(answers) > 1:
            names = " and ".join(info.source for info, _ in answers)
            raise PluginError(
                f"a monitor at '{address}' is claimed by {names}", hint="Disable one of them"
            )
        monitor: Monitor = answers[0][1]()
        return monitor

    def notify(
        self,
        what: What,
        old: Status | None = None,
        new: Status | None = None,
        pass_number: int | None = None,
    ) -> None:
        notification = Notification(what, self.state, old, new, pass_number)
        self.notifiers.notify(notification)
        self.plugins.notify("state_changed", kernel=self, notification=notification)

    def _state_changed(self, old: Status, new: Status) -> None:
        self.notify(What.STATE, old, new)

    def _machine_changed(self, runs: bool) -> None:
        self.notify(What.RESUME if runs else What.STOP)


def get_current() -> MigrationState:
    """The state of the process-wide kernel: the MigrationState singleton."""
    return Kernel.default().state
