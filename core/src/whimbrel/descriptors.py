"""Channels and listeners over file descriptors: what tcp, unix, exec and fd share, and a start for plugins of others.

Every wait can also end by abort(), a deadline or a cancelled context. So I/O is non-blocking underneath, except where it
takes no deadline and is on a socket: there the kernel waits, and abort() and close() shut the socket down.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import select
import socket
import stat
import termios
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from whimbrel.channel import Buffer, Channel, Listener
from whimbrel.errors import Cancelled, ChannelError
from whimbrel.waiting import Gate, pause, wait_any, wait_fd

__all__ = [
    "DescriptorChannel",
    "ReadyListener",
    "SocketListener",
    "connect_socket",
    "socket_uri",
    "wait_fd",
]

_IOV_MAX = 1024
_RETRY = 0.02  # seconds between two looks at what gives no event


def connect_socket(
    sock: socket.socket,
    address: str | tuple[Any, ...],
    *,
    deadline: float | None = None,
    cancel_fd: int | None = None,
    what: str = "the connection",
) -> None:
    """sock.connect(address) that obeys deadline and cancel_fd. Raises OSError, DeadlineExceeded, Cancelled."""
    sock.setblocking(False)
    while (error := sock.connect_ex(address)) == errno.EAGAIN and sock.family == socket.AF_UNIX:
        pause(_RETRY, deadline=deadline, cancel_fd=cancel_fd, what=what)  # its backlog is full
    if error in (errno.EINPROGRESS, errno.EINTR):
        wait_fd(sock.fileno(), select.POLLOUT, deadline=deadline, cancel_fd=cancel_fd, what=what)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def socket_uri(sock: socket.socket) -> str:
    """The URI of the address that a stream socket is bound to: tcp:HOST:PORT with numbers, or unix:PATH. Empty for
    other kinds of sockets.
    """
    where = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        flags = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        host, port = socket.getnameinfo(where, flags)
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
    return f"unix:{where}" if isinstance(where, str) and where else ""


def socket_address(sock: socket.socket) -> dict[str, Any] | None:
    """The same in the form of QMP's SocketAddress; None for other kinds of sockets."""
    where = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        family = "ipv4" if sock.family == socket.AF_INET else "ipv6"
        return {"type": "inet", "host": where[0], "port": str(where[1]), family: True}
    return {"type": "unix", "path": where} if isinstance(where, str) and where else None


