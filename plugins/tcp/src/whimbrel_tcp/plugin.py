"""What this distribution declares: the entry point of its pyproject.toml leads here. Nothing heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel import TransportSpec, hookimpl

if TYPE_CHECKING:
    from whimbrel import Check

whimbrel_api = (1, 0)


@hookimpl
def transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            schemes=("tcp",),
            factory="whimbrel_tcp.transport:TcpTransport",
            syntax="tcp:HOST:PORT, tcp:[IPV6]:PORT, tcp::PORT",
            summary="a TCP connection",
        )
    ]


@hookimpl
def health() -> list[Check]:
    from whimbrel_tcp.health import checks

    return checks()
