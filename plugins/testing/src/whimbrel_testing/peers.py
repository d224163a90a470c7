"""Peers of interop tests as pytest fixtures: real programs, started for one test and gone after it.

A peer that is not installed skips the test, with the reason. WHIMBREL_REQUIRE_PEERS=1 makes that a failure, so that a
CI machine cannot leave out quietly what it is there for.

QEMUs of other versions can stand beside the installed one: `qemu(..., version="10.0")` takes the one of that version from
PATH, from the folders in WHIMBREL_QEMU_PATH, or from build/*/bin below pytest's root. WHIMBREL_QEMU names the binary that
is taken where a test asks for no version.

    def test_it(qemu, tmp_path):
        guest = counting_guest(tmp_path)
        source = qemu(*guest.args(tmp_path / "source.log"))
        source.migrate(f"unix:{tmp_path}/m.sock")
        source.wait_migration("completed")
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import pytest

T = TypeVar("T")

#: Seconds that a test waits for what should take a fraction of one, on a busy machine.
PATIENCE = 45.0
_POLL = 0.01


def missing_peer(reason: str) -> NoReturn:
    """Skip the test, or fail it where peers are required."""
    if os.environ.get("WHIMBREL_REQUIRE_PEERS") == "1":
        pytest.fail(f"{reason} (WHIMBREL_REQUIRE_PEERS=1)")
    pytest.skip(reason)


def wait_until(condition: Callable[[], T | None], what: str, timeout: float = PATIENCE) -> T:
    """Ask until the answer is true, and return it. Raises TimeoutError that says what was awaited."""
    deadline = time.monotonic() + timeout
    tick = threading.Event()
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout} s")
        tick.wait(_POLL)
    return answer


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class _Monitor:
    """qemu.qmp's client, which is asynchronous, called synchronously."""

    def __init__(self, connection: socket.socket) -> None:
        from qemu.qmp import QMPClient

        self._connection = connection
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("peer")
        self._client.logger.disabled = True  # the end of the process is told by Qemu

    def open(self) -> None:
        self.run(self._client.connect(self._connection))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE))

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        return self.run(self._client.execute(command, arguments))

    def send_fd(self, fd: int) -> None:
        self._client.send_fd_scm(fd)

    @property
    def version(self) -> tuple[int, int]:
        greeting = self._client.greeting
        assert greeting is not None
        number: Any = greeting.QMP.version["qemu"]
        return int(number["major"]), int(number["minor"])

    def close(self) -> None:
        from qemu.qmp import QMPError

        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            self.run(self._client.disconnect())
        self._connection.close()
        self._loop.close()


