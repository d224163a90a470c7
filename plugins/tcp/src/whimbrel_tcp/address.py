"""`HOST:PORT[,to=N][,ipv4[=on|off]][,ipv6[=on|off]][,direct[=on|off]]` taken apart. Pure: no name is looked up here."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any

import attrs

from whimbrel import UriError

_FORM = re.compile(r"(\[(?P<v6>[^][]*)\]|(?P<host>[^][:,]*)):(?P<port>[^][:,]*)(?P<options>(,.*)?)")
_SERVICE = re.compile(r"[A-Za-z0-9_.+-]*[A-Za-z][A-Za-z0-9_.+-]*")
_HINT = "Write tcp:HOST:PORT, tcp:[IPV6-ADDRESS]:PORT, or tcp::PORT for all addresses of this host"
_SWITCHES = ("ipv4", "ipv6", "direct")
_VALUES = {"": True, "on": True, "off": False}


@attrs.frozen(kw_only=True)
class TcpAddress:
    """Where to connect or listen. `port` is a number or the name of a service."""

    host: str
    port: str
    #: When listening: the last port to try, where those before are taken.
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    #: The process that migrates is itself at the other end of the connection: no proxy or relay is in between.
    direct: bool | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        text = f"{host}:{self.port}" + ("" if self.to is None else f",to={self.to}")
        for name in _SWITCHES:
            value = getattr(self, name)
            text += "" if value is None else f",{name}={'on' if value else 'off'}"
        return text

    @property
    def family(self) -> socket.AddressFamily:
        """Which kind of addresses is meant: naming one kind leaves the other out."""
        if self.ipv4 == self.ipv6:
            return socket.AF_UNSPEC
        return socket.AF_INET if self.ipv4 or self.ipv6 is False else socket.AF_INET6


def parse(rest: str) -> TcpAddress:
    """The address in rest. Raises UriError."""
    form = _FORM.fullmatch(rest)
    if form is None:
        raise UriError(f"'tcp:{rest}' is not a TCP address", hint=_HINT)
    if form["v6"] is not None:
        try:
            ipaddress.IPv6Address(form["v6"])
        except ValueError:
            raise UriError(f"'{form['v6']}' is not an IPv6 address", hint=_HINT) from None
    port = form["port"]
    if port.isascii() and port.isdigit():
        if int(port) > 65535:
            raise UriError(f"port {port} is above 65535", hint="Choose one from 1 to 65535")
        port = str(int(port))
    elif not _SERVICE.fullmatch(port):
        raise UriError(f"'{port}' is neither a port number nor the name of a service", hint=_HINT)
    host = form["host"] if form["v6"] is None else form["v6"]
    return TcpAddress(host=host, port=port, **_options(form["options"], port))


def _options(text: str, port: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in text.split(",")[1:]:
        name, _, value = option.partition("=")
        if name in found:
            raise UriError(f"option '{name}' is given twice", hint="Leave one out")
        if name in _SWITCHES and value in _VALUES:
            found[name] = _VALUES[value]
        elif name == "to" and value.isascii() and value.isdigit() and port.isdigit():
            found[name] = int(value)
            if not int(port) <= int(value) <= 65535:
                raise UriError(
                    f"to={value} is not between port {port} and 65535",
                    hint="to is the last port to try, the first stands behind the host",
                )
        else:
            raise UriError(
                f"'{option}' is not an option of tcp",
                hint="There are to=PORT (with a numeric port), and ipv4, ipv6 and direct, each =on or =off",
            )
    if found.get("ipv4") is False and found.get("ipv6") is False:
        raise UriError("ipv4=off and ipv6=off leave no address", hint="Leave one out")
    return found
