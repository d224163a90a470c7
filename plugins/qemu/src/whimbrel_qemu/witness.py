"""What the destination says when it gives up, from wherever it can be heard: a log, its monitor, an error of exec:."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from types import TracebackType

from whimbrel.errors import LocalError, MigrationError
from whimbrel_qemu import words
from whimbrel_qemu.qmp import DestinationMonitor

#: Bytes of a log that are looked at, the last ones.
_WINDOW = 64 << 10
_SOON = 1.0  # seconds that its last words may take to reach the log
_POLL = 0.05
#: An exec: channel that broke ends with what its command wrote to standard error.
_COMMAND = re.compile(
    r"the command '.*' (?:ended with exit status|was killed by signal) \S+: ", re.DOTALL
)


class _Log:
    """What is appended to a file from now on."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise LocalError(
                f"{path}: {error.strerror}",
                hint="Name the file that the standard error output of the destination goes to",
            ) from error
        self._start = os.fstat(self._fd).st_size

    def read(self) -> str:
        size = os.fstat(self._fd).st_size
        start = max(self._start if size >= self._start else 0, size - _WINDOW)  # it may be cut off
        return os.pread(self._fd, _WINDOW, start).decode("utf-8", "replace")

    def close(self) -> None:
        os.close(self._fd)


class Witness:
    """Listens from its making to its end. monitor: an address of QMP; log: a file with the standard error output."""

    def __init__(self, *, monitor: str | None = None, log: Path | None = None) -> None:
        """Raises LocalError, ChannelError."""
        with contextlib.ExitStack() as undo:
            self._log = _Log(log) if log is not None else None
            if self._log is not None:
                undo.callback(self._log.close)
            self.monitor = DestinationMonitor(monitor) if monitor is not None else None
            if self.monitor is not None:
                undo.callback(self.monitor.close)
            self._undo = undo.pop_all()

    def __enter__(self) -> Witness:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()

    def said(self, error: MigrationError) -> str:
        """Its words after it ended with that error; waits a moment for them."""
        said = _of_command(error.__cause__) or _of_command(error)
        if self._log is not None:
            said = f"{said}\n{self._last_words(self._log)}"
        if self.monitor is not None:
            said = f"{said}\n{self.monitor.failure()}"
        return said

    @staticmethod
    def _last_words(log: _Log) -> str:
        deadline = time.monotonic() + _SOON
        while not words.ended(text := log.read()) and time.monotonic() < deadline:
            time.sleep(_POLL)
        return text


def _of_command(error: BaseException | None) -> str:
    """What the command of an exec: channel said, if that is what broke."""
    if not isinstance(error, MigrationError):
        return ""
    ended = _COMMAND.search(error.message)
    return error.message[ended.end() :] if ended is not None else ""
