"""The monitor of the QEMU that a guest is sent to: is it ready, and what it says when it refused. Blocking.

qemu.qmp is imported at first use. QEMU 7.2 ends when it refuses a migration, and so does a newer one unless it was told
to listen with exit-on-error=false: this does, where it may say that itself (-incoming defer).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from whimbrel.errors import ChannelError, LocalError

if TYPE_CHECKING:
    from qemu.qmp.protocol import SocketAddrT

T = TypeVar("T")

_PATIENCE = 10.0  # seconds for an answer
_SOON = 1.0  # seconds that a refusal may take to be known to the monitor
_POLL = 0.05
#: Schemes that mean the same to QEMU.
_SCHEMES = ("tcp:", "unix:")
_HOST_PORT = re.compile(r"(?P<host>\[[^\]]+\]|[^/:]*):(?P<port>\d+)")


def _address(text: str) -> SocketAddrT:
    """PATH, unix:PATH, HOST:PORT or tcp:HOST:PORT."""
    match = _HOST_PORT.fullmatch(text.removeprefix("tcp:"))
    if match is None or text.startswith("unix:"):
        return text.removeprefix("unix:")
    return match["host"].strip("[]") or "localhost", int(match["port"])


class DestinationMonitor:
    """Connected from its making to close(). One thread uses it."""

    def __init__(self, address: str) -> None:
        """Raises ChannelError."""
        from qemu.qmp import QMPClient, QMPError

        self.address = address
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("destination")
        self._client.logger.disabled = True  # what goes wrong is ours to tell
        try:
            self._run(self._client.connect(_address(address)))
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            self._loop.close()
            raise ChannelError(
                f"no QEMU answers at the monitor {address}: {error}",
                hint="Start the destination with -qmp unix:PATH,server=on,wait=off, and name PATH; a monitor talks to"
                " one program at a time",
            ) from error

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, _PATIENCE))

    def execute(self, command: str, **arguments: object) -> Any:
        """Raises ChannelError when it is gone, LocalError when it refuses; underscores stand for hyphens."""
        from qemu.qmp import ExecuteError, QMPError

        wire = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._run(self._client.execute(command, wire))
        except ExecuteError as error:
            raise LocalError(f"the destination refuses {command}: {error}") from error
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise ChannelError(f"the monitor {self.address} is gone: {error}") from error

    def close(self) -> None:
        from qemu.qmp import QMPError

        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            self._run(self._client.disconnect())
        self._loop.close()

    # ---- before

    def check(self, machine_type: str | None) -> None:
        """Would it take a guest of that type? Raises LocalError: what it refuses itself, it may not survive."""
        status = self.execute("query-status")["status"]
        if status != "inmigrate":
            raise LocalError(
                f"the QEMU at {self.address} is '{status}', and waits for no migration",
                hint="Start it with -incoming",
            )
        migration = self.execute("query-migrate")
        if migration.get("status") == "failed":
            raise LocalError(
                f"the QEMU at {self.address} has refused a migration already: {migration.get('error-desc', '')}",
                hint="Start it anew",
            )
        there = str(self.execute("qom-get", path="/machine", property="type"))
        there = there.removesuffix("-machine")
        if machine_type is not None and there != machine_type:
            raise LocalError(
                f"the guest's machine type is {machine_type}, that of the QEMU at {self.address} is {there}",
                section="configuration",
                expected=there,
                found=machine_type,
                hint=f"Start it with -machine {machine_type}; nothing was sent",
            )

    def listen(self, uri: str) -> None:
        """Where it waits to be told where to listen, tell it, and ask it to outlive a refusal."""
        answer = self.execute("query-migrate")
        if "status" in answer or "socket-address" in answer or not uri.startswith(_SCHEMES):
            return
        try:
            self.execute("migrate-incoming", uri=uri, exit_on_error=False)
        except LocalError as error:
            if "exit-on-error" not in str(error):
                raise
            self.execute("migrate-incoming", uri=uri)  # QEMU before 9.1

    # ---- afterwards

    def failure(self) -> str:
        """What it says of a migration that has failed: "" if it is gone, or knows of none."""
        deadline = time.monotonic() + _SOON
        while True:
            try:
                answer = self.execute("query-migrate")
            except (ChannelError, LocalError):
                return ""
            if answer.get("status") == "failed" or time.monotonic() > deadline:
                return str(answer.get("error-desc", ""))
            time.sleep(_POLL)
