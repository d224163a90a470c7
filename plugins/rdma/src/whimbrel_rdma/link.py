"""Control messages in their order: whoever receives says READY first, and that entitles the other side to one message."""

from __future__ import annotations

import collections
import time
from typing import TYPE_CHECKING

from whimbrel.errors import PeerError, StreamError
from whimbrel_rdma.protocol import Kind, Message, decode_message

if TYPE_CHECKING:
    from whimbrel_rdma.verbs import Connection

_READY = Message(Kind.READY).encode()


class Link:
    """Of one connection. Methods raise ChannelError, DeadlineExceeded, StreamError for what breaks the order, PeerError for ERROR."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        connection.received = self._take
        #: Seconds that each step of the other side may take; None: any time.
        self.patience: float | None = None
        self._may_send = 0  # READYs that were not used
        self._ready_said = False
        self._reply_due = False
        self._inbox: collections.deque[Message] = collections.deque()

    def _take(self, data: bytes) -> None:
        message = decode_message(data)
        if message.kind is Kind.ERROR:
            raise PeerError(
                "the other side has given up the migration", hint="Its own log says why"
            )
        if message.kind is Kind.READY:
            self._may_send += 1
            if self._may_send > 1:
                raise StreamError("READY twice, without a message in between")
            return
        if self._reply_due:
            self._reply_due = False
        elif self._ready_said:
            self._ready_said = False
        else:
            raise StreamError(f"RDMA control message {message.kind.name} without READY")
        self._inbox.append(message)

    def say(self, message: Message) -> None:
        """Send it, once the other side is ready."""
        self.connection.wait(
            lambda: self._may_send > 0,
            self._deadline(),
            f"the other side to be ready for {message.kind.name}",
        )
        self._may_send -= 1
        self.connection.send(message.encode())

    def reply(self, message: Message) -> None:
        """Send what the other side waits for."""
        self.connection.send(message.encode())

    def ask(self, message: Message, answer: Kind) -> Message:
        """Say it, and wait for the reply."""
        self.say(message)
        self._reply_due = True
        return self._next((answer,), self._deadline())

    def _deadline(self) -> float | None:
        return None if self.patience is None else time.monotonic() + self.patience

    def hear(self, *kinds: Kind, deadline: float | None = None) -> Message:
        """The next message, which must be of one of the kinds."""
        self.be_ready()
        return self._next(kinds, deadline)

    def be_ready(self) -> None:
        """Say READY, unless it was said or a message is here."""
        if not self._inbox and not self._ready_said:
            self._ready_said = True
            self.connection.send(_READY)

    def _next(self, kinds: tuple[Kind, ...], deadline: float | None) -> Message:
        said = " or ".join(kind.name for kind in kinds)
        self.connection.wait(lambda: bool(self._inbox), deadline, said)
        message = self._inbox.popleft()
        if message.kind not in kinds:
            raise StreamError(
                "an RDMA control message out of order", expected=said, found=message.kind.name
            )
        return message
