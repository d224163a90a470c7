"""Who may run the machine, and proof of who did: a lease, a log of runs, and claims of generations.

All three live in one directory that both sides can see, and survive kill -9 of anybody:
    lease        locked by flock while a copy runs; the system drops the lock when the process dies
    runs.jsonl   one line for each start, stop and violation, only ever appended to
    claim.N      who has the right to run generation N; made by link(2), which exactly one can do
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import attrs

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, see proc(5)


class LeaseViolation(Exception):
    """Another copy of the machine was running when this one started."""


@attrs.frozen(kw_only=True)
class Event:
    """A line of the log. `monotonic` is CLOCK_MONOTONIC of the host, in seconds."""

    what: str  # start, stop, violation
    holder: str
    pid: int
    generation: int
    monotonic: float
    #: violation: the holder that was running.
    other: str = ""


class Lease:
    """One side's hand on the lease. It detects two running copies; it does not arbitrate: that is fence()."""

    def __init__(self, directory: str | Path, holder: str) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        #: Unique for each process, so that a restarted one is not taken for the one before.
        self.holder = f"{holder}-{os.getpid()}-{time.monotonic_ns()}"
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._generation = 0

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self, generation: int = 0) -> None:
        """The machine is about to run here. Raises LeaseViolation, which the log then holds for ever."""
        with self._lock:
            if self._fd is not None:
                return
            fd = os.open(
                self.directory / "lease", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600
            )
            while not _locked(fd):
                other, _, pid = os.pread(fd, 256, 0).decode(errors="replace").partition("\n")
                if _is_ending(pid):  # its connections may be closed already, and its files not
                    time.sleep(0.001)
                    continue
                os.close(fd)
                self._log("violation", generation, other)
                raise LeaseViolation(f"{self.holder} starts the machine while {other} runs it")
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{self.holder}\n{os.getpid()}".encode(), 0)
            self._fd, self._generation = fd, generation
            self._log("start", generation)

    def release(self) -> None:
        """The machine stands still here."""
        with self._lock:
            if self._fd is not None:
                self._log("stop", self._generation)
                os.close(self._fd)
                self._fd = None

    def fence(self, generation: int) -> bool:
        """True if this side has, or hereby takes, the sole right to run that generation."""
        claim = self.directory / f"claim.{generation}"
        mine = self.directory / f".claim.{generation}.{self.holder}"
        with open(mine, "w", encoding="ascii") as file:
            file.write(self.holder)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(mine, claim)  # the content appears with the name, and only once
        except FileExistsError:
            return claim.read_text(encoding="ascii") == self.holder
        finally:
            mine.unlink()
        return True

    def _log(self, what: str, generation: int, other: str = "") -> None:
        event = Event(
            what=what,
            holder=self.holder,
            pid=os.getpid(),
            generation=generation,
            monotonic=time.monotonic(),
            other=other,
        )
        line = json.dumps(attrs.asdict(event)).encode() + b"\n"
        fd = os.open(
            self.directory / "runs.jsonl",
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
            mode=0o600,
        )
        try:
            os.write(fd, line)  # one write: a line is there whole or not at all
        finally:
            os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_ending(pid: str) -> bool:
    """The process runs nothing any more: it is gone, or on its way (PF_EXITING, and zombies)."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text(encoding="ascii", errors="replace")
    except (OSError, ValueError):
        return pid.isdigit()
    state, *fields = stat.rpartition(")")[2].split()
    return state in "ZX" or bool(int(fields[5]) & _PF_EXITING)


def read_log(directory: str | Path) -> list[Event]:
    path = Path(directory) / "runs.jsonl"
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [Event(**line) for line in lines]


def violations(directory: str | Path) -> list[str]:
    """Every sign in the log that two copies ran at once; empty is the proof that the lease was never broken.

    A start without a stop before it is a process that died while it ran: the lock was free then, or the log would have
    a violation. That one generation is started on both sides, one after the other, is none: the destination may die
    right after it has taken over, before it could say so.
    """
    return [
        f"{event.holder} started generation {event.generation} while {event.other} ran"
        for event in read_log(directory)
        if event.what == "violation"
    ]
