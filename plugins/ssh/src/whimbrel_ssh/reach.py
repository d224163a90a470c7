"""The way to a host that needs no SSH: a TCP connection, or what a ProxyCommand gives."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time

from whimbrel import DeadlineExceeded
from whimbrel.descriptors import connect_socket
from whimbrel_ssh.config import Host
from whimbrel_ssh.errors import Unreachable

_TAIL = 4096  # bytes of what a ProxyCommand said
_PATIENCE = 5.0  # seconds for a killed process to be gone


def tcp(host: Host, cancel_fd: int) -> socket.socket:
    """Raises Unreachable, and Cancelled by cancel_fd."""
    deadline = time.monotonic() + host.connect_timeout
    try:
        found = socket.getaddrinfo(host.hostname, host.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(
            f"cannot reach {host}: {error.strerror}",
            hint="Check the name, or HostName in ~/.ssh/config",
        ) from error
    reasons: list[str] = []
    for family, kind, number, _, where in found:
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(family, kind, number))
            try:
                connect_socket(sock, where, deadline=deadline, cancel_fd=cancel_fd)
                _watch_over(sock, host)
                sock.setblocking(True)
            except DeadlineExceeded:
                reasons.append(f"no answer within {host.connect_timeout:.0f} s")
                break
            except OSError as error:
                reasons.append(error.strerror or str(error))
            else:
                undo.pop_all()
                return sock
    raise Unreachable(
        f"cannot reach {host}: {', '.join(dict.fromkeys(reasons))}",
        hint="Check that sshd runs there, the port, and what filters on the way",
    )


def _watch_over(sock: socket.socket, host: Host) -> None:
    """Let the system notice that the other host, or the way to it, is gone: with data on the way, and without."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    every = max(1, round(host.keepalive))
    if host.keepalive:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, host.keepalives))
        patience = every * (host.keepalives + 1) * 1000
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)


class Proxy:
    """A ProxyCommand, whose standard input and output are the connection."""

    def __init__(self, command: str) -> None:
        """Raises OSError."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.sock, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", f"exec {command}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=self._said,
                    process_group=0,  # Ctrl-C is for us
                )
        except BaseException:
            self._said.close()
            raise

    def said(self) -> str:
        """The end of its standard error output."""
        size = os.fstat(self._said.fileno()).st_size
        data = os.pread(self._said.fileno(), _TAIL, max(0, size - _TAIL))
        return printable(data)

    def close(self) -> None:
        self.sock.close()
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self._said.close()


def printable(data: bytes) -> str:
    """What another program said, without what could move a terminal's cursor."""
    text = data.decode(errors="replace").strip()
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
