"""The destination's answers on the return path, and what the source's commands have to do with them."""

from __future__ import annotations

import contextlib
import struct
import time

from whimbrel.channel import Channel
from whimbrel.errors import MigrationError, StreamError
from whimbrel.stream import InStream
from whimbrel.wire.format import PING_COMMIT, Command
from whimbrel.wire.return_path import encode_pong, encode_shut

#: Seconds in which a source that was refused reads that and hangs up.
LINGER = 1.0


def linger(channel: Channel) -> None:
    """Read and drop what still comes, for a while: a connection that is closed with something unread is reset, and that may
    take with it what was said last.
    """
    deadline = time.monotonic() + LINGER
    view = memoryview(bytearray(1 << 16))
    with contextlib.suppress(MigrationError):
        while channel.peek(1, deadline) and time.monotonic() < deadline:
            channel.recv_into(view)


def check_precopy(command: Command, data: bytes, inp: InStream) -> None:
    """Raises StreamError for a command that needs more than precopy."""
    if command is Command.POSTCOPY_ADVISE and not data:
        return  # the short form says only that a section dirty-bitmap may follow
    if command not in (Command.OPEN_RETURN_PATH, Command.PING, Command.SWITCHOVER_START):
        raise StreamError(
            f"command {command.name} needs a capability that this side does not have",
            offset=inp.position,
            hint="Switch that capability off on the source",
        )


class WayBack:
    """The way back of one channel; open once the source has asked for it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._answers: Channel | None = None
        #: The generation of the machine that the source named in its last PING before the end; None from a QEMU.
        self.generation: int | None = None

    @property
    def is_open(self) -> bool:
        return self._answers is not None

    def command(self, command: Command, data: bytes, inp: InStream) -> None:
        """A command of the source. Raises StreamError for what needs more than precopy."""
        if command is Command.OPEN_RETURN_PATH:
            self._answers = self._channel.return_path()
            if self._answers is None:
                raise StreamError(
                    f"the source wants answers, but {self._channel.name} has no way back",
                    offset=inp.position,
                    hint="Switch the capability return-path off on the source",
                )
        elif command is Command.PING:
            if not self.is_open:
                raise StreamError(
                    "PING without a return path",
                    offset=inp.position,
                    expected=f"{Command.OPEN_RETURN_PATH.name} before it",
                )
            self.pong(struct.unpack(">I", data)[0])
        else:
            check_precopy(command, data, inp)

    def pong(self, value: int) -> None:
        """Answer a PING, if the source can be answered. Raises ChannelError."""
        if value & PING_COMMIT:
            self.generation = value & (PING_COMMIT - 1)
        if self._answers is not None:
            self._answers.send([encode_pong(value)])

    def shut(self, status: int) -> bool:
        """Say how it ended, 0 being success; False if the source asked for no answers. Raises ChannelError."""
        if self._answers is None:
            return False
        self._answers.send([encode_shut(status)])
        return True

    def refuse(self) -> bool:
        """Say that it failed, and leave the source the time to read it; False if it asked for no answers. Raises ChannelError."""
        told = self.shut(1)
        if told:
            linger(self._channel)
        return told
