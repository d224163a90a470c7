"""What this distribution declares."""

from __future__ import annotations

from whimbrel import TransportSpec, hookimpl

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
