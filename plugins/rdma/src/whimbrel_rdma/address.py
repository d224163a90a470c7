"""`HOST:PORT` taken apart. Pure: no name is looked up here."""

from __future__ import annotations

import re

import attrs

from whimbrel.errors import UriError

_FORM = re.compile(r"(\[(?P<v6>[^][]+)\]|(?P<host>[^][:,]*)):(?P<port>[0-9]+)", re.ASCII)


@attrs.frozen
class RdmaAddress:
    """Where to connect or listen; no host is all addresses of this one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse(rest: str) -> RdmaAddress:
    """Raises UriError."""
    form = _FORM.fullmatch(rest)
    if form is None:
        raise UriError(
            f"'rdma:{rest}' is not an RDMA address",
            hint="Write rdma:HOST:PORT or rdma:[IPV6-ADDRESS]:PORT",
        )
    port = int(form["port"])
    if not 1 <= port <= 65535:
        raise UriError(f"port {port} is not one of RDMA", hint="Choose one from 1 to 65535")
    return RdmaAddress(form["v6"] or form["host"], port)