class Qemu:
    """One QEMU process with its monitor. Its display, default devices and accelerator are chosen here: TCG, none, none."""

    def __init__(
        self,
        binary: str,
        args: Sequence[str],
        *,
        incoming: str | None = None,
        capabilities: Mapping[str, bool] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """incoming: a URI to listen at, before this returns. capabilities: set before that.

        Raises RuntimeError with what QEMU said when it does not come up.
        """
        self.args = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
        self.args += args
        if incoming is not None:
            self.args += ["-incoming", "defer"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self.args += ["-chardev", f"socket,id=qmp,fd={fd}", "-mon", "qmp,mode=control"]
            self.process = subprocess.Popen(
                self.args,
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(fd, *pass_fds),
            )
        self._monitor = _Monitor(ours)
        try:
            self._monitor.open()
            self.capabilities(events=True, **(capabilities or {}))
            if incoming is not None:
                self.qmp("migrate-incoming", uri=incoming)
        except Exception as error:
            self.kill()
            said = self.stderr
            self.close()
            raise RuntimeError(f"QEMU does not start: {error}\n{said}") from error

    # ---- monitor

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command; underscores in names of arguments stand for hyphens. Raises QmpError."""
        from qemu.qmp import QMPError

        wire = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._monitor.execute(command, wire)
        except (QMPError, EOFError, OSError) as error:
            raise QmpError(f"{command}: {error}\n{self.stderr}") from error

    def send_fd(self, name: str, fd: int) -> None:
        """Hand over a descriptor, as `fd:NAME`; the caller keeps and closes its own."""
        self._monitor.send_fd(fd)
        self.qmp("getfd", fdname=name)

    @property
    def version(self) -> tuple[int, int]:
        return self._monitor.version

    # ---- migration

    def capabilities(self, **capabilities: bool) -> None:
        """Switch capabilities; underscores stand for hyphens."""
        self.qmp("migrate-set-capabilities", capabilities=_switch(capabilities))

    def migrate(self, uri: str, **parameters: int) -> None:
        """Start; parameters such as max_bandwidth=… are set before."""
        if parameters:
            self.qmp("migrate-set-parameters", **parameters)
        self.qmp("migrate", uri=uri)

    def migration(self) -> dict[str, Any]:
        """query-migrate."""
        answer: dict[str, Any] = self.qmp("query-migrate")
        return answer

    def wait_migration(self, *states: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait for one of the states; query-migrate's answer. Raises AssertionError when it ended in another."""
        ends = {"completed", "failed", "cancelled", *states}

        def ended() -> dict[str, Any] | None:
            answer = self.migration()
            return answer if answer.get("status") in ends else None

        answer = wait_until(ended, f"migration {' or '.join(states)}", timeout)
        assert answer["status"] in states, f"{answer}\n{self.stderr}"
        return answer

    def status(self) -> str:
        """RunState."""
        return str(self.qmp("query-status")["status"])

    def wait_status(self, *states: str, timeout: float = PATIENCE) -> str:
        return wait_until(
            lambda: status if (status := self.status()) in states else None,
            f"run state {' or '.join(states)}",
            timeout,
        )

    # ---- process

    @property
    def stderr(self) -> str:
        """What it printed so far."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def wait_exit(self, timeout: float = PATIENCE) -> int:
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._monitor.close()
        self._errors.close()


def _switch(capabilities: dict[str, bool]) -> list[dict[str, object]]:
    return [
        {"capability": name.replace("_", "-"), "state": state}
        for name, state in capabilities.items()
    ]


class QemuFactory(Protocol):
    """The `qemu` fixture."""

    def __call__(
        self,
        *args: str,
        version: str | None = None,
        arch: str = "x86_64",
        incoming: str | None = None,
        capabilities: Mapping[str, bool] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Qemu:
        """Start one; it is killed at the end of the test. version: "7.2"; None: the installed one."""


class QemuBinaries:
    """The QEMUs of this machine, by architecture and version: the `qemu_binaries` fixture."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """folders: beside those in PATH, where one may lie."""
        self._folders = [str(f) for f in folders]

    def find(self, version: str | None = None, arch: str = "x86_64") -> str:
        """Path of one, or a skip. version: "major.minor"; None: any, and the installed one first."""
        found = self.versions(arch)
        if version is None and found:
            return next(iter(found.values()))
        if version in found:
            return found[version]
        have = f"; there is {' and '.join(found)}" if found else ""
        missing_peer(f"no qemu-system-{arch} {version or ''}{have}; .ci/run installs all peers")

    @functools.cache  # noqa: B019 - one object for each session
    def versions(self, arch: str = "x86_64") -> dict[str, str]:
        """All there are: "major.minor" → path."""
        name = f"qemu-system-{arch}"
        chosen = os.environ.get("WHIMBREL_QEMU") if arch == "x86_64" else None
        paths = [shutil.which(chosen or name)]
        paths += [shutil.which(name, path=folder) for folder in (None, *self._folders)]
        found: dict[str, str] = {}
        for path in paths:
            if path is not None:
                found.setdefault(_version(path), path)
        return found


def _version(binary: str) -> str:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"version (\d+\.\d+)", said)
    assert number is not None, f"{binary} does not tell its version: {said}"
    return number[1]


@pytest.fixture(scope="session")
def qemu_binaries(pytestconfig: pytest.Config) -> QemuBinaries:
    """Finds QEMUs, or skips."""
    try:
        import qemu.qmp  # noqa: F401
    except ImportError:
        missing_peer("the Python package qemu.qmp is not installed: pip install qemu.qmp")
    named = [Path(f) for f in os.environ.get("WHIMBREL_QEMU_PATH", "").split(os.pathsep) if f]
    return QemuBinaries([*named, *sorted(pytestconfig.rootpath.glob("build/*/bin"))])


@pytest.fixture(scope="session")
def qemu_binary(qemu_binaries: QemuBinaries) -> str:
    """Path of the installed qemu-system-x86_64, or a skip."""
    return qemu_binaries.find()


@pytest.fixture
def qemu(qemu_binaries: QemuBinaries) -> Iterator[QemuFactory]:
    """Starts QEMUs; see Qemu."""
    with contextlib.ExitStack() as running:

        def start(
            *args: str,
            version: str | None = None,
            arch: str = "x86_64",
            incoming: str | None = None,
            capabilities: Mapping[str, bool] | None = None,
            pass_fds: Sequence[int] = (),
        ) -> Qemu:
            peer = Qemu(
                qemu_binaries.find(version, arch),
                args,
                incoming=incoming,
                capabilities=capabilities,
                pass_fds=pass_fds,
            )
            running.callback(peer.close)
            return peer

        yield start
