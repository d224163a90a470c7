"""The exec transport: the stream goes into a command's standard input, or comes from its standard output."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Sequence

import attrs

from whimbrel import (
    Channel,
    ChannelError,
    DeadlineExceeded,
    Listener,
    Role,
    Transport,
    TransportContext,
    UriError,
)
from whimbrel.channel import Buffer
from whimbrel.descriptors import DescriptorChannel, ReadyListener
from whimbrel_exec.child import Child

_PIPE_SIZE = 1 << 20  # as large as our sends; what an unprivileged process may have
_SOON = 1.0  # seconds from the end of a pipe to the end of the process that held it
_REST = 1 << 16


@attrs.frozen
class ExecAddress:
    """A command for /bin/sh. All text behind `exec:` belongs to it."""

    command: str

    def __str__(self) -> str:
        return self.command


class ExecTransport(Transport):
    def parse(self, rest: str) -> ExecAddress:
        if not rest.strip():
            raise UriError("'exec:' has no command", hint="Write exec:COMMAND, as for a shell")
        if "\0" in rest:
            raise UriError("a command cannot contain NUL", hint="Write exec:COMMAND")
        return ExecAddress(rest)

    def connect(self, address: ExecAddress, ctx: TransportContext) -> Channel:
        return ExecChannel(address.command, Role.SOURCE)

    def listen(self, address: ExecAddress, ctx: TransportContext) -> Listener:
        return ReadyListener(ExecChannel(address.command, Role.DESTINATION), f"exec:{address}")


class ExecChannel(DescriptorChannel):
    """One way: there is no return path. Its end proves nothing about processes on other hosts."""

    def __init__(self, command: str, role: Role) -> None:
        read_end, write_end = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        sending = role is Role.SOURCE
        ours, theirs = (write_end, read_end) if sending else (read_end, write_end)
        try:
            if sending:
                self._child = Child(command, stdin=theirs)
            else:
                self._child = Child(command, stdout=theirs)
        except BaseException as error:
            os.close(ours)
            if isinstance(error, OSError):
                raise ChannelError(
                    f"cannot start the command '{command}': {error.strerror or error}",
                    hint="It needs /bin/sh, and room for two more processes",
                ) from error
            raise
        finally:
            os.close(theirs)
        super().__init__(
            write_fd=ours if sending else None,
            read_fd=None if sending else ours,
            name=f"exec:{command}",
        )

    def send(self, buffers: Sequence[Buffer]) -> None:
        try:
            super().send(buffers)
        except ChannelError:
            self._check_end()
            raise

    def recv_into(self, view: memoryview) -> int:
        n = super().recv_into(view)
        if n == 0:
            self._check_end()
        return n

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        data = super().peek(n, deadline)
        if not data:
            self._check_end()
        return data

    def finish(self, deadline: float | None = None) -> None:
        """Close the pipe to the command, or read what it still writes, and wait for it to end well."""
        super().finish(deadline)
        if self.raw_fd("read") is not None or self._pushback:
            rest = memoryview(bytearray(_REST))
            while super().peek(_REST, deadline):
                super().recv_into(rest)
        self._check_status(deadline)

    def _check_end(self) -> None:
        """The end of a pipe is best explained by that of the command: say that, if it comes soon and is a bad one."""
        with contextlib.suppress(DeadlineExceeded):
            self._check_status(time.monotonic() + _SOON)

    def _check_status(self, deadline: float | None) -> None:
        """Wait for the command to end. Raises ChannelError unless it ended with 0, and DeadlineExceeded."""
        with self._io("waiting"):
            status = self._child.wait(deadline, self._gate.fd)
            if status:
                raise ChannelError(
                    self._child.describe(status), hint="Run the command by hand to see why"
                )

    def abort(self) -> None:
        super().abort()
        self._child.kill()

    def close(self) -> None:
        if not self._gate.forked:
            self._child.kill()  # before its input ends: it must not take that for the end of the stream
        super().close()
        self._child.close()
