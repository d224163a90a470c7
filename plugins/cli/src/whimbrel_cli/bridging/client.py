"""migctl's side of a bridge: start the process, hand over what it opened, answer what it asks."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import attrs

from whimbrel.channel import Role
from whimbrel.errors import ChannelError, LocalError, MigrationError, OutcomeUnknown
from whimbrel_cli.bridging import record
from whimbrel_cli.bridging.words import CHANNEL, KEPT, MESSAGE_MAX, Job, Result, Standing, State
from whimbrel_cli.monitor import Refused
from whimbrel_cli.progress import ENDED

if TYPE_CHECKING:
    from whimbrel_cli.app import Selection
    from whimbrel_cli.monitor import Monitor

#: Seconds for the process to end after it was told to.
_PATIENCE = 3.0
#: Seconds for the orderly end of the channel, behind that of the migration.
_FINISH = 40.0
_POLL = 0.1
_DESCRIPTORS = 2


class BridgeFailed(ChannelError):
    """The process could not open the channel, or not hand it over."""


class Bridge:
    """The process, from its start to close(); from begun() on it goes on without us."""

    def __init__(
        self,
        role: Role,
        uri: str,
        monitor: str,
        selection: Selection,
        *,
        pump: bool = False,
        survive: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Raises LocalError."""
        self.uri, self.monitor = uri, monitor
        #: 'descriptor' or 'pump', once it is open.
        self.form: str | None = None
        self.has_way_back = True
        #: How the pump ended; None: it has not.
        self.result: Result | None = None
        self.figures: dict[str, Any] = {}
        self._unknown: str | None = None
        self._kept = False
        self._accepted = False
        self._fds: list[int] = []
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, record.log_path(monitor).open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "whimbrel_cli.bridging.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        job = Job(
            role=role.value,
            uri=uri,
            monitor=monitor,
            disabled=selection.disabled,
            prefer=selection.prefer,
            pump=pump,
            survive=survive,
            timeout=timeout,
        )
        self._tell(attrs.asdict(job))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- messages

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.send(json.dumps(message).encode())

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None: there was none within that many seconds. Raises BridgeFailed, Gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return None
        size = array.array("i").itemsize * _DESCRIPTORS
        data, beside, _, _ = self._control.recvmsg(
            MESSAGE_MAX, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, raw in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                self._fds += fds
        if not data:
            raise _Died(
                f"the process that bridges {self.uri} is gone",
                hint=f"Its log says more: {record.log_path(self.monitor)}",
            )
        message: dict[str, Any] = json.loads(data)
        match message["event"]:
            case "failed" | "cancelled":
                self.result = Result(State.FAILED, message["error"])
                raise BridgeFailed(message["error"], hint="")
            case "ended":
                self.result = Result(State(message["state"]), message["error"])
                self.figures = {
                    "form": self.form,
                    **{n: message[n] for n in ("sent", "received", "seconds")},
                }
            case "accepted":
                self._accepted = True
            case "open":
                self.form, self.has_way_back = message["form"], message.get("return-path", True)
                self.figures = {"form": self.form}
        return message

    # ---- a source

    def await_open(self, patience: float | None = None) -> bool:
        """False: not within that many seconds. Raises BridgeFailed: it could not connect."""
        while self.form is None:
            if self.receive(patience) is None:
                return False
        return True

    def migrate(self, source: Monitor, disks: dict[str, bool]) -> None:
        """Hand over what is open, and begin. disks: blk and inc. Raises Refused, Gone: nothing has begun."""
        try:
            source.hand_over(CHANNEL, self._fds[0])
            if self.form == "pump":
                source.hand_over(KEPT, self._fds[1])
                self._kept = True
            try:
                source.execute("migrate", {"uri": f"fd:{CHANNEL}", **disks})
            except Refused:
                self._forget(source, CHANNEL)
                self._forget(source, KEPT)
                raise
        finally:
            self._close_fds()  # a copy here would keep the connection open when the machine closes it
        self.begun()

    def begun(self) -> None:
        """From here on the process does without us."""
        self._tell({"begun": True})

    def watch(self, source: Monitor) -> None:
        """Between two looks at the migration: answer what the pump asks. Raises OutcomeUnknown, LocalError."""
        while self.form == "pump" and self.result is None:
            try:
                message = self.receive(0)
            except _Died:
                self._died(source)
                return
            if message is None:
                return
            if message["event"] == "ask":
                standing = Standing(
                    run_state=source.run_state(), status=source.migration().get("status", "none")
                )
                self._tell(attrs.asdict(standing))
            elif message["event"] == "unknown":
                raise _unknown(message["error"], self.monitor)

    def _died(self, source: Monitor) -> None:
        """It was killed. The machine holds the pump's end of its connection, so it has not noticed."""
        from whimbrel_cli.control import cancel_and_wait

        self.result = Result(State.FAILED, "the pump was killed")
        status = source.migration().get("status", "none")
        if status == "completed" and not source.capabilities().get("return-path"):
            self.result = Result(
                State.UNKNOWN, "the pump was killed, maybe before it had passed on all"
            )
        if status in ENDED:
            return
        standing = Standing(run_state=source.run_state(), status=status)
        if not standing.may_see_the_end:
            raise _unknown("the pump was killed while the machine stood still", self.monitor)
        cancel_and_wait(source)
        raise LocalError(
            f"the pump was killed; the migration is cancelled, and the machine is {source.run_state()}",
            hint=f"Its log may say more: {record.log_path(self.monitor)}",
        )

    def end(self, source: Monitor) -> None:
        """The migration has ended at the source: wait for the orderly end of the channel. Raises as watch() does."""
        deadline = time.monotonic() + _FINISH
        while self.form == "pump" and self.result is None:
            self.watch(source)
            if time.monotonic() > deadline:
                raise OutcomeUnknown(
                    f"the pump has not ended {_FINISH:.0f} s after the migration",
                    hint=f"Its log says more: {record.log_path(self.monitor)}",
                )
            select.select([self._control], [], [], _POLL)
        if self._kept:
            self._forget(source, KEPT)
        if self.result is not None and self.result.state is State.UNKNOWN:
            raise OutcomeUnknown(
                f"the source says completed, but {self.result.error}",
                hint=f"Look at the destination. If it does not run: migctl -m {self.monitor} resolve --run-here",
            )

    def explained(self, migration: dict[str, Any]) -> dict[str, Any]:
        """query-migrate's answer, with what the pump knows of a failure: QEMU has seen no more than an end."""
        if migration.get("status") != "failed" or self.result is None or self.result.error is None:
            return migration
        told = migration.get("error-desc")
        why = f"{self.result.error} (at the machine: {told})" if told else self.result.error
        return {**migration, "error-desc": why}

    @staticmethod
    def _forget(source: Monitor, name: str) -> None:
        with contextlib.suppress(MigrationError):
            source.execute("closefd", {"fdname": name})

    # ---- the end

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def close(self) -> None:
        """Let go: a process that was not told begun() gives up."""
        self._control.close()
        self._close_fds()
        if self._process.poll() is None:
            self._process.returncode = 0  # Popen would warn of a child that goes on without us

    def give_up(self) -> bool:
        """Wait until it has cleaned up; False: it is too late, somebody has connected to it."""
        deadline = time.monotonic() + _PATIENCE
        with contextlib.suppress(MigrationError, OSError):
            self._control.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0 and not self._accepted:
                self.receive(left)
        if self._accepted:
            return False
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return True


class _Died(ChannelError):
    """The process went away without a word."""


def _unknown(why: str, monitor: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        why,
        hint="The source is kept waiting, and does not run: look whether the destination does. If not:"
        f" migctl -m {monitor} resolve --run-here",
    )
