"""Two monitors side by side: a real QEMU's and ours, each with a bare machine, spoken to byte by byte."""

from __future__ import annotations

import array
import contextlib
import json
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from whimbrel import Kernel, Machine, RunState
from whimbrel_ram import RAMBlock
from whimbrel_testing.peers import PATIENCE, wait_until
from whimbrel_testing.qemu_guest import MACHINE, MIB, counting_guest

NAME = "wren"
#: Asked after every request: what comes before its answer is the request's.
_MARK = "the answer before this one was the last"


class Client:
    """One connection. Answers and events are kept apart."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self._sock = sock
        self._file = sock.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.kill: Callable[[], object] = lambda: None
        self.greeting = self._read()

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise EOFError("the monitor has closed the connection")
        assert line.endswith(b"\r\n"), line
        assert line.isascii(), line
        message: dict[str, Any] = json.loads(line)
        return message

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._sock.sendmsg([payload], rights)
        if rest := payload[sent:]:
            self._sock.sendall(rest)

    def read_until(self, event: str) -> None:
        """For a monitor that may be gone afterwards."""
        while not any(e["event"] == event for e in self.events):
            if "event" in (message := self._read()):
                self.events.append(message)

    def ask(self, payload: bytes, fds: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Send it as it is; all that the monitor answers, events aside."""
        self.send(payload, fds)
        self.send(json.dumps({"execute": "query-name", "id": _MARK}).encode())
        answers = []
        while (message := self._read()).get("id") != _MARK:
            (self.events if "event" in message else answers).append(message)
        return answers

    def run(self, command: str, **arguments: Any) -> Any:
        """A command that must succeed; underscores in names of arguments stand for hyphens."""
        (answer,) = self.ask(request(command, **arguments))
        assert "return" in answer, (command, answer)
        return answer["return"]

    def wait(self, *states: str) -> dict[str, Any]:
        """Until the migration is in one of the states; query-migrate's answer."""

        def there() -> dict[str, Any] | None:
            info: dict[str, Any] = self.run("query-migrate")
            return info if info.get("status") in states else None

        return wait_until(there, " or ".join(states))

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def request(command: str, **arguments: Any) -> bytes:
    wire = {name.replace("_", "-"): value for name, value in arguments.items()}
    return json.dumps({"execute": command, **({"arguments": wire} if wire else {})}).encode()


#: Starts a machine with its monitor; True: one that waits for a migration. It stands still at first.
Start = Callable[[bool], Client]


class Writer:
    """What a machine of ours does while it runs: it writes to 1024 pages again and again, as the counting guest does."""

    def __init__(self, ram: RAMBlock) -> None:
        self._pages = ram.buffer[: 4 * MIB : 4096]
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(0.001):
            count += 1
            self._pages[:] = bytes((count % 256,)) * 1024

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


@contextlib.contextmanager
def qemus(binary: str, busy: Path | None = None) -> Iterator[Start]:
    """Real QEMUs, killed in the end. busy: with a guest that writes to memory, its files in that folder."""
    guest = ("-machine", MACHINE, "-m", "16M")
    if busy is not None:
        guest = tuple(counting_guest(busy).args(busy / "serial.log"))
    with contextlib.ExitStack() as running:

        def start(incoming: bool) -> Client:
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [
                        *(binary, "-nodefaults", "-no-user-config", "-display", "none"),
                        *("-accel", "tcg", *guest, "-name", NAME),
                        *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                        *("-mon", "qmp,mode=control"),
                        *(("-incoming", "defer") if incoming else ("-S",)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            running.callback(process.wait)
            running.callback(process.kill)
            client = Client(ours)
            client.kill = process.kill
            running.callback(client.close)
            return client

        yield start


@contextlib.contextmanager
def whimbrels(folder: Path, *, busy: bool = False) -> Iterator[Start]:
    """Kernels of ours in this process, with 4 MiB of RAM, none of it zero. busy: while they run they write to it."""
    with contextlib.ExitStack() as running:
        count = 0

        def start(incoming: bool) -> Client:
            nonlocal count
            count += 1
            ram = RAMBlock("pc.ram", 4 * MIB)
            writer = Writer(ram) if busy else None
            machine = Machine(
                MACHINE,
                name=NAME,
                run_state=RunState.PRELAUNCH,
                start=writer and writer.start,
                stop=writer and writer.stop,
                quit=lambda: None,
            )
            if writer is not None:
                running.callback(writer.stop)
            machine.add(ram)
            ram.buffer[:] = random.Random(1).randbytes(4 * MIB)
            kernel = Kernel(machine)
            if incoming:
                kernel.defer_incoming()
            path = folder / f"{count}.qmp"
            monitor = kernel.monitor(f"unix:{path}")
            running.callback(monitor.close)
            running.callback(kernel.cancel)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            client = Client(sock)
            client.kill = kernel.cancel
            running.callback(client.close)
            return client

        yield start


# ---- comparing


@attrs.frozen
class Difference:
    """An allowed one: where it shows, what it looks like (both as regular expressions), and why it is."""

    where: str
    what: str
    reason: str


#: Members that are numbers in the schema, where all others are whole numbers.
_NUMBERS = ("mbps",)


def shape(value: Any, name: str = "") -> Any:
    """Keys and types, without the values; of a list the shapes of its elements, each once."""
    if isinstance(value, dict):
        return {k: shape(v, k) for k, v in value.items()}
    if isinstance(value, list):
        shapes: list[Any] = []
        for each in value:
            if (s := shape(each)) not in shapes:
                shapes.append(s)
        return shapes
    if name in _NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def differences(theirs: Any, ours: Any, at: str = "") -> Iterator[str]:
    """Between two shapes: members that one side has only, and types."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            where = f"{at}.{key}" if at else key
            if key not in ours:
                yield f"{where}: QEMU's only"
            elif key not in theirs:
                yield f"{where}: ours only"
            else:
                yield from differences(theirs[key], ours[key], where)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for a, b in zip(theirs, ours, strict=True):
            yield from differences(a, b, f"{at}[]")
    elif theirs != ours:
        yield f"{at or 'value'}: {theirs} at QEMU, {ours} here"
