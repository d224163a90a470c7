"""What became of a bridge, for those who look later: one file and one log for each monitor, in the user's runtime directory."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import stat
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from whimbrel.errors import LocalError, StateError
from whimbrel_cli import units
from whimbrel_cli.bridging.words import State
from whimbrel_cli.uris import parse_address

#: A process stands behind these, unless it was killed.
LIVE = (State.CONNECTING, State.LISTENING, State.PUMPING)
_TRIES = 10  # somebody who reads the record holds the lock for a moment


def folder() -> Path:
    """It is the user's alone. Raises LocalError."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = (
        Path(runtime) / "migctl"
        if runtime
        else Path(tempfile.gettempdir(), f"migctl-{os.getuid()}")
    )
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise LocalError(
            f"{path} cannot be made: {error.strerror}", hint="Set XDG_RUNTIME_DIR"
        ) from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise LocalError(f"{path} is not yours alone", hint="Remove it, or set XDG_RUNTIME_DIR")
    return path


def _path(monitor: str) -> Path:
    address = parse_address(monitor)
    name = os.path.realpath(address) if isinstance(address, str) else f"{address[0]}:{address[1]}"
    return folder() / hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def log_path(monitor: str) -> Path:
    return _path(monitor).with_suffix(".log")


class Record:
    """Of the process that serves one monitor, and held by it as long as it lives."""

    def __init__(self, monitor: str, **members: Any) -> None:
        """Raises StateError when another process serves that monitor."""
        self._path = _path(monitor).with_suffix(".json")
        self._lock: IO[str] = self._path.with_suffix(".lock").open("w")
        if not self._take():
            self._lock.close()
            raise StateError(
                f"another migctl bridges a migration of {monitor}",
                hint=f"Wait for its end; migctl -m {monitor} status tells of it",
            )
        self._members = {"monitor": monitor, "process": os.getpid(), **members}

    def _take(self) -> bool:
        for _ in range(_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.02)
        return False

    def write(self, **members: Any) -> None:
        self._members |= {"since": time.time(), **members}
        partial = self._path.with_suffix(".new")
        partial.write_text(json.dumps(self._members))
        partial.replace(self._path)

    def close(self) -> None:
        """Nobody serves that monitor any more."""
        self._lock.close()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()


def read(monitor: str) -> dict[str, Any] | None:
    """The last record; None: there was none. `alive` says whether its process is there."""
    try:
        path = _path(monitor).with_suffix(".json")
        members: dict[str, Any] = json.loads(path.read_text())
        with path.with_suffix(".lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                members["alive"] = False
            except BlockingIOError:
                members["alive"] = True
    except (OSError, ValueError, LocalError):
        return None
    return members


def forget(monitor: str) -> None:
    """A migration begins that is no bridge's: what was before is of no interest any more."""
    if (members := read(monitor)) is not None and not members["alive"]:
        _path(monitor).with_suffix(".json").unlink(missing_ok=True)


def described(record: dict[str, Any]) -> str:
    """One line."""
    state, uri, pid = record.get("state"), record.get("uri"), record.get("process")
    if state in LIVE and not record["alive"]:
        return f"its process {pid} is gone in the midst of {uri}"
    ago = units.time(max(0.0, time.time() - record.get("since", 0.0)))
    text = f"{state} for {ago}: {uri}" if record["alive"] else f"{state} {ago} ago: {uri}"
    if record["alive"]:
        text += f", process {pid}"
    if error := record.get("error"):
        text += f"; {error}"
    return text


def stop_listening(monitor: str) -> bool:
    """End the process that listens for that machine; False: there is none."""
    members = read(monitor)
    if members is None or not members["alive"] or members.get("state") != State.LISTENING:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(members["process"], signal.SIGTERM)
    for _ in range(_TRIES * 10):
        if (members := read(monitor)) is None or not members["alive"]:
            return True
        time.sleep(0.02)
    return False
