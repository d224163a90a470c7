"""The unix transport: a stream socket with a path, which only its owner can connect to."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable

import attrs

from whimbrel import Channel, ChannelError, Listener, Transport, TransportContext, UriError
from whimbrel.descriptors import DescriptorChannel, SocketListener, connect_socket

#: unix(7): sun_path holds 108 bytes, the final NUL included.
PATH_MAX = 107
#: Measured: with sends of 1 MiB, a quarter more throughput than with the default. The system may give less.
SEND_BUFFER = 1 << 20
_BACKLOG = 255

_HINTS = {
    errno.ENOENT: "Start the destination first, and check the path",
    errno.ECONNREFUSED: "Nobody listens there any more: start the destination first",
    errno.EACCES: "The socket belongs to another user, or a directory on the way is closed to this one",
    errno.EPROTOTYPE: "The socket is not one of streams: check the path",
}


@attrs.frozen
class UnixAddress:
    """A path in the file system. All text behind `unix:` belongs to it."""

    path: str

    def __str__(self) -> str:
        return self.path


class UnixTransport(Transport):
    def parse(self, rest: str) -> UnixAddress:
        if not rest:
            raise UriError("'unix:' has no path", hint="Write unix:PATH")
        if "\0" in rest:
            raise UriError("a path cannot contain NUL", hint="Write unix:PATH")
        length = len(os.fsencode(rest))
        if length > PATH_MAX:
            raise UriError(
                f"the path of a UNIX socket can have {PATH_MAX} bytes, this one has {length}: {rest}",
                hint="Use a shorter one, for instance under /run or relative to the current directory",
            )
        return UnixAddress(rest)

    def connect(self, address: UnixAddress, ctx: TransportContext) -> Channel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connect_socket(
                sock,
                address.path,
                deadline=ctx.deadline,
                cancel_fd=ctx.cancel_fd,
                what=f"the connection to unix:{address}",
            )
            further = attrs.evolve(ctx, deadline=None)
            return _channel(sock, address, lambda: self.connect(address, further))
        except OSError as error:
            sock.close()
            raise ChannelError(
                f"cannot connect to unix:{address}: {error.strerror or error}",
                hint=_HINTS.get(error.errno or 0, "Check the path"),
            ) from error
        except BaseException:
            sock.close()
            raise

    def listen(self, address: UnixAddress, ctx: TransportContext) -> Listener:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # bind() makes the file with the mode of the socket, less the umask: so it is never open to others, and
            # the umask, which belongs to all threads, is left alone.
            os.fchmod(sock.fileno(), 0o600)
            _make_way(address.path)
            sock.bind(address.path)
            return _UnixListener(sock, address, ctx)
        except OSError as error:
            sock.close()
            raise ChannelError(
                f"cannot listen on unix:{address}: {error.strerror or error}",
                hint="Choose a path in a directory that exists and that this user may write to",
            ) from error
        except BaseException:
            sock.close()
            raise


class _UnixListener(SocketListener):
    """Removes its file in the end, if it still is its own."""

    def __init__(self, sock: socket.socket, address: UnixAddress, ctx: TransportContext) -> None:
        self._path = os.path.abspath(address.path)  # the directory may be another one in the end
        self._identity = _identity(self._path)
        mode = stat.S_IMODE(os.lstat(self._path).st_mode)
        if mode & 0o177:
            self._remove()
            raise ChannelError(
                f"the file system gave unix:{address} the mode {mode:04o} instead of 0600",
                hint="Choose a path on a file system with permissions",
            )
        sock.listen(_BACKLOG)  # from here on somebody can connect
        uri = self._path if len(os.fsencode(self._path)) <= PATH_MAX else address.path
        super().__init__(
            [sock],
            addresses=[f"unix:{uri}"],
            channel=lambda accepted: _channel(accepted, address),
            deadline=ctx.deadline,
            cancel_fd=ctx.cancel_fd,
        )

    def _clean_up(self) -> None:
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            if _identity(self._path) == self._identity:
                os.unlink(self._path)


def _channel(
    sock: socket.socket, address: UnixAddress, open_extra: Callable[[], Channel] | None = None
) -> Channel:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return DescriptorChannel(
        sock=sock, name=f"unix:{address}", eof_means_peer_gone=True, open_extra=open_extra
    )


def _identity(path: str) -> tuple[int, int]:
    """What tells a file from another that took its place. The number of a bound socket is not given again while the
    socket is open.
    """
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _make_way(path: str) -> None:
    """Remove a socket that nobody listens on any more, as a process that was killed leaves it. Nothing else is ever
    removed. Raises ChannelError when something is in the way.
    """
    try:
        mode = os.lstat(path).st_mode
        found = _identity(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ChannelError(
            f"cannot listen on unix:{path}: there is something that is not a socket",
            hint="Remove it or choose another path",
        )
    error = _probe(path)
    if error in (0, errno.EPROTOTYPE):
        raise ChannelError(
            f"cannot listen on unix:{path}: another process does already",
            hint="Stop it or choose another path",
        )
    if error not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(error, os.strerror(error))
    with contextlib.suppress(FileNotFoundError):
        if _identity(path) == found:  # and not yet that of another process, which was faster
            os.unlink(path)


def _probe(path: str) -> int:
    """The errno of connecting with a datagram socket: EPROTOTYPE where a stream socket is bound, ECONNREFUSED where
    none is. Connecting with a stream socket would do harm: a destination takes the first that connects for the source.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(path)
