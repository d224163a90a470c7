"""What this distribution declares."""

from __future__ import annotations

from whimbrel import TransportSpec, hookimpl

whimbrel_api = (1, 0)


@hookimpl
def transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            schemes=("fd",),
            factory="whimbrel_fd.transport:FdTransport",
            syntax="fd:NUMBER, fd:NAME",
            summary="a descriptor that this process has already: socket, pipe or file",
        )
    ]
