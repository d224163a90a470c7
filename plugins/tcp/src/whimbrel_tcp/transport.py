"""The tcp transport: connect and listen. Made to be copied: everything that waits can be cancelled."""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

from whimbrel import Channel, ChannelError, DeadlineExceeded, Listener, Transport, TransportContext
from whimbrel.descriptors import DescriptorChannel, SocketListener, connect_socket, socket_uri
from whimbrel.waiting import call_in_thread
from whimbrel_tcp.address import TcpAddress, parse

#: A socket address together with its family, as from getaddrinfo.
Place = tuple[int, tuple[Any, ...]]

_BACKLOG = 255  # as many channels as a source may open at once

#: What to do about an error, where that can be said.
_HINTS = {
    errno.ECONNREFUSED: "Start the destination first, and check host and port",
    errno.EHOSTUNREACH: "Check the address, and the network and firewall in between",
    errno.ENETUNREACH: "Check the address, and that this host has a route to it",
    errno.ETIMEDOUT: "Check the address, and the network and firewall in between",
    errno.EADDRINUSE: "Choose another port, a range by to=PORT, or port 0 for any that is free",
    errno.EADDRNOTAVAIL: "Choose an address of this host, or none for all of them",
    errno.EACCES: "Choose a port above 1023",
}


class TcpTransport(Transport):
    """A connection is tried to all addresses of a host in turn; a listener is on all of them."""

    def parse(self, rest: str) -> TcpAddress:
        return parse(rest)

    def connect(self, address: TcpAddress, ctx: TransportContext) -> Channel:
        failures: dict[str, OSError] = {}
        places = _look_up(address, ctx, 0)
        for tried, place in enumerate(places):
            deadline = ctx.deadline
            if deadline is not None:  # each gets its share of the time, so that the last is tried
                now = time.monotonic()
                deadline = now + (deadline - now) / (len(places) - tried)
            try:
                return self._connect(address, place, ctx.cancel_fd, deadline)
            except OSError as error:
                failures[place[1][0]] = error
            except DeadlineExceeded:
                if tried == len(places) - 1:
                    raise
                failures[place[1][0]] = OSError(errno.ETIMEDOUT, "no answer in time")
        raise _error("connect to", address, failures) from next(iter(failures.values()))

    def _connect(
        self, address: TcpAddress, place: Place, cancel_fd: int | None, deadline: float | None
    ) -> Channel:
        family, where = place
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            connect_socket(sock, where, deadline=deadline, cancel_fd=cancel_fd, what=_said(address))
        except BaseException:
            sock.close()
            raise
        return self._channel(address, sock, place, cancel_fd)

    def listen(self, address: TcpAddress, ctx: TransportContext) -> Listener:
        failures: dict[str, OSError] = {}
        places = _look_up(address, ctx, socket.AI_PASSIVE)
        first = places[0][1][1]
        # Port 0 is one that is free for the first address; for another it may be taken, then once more.
        for port in range(first, (address.to or first) + 1) if first else [0] * 8:
            try:
                socks = _listen_on_all(places, port)
            except OSError as error:
                failures[f"port {port}"] = error
                if error.errno != errno.EADDRINUSE:
                    break
            else:
                return SocketListener(
                    socks,
                    addresses=[socket_uri(sock) for sock in socks],
                    channel=lambda sock: self._channel(address, sock),
                    deadline=ctx.deadline,
                    cancel_fd=ctx.cancel_fd,
                )
        raise _error("listen on", address, failures)

    def _channel(
        self,
        address: TcpAddress,
        sock: socket.socket,
        place: Place | None = None,
        cancel_fd: int | None = None,
    ) -> Channel:
        """The channel of a connected socket; on the source, `place` is where its further channels go."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return DescriptorChannel(
            sock=sock,
            name=f"tcp:{address}",
            eof_means_peer_gone=address.direct is not False,
            open_extra=place and (lambda: self._extra(address, place, cancel_fd)),
        )

    def _extra(self, address: TcpAddress, place: Place, cancel_fd: int | None) -> Channel:
        try:
            return self._connect(address, place, cancel_fd, None)
        except OSError as error:
            raise _error("open a further connection to", address, {"": error}) from error


def _look_up(address: TcpAddress, ctx: TransportContext, flags: int) -> list[Place]:
    """All addresses of the host. The look-up cannot be interrupted, so it gets a thread that can be left behind."""

    def look_up() -> list[Any]:
        return socket.getaddrinfo(
            address.host or None, address.port, address.family, socket.SOCK_STREAM, flags=flags
        )

    try:
        what = f"the addresses of {_said(address)}"
        found = call_in_thread(look_up, deadline=ctx.deadline, cancel_fd=ctx.cancel_fd, what=what)
    except (OSError, UnicodeError) as error:
        raise ChannelError(
            f"{_said(address)} is not known: {getattr(error, 'strerror', error)}",
            hint="Check the names, or write the numbers",
        ) from error
    return list(dict.fromkeys((entry[0], entry[4]) for entry in found))


def _listen_on_all(places: list[Place], port: int) -> list[socket.socket]:
    """Sockets that listen on the port at all places but those of a family that this host has no addresses of."""
    socks: list[socket.socket] = []
    refused: OSError | None = None
    try:
        for family, where in places:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                refused = error
                continue
            socks.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # IPv4 has a socket of its own
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((where[0], port, *where[2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                refused = error
                socks.pop().close()
                continue
            sock.listen(_BACKLOG)
            port = sock.getsockname()[1]  # what 0 has become is the port of all
        if not socks and refused is not None:
            raise refused
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    return socks


def _said(address: TcpAddress) -> str:
    return f"{address.host or 'this host'} port {address.port}"


def _error(doing: str, address: TcpAddress, failures: dict[str, OSError]) -> ChannelError:
    reasons = {where: error.strerror or str(error) for where, error in failures.items()}
    text = "; ".join(
        why if where in ("", address.host) or len(reasons) == 1 else f"{where}: {why}"
        for where, why in reasons.items()
    )
    hints = [_HINTS[e.errno] for e in failures.values() if e.errno in _HINTS]
    hint = hints[-1] if hints else "Check host and port"
    return ChannelError(f"cannot {doing} {_said(address)}: {text}", hint=hint)
