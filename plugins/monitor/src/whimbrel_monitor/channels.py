"""`channels` of migrate and migrate-incoming: addresses in members, here put together as the URI that says the same."""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import attrs

from whimbrel import UriError
from whimbrel_monitor.kinds import BOOL, INT, STR, Array, Member, Object, Union, Unsigned


class ChannelType(enum.StrEnum):
    """Of QEMU's, those that there are here."""

    MAIN = "main"


def _object(**members: Any) -> Object:
    return Object(
        tuple(
            Member(name.rstrip("_"), kind, not name.endswith("_")) for name, kind in members.items()
        )
    )


_SOCKET = Union(
    "type",
    {
        "inet": _object(host=STR, port=STR, to_=INT, ipv4_=BOOL, ipv6_=BOOL),
        "unix": _object(path=STR),
        "vsock": _object(cid=STR, port=STR),
        "fd": _object(str=STR),
    },
)
_ADDRESS = Union(
    "transport",
    {
        "socket": _SOCKET,
        "exec": _object(args=Array(STR)),
        "rdma": _object(host=STR, port=STR),
        "file": _object(filename=STR, offset=Unsigned()),
    },
)


@attrs.frozen(kw_only=True)
class MigrationChannel:
    """`addr`: by `transport`, and for sockets by `type`, as in QEMU."""

    channel_type: ChannelType
    addr: Annotated[dict[str, Any], _ADDRESS]


def to_uri(channels: list[MigrationChannel]) -> str:
    """Of the one channel. Raises UriError."""
    if len(channels) != 1:
        raise UriError(f"Channel list must have one entry, and has {len(channels)}")
    addr = channels[0].addr
    kind = addr["type"] if addr["transport"] == "socket" else addr["transport"]
    if kind in ("inet", "rdma"):
        return ("tcp:" if kind == "inet" else "rdma:") + _inet(addr)
    if kind == "vsock":
        return f"vsock:{_plain(addr['cid'])}:{_plain(addr['port'])}"
    if kind == "exec":
        args = addr["args"]
        is_line = len(args) == 3 and args[:2] == ["/bin/sh", "-c"]
        return "exec:" + (args[2] if is_line else shlex.join(args))
    if kind == "file":
        return f"file:{addr['filename']},offset={addr['offset']}"
    return f"unix:{addr['path']}" if kind == "unix" else f"fd:{addr['str']}"


def _inet(addr: Mapping[str, Any]) -> str:
    host = addr["host"]
    if re.search(r"[][,\s]", host):
        raise UriError(f"'{host}' is not a host")
    options = f",to={addr['to']}" if "to" in addr else ""
    for name in ("ipv4", "ipv6"):
        if name in addr:
            options += f",{name}={'on' if addr[name] else 'off'}"
    return f"{f'[{host}]' if ':' in host else host}:{_plain(addr['port'])}{options}"


def _plain(text: str) -> str:
    """A word of an address, which cannot bring options of its own."""
    if not re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        raise UriError(f"'{text}' is not part of an address")
    return text
