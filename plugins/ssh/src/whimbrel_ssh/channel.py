"""A channel of an SSH connection as a channel of whimbrel."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import paramiko

from whimbrel import Channel, ChannelError, DeadlineExceeded
from whimbrel.channel import Buffer
from whimbrel.waiting import Gate, call_in_thread
from whimbrel_ssh.address import Command, End
from whimbrel_ssh.errors import FarEndRefused, LinkLost
from whimbrel_ssh.link import TICK, Link
from whimbrel_ssh.protocol import FAILURES
from whimbrel_ssh.reach import printable

log = logging.getLogger("whimbrel.ssh")

_PACKET = 1 << 15  # what OpenSSH takes at once; paramiko makes one packet of each send()
_MOST = 1 << 20  # bytes read at once
_TAIL = 4096  # bytes of a command's standard error output that are kept
#: Seconds that close() waits for what was sent to leave the far sshd.
LINGER = 5.0
_SOON = 1.0  # seconds from the end of a command's output to its exit status, and to break one off
_ANSWERED = (
    2.0  # seconds that a command has to pass on a destination's last answer, before it is killed
)
_LAST_WORDS = 2.0  # seconds that a command has to end after it has refused
_LOOK = 0.01


class SshChannel(Channel):
    """Two-way: to a socket on the far host, or to a command's standard input and from its standard output.

    Its end proves nothing about processes on the far host.
    """

    def __init__(
        self,
        link: Link,
        channel: paramiko.Channel,
        *,
        end: End,
        listening: bool = False,
        open_extra: Callable[[], Channel] | None = None,
    ) -> None:
        """It owns the channel, and one share of the link."""
        self.name = f"{link.name}/{end}"
        self._link, self._channel, self._end = link, channel, end
        self._open_extra = open_extra
        self._gate = Gate(self.name)
        self._pushback = b""
        self._stderr = _Stderr(self.name, channel)
        self._answered = self._finished = False
        self._answering = False  # a destination has said something to a command
        self._listening = listening
        self._patience = _SOON
        self._breaking_off: threading.Thread | None = None
        self._aborting = threading.Lock()
        channel.settimeout(TICK)
        #: Set while there is something to read, or will never be again.
        self._readable = threading.Event()
        channel.in_buffer.set_event(self._readable)

    @contextlib.contextmanager
    def _io(self) -> Iterator[None]:
        """Around every operation: ChannelErrors that tell a broken link from a far end that closed."""
        with self._gate.inside():
            try:
                yield
            except ChannelError:
                self._gate.check()  # whatever an abort looked like
                raise
            except FAILURES as error:
                self._explain(error)

    def _explain(self, error: BaseException) -> None:
        self._gate.check()
        if not self._ended and not self._has_status:
            self._link.check()
            raise LinkLost(f"{self.name}: link lost: {error}", hint="Try again") from error
        if not self._channel.eof_received and not self._has_status:
            self._link.check()
        self._check_status_soon()
        what = (
            "the command ended"
            if isinstance(self._end, Command)
            else "the far end closed the connection"
        )
        raise FarEndRefused(
            f"{self.name}: {what} before it had all", hint="Its own log says why"
        ) from error

    def _look(self) -> None:
        """Between two waits: is there reason to go on?"""
        self._gate.check()
        if not self._ended:
            self._link.check()
        self._stderr.drain()

    @property
    def _ended(self) -> bool:
        """Nothing more comes."""
        return bool(self._channel.closed or self._channel.eof_received)

    @property
    def _has_status(self) -> bool:
        return isinstance(self._end, Command) and self._channel.exit_status >= 0

    # ---- the contract

    def send(self, buffers: Sequence[Buffer]) -> None:
        with self._io():
            if self._finished:
                raise ChannelError(f"{self.name} is finished: nothing can be sent any more")
            self._stderr.drain()
            self._answering = self._listening
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                while len(view):
                    view = view[self._send_some(view[:_PACKET]) :]

    def _send_some(self, view: memoryview) -> int:
        while True:
            try:
                sent = self._channel.send(view)  # type: ignore[arg-type]
            except TimeoutError:  # the far end takes nothing at the moment
                self._look()
                continue
            if not sent:
                raise EOFError
            return sent

    def recv_into(self, view: memoryview) -> int:
        with self._io():
            data = self._pushback or self._receive(min(len(view), _MOST))
            n = min(len(view), len(data))
            view[:n] = data[:n]
            self._pushback = data[n:]
            return n

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        with self._io():
            if not self._pushback or (len(self._pushback) < n and self._channel.recv_ready()):
                self._pushback += self._receive(n - len(self._pushback), deadline)
            return self._pushback[:n]

    def _receive(self, n: int, deadline: float | None = None) -> bytes:
        """At least one byte, unless it is the end."""
        while not self._readable.wait(_tick(deadline)):
            self._look()
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded(f"timed out waiting for {self.name}", hint=self._silence)
        data = self._channel.recv(n)
        self._gate.check()
        if data:
            self._answered = True
        else:
            if not self._channel.eof_received and not self._has_status:
                self._link.check()
            self._check_status_soon()
        return data

    @property
    def _silence(self) -> str | None:
        if self._answered or not isinstance(self._end, Command):
            return None
        return "The command has not answered: for one that only takes the stream write exec,answers=off:COMMAND"

    def finish(self, deadline: float | None = None) -> None:
        """End what is sent; wait until a command has ended well, or the far host has all."""
        with self._io():
            if self._channel.closed and not self._has_status:
                raise EOFError
            self._channel.shutdown_write()
            self._finished = True
            if isinstance(self._end, Command):
                self._check_status(deadline, must_end=True)
            else:
                self._link.round_trip(self._look, deadline)

    def _check_status_soon(self) -> None:
        """The end of what a command says is best explained by its own, if that comes soon."""
        wait, self._patience = self._patience, 0.0
        self._check_status(time.monotonic() + wait)

    def _check_status(self, deadline: float | None, *, must_end: bool = False) -> None:
        """Raises FarEndRefused unless a command has ended with 0; must_end: and DeadlineExceeded if it has not."""
        channel, end = self._channel, self._end
        if not isinstance(end, Command):
            return
        while not channel.status_event.wait(_tick(deadline, _LOOK)):
            if channel.recv_ready():
                if must_end:
                    channel.recv(_MOST)  # nobody waits for it, and the command must not either
            elif deadline is not None and time.monotonic() >= deadline:
                if not must_end:
                    return
                raise DeadlineExceeded(f"timed out waiting for the command '{end.command}' to end")
            self._look()
        self._stderr.drain()
        status = channel.exit_status
        if status < 0:
            self._link.check()
        if status:
            how = f"ended with exit status {status}" if status > 0 else "was killed by a signal"
            said = f": {self._stderr.tail}" if self._stderr.tail else ""
            raise FarEndRefused(
                f"the command '{end.command}' on {self._link.name} {how}{said}",
                status=status if status > 0 else None,
                hint="Run it there by hand to see why" if not said else None,
            )

    def explain(self) -> str | None:
        """How a command that has refused ended, and what it said last."""
        if isinstance(self._end, Command):
            with contextlib.suppress(ChannelError, *FAILURES), self._gate.inside():
                self._channel.shutdown_write()  # it may wait for that
                try:
                    self._check_status(time.monotonic() + _LAST_WORDS)
                except FarEndRefused as error:
                    return error.message
        return None

    # ---- ending

    def abort(self) -> None:
        if not self._gate.signal():
            return
        self._readable.set()
        if not isinstance(self._end, Command) or self._gate.forked or self._finished:
            self._link.kill()
            return
        with self._aborting:
            if self._breaking_off is None:
                self._breaking_off = threading.Thread(
                    target=self._break_off, name="ssh abort", daemon=True
                )
                self._breaking_off.start()

    def _break_off(self) -> None:
        """A command is killed before its input ends: it must not take half a stream for a whole one."""
        with contextlib.suppress(Exception):
            call_in_thread(self._leave, deadline=time.monotonic() + _SOON, what="the command")
        self._link.kill()

    def _leave(self) -> None:
        """Close this side, and wait until the far sshd has passed on what was sent and closed its own."""
        transport, channel = self._link.transport, self._channel
        until = time.monotonic() + LINGER
        if isinstance(self._end, Command):
            if not self._finished and not self._has_status:
                if self._answering:
                    # What was said last is still on its way through the command.
                    channel.shutdown_write()
                    channel.status_event.wait(_ANSWERED)
                transport.signal(channel, "KILL")
            channel.close()
            self._link.round_trip(self._link.check, until)
            return
        channel.close()
        closed = threading.Event()
        while transport.has(channel) and transport.is_active() and time.monotonic() < until:
            closed.wait(_LOOK)

    def close(self) -> None:
        self._readable.set()
        if not self._gate.close():
            return
        if not self._gate.forked:
            if self._breaking_off is not None:
                self._breaking_off.join(2 * _SOON)
            elif self._link.alive:
                with contextlib.suppress(Exception):
                    call_in_thread(
                        self._leave, deadline=time.monotonic() + LINGER, what="the far end"
                    )
        self._link.release()

    def return_path(self) -> Channel | None:
        return self if not isinstance(self._end, Command) or self._end.answers else None

    def open_extra(self, purpose: str, index: int) -> Channel:
        if self._open_extra is None:
            return super().open_extra(purpose, index)
        return self._open_extra()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _tick(deadline: float | None, tick: float = TICK) -> float:
    """How long to wait at once."""
    return tick if deadline is None else max(0.0, min(tick, deadline - time.monotonic()))


class _Stderr:
    """What a command says on its standard error output: logged line by line, its end kept. Unread, it would take up the
    window of the channel in time.
    """

    def __init__(self, name: str, channel: paramiko.Channel) -> None:
        self._name, self._channel = name, channel
        self._lock = threading.Lock()
        self._line = self._last = b""

    def drain(self) -> None:
        """Take what is there. Either thread may come by."""
        if not self._channel.recv_stderr_ready() or not self._lock.acquire(blocking=False):
            return
        try:
            while self._channel.recv_stderr_ready():
                data = self._channel.recv_stderr(1 << 16)
                self._last = (self._last + data)[-_TAIL:]
                *lines, self._line = (self._line + data)[-(1 << 16) :].split(b"\n")
                for line in lines:
                    log.info("%s: %s", self._name, printable(line))
        finally:
            self._lock.release()

    @property
    def tail(self) -> str:
        return printable(self._last)
