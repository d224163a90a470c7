"""How `migctl receive` and `migctl send` look, on a terminal and off it."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from whimbrel_cli.main import run
from whimbrel_qemu.commands import human
from whimbrel_testing.peers import wait_until


@pytest.mark.parametrize("command", ["receive", "send"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"migctl {command}" in text


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"receive +Take a migration", text)
    assert re.search(r"send +Put a machine", text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["receive", "tcp::0", "f", "--max-ram", "lots"],
        ["send", "f", "tcp::1", "--bandwidth", "-1"],
        ["receive", "tcp::0"],
        ["send", "f"],
    ],
)
def test_wrong_command_lines_are_explained(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert "Error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human(size) == text


def migctl() -> str:
    program = shutil.which("migctl", path=str(Path(sys.executable).parent))
    assert program is not None
    return program


class Terminal:
    """A program on a terminal of 100 columns; what it shows is kept."""

    def __init__(self, *args: object) -> None:
        ours, theirs = pty.openpty()
        self._fd = ours
        self.shown = ""
        os.set_blocking(ours, False)
        with contextlib.closing(os.fdopen(theirs, "wb", buffering=0)) as end:
            self.process = subprocess.Popen(
                [migctl(), *(str(a) for a in args)],
                stdin=end,
                stdout=end,
                stderr=end,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            )

    def shows(self, text: str) -> bool:
        with contextlib.suppress(BlockingIOError, OSError):  # nothing new; nobody there any more
            while data := os.read(self._fd, 4096):
                self.shown += data.decode()
        return text in self.shown

    def wait(self) -> int:
        return wait_until(
            lambda: (
                [s] if not self.shows("\0") and (s := self.process.poll()) is not None else None
            ),
            "end of the program",
        )[0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A fifo that somebody has opened for writing, so that its reader waits."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    yield path
    os.close(fd)


def test_progress_is_shown_after_a_while_and_taken_away(tmp_path: Path, pipe: Path) -> None:
    file = tmp_path / "guest.mig"
    with contextlib.closing(Terminal("receive", f"exec:cat {pipe}", file)) as terminal:
        wait_until(lambda: terminal.shows("receiving"), "progress")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 130
        assert terminal.shown.rstrip().endswith("migctl: error: interrupted")
        assert terminal.shown.rfind("\x1b[?25h") > terminal.shown.rfind("\x1b[?25l")  # the cursor
    assert list(tmp_path.iterdir()) == [pipe]


def test_output_for_programs_is_json_and_nothing_else(tmp_path: Path, pipe: Path) -> None:
    with subprocess.Popen(
        [migctl(), "receive", f"exec:cat {pipe}", str(tmp_path / "f"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())
        assert listening == {"event": "listening", "addresses": [f"exec:cat {pipe}"]}
        pipe.write_bytes(b"no stream")
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    told = json.loads(out)
    assert (told["event"], told["exit-status"]) == ("error", 1)
    assert "not a migration stream" in told["error"]
    assert "not a migration stream" in errors
