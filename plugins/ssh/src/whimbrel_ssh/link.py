"""One SSH connection: reached directly, through other hosts, or by a command; trusted, let in, and kept alive.

paramiko's calls cannot be interrupted, but all of them end when their connection does. So whatever may wait runs on a
thread of its own, and who waits for that breaks the connection when there is no more reason to wait.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import paramiko

from whimbrel import ChannelError, DeadlineExceeded
from whimbrel.waiting import Gate, call_in_thread
from whimbrel_ssh import reach
from whimbrel_ssh.auth import Authenticator
from whimbrel_ssh.config import Config, Host
from whimbrel_ssh.errors import LinkLost, Unreachable
from whimbrel_ssh.keepalive import JOIN, Keeper
from whimbrel_ssh.known_hosts import KnownHosts
from whimbrel_ssh.protocol import FAILURES, Protocol

T = TypeVar("T")
log = logging.getLogger("whimbrel.ssh")

#: Bytes that the far host may send ahead on each channel. It decides itself how many we may: OpenSSH says 2 MiB.
WINDOW = 1 << 22
_AUTH_TIMEOUT = 60.0  # seconds: an agent may ask its user
_DEEPEST = 8  # hosts on the way
#: Seconds until a thread that waits for paramiko looks up.
TICK = 0.2
_LOST = (
    "Nothing is known of what the far host did since; look at the network, and at sshd's log there"
)


class Link:
    """A connection, which several channels may share: the last that releases it closes it."""

    def __init__(self, name: str, config: Config, *, accept_new: bool) -> None:
        self.name = name
        self.transport: Protocol
        self._config, self._accept_new = config, accept_new
        self._gate = Gate(name)
        self._lock = threading.Lock()
        self._undo = contextlib.ExitStack()
        self._sockets: list[Any] = []
        self._opened = self._abandoned = False
        self._users = 1
        self._lost: str | None = None  # why
        self._keeper: Keeper | None = None

    def run(
        self, call: Callable[[], T], *, deadline: float | None, cancel_fd: int | None, what: str
    ) -> T:
        """call(), which ends when the connection does. If it fails, or nobody waits for it any more, so does the link."""
        try:
            return call_in_thread(call, deadline=deadline, cancel_fd=cancel_fd, what=what)
        except BaseException:
            self._abandon()
            raise

    # ---- opening

    def open(self, host: Host) -> None:
        """Raises ChannelErrors that say how far it came."""
        try:
            self.transport = self._reach(host)
            self._keeper = Keeper(self.transport, host)
            self._undo.callback(self._keeper.stop)
            with self._lock:
                self._opened = True
                wanted = not self._abandoned
        except BaseException:
            self._close()
            raise
        if not wanted:
            self._close()

    def _abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            opened = self._opened
        self.kill()
        if opened:  # otherwise open() itself closes what there is
            self._close()

    def _reach(self, host: Host, depth: int = 0) -> Protocol:
        if depth > _DEEPEST:
            raise Unreachable(
                f"cannot reach {host}: more than {_DEEPEST} hosts are in the way",
                hint="Look for a circle of ProxyJumps in ~/.ssh/config",
            )
        via: Protocol | None = None
        for name in host.jumps:
            hop = self._config.jump(name)
            # The first is reached as its own configuration says, each of the others through the one before.
            via = (
                self._reach(hop, depth + 1)
                if via is None
                else self._enter(hop, self._via(hop, via))
            )
        if via is not None:
            return self._enter(host, self._via(host, via))
        if host.proxy_command is None:
            sock = reach.tcp(host, self._gate.fd)
            self._owns(sock)
            return self._enter(host, sock)
        try:
            proxy = reach.Proxy(host.proxy_command)
        except OSError as error:
            raise Unreachable(
                f"cannot reach {host}: {error}", hint="Check its ProxyCommand"
            ) from error
        self._undo.callback(proxy.close)
        self._owns(proxy.sock)
        return self._enter(host, proxy.sock, proxy.said)

    def _owns(self, sock: Any) -> None:
        """What kill() shuts down, and the end closes."""
        self._undo.callback(sock.close)
        with self._lock:
            if hasattr(sock, "shutdown"):
                self._sockets.append(sock)
        self._gate.check()

    def _via(self, host: Host, via: Protocol) -> paramiko.Channel:
        try:
            there = (host.hostname, host.port)
            return via.open_channel(
                "direct-tcpip", there, ("127.0.0.1", 0), timeout=host.connect_timeout
            )
        except FAILURES as error:
            self._gate.check()
            raise Unreachable(
                f"cannot reach {host} from the host before it: {error}",
                hint="Check HostName and Port as that host sees them, and AllowTcpForwarding there",
            ) from error

    def _enter(self, host: Host, sock: Any, said: Callable[[], str] = str) -> Protocol:
        """Agree on ciphers, know the host, be let in. said: what a ProxyCommand has to say."""
        known = KnownHosts(host.known_hosts, host.host_key_name)
        try:
            transport = Protocol(sock, window=WINDOW, host_key_types=known.types)
            self._undo.callback(_end, transport)
            transport.banner_timeout = transport.handshake_timeout = host.connect_timeout
            transport.auth_timeout = _AUTH_TIMEOUT
            transport.start_client(timeout=host.connect_timeout)
        except FAILURES as error:
            self._gate.check()
            raise Unreachable(
                f"cannot reach {host}: no agreement with an SSH server there:"
                f" {said() or error or 'the connection was closed'}",
                hint=f"Try ssh -v {host.alias}",
            ) from error
        key = transport.get_remote_server_key()
        if known.check(key, accept_new=self._accept_new or host.accept_new):
            log.warning("%s is new: noted its %s key %s", host, key.get_name(), key.fingerprint)
        try:
            Authenticator(host, self._owns).run(transport)
        except ChannelError:
            self._gate.check()
            raise
        log.debug("%s: %s, %s", host, transport.remote_version, transport.local_cipher)
        return transport

    # ---- in use

    def check(self) -> None:
        """Raises LinkLost when the connection is broken or the host does not answer any more."""
        if self._lost is None:
            self._gate.check()
            silent = self._keeper.silent if self._keeper is not None else None
            if silent is not None:
                self._lost = f"no answer for {silent:.0f} s"
                self.kill()
            elif not self.transport.is_active():
                self._lost = str(self.transport.get_exception() or "") or "the connection ended"
        if self._lost is not None:
            raise LinkLost(f"{self.name}: link lost: {self._lost}", hint=_LOST)

    def round_trip(self, look: Callable[[], None], deadline: float | None) -> None:
        """Return once the far host has received all that was sent before. look: may raise what ends the wait."""
        assert self._keeper is not None
        done = self._keeper.ask()
        while not done.wait(
            TICK if deadline is None else max(0.0, min(TICK, deadline - time.monotonic()))
        ):
            look()
            self.check()
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded(f"timed out waiting for an answer of {self.name}")
        self.check()

    @property
    def alive(self) -> bool:
        return self._opened and self.transport.is_active()

    def share(self) -> None:
        """One more user."""
        with self._lock:
            self._users += 1

    # ---- ending

    def kill(self) -> None:
        """End the connection and whoever waits for it, at once, from any thread or process."""
        self._gate.signal()
        self._shut_down()

    def _shut_down(self) -> None:
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """One user less."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._close()

    def _close(self) -> None:
        if self._gate.forked:
            for sock in self._sockets:
                with contextlib.suppress(Exception):
                    sock.close()
            return
        self._shut_down()  # paramiko's threads see that at once
        with self._lock:
            undo, self._undo = self._undo, contextlib.ExitStack()
        with contextlib.suppress(Exception):
            undo.close()
        self._gate.close()


def _end(transport: Protocol) -> None:
    transport.packetizer.complete_handshake()  # ends the thread that would time it out
    with contextlib.suppress(*FAILURES):
        transport.close()
    if transport.ident is not None:
        transport.join(JOIN)


def open_link(
    host: Host,
    config: Config,
    *,
    name: str,
    accept_new: bool,
    deadline: float | None,
    cancel_fd: int | None,
) -> Link:
    """A link that is open. Raises ChannelErrors, DeadlineExceeded, Cancelled."""
    link = Link(name, config, accept_new=accept_new)
    link.run(
        lambda: link.open(host),
        deadline=deadline,
        cancel_fd=cancel_fd,
        what=f"the SSH connection to {host}",
    )
    return link
