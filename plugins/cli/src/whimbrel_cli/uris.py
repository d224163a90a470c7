"""Who speaks a URI: the machine itself, or a transport plugin here that hands it a channel."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from whimbrel.errors import UriError
from whimbrel_cli.logs import printable

if TYPE_CHECKING:
    from qemu.qmp.protocol import SocketAddrT

    from whimbrel_cli.monitor import Monitor

#: What every QEMU of today speaks.
_QEMU = frozenset({"tcp", "unix", "vsock", "fd", "exec", "rdma"})
_FILE_SINCE = (8, 2)

_LAST_PORT = 0xFFFF
_HOST_PORT = re.compile(r"(?P<host>\[[^\]]+\]|[^/:]*):(?P<port>\d{1,9})")


def parse_address(text: str) -> SocketAddrT:
    """PATH, unix:PATH, HOST:PORT or tcp:HOST:PORT. Raises UriError."""
    match = _HOST_PORT.fullmatch(text.removeprefix("tcp:"))
    if match is None or text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path or text.startswith("tcp:"):
            raise UriError(
                f"'{printable(text)}' names no monitor", hint="Write unix:PATH or HOST:PORT"
            )
        return path
    port = int(match["port"])
    if port > _LAST_PORT:
        raise UriError(f"there is no port {port} ('{text}')", hint=f"The last is {_LAST_PORT}")
    return match["host"].strip("[]") or "localhost", port


def is_tcp(address: str) -> bool:
    return isinstance(parse_address(address), tuple)


def same(one: str, other: str) -> bool:
    """Do two addresses name one socket?"""
    a, b = parse_address(one), parse_address(other)
    if isinstance(a, str) and isinstance(b, str):
        return os.path.realpath(a) == os.path.realpath(b)
    return a == b


def is_app(monitor: Monitor) -> bool:
    """An app that whimbrel migrates, and no QEMU."""
    return monitor.has("x-whimbrel-plugins")


def spoken_by(monitor: Monitor, uri: str) -> bool:
    """Does the machine open that URI itself? Raises UriError where there is no scheme."""
    scheme, colon, _ = uri.partition(":")
    if not colon or not scheme:
        raise UriError(
            f"'{uri}' is not a migration URI: no scheme",
            hint="Write for instance tcp:HOST:PORT or unix:PATH",
        )
    if is_app(monitor):
        return True  # it knows its own plugins, and says what is missing
    if scheme == "file":
        return monitor.version >= _FILE_SINCE
    return scheme in _QEMU
