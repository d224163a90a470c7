"""What this distribution declares: the entry point of its pyproject.toml leads here. Nothing heavy is imported."""

from __future__ import annotations

from whimbrel import TransportSpec, hookimpl

whimbrel_api = (1, 0)


@hookimpl
def transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            schemes=("abstract",),
            factory="whimbrel_abstract.transport:AbstractTransport",
            syntax="abstract:NAME",
            summary="a UNIX socket without a file",
        )
    ]