class DescriptorChannel(Channel):
    """A channel over a socket, or over a descriptor to read and/or one to write. It owns what it is given.

    A socket is its own return path. `open_extra` makes the further channels, where the transport has room for them.
    close() may come while other threads are blocked: they get a ChannelError.
    """

    def __init__(
        self,
        *,
        sock: socket.socket | None = None,
        read_fd: int | None = None,
        write_fd: int | None = None,
        name: str = "channel",
        eof_means_peer_gone: bool = False,
        open_extra: Callable[[], Channel] | None = None,
    ) -> None:
        self.name = name
        self.eof_means_peer_gone = eof_means_peer_gone
        self._sock = sock
        self._open_extra = open_extra
        if sock is not None:
            read_fd = write_fd = sock.fileno()
        self._read_fd, self._write_fd = read_fd, write_fd
        # The flag belongs to the open file, which other processes may share: it is given back in the end.
        self._was_blocking = {fd: os.get_blocking(fd) for fd in self._fds()}
        if sock is not None:
            sock.setblocking(True)  # MSG_DONTWAIT does for us; who borrows raw_fd() wants it so
        else:
            for fd in self._fds():
                os.set_blocking(fd, False)
        self._pushback = b""  # peeked bytes of a pipe, which has no MSG_PEEK
        # Not a method: the gate would keep the channel from being collected.
        self._gate = Gate(name, functools.partial(_shut_down, sock))

    def _fds(self) -> set[int]:
        return {fd for fd in (self._read_fd, self._write_fd) if fd is not None}

    @contextlib.contextmanager
    def _io(self, doing: str, *, blocking: bool = False) -> Iterator[None]:
        """Around every operation: ChannelErrors for OSErrors, and for an abort, whatever it looked like."""
        self._gate.enter(blocking=blocking)
        try:
            yield
        except Cancelled:
            self._gate.check()
            raise
        except OSError as error:
            self._gate.check()
            raise ChannelError(f"{self.name}: {doing} failed: {error.strerror or error}") from error
        finally:
            self._gate.leave(blocking=blocking)

    def _wait(self, fd: int, events: int, deadline: float | None = None) -> None:
        wait_fd(fd, events, deadline=deadline, cancel_fd=self._gate.fd, what=self.name)

    def _readable(self) -> int:
        if self._read_fd is None and not self._gate.closed:
            raise ChannelError(f"{self.name} is open for writing only")
        return -1 if self._read_fd is None else self._read_fd

    # ---- the contract

    def send(self, buffers: Sequence[Buffer]) -> None:
        todo = [memoryview(b).cast("B") for b in buffers if len(b)]
        with self._io("writing", blocking=True):
            if self._write_fd is None:
                raise ChannelError(f"{self.name} is not open for writing")
            while todo:
                try:
                    sent = self._write_some(self._write_fd, todo[:_IOV_MAX])
                except BlockingIOError:
                    self._wait(self._write_fd, select.POLLOUT)
                    continue
                _advance(todo, sent)

    def _write_some(self, fd: int, buffers: list[memoryview]) -> int:
        if self._sock is not None:
            return self._sock.sendmsg(buffers, (), socket.MSG_NOSIGNAL)
        return os.writev(fd, buffers)

    def recv_into(self, view: memoryview) -> int:
        with self._io("reading"):
            fd = self._readable()
            if self._pushback:
                n = min(len(view), len(self._pushback))
                view[:n] = self._pushback[:n]
                self._pushback = self._pushback[n:]
                return n
            while True:
                try:
                    if self._sock is not None:
                        n = self._sock.recv_into(view, 0, socket.MSG_DONTWAIT)
                    else:
                        n = os.readv(fd, [view])
                except BlockingIOError:
                    self._wait(fd, select.POLLIN)
                    continue
                if n == 0:
                    self._gate.check()  # the end that our own abort() makes is none
                return n

    def recv_all(self, views: Sequence[memoryview]) -> int:
        if self._sock is None:
            return super().recv_all(views)
        todo = [view for view in views if len(view)]
        got = 0
        with self._io("reading", blocking=True):
            while todo:
                try:
                    n, *_ = self._sock.recvmsg_into(todo[:_IOV_MAX], 0, socket.MSG_WAITALL)
                except BlockingIOError:  # somebody else who holds the socket wants it so
                    self._wait(self._readable(), select.POLLIN)
                    continue
                if n == 0:
                    self._gate.check()
                    break
                got += n
                _advance(todo, n)
        return got

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        with self._io("reading"):
            fd = self._readable()
            while True:
                try:
                    data = self._peek_now(fd, n)
                except BlockingIOError:
                    self._wait(fd, select.POLLIN, deadline)
                    continue
                if not data:
                    self._gate.check()
                return data

    def _peek_now(self, fd: int, n: int) -> bytes:
        if self._sock is not None:
            return self._sock.recv(n, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if len(self._pushback) < n:
            try:
                self._pushback += os.read(fd, n - len(self._pushback))
            except BlockingIOError:
                if not self._pushback:
                    raise
        return self._pushback[:n]

    def finish(self, deadline: float | None = None) -> None:
        """On TCP, wait until the other host has all; half-close a socket; fsync a file; close a pipe."""
        with self._io("finishing"):
            if self._sock is not None:
                self._finish_socket(self._sock, deadline)
                return
            fd = self._write_fd
            if fd is None:
                return
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.fsync(fd)
            if fd != self._read_fd:
                self._write_fd = None
                self._give_back(fd)
                os.close(fd)

    def _finish_socket(self, sock: socket.socket, deadline: float | None) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Before the half-close: the other host may take its time to acknowledge that.
            step = 0.0005
            while any(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))):
                _raise_error(sock)  # what a reset connection has not sent stays there for ever
                pause(step, deadline=deadline, cancel_fd=self._gate.fd, what=self.name)
                step = min(2 * step, 0.01)
        sock.shutdown(socket.SHUT_WR)
        _raise_error(sock)

    def abort(self) -> None:
        if self._gate.signal():
            _shut_down(self._sock)

    def close(self) -> None:
        if not self._gate.close():
            return
        fds = self._fds()
        self._read_fd = self._write_fd = None
        for fd in fds:
            self._give_back(fd)
            with contextlib.suppress(OSError):
                if self._sock is not None:
                    self._sock.close()
                else:
                    os.close(fd)

    def _give_back(self, fd: int) -> None:
        """Restore the blocking mode that other holders of the open file rely on."""
        if not self._gate.forked:
            with contextlib.suppress(OSError):
                os.set_blocking(fd, self._was_blocking[fd])

    def return_path(self) -> Channel | None:
        return self if self._sock is not None else None

    def open_extra(self, purpose: str, index: int) -> Channel:
        if self._open_extra is None:
            return super().open_extra(purpose, index)
        return self._open_extra()

    def raw_fd(self, direction: str) -> int | None:
        if direction == "read":
            return None if self._pushback else self._read_fd
        return self._write_fd

    @contextlib.contextmanager
    def lend(self, direction: str) -> Iterator[int | None]:
        with self._io("reading" if direction == "read" else "writing", blocking=True):
            yield None if self._sock is None else self._sock.fileno()
            self._gate.check()  # to native code an abort looks like the end

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _shut_down(sock: socket.socket | None) -> None:
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _advance(todo: list[memoryview], n: int) -> None:
    """Take the first n bytes off."""
    whole = 0
    while whole < len(todo) and n >= len(todo[whole]):
        n -= len(todo[whole])
        whole += 1
    del todo[:whole]
    if n:
        todo[0] = todo[0][n:]


