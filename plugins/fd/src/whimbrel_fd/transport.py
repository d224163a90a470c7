"""The fd transport: a descriptor that the process has, by its number or by the name it was registered under.

The descriptor is taken over, as QEMU does: it is closed in the end, and a name is used up. One that is refused stays
the caller's. In place of 0, 1 and 2 /dev/null is left, so that nothing else gets these numbers.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import MutableMapping

import attrs

from whimbrel import Channel, ChannelError, Listener, Role, Transport, TransportContext, UriError
from whimbrel.descriptors import DescriptorChannel, ReadyListener, SocketListener, socket_uri
from whimbrel_fd.plugin import not_found

_HINT = (
    "Write fd:NUMBER or fd:NAME, and behind it ,direct=on where the peer itself holds the other end"
)
_MODES = {os.O_RDONLY: "reading", os.O_WRONLY: "writing", os.O_RDWR: "reading and writing"}
_O_PATH = 0o10000000
_DIRECT = {"": True, "on": True, "off": False}


@attrs.frozen
class FdAddress:
    """`name` is what was written: the number of a descriptor, or the name of a registered one."""

    name: str
    #: The process that migrates itself holds the other end of this socket: the end of it proves that it is gone.
    direct: bool = False

    def __str__(self) -> str:
        return self.name + (",direct=on" if self.direct else "")


class FdTransport(Transport):
    def parse(self, rest: str) -> FdAddress:
        name, *options = rest.split(",")
        if not name or not name.isprintable():
            raise UriError(f"'fd:{rest}' names no descriptor", hint=_HINT)
        if name.isascii() and name.isdigit():
            if int(name) >= 1 << 31:
                raise UriError(f"{name} is not the number of a descriptor", hint=_HINT)
            name = str(int(name))
        direct = False
        for option in options:
            key, _, value = option.partition("=")
            if key != "direct" or value not in _DIRECT:
                raise UriError(f"'{option}' is not an option of fd", hint=_HINT)
            direct = _DIRECT[value]
        return FdAddress(name, direct)

    def connect(self, address: FdAddress, ctx: TransportContext) -> Channel:
        fd = _find(address, ctx)
        if stat.S_ISSOCK(os.fstat(fd).st_mode) and _is_listening(fd):
            raise ChannelError(
                f"descriptor {fd} is a listening socket; the source needs a connected one",
                hint="Connect it first, or give it to the destination",
            )
        return _channel(fd, address, ctx, Role.SOURCE)

    def listen(self, address: FdAddress, ctx: TransportContext) -> Listener:
        fd = _find(address, ctx)
        if not (stat.S_ISSOCK(os.fstat(fd).st_mode) and _is_listening(fd)):
            return ReadyListener(_channel(fd, address, ctx, Role.DESTINATION), f"fd:{address}")
        sock = socket.socket(fileno=_take_over(fd, address, ctx))
        return SocketListener(
            [sock],
            addresses=[socket_uri(sock) or f"fd:{address}"],
            channel=lambda accepted: _socket_channel(accepted, address),
            deadline=ctx.deadline,
            cancel_fd=ctx.cancel_fd,
        )


def _find(address: FdAddress, ctx: TransportContext) -> int:
    """The number of an open descriptor."""
    fd = ctx.named_fds.get(address.name)
    if fd is None:
        if not address.name.isdigit():
            raise ChannelError(
                not_found(address.name, ctx.named_fds),
                hint=f"Register it first, by kernel.register_fd('{address.name}', FD) or getfd, or give a number",
            )
        fd = int(address.name)
    try:
        os.fstat(fd)
    except OSError as error:
        raise ChannelError(
            f"descriptor {fd} is not open in this process",
            hint="Hand it down to the process that migrates (in a shell: 5<>FILE; in Python: pass_fds)",
        ) from error
    return fd


def _take_over(fd: int, address: FdAddress, ctx: TransportContext) -> int:
    """The descriptor as ours: nobody finds it by name any more, and no child process inherits it."""
    if isinstance(ctx.named_fds, MutableMapping):
        ctx.named_fds.pop(address.name, None)
    if fd > 2:
        os.set_inheritable(fd, False)
        return fd
    ours = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)
    return ours


def _channel(fd: int, address: FdAddress, ctx: TransportContext, role: Role) -> Channel:
    status = os.fstat(fd)
    if stat.S_ISSOCK(status.st_mode):
        _check_connected(fd)
        return _socket_channel(socket.socket(fileno=_take_over(fd, address, ctx)), address)
    kinds = (stat.S_ISFIFO, stat.S_ISREG, stat.S_ISCHR, stat.S_ISBLK)
    if not any(kind(status.st_mode) for kind in kinds):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a file, pipe or socket"
        raise ChannelError(
            f"descriptor {fd} is {kind}", hint="A stream needs a file, a pipe or a connected socket"
        )
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    mode = flags & os.O_ACCMODE
    wanted, verb = (os.O_WRONLY, "write") if role is Role.SOURCE else (os.O_RDONLY, "read")
    if flags & _O_PATH or mode not in (wanted, os.O_RDWR):
        opened = "no access (O_PATH)" if flags & _O_PATH else f"{_MODES[mode]} only"
        raise ChannelError(
            f"descriptor {fd} is open for {opened}; the {role.value} needs to {verb}",
            hint=f"Open it for {_MODES[wanted]}",
        )
    ours = _take_over(fd, address, ctx)
    name = f"fd:{address}"
    if role is Role.SOURCE:
        return DescriptorChannel(write_fd=ours, name=name)
    return DescriptorChannel(read_fd=ours, name=name)


def _borrowed(fd: int) -> socket.socket:
    """A socket object that leaves fd open when it is closed."""
    return socket.socket(fileno=os.dup(fd))


def _is_listening(fd: int) -> bool:
    with _borrowed(fd) as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _check_connected(fd: int) -> None:
    with _borrowed(fd) as sock:
        if sock.type != socket.SOCK_STREAM:
            raise ChannelError(
                f"descriptor {fd} is a socket of datagrams",
                hint="Give one of streams (SOCK_STREAM)",
            )
        try:
            sock.getpeername()
        except OSError as error:
            raise ChannelError(
                f"descriptor {fd} is a socket that is not connected",
                hint="Connect it first, or give the destination a listening one",
            ) from error


def _socket_channel(sock: socket.socket, address: FdAddress) -> Channel:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return DescriptorChannel(sock=sock, name=f"fd:{address}", eof_means_peer_gone=address.direct)
