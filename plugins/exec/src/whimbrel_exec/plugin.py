"""What this distribution declares."""

from __future__ import annotations

from whimbrel import TransportSpec, hookimpl

whimbrel_api = (1, 0)


@hookimpl
def transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            schemes=("exec",),
            factory="whimbrel_exec.transport:ExecTransport",
            syntax="exec:COMMAND",
            summary="the standard input or output of a shell command",
        )
    ]
