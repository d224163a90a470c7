"""A URI resolved: transport, address and filters found, nothing connected yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.channel import Channel, Filter, Listener, Role, Transport, TransportContext
from whimbrel.errors import UriError
from whimbrel.uri import Uri, parse_uri

if TYPE_CHECKING:
    from whimbrel.plugins import Plugins


@attrs.frozen
class Route:
    """Where a migration goes to or comes from. Made by resolve()."""

    uri: Uri
    transport: Transport
    address: Any
    filters: tuple[Filter, ...]

    @classmethod
    def resolve(cls, plugins: Plugins, text: str) -> Route:
        """Raises UriError and PluginError, saying which schemes there are."""
        uri = parse_uri(text, plugins.filter_names)
        try:
            transport = plugins.transport(uri.scheme).create()
        except UriError as error:
            if uri.rest.isdigit():
                error.hint = f"Write tcp:{uri.scheme}:{uri.rest} for port {uri.rest} of the host {uri.scheme}"
            raise
        filters = tuple(plugins.filter(name) for name in uri.filters)
        return cls(uri, transport, transport.parse(uri.rest), filters)

    def connect(self, ctx: TransportContext) -> Channel:
        self._begin(ctx)
        return self._wrap(self.transport.connect(self.address, ctx), ctx.role)

    def listen(self, ctx: TransportContext) -> Listener:
        self._begin(ctx)
        listener = self.transport.listen(self.address, ctx)
        return _FilteringListener(self, listener, ctx.role) if self.filters else listener

    def query(self) -> dict[str, Any]:
        """What the filters add to query-migrate."""
        return {name: value for each in self.filters for name, value in each.query().items()}

    def _begin(self, ctx: TransportContext) -> None:
        for each in self.filters:
            each.begin(ctx)

    def _wrap(self, channel: Channel, role: Role) -> Channel:
        """The filters around a channel, the one written last being next to it."""
        try:
            for each in reversed(self.filters):
                channel = each.wrap(channel, role)
        except BaseException:
            channel.close()
            raise
        return channel


class _FilteringListener(Listener):
    """Puts the filters of a route around every accepted channel. It has no addresses of sockets: what connects to one as it
    stands is not filtered.
    """

    def __init__(self, route: Route, listener: Listener, role: Role) -> None:
        self._route, self._listener, self._role = route, listener, role
        prefix = "".join(f"{name}::" for name in route.uri.filters)
        self.addresses = tuple(prefix + address for address in listener.addresses)

    def accept(self, deadline: float | None = None) -> Channel:
        return self._route._wrap(self._listener.accept(deadline), self._role)

    def close(self) -> None:
        self._listener.close()
