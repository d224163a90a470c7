"""The abstract transport: unix(7), addresses that begin with a NUL byte."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import attrs

from whimbrel import Channel, ChannelError, Listener, Transport, TransportContext, UriError
from whimbrel.descriptors import DescriptorChannel, SocketListener, connect_socket

#: sun_path holds 108 bytes, the leading NUL included.
NAME_MAX = 107


class AbstractTransport(Transport):
    def parse(self, rest: str) -> str:
        """The name. Any text will do that fits, but for a NUL, which no URI can be written with."""
        if not 0 < len(os.fsencode(rest)) <= NAME_MAX or "\0" in rest:
            raise UriError(
                f"'{rest}' is not a name of 1 to {NAME_MAX} bytes", hint="Write abstract:NAME"
            )
        return rest

    def connect(self, address: str, ctx: TransportContext) -> Channel:
        sock = socket.socket(socket.AF_UNIX)
        try:
            connect_socket(
                sock,
                f"\0{address}",
                deadline=ctx.deadline,
                cancel_fd=ctx.cancel_fd,
                what=f"the connection to abstract:{address}",
            )
        except OSError as error:
            sock.close()
            raise ChannelError(
                f"cannot connect to abstract:{address}: {error.strerror}",
                hint="Start the destination first, on this host",
            ) from error
        except BaseException:
            sock.close()
            raise
        further = attrs.evolve(ctx, deadline=None)
        return _channel(sock, address, lambda: self.connect(address, further))

    def listen(self, address: str, ctx: TransportContext) -> Listener:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(f"\0{address}")
            sock.listen()
        except OSError as error:
            sock.close()
            raise ChannelError(
                f"cannot listen on abstract:{address}: {error.strerror}", hint="Choose another name"
            ) from error
        return SocketListener(
            [sock],
            addresses=[f"abstract:{address}"],
            channel=lambda accepted: _channel(accepted, address),
            deadline=ctx.deadline,
            cancel_fd=ctx.cancel_fd,
        )


def _channel(
    sock: socket.socket, address: str, open_extra: Callable[[], Channel] | None = None
) -> Channel:
    """A socket between two processes of one host: its end proves that the other one is gone."""
    return DescriptorChannel(
        sock=sock, name=f"abstract:{address}", eof_means_peer_gone=True, open_extra=open_extra
    )