def _raise_error(sock: socket.socket) -> None:
    """OSError if the connection has failed: the peer closed with bytes unread, or the link was reset."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


class SocketListener(Listener):
    """Accepts from listening sockets, which it owns, and makes channels of what it accepts by `channel`.

    close() may come while another thread is in accept(), which then raises ChannelError.
    """

    def __init__(
        self,
        socks: Sequence[socket.socket],
        *,
        addresses: Sequence[str],
        channel: Callable[[socket.socket], Channel],
        deadline: float | None = None,
        cancel_fd: int | None = None,
    ) -> None:
        self.addresses = tuple(addresses)
        self.socket_addresses = tuple(a for a in map(socket_address, socks) if a is not None)
        self._socks = {sock.fileno(): sock for sock in socks}
        for sock in socks:
            sock.setblocking(False)  # a client may be gone again between poll and accept
        self._channel = channel
        self._deadline = deadline
        self._cancel_fd = cancel_fd
        self._gate = Gate(f"the listener at {' '.join(self.addresses) or 'a socket'}")

    def accept(self, deadline: float | None = None) -> Channel:
        with self._gate.inside():
            while True:
                ready = wait_any(
                    (self._gate.fd, *self._socks),
                    select.POLLIN,
                    deadline=self._deadline if deadline is None else deadline,
                    cancel_fd=self._cancel_fd,
                    what=f"a connection to {' '.join(self.addresses)}",
                )
                self._gate.check()
                for fd in ready:
                    try:
                        accepted, _ = self._socks[fd].accept()
                    except (BlockingIOError, ConnectionAbortedError):
                        continue
                    except OSError as error:
                        raise ChannelError(f"{self._gate.name}: {error.strerror}") from error
                    return self._channel(accepted)

    def close(self) -> None:
        if self._gate.close():
            if not self._gate.forked:
                self._clean_up()
            for sock in self._socks.values():
                sock.close()

    def _clean_up(self) -> None:
        """What else to remove; called once, while the sockets are still open, and not in a forked child."""

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class ReadyListener(Listener):
    """The listener of a transport whose only channel exists already: accept() gives it, once."""

    def __init__(self, channel: Channel, address: str) -> None:
        self.addresses = (address,)
        self._channel: Channel | None = channel
        self._closed = False

    def accept(self, deadline: float | None = None) -> Channel:
        channel, self._channel = self._channel, None
        if channel is None:
            state = "is closed" if self._closed else "has one channel only, which was taken"
            raise ChannelError(f"the listener at {self.addresses[0]} {state}")
        return channel

    def close(self) -> None:
        channel, self._channel = self._channel, None
        self._closed = True
        if channel is not None:
            channel.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
