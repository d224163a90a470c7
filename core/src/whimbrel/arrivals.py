"""The connections of one incoming migration: which of them is the main channel, and who gets the others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from whimbrel.channel import Channel, Listener
from whimbrel.errors import ChannelError
from whimbrel.wire import format as wire

#: Seconds that a connection may take to say which one it is.
PATIENCE = 10.0
#: Further channels that are kept until somebody asks for them.
MOST = 256


class Arrivals:
    """A listener as one migration sees it.

    several     capabilities are on that open further channels. They may come in any order, and before the main one:
                each is known by its first four bytes.
    """

    def __init__(
        self, listener: Listener, *, several: bool, opened: Callable[[Channel], None]
    ) -> None:
        """opened: told of each channel before it is looked at, so that a cancel reaches it."""
        self._listener = listener
        self._several = several
        self._opened = opened
        self._others: deque[Channel] = deque()
        self._lock = threading.Lock()

    def main(self) -> Channel:
        """The channel that carries the stream. Raises ChannelError, Cancelled."""
        while True:
            channel = self._listener.accept()
            self._opened(channel)
            if not self._several:
                self._listener.close()  # who opens more of them relies on somebody who takes them
                return channel
            try:
                first = channel.peek(4, time.monotonic() + PATIENCE)
            except ChannelError:
                first = b""  # of a cancel the listener knows as well
            if first == wire.MAGIC.to_bytes(4, "big"):
                return channel
            if not first or len(self._others) == MOST:
                channel.close()
                continue
            with self._lock:
                self._others.append(channel)

    def accept(self, deadline: float | None) -> Channel:
        """The next further channel. Raises ChannelError, DeadlineExceeded, Cancelled."""
        with self._lock:
            if self._others:
                return self._others.popleft()
        return self._listener.accept(deadline)

    def close(self) -> None:
        """Idempotent."""
        self._listener.close()
        with self._lock:
            others, self._others = list(self._others), deque()
        for channel in others:
            channel.close()
