"""QEMUs as the peer: which there are, one as a process with its monitor, and a migration between two."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from remote import PATIENCE

QEMU = "qemu-system-x86_64"
#: QEMU knows no "none": this is more than any link carries.
UNLIMITED = 1 << 40


def binaries() -> dict[str, str]:
    """Those of this machine, "major.minor" → path: on PATH, in WHIMBREL_QEMU_PATH, and in build/*/bin."""
    named = os.environ.get("WHIMBREL_QEMU_PATH", "").split(os.pathsep)
    built = sorted((Path(__file__).parents[1] / "build").glob("*/bin"))
    found: dict[str, str] = {}
    for folder in (None, *filter(None, named), *map(str, built)):
        path = shutil.which(QEMU, path=folder)
        if path is not None:
            found.setdefault(version(path)[0], path)
    return found


def version(binary: str) -> tuple[str, str]:
    """As "major.minor", and all that it says of itself."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"version (\d+\.\d+)", said)
    if number is None:
        raise RuntimeError(f"{binary} does not tell its version: {said}")
    return number[1], said.splitlines()[0]


class Qmp:
    """The little of QMP that this needs. `seen` has the times of events, in seconds of the system's clock."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.seen: dict[str, float] = {}
        deadline = time.monotonic() + PATIENCE
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                self.socket.close()
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.file = self.socket.makefile("rwb")
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self.file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "event" in answer:
                stamp = answer["timestamp"]
                self.seen[answer["event"]] = stamp["seconds"] + stamp["microseconds"] / 1e6
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def event(self, name: str) -> float:
        """When it came last; waits for the first."""
        deadline = time.monotonic() + PATIENCE
        while name not in self.seen:
            if time.monotonic() > deadline:
                raise TimeoutError(name)
            self("query-status")
            time.sleep(0.01)
        return self.seen[name]

    def capabilities(self, *names: str) -> None:
        """Switch them on."""
        if names:
            on = [{"capability": name, "state": True} for name in names]
            self("migrate-set-capabilities", capabilities=on)

    def completed(self, patience: float = PATIENCE) -> dict[str, Any] | None:
        """query-migrate at its end; None when it did not end in time, and was cancelled."""
        deadline = time.monotonic() + patience
        info: dict[str, Any] = {}
        while not info.get("total-time") or info["status"] != "completed":  # the time comes last
            time.sleep(0.02)
            info = self("query-migrate")
            if info["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"QEMU: {info}")
            if info["status"] == "active" and time.monotonic() > deadline:
                self("migrate_cancel")
                return None
        return info


@contextmanager
def qemu(
    folder: Path, name: str, memory: Path, size: int, *more: str, binary: str = QEMU
) -> Iterator[Qmp]:
    """One that keeps its RAM in the file `memory`. It is killed at the end."""
    path = folder / f"{name}.qmp"
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            *(binary, "-M", "pc", "-accel", "tcg", "-nodefaults", "-display", "none"),
            *("-m", f"{size >> 20}M", "-machine", "memory-backend=m"),
            "-object",
            f"memory-backend-file,id=m,mem-path={memory},size={size},share=on,prealloc=on",
            *("-qmp", f"unix:{path},server=on,wait=off"),
            *more,
        ]
    )
    try:
        yield Qmp(path, process)
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def place(uri: str) -> str:
    """The same URI, for a QEMU: it cannot be asked which port it took."""
    return f"tcp:127.0.0.1:{free_port()}" if uri.startswith("tcp") else uri


class Pair:
    """Source and destination, with RAM in two files that stay warm from run to run."""

    def __init__(self, folder: Path, files: tuple[Path, Path], size: int, binary: str) -> None:
        self.folder, self.files, self.size, self.binary = folder, files, size, binary

    @contextmanager
    def started(
        self,
        uri: str,
        *,
        source: Sequence[str] = ("-S",),
        destination: Sequence[str] = (),
        both: Sequence[str] = (),
        channels: int = 0,
    ) -> Iterator[tuple[Qmp, Qmp]]:
        """Both, the destination listening at uri. source, destination: further options of each; both: capabilities."""
        with ExitStack() as stack:
            sides = []
            for name, file, more in (
                ("dst", self.files[1], ("-incoming", "defer", *destination)),
                ("src", self.files[0], source),
            ):
                side = stack.enter_context(
                    qemu(self.folder, name, file, self.size, *more, binary=self.binary)
                )
                side.capabilities(*both, *(["multifd"] if channels else []), "events")
                if channels:
                    side("migrate-set-parameters", **{"multifd-channels": channels})
                sides.append(side)
            sides[0]("migrate-incoming", uri=uri)
            sides[1]("migrate-set-parameters", **{"max-bandwidth": UNLIMITED})
            yield sides[1], sides[0]

    def moved(self, uri: str, channels: int = 0) -> dict[str, Any]:
        """A guest that never runs, from one to the other; seconds."""
        uri = place(uri)
        with self.started(uri, channels=channels) as (source, _):
            source("migrate", uri=uri)
            info = source.completed()
            assert info is not None
            return {
                "seconds": info["total-time"] / 1000,
                "downtime": info["downtime"] / 1000,
                "megabytes": info["ram"]["transferred"] / 1e6,
            }


def warm_files(folder: Path, size: int) -> tuple[Path, Path]:
    """RAM of a source and of a destination, in files; to be filled."""
    files = (folder / "src", folder / "dst")
    for file in files:
        with file.open("wb") as handle:
            handle.truncate(size)
    return files
