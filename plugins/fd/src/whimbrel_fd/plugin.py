"""What this distribution declares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from whimbrel import TransportSpec, UriError, hookimpl
from whimbrel.uri import parse_uri

if TYPE_CHECKING:
    from whimbrel import Kernel

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


@hookimpl
def preflight(kernel: Kernel, uri: str) -> list[str]:
    try:
        target = parse_uri(uri, kernel.plugins.filter_names)
    except UriError:
        return []
    name = target.rest.partition(",")[0]  # options behind it
    if target.scheme != "fd" or not name or name.isdigit() or name in kernel.named_fds:
        return []
    return [not_found(name, kernel.named_fds)]


def not_found(name: str, known: Iterable[str]) -> str:
    """In QEMU's words, which clients look for."""
    return (
        f"File descriptor named '{name}' has not been found"
        f" (registered: {', '.join(sorted(known)) or 'none'})"
    )
