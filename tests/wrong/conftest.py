"""Real QEMUs as destinations of streams that are bytes already."""

from __future__ import annotations

import enum
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest

from whimbrel_testing.peers import PATIENCE, missing_peer

#: `tools/qemu-backports` puts the second one there.
BINARIES = {
    "7.2": "qemu-system-x86_64",
    "10.0": str(Path(__file__).parents[2] / "build/qemu-backports/bin/qemu-system-x86_64"),
}
_MACHINE = [
    *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-S"),
    *("-M", "none", "-m", "1", "-incoming", "defer"),
]


class Verdict(enum.Enum):
    TAKEN = "taken"
    REFUSED = "refused"
    DIED = "died"  # of a signal


@attrs.frozen
class Answer:
    verdict: Verdict
    said: str

    @property
    def took_it(self) -> bool:
        return self.verdict is Verdict.TAKEN


def ask(binary: str, data: bytes) -> Answer:
    """Give a stream to a QEMU of its own. Raises TimeoutError when it neither takes nor refuses it."""
    monitor, its_monitor = socket.socketpair()
    source, its_source = socket.socketpair()
    with tempfile.TemporaryFile() as errors, monitor, source:
        with its_monitor, its_source:
            fds = (its_monitor.fileno(), its_source.fileno())
            qmp = ["-chardev", f"socket,id=qmp,fd={fds[0]}", "-mon", "qmp,mode=control"]
            process = subprocess.Popen(
                [binary, *_MACHINE, *qmp],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=fds,
            )
        feeder = threading.Thread(target=_feed, args=(source, data))
        feeder.start()
        try:
            took_it = _wait(monitor, "migrate-incoming", f"fd:{fds[1]}")
        finally:
            process.kill()  # it is gone already if it refused
            status = process.wait()
            feeder.join()
        said = os.pread(errors.fileno(), 1 << 16, 0).decode("utf-8", "replace")
    if took_it:
        return Answer(Verdict.TAKEN, said)
    return Answer(Verdict.REFUSED if status == 1 else Verdict.DIED, said)


def _feed(source: socket.socket, data: bytes) -> None:
    try:
        source.sendall(data)
        source.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # refused before its end


def _wait(monitor: socket.socket, command: str, uri: str) -> bool:
    """Until the migration has completed, or the process has ended: whether it was the first."""
    monitor.settimeout(PATIENCE)
    events = {"capability": "events", "state": True}
    for name, arguments in (
        ("qmp_capabilities", {}),
        ("migrate-set-capabilities", {"capabilities": [events]}),
        (command, {"uri": uri}),
    ):
        monitor.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
    try:
        with monitor.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                assert "error" not in message, message
                # A QEMU that takes part in COLO has taken the stream as well.
                if message.get("data", {}).get("status") in ("completed", "colo"):
                    return True
    except ConnectionResetError:
        pass
    return False


def capture(binary: str, path: Path, *args: str) -> None:
    """The stream of a machine that never ran, into a file."""
    monitor, its_monitor = socket.socketpair()
    with tempfile.TemporaryFile() as errors, monitor:
        with its_monitor:
            fd = its_monitor.fileno()
            process = subprocess.Popen(
                [
                    *(
                        binary,
                        "-nodefaults",
                        "-no-user-config",
                        "-display",
                        "none",
                        "-accel",
                        "tcg",
                    ),
                    *("-S", *args),
                    *("-chardev", f"socket,id=qmp,fd={fd}", "-mon", "qmp,mode=control"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(fd,),
            )
        try:
            sent = _wait(monitor, "migrate", f"exec:cat > {path}")
        finally:
            process.kill()
            process.wait()
        assert sent, os.pread(errors.fileno(), 1 << 16, 0).decode("utf-8", "replace")


def ask_all(binary: str, streams: dict[str, bytes]) -> dict[str, Answer]:
    """Two at a time: they are as many processes as streams."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(streams, pool.map(lambda d: ask(binary, d), streams.values()), strict=True))


_OLD_FORM = [
    f"-global migration.{name}=off"
    for name in ("send-configuration", "send-section-footer", "store-global-state")
]
#: Small machines: what they send is a few KiB to some hundred, most of that a BIOS and the vmdescription.
CORPUS = {
    "none-7.2": ("7.2", "-M none -m 1"),
    "none-10.0": ("10.0", "-M none -m 1"),
    "none-old-7.2": ("7.2", " ".join(["-M none -m 1", *_OLD_FORM])),
    "isapc-7.2": ("7.2", "-M isapc -m 1"),
    "microvm-10.0": ("10.0", "-M microvm -m 1"),
}


@pytest.fixture(scope="session")
def corpus(binaries, tmp_path_factory) -> dict[str, Path]:
    """Streams of real QEMUs, by name."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, (version, args) in CORPUS.items():
        capture(binaries[version], folder / name, *args.split())
    return {name: folder / name for name in CORPUS}


@pytest.fixture(scope="session")
def binaries() -> dict[str, str]:
    """The QEMUs that are here, by version; a skip if one is missing."""
    found = {version: shutil.which(name) for version, name in BINARIES.items()}
    for version, path in found.items():
        if path is None:
            missing_peer(
                f"QEMU {version} is not here: apt-get install qemu-system-x86, tools/qemu-backports"
            )
    return {version: path for version, path in found.items() if path is not None}
