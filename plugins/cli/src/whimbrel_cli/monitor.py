"""The monitor of a machine: a real QEMU's, or that of an app that whimbrel migrates. Blocking; one thread uses it.

qemu.qmp is imported at first use. It is asynchronous; each Monitor runs it in an event loop of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from whimbrel.errors import ChannelError, LocalError
from whimbrel_cli.logs import printable
from whimbrel_cli.uris import parse_address

T = TypeVar("T")

PATIENCE = 10.0  # seconds for an answer


class Refused(LocalError):
    """The monitor answered with an error: `error_class` is QMP's, `description` its text."""

    def __init__(self, address: str, command: str, error_class: str, description: str) -> None:
        self.reason = f"refuses {command}: {printable(description)}"
        super().__init__(f"{address} {self.reason}", hint="")  # its text says all there is
        self.error_class = error_class
        self.description = description


class Gone(ChannelError):
    """Nobody answers at the monitor (any more): why, in `reason`."""

    def __init__(self, message: str, reason: str, *, hint: str | None = None) -> None:
        super().__init__(f"{message}: {reason}", hint=hint)
        self.reason = reason


class Taken(Gone):
    """The monitor is there and does not greet: it serves another program, or the machine hangs."""


class Monitor:
    """Connected from its making to close()."""

    def __init__(self, address: str, patience: float = PATIENCE) -> None:
        """patience: seconds for an answer. Raises Gone when nobody answers there, Taken when somebody else has it."""
        from qemu.qmp import QMPClient, QMPError

        self.address = address
        self._patience = patience
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("migctl")
        self._client.logger.disabled = True  # what goes wrong is ours to tell
        self._commands: frozenset[str] | None = None
        try:
            self._run(self._client.connect(parse_address(address)))
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            self._loop.close()
            raise self._unanswered(error) from error
        except BaseException:
            self._loop.close()
            raise

    def _unanswered(self, error: BaseException) -> Gone:
        """What a failure to connect means. A QEMU that serves another client lets one or two more wait unanswered; the
        socket of one that does not even wait is not connected, and reading from it is an invalid argument.
        """
        inner = _innermost(error)
        waiting = isinstance(error, TimeoutError) or getattr(inner, "errno", 0) == errno.EINVAL
        if waiting and isinstance(parse_address(self.address), str):
            return Taken(
                f"the monitor {self.address} is there and does not answer",
                "it serves another program, or the machine hangs",
                hint="A QEMU's monitor serves one program at a time: end the other, or give QEMU a second -qmp",
            )
        return Gone(
            f"nobody answers at the monitor {self.address}",
            self._reason(error),
            hint="Your user may not open it: be the user that runs the machine, or root"
            if isinstance(inner, PermissionError)
            else "A QEMU started with -qmp unix:PATH,server=on,wait=off answers at unix:PATH, one with"
            " -qmp tcp:HOST:PORT,server=on,wait=off at HOST:PORT",
        )

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError) and not str(error):
            return f"no answer within {self._patience:.0f} s"
        inner = _innermost(error)
        if isinstance(inner, OSError) and inner.strerror:
            return os.strerror(inner.errno) if inner.errno and inner.errno > 0 else inner.strerror
        return printable(str(inner)) or type(inner).__name__

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, self._patience))

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What the command returns. Raises Refused, Gone."""
        from qemu.qmp import ExecuteError, QMPError

        try:
            return self._run(self._client.execute(command, arguments))
        except ExecuteError as error:
            told = error.error.error
            raise Refused(self.address, command, told.class_, told.desc) from error
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise Gone(f"the monitor {self.address} is gone", self._reason(error)) from error

    def hand_over(self, name: str, fd: int) -> None:
        """Give it a descriptor under a name (for fd:NAME); the caller keeps and closes its own. Raises Refused, Gone."""
        from qemu.qmp import QMPError

        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise Gone(
                f"{self.address} cannot take a descriptor",
                self._reason(error),
                hint="Descriptors pass through UNIX sockets only: name the monitor as unix:PATH, on its own host",
            ) from error
        self.execute("getfd", {"fdname": name})

    @property
    def version(self) -> tuple[int, int]:
        """Of QEMU, as the greeting says."""
        greeting = self._client.greeting
        number: Any = greeting.QMP.version["qemu"] if greeting is not None else {}
        return int(number.get("major", 0)), int(number.get("minor", 0))

    def has(self, command: str) -> bool:
        if self._commands is None:
            self._commands = frozenset(c["name"] for c in self.execute("query-commands"))
        return command in self._commands

    # ---- what several commands ask

    def migration(self) -> dict[str, Any]:
        """query-migrate; {} where there was none."""
        answer: dict[str, Any] = self.execute("query-migrate")
        return answer

    def run_state(self) -> str:
        return str(self.execute("query-status")["status"])

    def capabilities(self) -> dict[str, bool]:
        listed = self.execute("query-migrate-capabilities")
        return {c["capability"]: bool(c["state"]) for c in listed}

    def set_capabilities(self, changes: dict[str, bool]) -> None:
        listed = [{"capability": name, "state": state} for name, state in changes.items()]
        self.execute("migrate-set-capabilities", {"capabilities": listed})

    def parameters(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.execute("query-migrate-parameters")
        return answer

    def close(self) -> None:
        from qemu.qmp import QMPError

        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            self._run(self._client.disconnect())
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _innermost(error: BaseException) -> BaseException:
    """qemu.qmp wraps what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
