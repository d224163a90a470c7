"""The byte stream of a migration as QEMU_FILE messages, and the pages beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from whimbrel.channel import Buffer, Channel, Role
from whimbrel.errors import EndOfStream
from whimbrel_ram import PageTransport
from whimbrel_rdma.link import Link
from whimbrel_rdma.protocol import MAX_FILE, Kind, Message
from whimbrel_rdma.verbs import Connection

T = TypeVar("T")


class RdmaChannel(Channel):
    """One connection. The stream goes one way; the way back is a connection of its own, where the peer has one.

    patience    seconds that each step of the destination may take while the machine stands still; None: any time

    recv_into() never reads ahead: behind each message may come control messages that are not of the stream.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        role: Role,
        pin_all: bool = False,
        patience: float | None = None,
        way_back: Callable[[], Channel | None] = lambda: None,
        eager: bool = False,
    ) -> None:
        self.name = connection.name
        self.connection = connection
        self.link = Link(connection)
        self.role = role
        self.pin_all = pin_all
        self.patience = patience
        self._open_way_back = way_back
        self._way_back: Channel | None = None
        self._eager = eager
        self._rest = memoryview(b"")
        self._pages: PageTransport | None = None

    # ---- the stream

    def send(self, buffers: Sequence[Buffer]) -> None:
        data = memoryview(b"".join(buffers))
        for start in range(0, len(data), MAX_FILE):
            piece = bytes(data[start : start + MAX_FILE])
            self.link.say(Message(Kind.QEMU_FILE, piece, 0))

    def recv_into(self, view: memoryview) -> int:
        if not self._fill(None):
            return 0
        n = min(len(view), len(self._rest))
        view[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        if self._eager and not self._rest:
            self.ready()
        return n

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        return bytes(self._rest[:n]) if self._fill(deadline) else b""

    def _fill(self, deadline: float | None) -> bool:
        """Have something to give; False at the end."""
        if not self._rest:
            self.connection.gate.check()
            try:
                message = self.link.hear(Kind.QEMU_FILE, deadline=deadline)
            except EndOfStream:
                return False
            self._rest = memoryview(message.data)
        return True

    def ready(self) -> None:
        """Let the other side send its next message before anybody waits for it."""
        with contextlib.suppress(EndOfStream):
            self.link.be_ready()

    def finish(self, deadline: float | None = None) -> None:
        self.connection.drain_sends(deadline)

    # ---- the rest

    def return_path(self) -> Channel | None:
        if self._way_back is None:
            self._way_back = self._open_way_back()
        return self._way_back

    def extension(self, kind: type[T]) -> T | None:
        if kind is PageTransport:
            if self._pages is None:
                self._pages = self._make_pages()
            return self._pages  # type: ignore[return-value]
        return super().extension(kind)

    def _make_pages(self) -> PageTransport:
        if self.role is Role.SOURCE:
            from whimbrel_rdma.sending import SendingPages

            return SendingPages(self)
        from whimbrel_rdma.receiving import ReceivingPages

        return ReceivingPages(self)

    def fail(self) -> None:
        """The migration has failed: say so, and let neither side touch the other's memory any more."""
        self.connection.last_word(Message(Kind.ERROR).encode())
        self.connection.stop()

    def abort(self) -> None:
        self.connection.gate.signal()
        if self._way_back is not None:
            self._way_back.abort()

    def close(self) -> None:
        if self.role is Role.DESTINATION:
            self.return_path()  # it may have been opened and not asked for
        if self._way_back is not None:
            self._way_back.close()
        self.connection.close()
