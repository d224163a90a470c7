"""migctl as a user runs it: a process of its own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from whimbrel_testing.peers import PATIENCE, QemuFactory

from .matrix import BEGUN, CELL, Record, lines, tables
from .passage import Passage


class Migctl:
    """One migctl with --json, started and not waited for."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
    ) -> None:
        program = shutil.which("migctl", path=str(Path(sys.executable).parent))
        assert program is not None, "whimbrel-cli is not installed in this environment"
        self.process = subprocess.Popen(
            [program, *args, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )

    def event(self, name: str) -> dict[str, Any]:
        """The next line of its output, which must be that event."""
        assert self.process.stdout is not None
        line = b""  # byte by byte: what a buffer held would be missing in communicate()
        while not line.endswith(b"\n") and (byte := os.read(self.process.stdout.fileno(), 1)):
            line += byte
        assert line, f"no {name}: {self.failed() if self.process.wait(PATIENCE) else ''}"
        event: dict[str, Any] = json.loads(line)
        assert event.pop("event") == name
        return event

    def address(self) -> str:
        """Where a receive listens."""
        return str(self.event("listening")["addresses"][0])

    def succeeded(self, name: str) -> dict[str, Any]:
        """Wait for its end; what it did."""
        event = self.event(name)
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert (self.process.returncode, errors) == (0, "")
        return event

    def failed(self, status: int = 1) -> str:
        """Wait for its end; the one line of its error."""
        out, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == status, errors
        (told,) = map(json.loads, out.splitlines())
        assert (told["event"], told["exit-status"]) == ("error", status)
        errors = errors.strip()  # click begins a new line behind ^C
        assert errors, "no error message"
        assert "\n" not in errors, errors
        return errors

    def close(self) -> None:
        self.process.kill()
        with contextlib.suppress(ValueError):  # its pipes were read to the end
            self.process.communicate()


@pytest.fixture
def migctl() -> Iterator[Callable[..., Migctl]]:
    """Starts migctl: `migctl("receive", URI, FILE)`. It is killed at the end of the test."""
    with contextlib.ExitStack() as running:

        def start(
            *args: object,
            pass_fds: Sequence[int] = (),
        ) -> Migctl:
            process = Migctl([str(a) for a in args], pass_fds=pass_fds)
            running.callback(process.close)
            return process

        yield start


@pytest.fixture
def transport() -> str:
    """Where a test does not ask for another."""
    return "unix"


@pytest.fixture
def passage(
    transport: str, tmp_path: Path, qemu: QemuFactory, migctl: Callable[..., Migctl]
) -> Iterator[Passage]:
    """The steps of a passage, over `transport`."""
    with contextlib.closing(Passage(transport, tmp_path, qemu, migctl)) as steps:
        yield steps


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Enters what a test has seen into the tables at the end."""

    def enter(table: str, row: str, column: str, seen: str = BEGUN) -> None:
        record_property(CELL, (table, row, column, seen))

    return enter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if isinstance(report, pytest.TestReport)
    ]
    for name, rows in tables(reports).items():
        terminalreporter.section(name)
        for line in lines(rows):
            terminalreporter.line(line)
