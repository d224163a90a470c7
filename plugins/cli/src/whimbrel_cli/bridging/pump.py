"""Bytes both ways between a machine and a channel, and what it means when one of them ends.

    machine <--socketpair--> pump <--channel--> the other side

A QEMU that is a source takes the end of its connection for a failure, and runs on. So the pump never lets it see an
end that proves nothing once the machine may have been started on the other side: it holds the connection until a person
has decided. Whether it may have been started is known without looking into the stream: EOF, behind which a destination
starts, is written by a machine that stands still. As long as the source says, after the last byte that was passed on,
that its machine has not been stopped, there was no EOF among them.

The machine holds a copy of the pump's end as well, under a name (words.KEPT). So a pump that is killed ends nothing either.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

import attrs

from whimbrel.channel import Channel
from whimbrel.errors import ChannelError, EndOfStream, MigrationError
from whimbrel.wire.format import MAX_RP_DATA, PONG_RELAY, Answer
from whimbrel.wire.return_path import encode_pong
from whimbrel_cli.bridging.words import Result, Standing, State
from whimbrel_cli.progress import ENDED

_BUFFER = 1 << 20
#: Seconds in which a destination that hung up may still say why.
_LAST_WORDS = 1.0
#: Seconds for the orderly end of the channel, and for the machine to say how it ended.
_FINISH = 30.0
_POLL = 0.1
log = logging.getLogger("whimbrel.cli.pump")


class Answers:
    """What of the return path a pump must know; see docs of whimbrel.wire.return_path. Fed with pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._lost = False
        #: Something was answered: the source has opened the return path.
        self.any = False
        #: Status of SHUT, the last message; None: there was none.
        self.shut: int | None = None
        #: There is a relay, or another pump, on the way.
        self.relayed = False

    def feed(self, data: bytes) -> None:
        self.any = True
        self._rest = b"" if self._lost else self._rest + data
        at = 0
        while len(self._rest) - at >= 4:
            number, length = struct.unpack_from(">HH", self._rest, at)
            # After RECV_BITMAP comes something that its length does not count.
            if length > MAX_RP_DATA or number == Answer.RECV_BITMAP:
                self._lost = True
                return
            if len(self._rest) - at < 4 + length:
                break
            body = self._rest[at + 4 : at + 4 + length]
            at += 4 + length
            if number == Answer.SHUT and length == 4:
                (self.shut,) = struct.unpack(">I", body)
            elif number == Answer.PONG and body == struct.pack(">I", PONG_RELAY):
                self.relayed = True
        self._rest = self._rest[at:]


