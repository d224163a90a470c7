"""What this distribution declares."""

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
            schemes=("unix",),
            factory="whimbrel_unix.transport:UnixTransport",
            syntax="unix:PATH",
            summary="a UNIX socket on this host",
        )
    ]


@hookimpl
def health() -> list[Check]:
    from whimbrel_unix.health import checks

    return checks()
