"""A Channel over file descriptors: what tcp, unix, exec and fd share, and a start for plugins of others.

All I/O is non-blocking underneath, so that every wait can also end by abort(), a deadline or a cancelled context.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence

from whimbrel.channel import Buffer, Channel
from whimbrel.errors import Cancelled, ChannelError, DeadlineExceeded

_IOV_MAX = 1024


def wait_fd(
    fd: int,
    events: int,
    *,
    deadline: float | None = None,
    cancel_fd: int | None = None,
    what: str = "the peer",
) -> None:
    """Wait until fd has one of the poll events. Raises DeadlineExceeded, or Cancelled once cancel_fd is readable."""
    poll = select.poll()
    poll.register(fd, events)
    if cancel_fd is not None:
        poll.register(cancel_fd, select.POLLIN)
    while True:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = dict(poll.poll(timeout))
        if cancel_fd in ready:
            raise Cancelled(f"cancelled while waiting for {what}")
        if fd in ready:
            return
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded(f"timed out waiting for {what}")


class DescriptorChannel(Channel):
    """A channel over a socket, or over a descriptor to read and/or one to write. It owns what it is given."""

    def __init__(
        self,
        *,
        sock: socket.socket | None = None,
        read_fd: int | None = None,
        write_fd: int | None = None,
        name: str = "channel",
        eof_means_peer_gone: bool = False,
    ) -> None:
        self.name = name
        self.eof_means_peer_gone = eof_means_peer_gone
        self._sock = sock
        if sock is not None:
            sock.setblocking(True)  # MSG_DONTWAIT leaves the flag alone, which other holders share
            read_fd = write_fd = sock.fileno()
        self._read_fd, self._write_fd = read_fd, write_fd
        self._was_blocking = {
            fd: os.get_blocking(fd)
            for fd in {read_fd, write_fd} - {None}
            if sock is None and fd is not None
        }
        for fd in self._was_blocking:
            os.set_blocking(fd, False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._aborted = False
        self._closed = False
        self._pushback = b""  # peeked bytes of a pipe, which has no MSG_PEEK

    # ---- waiting

    def _wait(self, fd: int, events: int, deadline: float | None = None) -> None:
        try:
            wait_fd(fd, events, deadline=deadline, cancel_fd=self._wake, what=self.name)
        except Cancelled:
            raise ChannelError(f"{self.name}: the channel was aborted") from None

    @contextlib.contextmanager
    def _io(self, doing: str) -> Iterator[None]:
        if self._aborted or self._closed:
            raise ChannelError(
                f"{self.name}: the channel was {'closed' if self._closed else 'aborted'}"
            )
        try:
            yield
        except OSError as error:
            if self._aborted:
                raise ChannelError(f"{self.name}: the channel was aborted") from None
            raise ChannelError(f"{self.name}: {doing} failed: {error.strerror or error}") from error

    # ---- the contract

    def send(self, buffers: Sequence[Buffer]) -> None:
        fd = self._write_fd
        if fd is None:
            raise ChannelError(f"{self.name} is open for reading only")
        todo = [memoryview(b).cast("B") for b in buffers if len(b)]
        with self._io("writing"):
            while todo:
                try:
                    if self._sock is not None:
                        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                        sent = self._sock.sendmsg(todo[:_IOV_MAX], (), flags)
                    else:
                        sent = os.writev(fd, todo[:_IOV_MAX])
                except BlockingIOError:
                    self._wait(fd, select.POLLOUT)
                    continue
                while sent:
                    if sent >= len(todo[0]):
                        sent -= len(todo.pop(0))
                    else:
                        todo[0] = todo[0][sent:]
                        sent = 0

    def recv_into(self, view: memoryview) -> int:
        fd = self._read_fd
        if fd is None:
            raise ChannelError(f"{self.name} is open for writing only")
        if self._pushback:
            n = min(len(view), len(self._pushback))
            view[:n] = self._pushback[:n]
            self._pushback = self._pushback[n:]
            return n
        with self._io("reading"):
            while True:
                try:
                    if self._sock is not None:
                        n = self._sock.recv_into(view, 0, socket.MSG_DONTWAIT)
                    else:
                        n = os.readv(fd, [view])
                except BlockingIOError:
                    self._wait(fd, select.POLLIN)
                    continue
                if n == 0 and self._aborted:
                    raise ChannelError(f"{self.name}: the channel was aborted")
                return n

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        fd = self._read_fd
        if fd is None:
            raise ChannelError(f"{self.name} is open for writing only")
        if self._pushback:
            return self._pushback[:n]
        with self._io("reading"):
            while True:
                try:
                    if self._sock is not None:
                        return self._sock.recv(n, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                    self._pushback = os.read(fd, n)
                    return self._pushback
                except BlockingIOError:
                    self._wait(fd, select.POLLIN, deadline)

    def finish(self, deadline: float | None = None) -> None:
        with self._io("finishing"):
            if self._sock is not None:
                self._sock.shutdown(socket.SHUT_WR)
            elif self._write_fd is not None and self._write_fd != self._read_fd:
                fd, self._write_fd = self._write_fd, None
                self._release(fd)

    def abort(self) -> None:
        if self._closed:
            return
        self._aborted = True
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._sock is not None:
            self._sock.close()
        else:
            for fd in {self._read_fd, self._write_fd} - {None}:
                assert fd is not None
                self._release(fd)
        os.close(self._wake)

    def _release(self, fd: int) -> None:
        """Close a descriptor, giving back the blocking mode that other holders of it rely on."""
        with contextlib.suppress(OSError):
            os.set_blocking(fd, self._was_blocking.get(fd, True))
        with contextlib.suppress(OSError):
            os.close(fd)

    def return_path(self) -> Channel | None:
        return self if self._sock is not None else None

    def raw_fd(self, direction: str) -> int | None:
        if direction == "read":
            return None if self._pushback else self._read_fd
        return self._write_fd

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