class Pump:
    """What both directions share. run() is called once; terminate() from any thread or a signal handler."""

    def __init__(self, sock: socket.socket, channel: Channel) -> None:
        """It owns both."""
        self._sock, self._channel = sock, channel
        self._answers = Answers()
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        #: Bytes that the channel took, and gave.
        self.sent = 0
        self.received = 0

    def run(self) -> Result:
        raise NotImplementedError

    def terminate(self) -> None:
        """Somebody wants the process to end."""
        self._events.put(_Terminated())

    def _start(self, *loops: Callable[[], None]) -> None:
        for loop in loops:
            thread = threading.Thread(target=loop, name=f"pump {loop.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """After run() has returned: both ends."""
        self._shutdown(socket.SHUT_RDWR)
        self._channel.close()
        for thread in self._threads:
            thread.join(_LAST_WORDS)
        self._sock.close()

    def _shutdown(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(how)

    def _finish(self) -> None:
        """Raises MigrationError when something may not have arrived."""
        self._channel.flush()
        self._channel.finish(time.monotonic() + _FINISH)


@attrs.frozen
class _Terminated:
    pass


@attrs.frozen
class _MachineClosed:
    pass


@attrs.frozen
class _Lost:
    """The channel failed; `answers`: it was the way back, else the way out."""

    error: MigrationError
    answers: bool


_Event = _Terminated | _MachineClosed | _Lost


class SourcePump(Pump):
    """The machine is the source."""

    def __init__(
        self,
        sock: socket.socket,
        channel: Channel,
        *,
        ask: Callable[[], Standing | None],
        on_unknown: Callable[[str], None],
    ) -> None:
        """ask: what the source says of itself; None: it cannot be asked now. on_unknown: its connection is held from
        here on until somebody decides, and why.
        """
        super().__init__(sock, channel)
        self._ask, self._on_unknown = ask, on_unknown
        self._stopped = threading.Event()  # nothing goes on that was read from here on
        self._back_ended = threading.Event()
        self._back_error: MigrationError | None = None

    def run(self) -> Result:
        self._start(self._out)
        self._back = self._channel.return_path()
        if self._back is None:
            self._back_ended.set()
        else:
            self._start(self._answer)
        while True:
            match self._events.get():
                case _MachineClosed():
                    return self._machine_closed()
                case _Lost(answers=True) if not self._answers.any:
                    pass  # it asked for no answers: a destination hangs up as soon as it has all
                case _Lost(error=error) if self._answers.shut is None:
                    if (result := self._lost(error)) is not None:
                        return result
                case _Lost(answers=False):
                    self._await_machine(drain=True)
                    return self._machine_closed()
                case _Terminated():
                    if (standing := self._ask()) is not None and standing.may_see_the_end:
                        return self._let_go("the pump was told to end")
                    log.warning("told to end; too late: the destination decides now")

    # ---- threads

    def _out(self) -> None:
        view = memoryview(bytearray(_BUFFER))
        try:
            while n := self._read(view):
                if self._stopped.is_set():
                    return
                self._channel.send([view[:n]])
                self.sent += n
        except MigrationError as error:
            self._events.put(_Lost(error, answers=False))
        else:
            self._events.put(_MachineClosed())

    def _read(self, view: memoryview) -> int:
        try:
            return self._sock.recv_into(view)
        except OSError:  # reset: it closed with an answer unread
            return 0

    def _answer(self) -> None:
        view = memoryview(bytearray(_BUFFER >> 4))
        error: MigrationError = EndOfStream("the destination closed the connection")
        try:
            while n := self._channel_back().recv_into(view):
                self.received += n
                self._answers.feed(bytes(view[:n]))
                with contextlib.suppress(OSError):  # it is gone: _out sees that
                    self._sock.sendall(view[:n])
        except MigrationError as why:
            error = why
        self._back_error = error
        self._back_ended.set()
        if self._answers.shut is None:
            self._events.put(_Lost(error, answers=True))

    def _channel_back(self) -> Channel:
        assert self._back is not None
        return self._back

    # ---- ends

    def _machine_closed(self) -> Result:
        """The source has ended its migration, one way or the other."""
        if self._answers.shut == 0:
            with contextlib.suppress(
                MigrationError
            ):  # it has taken over, whatever became of the connection
                self._finish()
            return Result(State.DONE)
        if self._answers.shut:
            self._channel.abort()
            return Result(State.FAILED, f"the destination refused (status {self._answers.shut})")
        status = self._how_it_ended()
        if status == "completed" or (status is None and not self._answers.any):
            try:
                self._finish()
            except MigrationError as error:
                return Result(State.UNKNOWN, f"not all may have arrived: {error}")
            return Result(State.DONE)
        self._channel.abort()
        return Result(State.FAILED, f"the migration was {status or 'broken off'} at the source")

    def _how_it_ended(self) -> str | None:
        """The status, which follows the end of the connection soon; None: nobody says."""
        deadline = time.monotonic() + _FINISH
        while (standing := self._ask()) is not None:
            if standing.status in ENDED or time.monotonic() > deadline:
                return standing.status
            time.sleep(_POLL)
        return None

    def _lost(self, error: MigrationError) -> Result | None:
        """None: the destination's answer came after all."""
        self._stopped.set()
        if self._answers.any:
            self._back_ended.wait(_LAST_WORDS)
            if self._answers.shut is not None:
                self._await_machine(drain=True)
                return self._machine_closed()
        log.info("lost: %s", error)
        proved = (
            self._answers.any
            and isinstance(self._back_error, EndOfStream)
            and self._channel.eof_means_peer_gone
            and not self._answers.relayed
        )
        while not proved:
            if self._await_machine(0):
                if self._how_it_ended() == "completed":
                    return Result(State.UNKNOWN, f"not all may have arrived: {error}")
                break
            standing = self._ask()
            if standing is None:
                self._await_machine(_LAST_WORDS)
            elif standing.may_see_the_end:
                break
            else:
                return self._hold(error)
        return self._let_go(str(error))

    def _let_go(self, why: str) -> Result:
        """The source sees the end of its connection, and runs on."""
        self._stopped.set()
        self._shutdown(socket.SHUT_RDWR)
        self._channel.abort()
        return Result(State.FAILED, why)

    def _hold(self, error: MigrationError) -> Result:
        why = f"the link was lost while the machine stood still: {error}"
        self._on_unknown(why)
        self._await_machine()
        return Result(State.UNKNOWN, why)

    def _await_machine(self, seconds: float | None = None, *, drain: bool = False) -> bool:
        """Wait until the machine has closed its end; False when it has not within that time."""
        if drain:
            view = memoryview(bytearray(_BUFFER))
            while self._read(view):
                pass
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(None if seconds is None else seconds * 1000))


