"""The return path through a relay: whole messages of the destination, passed on to the source as they come."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable

from whimbrel.channel import Channel
from whimbrel.errors import EndOfStream, MigrationError, StreamError
from whimbrel.stream import InStream
from whimbrel.wire.format import PONG_RELAY, Answer
from whimbrel.wire.return_path import encode_answer, encode_pong, encode_shut, read_answer

#: Seconds that a source has for reading what it was told before.
_TELL = 1.0


class Answers(threading.Thread):
    """Reads from the destination until it has said how it ended, or says nothing more."""

    def __init__(
        self,
        out: Channel,
        back: Channel,
        *,
        may_take_over: Callable[[], bool],
        on_end: Callable[[], None],
    ) -> None:
        """The channel `out` leads to the destination, `back` to the source. may_take_over: the destination may have all
        that it needs for that. on_end is called, on this thread, behind the last message.
        """
        super().__init__(name="whimbrel-answers", daemon=True)
        self._inp = InStream(out, buffer_size=4096)
        self._back = back
        self._may_take_over = may_take_over
        self._on_end = on_end
        self._lock = threading.Lock()
        #: Status of the destination's SHUT; None: there was none.
        self.status: int | None = None
        #: Why there was none, or why it could not be passed on.
        self.error: MigrationError | None = None
        #: The source has got a SHUT.
        self.told = False
        #: There is another relay on the way to the destination.
        self.relayed = False
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            with self._lock:
                self._back.send([encode_pong(PONG_RELAY)])
            while self.status is None:
                self._pass_on(*read_answer(self._inp))
        except EndOfStream as error:
            self.error = EndOfStream("the destination closed the connection without an answer")
            self.error.__cause__ = error
        except MigrationError as error:
            self.error = error
        finally:
            self.ended.set()
            self._on_end()

    def tell(self, status: int) -> None:
        """Say to the source how it ended, unless it was told before, is gone, or does not read."""
        if not self._lock.acquire(timeout=_TELL):
            return
        try:
            if not self.told:
                with contextlib.suppress(MigrationError):
                    self._back.send([encode_shut(status)])
                    self.told = True
        finally:
            self._lock.release()

    def _pass_on(self, answer: Answer, data: bytes) -> None:
        if answer is Answer.SHUT:
            (status,) = struct.unpack(">I", data)
            if status == 0 and not self._may_take_over():
                raise StreamError(
                    "the destination says that it has taken over before it was sent the end of the stream"
                )
        with self._lock:
            if answer is Answer.SHUT:
                self.status = status
                if self.told:  # by whoever decided in the meantime
                    return
            self._back.send([encode_answer(answer, data)])
            self.told |= answer is Answer.SHUT
        self.relayed |= (answer, data) == (Answer.PONG, struct.pack(">I", PONG_RELAY))
