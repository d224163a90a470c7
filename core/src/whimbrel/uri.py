"""URIs: `[filter::]...scheme:rest`.

Only the name of a registered filter consumes '::', so that `tcp::4444` (any address, port 4444) and `exec:a::b` mean
what they always meant.
"""

from __future__ import annotations

from collections.abc import Container

import attrs

from whimbrel.errors import UriError


@attrs.frozen
class Uri:
    """A URI taken apart. `rest` is for the transport to parse; `filters` stand in the order written, outermost first."""

    scheme: str
    rest: str
    filters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "".join(f"{f}::" for f in self.filters) + f"{self.scheme}:{self.rest}"


def parse_uri(text: str, filters: Container[str] = ()) -> Uri:
    """Take a URI apart. Raises UriError when there is no scheme."""
    rest = text
    found = []
    while "::" in rest:
        name, _, behind = rest.partition("::")
        if name not in filters:
            break
        found.append(name)
        rest = behind
    scheme, colon, address = rest.partition(":")
    if not colon or not scheme:
        raise UriError(
            f"unknown migration protocol: '{text}' has no scheme",
            hint="Write for instance tcp:HOST:PORT or unix:PATH",
        )
    return Uri(scheme, address, tuple(found))