class DestinationPump(Pump):
    """The machine is the destination. It runs as soon as it has read EOF; nothing here decides anything.

    When its process ends or refuses, its end is passed on. The source is told that there is a pump, so that it does not
    take the pump's own end for proof that the destination is gone.
    """

    def __init__(self, sock: socket.socket, channel: Channel) -> None:
        super().__init__(sock, channel)
        self._in_ended = threading.Event()
        self._in_error: MigrationError | None = None
        self._untold: MigrationError | None = None

    def run(self) -> Result:
        self._start(self._in, self._answer)
        while not isinstance(self._events.get(), _MachineClosed):
            log.warning("told to end: the stream is cut off here")
            self._shutdown(socket.SHUT_WR)
        result = self._result()
        if self._channel.return_path() is not None:
            with contextlib.suppress(
                MigrationError
            ):  # what it answered was taken or not: see _answer
                self._finish()
            self._in_ended.wait(_LAST_WORDS)  # closing with bytes unread would reset the connection
        elif self._in_ended.wait(_LAST_WORDS) and self._in_error is None:
            try:
                self._finish()
            except MigrationError as error:
                log.warning("the way in did not end well: %s", error)
        return result

    def _result(self) -> Result:
        if self._answers.shut == 0:
            if self._untold is not None:
                return Result(
                    State.UNKNOWN,
                    f"the machine has taken over, and the source could not be told: {self._untold}",
                )
            return Result(State.DONE)
        if self._answers.shut:
            return Result(State.FAILED, f"the machine refused (status {self._answers.shut})")
        if self._in_error is not None:
            return Result(State.FAILED, str(self._in_error))
        if self._answers.any:
            return Result(State.FAILED, "the machine hung up before it took over")
        return Result(State.DONE)  # nobody asked it

    def _in(self) -> None:
        view = memoryview(bytearray(_BUFFER))
        listening = True
        try:
            while n := self._channel.recv_into(view):
                self.received += n
                try:
                    if listening:
                        self._sock.sendall(view[:n])
                except OSError:
                    listening = False
        except MigrationError as error:
            self._in_error = error
        self._shutdown(socket.SHUT_WR)
        self._in_ended.set()

    def _answer(self) -> None:
        back = self._channel.return_path()
        view = memoryview(bytearray(_BUFFER >> 4))
        try:
            while n := self._sock.recv_into(view):
                hello = b"" if self._answers.any else encode_pong(PONG_RELAY)
                self._answers.feed(bytes(view[:n]))
                if self._untold is not None:
                    continue
                try:
                    if back is None:
                        raise ChannelError(f"{self._channel.name} has no way back")
                    back.send([hello, view[:n]])
                    self.sent += n
                except MigrationError as error:
                    log.warning("an answer could not be passed on: %s", error)
                    self._untold = error
        except OSError as error:
            log.info("the machine's end: %s", error)
        self._events.put(_MachineClosed())
