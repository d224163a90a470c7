"""The ssh transport: a connection to sshd on the far host, and there to a socket, or to a command."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import time
from collections.abc import Callable

import attrs
import paramiko

from whimbrel import (
    Channel,
    ChannelError,
    DeadlineExceeded,
    Listener,
    Role,
    Transport,
    TransportContext,
)
from whimbrel.descriptors import ReadyListener
from whimbrel.waiting import Gate, call_in_thread, wait_any
from whimbrel_ssh import address as addresses
from whimbrel_ssh.address import Command, End, SshAddress, Tcp, Unix
from whimbrel_ssh.channel import SshChannel
from whimbrel_ssh.config import Config, Host
from whimbrel_ssh.errors import FarEndRefused
from whimbrel_ssh.link import TICK, Link, open_link
from whimbrel_ssh.protocol import FAILURES

_SOON = 2.0  # seconds that a host has to stop listening


class SshTransport(Transport):
    def parse(self, rest: str) -> SshAddress:
        return addresses.parse(rest)

    def connect(self, address: SshAddress, ctx: TransportContext) -> Channel:
        """Raises the errors of whimbrel_ssh.errors, DeadlineExceeded, Cancelled."""
        link = _link(address, ctx)
        channel = link.run(
            lambda: _open(link, address.end),
            deadline=ctx.deadline,
            cancel_fd=ctx.cancel_fd,
            what=f"{address.end} on the far host",
        )
        further: Callable[[], Channel] | None = None
        if not isinstance(address.end, Command):
            again = attrs.evolve(ctx, deadline=None)
            further = lambda: self.connect(address, again)  # noqa: E731
        return SshChannel(
            link,
            channel,
            end=address.end,
            listening=ctx.role is Role.DESTINATION,
            open_extra=further,
        )

    def listen(self, address: SshAddress, ctx: TransportContext) -> Listener:
        """A TCP port of the far host, whose connections come here; or what a command there writes."""
        if isinstance(address.end, Command):
            return ReadyListener(self.connect(address, ctx), f"ssh:{address}")
        if isinstance(address.end, Unix):
            raise ChannelError(
                f"ssh:{address}: the far host can listen for us on TCP ports only",
                hint=f"Write {address.place}/tcp:localhost:0, and let the source connect to what that becomes",
            )
        return _ForwardListener(_link(address, ctx), address, address.end, ctx)


def _link(address: SshAddress, ctx: TransportContext) -> Link:
    settings = ctx.settings
    file = settings["ssh-config"] if settings is not None else ""
    policy = settings["ssh-host-key"] if settings is not None else "strict"
    config = Config(file or None)
    host: Host = config.host(address.host, address.user, address.port)
    return open_link(
        host,
        config,
        name=address.place,
        accept_new=policy == "accept-new",
        deadline=ctx.deadline,
        cancel_fd=ctx.cancel_fd,
    )


def _open(link: Link, end: End) -> paramiko.Channel:
    transport = link.transport
    try:
        if isinstance(end, Command):
            channel = transport.open_session()
            channel.exec_command(end.command)
            return channel
        if isinstance(end, Unix):
            return transport.open_streamlocal(end.path)
        return transport.open_channel("direct-tcpip", (end.host, end.port), ("127.0.0.1", 0))
    except FAILURES as error:
        link.check()
        raise FarEndRefused(
            f"{link.name}: the far host refused {end}: {getattr(error, 'text', error)}",
            hint=_REMEDIES[type(end)],
        ) from error


_REMEDIES = {
    Command: "Its sshd_config or authorized_keys may force another command (ForceCommand, command=)",
    Unix: "Start the destination there first; check the path, that the user may open it, and"
    " AllowStreamLocalForwarding in its sshd_config",
    Tcp: "Start the destination there first; check host and port as seen from there, and AllowTcpForwarding and"
    " PermitOpen in its sshd_config",
}


class _ForwardListener(Listener):
    """A port of the far host. sshd opens a channel to us for each connection to it."""

    def __init__(self, link: Link, address: SshAddress, end: Tcp, ctx: TransportContext) -> None:
        self._link = link
        self._deadline, self._cancel_fd = ctx.deadline, ctx.cancel_fd
        self._waiting: collections.deque[paramiko.Channel] = collections.deque()
        self._gate = Gate(f"the listener at ssh:{address}")
        self._arrived = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        try:
            port = link.run(
                lambda: _request(link, end, self._arrive),
                deadline=ctx.deadline,
                cancel_fd=ctx.cancel_fd,
                what=f"{end} on the far host",
            )
        except BaseException:
            self._gate.close()
            os.close(self._arrived)
            raise
        self._end = attrs.evolve(end, port=port)
        self.addresses = (f"ssh:{attrs.evolve(address, end=self._end)}",)
        self._gate.name = f"the listener at {self.addresses[0]}"

    def _arrive(self, channel: paramiko.Channel, origin: object, server: object) -> None:
        """On paramiko's thread."""
        self._waiting.append(channel)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._arrived, 1)

    def accept(self, deadline: float | None = None) -> Channel:
        deadline = self._deadline if deadline is None else deadline
        with self._gate.inside():
            while True:
                tick = time.monotonic() + TICK
                try:
                    wait_any(
                        (self._arrived, self._gate.fd),
                        select.POLLIN,
                        deadline=tick if deadline is None else min(tick, deadline),
                        cancel_fd=self._cancel_fd,
                        what=f"a connection to {self.addresses[0]}",
                    )
                except DeadlineExceeded:
                    self._gate.check()
                    self._link.check()
                    if deadline is not None and time.monotonic() >= deadline:
                        raise
                    continue
                self._gate.check()
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._arrived)
                    self._link.share()
                    return SshChannel(self._link, self._waiting.popleft(), end=self._end)

    def close(self) -> None:
        if not self._gate.close():
            return
        if not self._gate.forked:
            with contextlib.suppress(Exception):
                call_in_thread(self._stop, deadline=time.monotonic() + _SOON, what="the far host")
            for channel in self._waiting:
                with contextlib.suppress(Exception):
                    channel.close()
            os.close(self._arrived)
        self._link.release()

    def _stop(self) -> None:
        """The host would go on listening as long as channels are in use."""
        self._link.transport.cancel_port_forward(self._end.host, self._end.port)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _request(
    link: Link, end: Tcp, arrive: Callable[[paramiko.Channel, object, object], None]
) -> int:
    """The port that the far host listens on. Raises FarEndRefused."""
    try:
        return int(link.transport.request_port_forward(end.host, end.port, arrive))
    except FAILURES as error:
        link.check()
        raise FarEndRefused(
            f"{link.name}: the far host does not listen on {end} for us: {error}",
            hint="The port may be taken (0 lets the host choose), or its sshd forbids it (AllowTcpForwarding, PermitListen)",
        ) from error
