"""The machine that migrates, as its embedder describes it: identity, parts, run state and callbacks."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from whimbrel.errors import MachineError, MigrationError

if TYPE_CHECKING:
    from whimbrel.savevm import SaveVMHandler

log = logging.getLogger("whimbrel.machine")
T = TypeVar("T")


class RunState(enum.StrEnum):
    """RunState, in QEMU's words; an embedder may use those that fit."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    IO_ERROR = "io-error"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"


def _directly(function: Callable[[], T]) -> T:
    return function()


class Machine:
    """What an embedding app hands to a Kernel.

    Callbacks (all optional; each runs where `call` puts it, by default on the migration's thread):

    stop()              the machine stands still when this returns. It may raise: the migration then fails and the
                        machine goes on. Called at switchover, also when the machine was not running.
    start()             the machine runs when this returns.
    wakeup()            before stop at switchover: a suspended machine must be awake to be stopped.
    throttle(percent)   0 to 99: how much of its time the machine should rest, so that it dirties less.
    activate()          the destination takes what only one side may hold (disks, leases), before start. May raise.
    invalidate()        the source gives that up, after stop. May raise.
    fence(generation)   True if this side now has the sole right to run that generation of the machine (a lease, a
                        lock on the disk), False if the other side has it. None as the callback: no fence.
    announce()          tell the network where the machine is now (destination, before start).
    quit()              end the program, on request of a monitor: wake whoever waits for that. None: it cannot be ended
                        that way.

    `call` takes a function, runs it on the thread or event loop that owns the machine, and returns its result.
    """

    def __init__(
        self,
        machine_type: str,
        *,
        name: str = "",
        target_page_bits: int = 12,
        legacy_page_bits: int = 12,
        uuid: bytes | None = None,
        run_state: RunState = RunState.RUNNING,
        stop: Callable[[], object] | None = None,
        start: Callable[[], object] | None = None,
        wakeup: Callable[[], object] | None = None,
        throttle: Callable[[int], object] | None = None,
        activate: Callable[[], object] | None = None,
        invalidate: Callable[[], object] | None = None,
        fence: Callable[[int], bool] | None = None,
        announce: Callable[[], object] | None = None,
        quit: Callable[[], object] | None = None,  # noqa: A002 - QMP's word
        call: Callable[[Callable[[], Any]], Any] = _directly,
    ) -> None:
        if not 10 <= target_page_bits <= 24:
            raise ValueError(f"target_page_bits {target_page_bits} is not within 10..24")
        if uuid is not None and len(uuid) != 16:
            raise ValueError("a uuid has 16 bytes")
        self.machine_type = machine_type
        self.name = name or machine_type
        self.target_page_bits = target_page_bits
        #: What a stream without the subsection target-page-bits means: 12 for most, 10 for Arm.
        self.legacy_page_bits = legacy_page_bits
        self.uuid = uuid
        self.run_state = run_state
        #: Counts switchovers; fence() is asked for the generation that wants to run.
        self.generation = 0
        #: What the source said of its run state (destination, after load); None if it said nothing.
        self.received_run_state: str | None = None
        self._callbacks: dict[str, Callable[..., object] | None] = {
            "stop": stop,
            "start": start,
            "wakeup": wakeup,
            "throttle": throttle,
            "activate": activate,
            "invalidate": invalidate,
            "fence": fence,
            "announce": announce,
            "quit": quit,
        }
        self._call = call
        self._parts: list[object] = []
        self._handlers: list[SaveVMHandler] = []
        self._observers: list[Callable[[bool], object]] = []
        self._lock = threading.Lock()
        #: For whoever stops or starts it while a migration may do so as well. The thread of a migration waits for it;
        #: a caller that the callbacks may depend on must not, and Kernel.stop() and cont() do not.
        self.turn = threading.RLock()
        #: This side holds what only one side may hold: between invalidate() and activate() it does not.
        self.active = True

    # ---- parts: RAM blocks, disks, devices. Section plugins look for those that they know.

    def add(self, part: T) -> T:
        """Add a part and return it."""
        with self._lock:
            self._parts.append(part)
        return part

    def parts(self, kind: type[T]) -> list[T]:
        """The parts of one kind, in the order of adding."""
        with self._lock:
            return [p for p in self._parts if isinstance(p, kind)]

    @property
    def all_parts(self) -> tuple[object, ...]:
        with self._lock:
            return tuple(self._parts)

    def register(self, handler: SaveVMHandler) -> SaveVMHandler:
        """A section handler of the machine's own, beside those that plugins contribute for its parts."""
        with self._lock:
            self._handlers.append(handler)
        return handler

    @property
    def handlers(self) -> tuple[SaveVMHandler, ...]:
        with self._lock:
            return tuple(self._handlers)

    # ---- running and standing still

    @property
    def is_running(self) -> bool:
        return self.run_state is RunState.RUNNING

    def has(self, callback: str) -> bool:
        return self._callbacks[callback] is not None

    def invoke(self, callback: str, *args: object) -> Any:
        """Call back where the machine wants it. Raises MachineError."""
        function = self._callbacks[callback]
        if function is None:
            return None
        try:
            return self._call(lambda: function(*args))
        except MigrationError:
            raise
        except Exception as error:
            log.debug("%s() of the machine failed", callback, exc_info=True)
            raise MachineError(f"{callback}() of machine {self.name} failed: {error}") from error

    def observe(self, observer: Callable[[bool], object]) -> None:
        """Call observer(runs) after vm_stop() and vm_start(), where they changed that, on the same thread."""
        self._observers.append(observer)

    def vm_stop(self, state: RunState = RunState.PAUSED) -> None:
        """Stop it and say why it stands still. Raises MachineError, the state then being what it was."""
        self.invoke("stop")
        self._set_run_state(state)

    def vm_start(self) -> None:
        """Run it. Raises MachineError."""
        self.invoke("start")
        self._set_run_state(RunState.RUNNING)

    def _set_run_state(self, state: RunState) -> None:
        before, self.run_state = self.is_running, state
        if before is not self.is_running:
            for observer in tuple(self._observers):
                observer(self.is_running)

    # ---- whose it is

    def invalidate(self) -> None:
        """Give up what only one side may hold. Raises MachineError."""
        self.invoke("invalidate")
        self.active = False

    def activate(self) -> None:
        """Take it. Raises MachineError."""
        self.invoke("activate")
        self.active = True

    def ask_fence(self, generation: int) -> bool | None:
        """Whether this side now has the sole right to run that generation; None when nobody can tell."""
        if not self.has("fence"):
            return None
        try:
            return bool(self.invoke("fence", generation))
        except MigrationError as error:
            log.error("the fence could not be asked: %s", error)
            return None

    def claim(self) -> None:
        """Take the next generation for this side, which somebody has made sure of.

        Raises MachineError when the fence says that the other side has the machine.
        """
        generation = self.generation + 1
        if self.ask_fence(generation) is False:
            raise MachineError("the fence says that the destination has the machine")
        self.generation = generation
