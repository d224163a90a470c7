"""The loaders that wrong streams are given to, in this process."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from whimbrel.channel import Buffer, Channel, MemoryChannel
from whimbrel.errors import DeadlineExceeded, MigrationError
from whimbrel.globalstate import GlobalState
from whimbrel.machine import Machine
from whimbrel.savevm import LoadDriver
from whimbrel.state import Outcome
from whimbrel.stream import InStream
from whimbrel.way_back import WayBack
from whimbrel.wire.format import Dialect
from whimbrel_device import DeviceHandler, device, i64, unused
from whimbrel_ram import RAMBlock, RamHandler
from whimbrel_testing.wrong.pieces import MACHINE, RAM

if TYPE_CHECKING:
    from collections.abc import Sequence


#: Bytes of RAM that a keeper accepts here.
MAX_RAM = 64 << 20


class WaitsForever(AssertionError):
    """A loader asked a source for more that will send no more, without a deadline."""


class SilentSource(MemoryChannel):
    """Has sent what it has, and keeps the connection open."""

    def __init__(self, data: Buffer, *, answers: Channel | None = None) -> None:
        super().__init__(data)
        self._answers = answers

    def recv_into(self, view: memoryview) -> int:
        n = super().recv_into(view)
        if not n and len(view):
            raise WaitsForever("waits for bytes that never come")
        return n

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        found = super().peek(n, deadline)
        if not found and deadline is None:
            raise WaitsForever("waits for bytes that never come")
        if not found:
            raise DeadlineExceeded("nothing came")
        return found

    def return_path(self) -> Channel | None:
        return self._answers


class ClosedSource(MemoryChannel):
    """Has sent what it has, and closed the connection; answers still get through."""

    def __init__(self, data: Buffer, *, answers: Channel | None = None) -> None:
        super().__init__(data)
        self._answers = answers

    def return_path(self) -> Channel | None:
        return self._answers


@device("timer", version_id=2, minimum_version_id=1)
class Timer:
    """The one device of `-M none`, as its vmdescription names the fields."""

    cpu_ticks_offset: int = i64()
    _unused: None = unused(8)
    cpu_clock_offset: int = i64(since=2)


@attrs.define
class App:
    """An app's machine that matches `-M none -m 1`."""

    machine: Machine = attrs.field(factory=lambda: Machine(MACHINE))
    timer: Timer = attrs.field(factory=Timer)
    ram: RAMBlock = attrs.field(factory=lambda: RAMBlock("ram", RAM))

    def load(self, channel: Channel, dialect: Dialect | None = Dialect()) -> None:  # noqa: B008 - frozen
        """One stream up to its EOF byte, and what may follow. Raises MigrationError."""
        inp = InStream(channel, buffer_size=64 << 10)
        driver = LoadDriver(
            self.machine,
            [RamHandler([self.ram]), DeviceHandler(self.timer), GlobalState(self.machine)],
            dialect,
            on_command=WayBack(channel).command,
        )
        outcome = Outcome.FAILED
        try:
            driver.load(inp)
            outcome = Outcome.COMPLETED
        finally:
            driver.cleanup(outcome)
        with contextlib.suppress(MigrationError):  # the machine runs here: nothing may undo that
            inp.deadline = time.monotonic()
            driver.vmdescription(inp)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.path.isdir(shared) else None) as name:
        yield Path(name)


def keep(channel: Channel, path: Path, *, max_ram: int = MAX_RAM) -> bytes:
    """As `migctl receive`; the file that was kept. Raises MigrationError."""
    from whimbrel_qemu.receiving import receive_from

    receive_from(channel, path, max_ram=max_ram)
    return path.read_bytes()


def load_app(data: bytes, source: Callable[..., Channel] = ClosedSource) -> None:
    App().load(source(data, answers=MemoryChannel()))


def load_keep(data: bytes, source: Callable[..., Channel] = ClosedSource) -> None:
    with _folder() as folder:
        try:
            keep(source(data, answers=MemoryChannel()), folder / "kept")
        except MigrationError:
            left = os.listdir(folder)
            assert not left, f"a refused stream left {left}"
            raise


LOADERS: Sequence[tuple[str, Callable[..., None]]] = (("app", load_app), ("keep", load_keep))
