"""The transport contract: how bytes reach the other side.

A transport plugin gives a TransportSpec for its schemes. Its factory makes a Transport, which turns the text behind
`scheme:` into an address, connects (source) and listens (destination). What both end in is a Channel.

Deadlines are absolute, in seconds of time.monotonic(); None means no deadline.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from whimbrel.errors import ChannelError, PluginError

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel
    from whimbrel.machine import Machine
    from whimbrel.settings import Settings

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Role(enum.Enum):
    """Which side of the migration a channel is opened for."""

    SOURCE = "source"
    DESTINATION = "destination"


class Channel(abc.ABC):
    """One bidirectional or one-way stream of bytes.

    One reader thread and one writer thread may use a channel at the same time. abort() may come from any thread, also
    while both are blocked; after it every call raises ChannelError.
    """

    #: The end of this channel proves that the process at the other end is gone (true on a direct socket; false behind
    #: a relay, ssh or a pipe to a command). The commit relies on it: never claim it without being sure.
    eof_means_peer_gone: bool = False

    #: For messages: where this channel leads, as a URI where there is one.
    name: str = "channel"

    @abc.abstractmethod
    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all of the buffers in order, or raise ChannelError."""

    @abc.abstractmethod
    def recv_into(self, view: memoryview) -> int:
        """Receive what is there into view, at least one byte, waiting for it if need be; 0 is the end."""

    def recv_all(self, views: Sequence[memoryview]) -> int:
        """Receive until the views are full, one after the other; fewer bytes mean the end. How many they were."""
        got = 0
        for view in views:
            filled = 0
            while filled < len(view):
                n = self.recv_into(view[filled:])
                if not n:
                    return got + filled
                filled += n
            got += filled
        return got

    @abc.abstractmethod
    def peek(self, n: int, deadline: float | None = None) -> bytes:
        """Up to n next bytes (at least one, unless the channel ended) without consuming them.

        Raises DeadlineExceeded. Also the way to wait for input with a time limit.
        """

    def flush(self) -> None:
        """Push out what the channel itself buffers; most buffer nothing."""

    @abc.abstractmethod
    def finish(self, deadline: float | None = None) -> None:
        """The orderly end of writing: flush, half-close, wait for the exit status or fsync and rename.

        Called once, before `completed` is said. Raises when anything that was sent may not have arrived.
        """

    @abc.abstractmethod
    def abort(self) -> None:
        """Unblock both directions at once, from any thread or process; whoever is blocked gets a ChannelError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything, children included. Idempotent; never raises."""

    def return_path(self) -> Channel | None:
        """The channel that carries the destination's answers, or None where there is no way back.

        On a socket that is the channel itself: the source receives from it and the destination sends to it.
        """
        return None

    def open_extra(self, purpose: str, index: int) -> Channel:
        """A further channel to the same peer (multifd, preempt), on the source."""
        raise ChannelError(f"{self.name} has room for one channel only, none for {purpose} {index}")

    def explain(self) -> str | None:
        """What the far end said of its own failure (the last words of a command), for a message; None: nothing is known.

        Called after the destination has refused or hung up, when nothing more is sent. May wait a moment; never raises.
        """
        return None

    def raw_fd(self, direction: str) -> int | None:
        """A descriptor on which raw read ('read') or write ('write') equals recv and send, or None.

        It may be non-blocking (a pipe is): who borrows it polls when it would block.
        """
        return None

    @contextlib.contextmanager
    def lend(self, direction: str) -> Iterator[int | None]:
        """A socket for somebody who reads from it ('read') or writes to it ('write') in native code, and blocks there, or
        None: where it is none, or raw bytes would not be the same as recv and send. abort() ends a call on it as it ends one
        of the channel's own, an OSError inside becomes a ChannelError, and close() waits for the end.
        """
        yield None

    def extension(self, kind: type[T]) -> T | None:
        """The channel as another protocol (positional I/O, descriptor passing, page transport), or None."""
        return self if isinstance(self, kind) else None

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WrappedChannel(Channel):
    """Another channel with something done to what passes: the base of what a filter's wrap() gives.

    It forwards everything but what would pass it by: there is no raw descriptor, and an extension is one that the
    filter's own class implements. A return path that is the inner channel itself is this one; other channels that come
    from the inner one are given to rewrap().
    """

    def __init__(self, inner: Channel) -> None:
        self.inner = inner
        self.name = inner.name
        self.eof_means_peer_gone = inner.eof_means_peer_gone

    def send(self, buffers: Sequence[Buffer]) -> None:
        self.inner.send(buffers)

    def recv_into(self, view: memoryview) -> int:
        return self.inner.recv_into(view)

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        return self.inner.peek(n, deadline)

    def flush(self) -> None:
        self.inner.flush()

    def finish(self, deadline: float | None = None) -> None:
        self.inner.finish(deadline)

    def abort(self) -> None:
        self.inner.abort()

    def close(self) -> None:
        self.inner.close()

    def explain(self) -> str | None:
        return self.inner.explain()

    def return_path(self) -> Channel | None:
        way_back = self.inner.return_path()
        return None if way_back is None else self.rewrap(way_back)

    def open_extra(self, purpose: str, index: int) -> Channel:
        return self.rewrap(self.inner.open_extra(purpose, index))

    def rewrap(self, channel: Channel) -> Channel:
        """A return path or further channel of the inner channel, filtered like this one."""
        if channel is self.inner:
            return self
        return type(self)(channel)


class MemoryChannel(Channel):
    """Bytes in memory: what is sent is appended to `data`, what is received is taken from its front."""

    name = "memory"

    def __init__(self, data: Buffer = b"") -> None:
        self.data = bytearray(data)
        self._read = 0

    def send(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            self.data += buffer

    def recv_into(self, view: memoryview) -> int:
        n = min(len(view), len(self.data) - self._read)
        view[:n] = self.data[self._read : self._read + n]
        self._read += n
        return n

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        return bytes(self.data[self._read : self._read + n])

    def finish(self, deadline: float | None = None) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class Listener(abc.ABC):
    """Waits for connections; several channels (main, multifd, preempt) may come from one listener."""

    #: The real addresses, as URIs that connect() takes: a port 0 has become the port that was given.
    addresses: tuple[str, ...] = ()
    #: The same in the form of QMP's SocketAddress ({'type': 'inet', 'host': ..., 'port': '4444'}), of what are sockets.
    socket_addresses: tuple[dict[str, Any], ...] = ()

    @abc.abstractmethod
    def accept(self, deadline: float | None = None) -> Channel:
        """The next connection. Obeys the deadline and the context's cancel_fd."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop listening and remove what listening left behind (a socket file). Idempotent."""

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@attrs.frozen(kw_only=True)
class TransportContext:
    """What a transport may need while it connects or listens."""

    role: Role
    kernel: Kernel | None = None
    machine: Machine | None = None
    settings: Settings | None = None
    #: Descriptors that the application registered by name (fd:NAME).
    named_fds: Mapping[str, int] = attrs.field(factory=dict)
    deadline: float | None = None
    #: Becomes readable when the migration is cancelled: connect and accept must wait for it as well.
    cancel_fd: int | None = None


class Transport(abc.ABC):
    """One URI scheme. Made once for each use; holds no state of a migration."""

    @abc.abstractmethod
    def parse(self, rest: str) -> Any:
        """The text behind `scheme:` as an address of this transport's own type. Pure: no I/O. Raises UriError.

        Addresses compare by value, and str() of one is a text that parses to the same.
        """

    @abc.abstractmethod
    def connect(self, address: Any, ctx: TransportContext) -> Channel:
        """A channel to a destination. Raises ChannelError, DeadlineExceeded, Cancelled."""

    @abc.abstractmethod
    def listen(self, address: Any, ctx: TransportContext) -> Listener:
        """A listener at the address. Raises ChannelError."""


class Filter(abc.ABC):
    """Something that a channel passes through: `name::scheme:rest`. Made once for each use of a URI."""

    def begin(self, ctx: TransportContext) -> None:
        """What the transport is given to connect or listen, before it does and before wrap()."""

    @abc.abstractmethod
    def wrap(self, channel: Channel, role: Role) -> Channel:
        """The channel to use instead. Closing it closes the wrapped one."""

    def query(self) -> dict[str, Any]:
        """Members of query-migrate, each with a name that begins with `x-`. From any thread, also after the end."""
        return {}


def _load(target: str | Callable[[], T]) -> Callable[[], T]:
    """A factory from 'package.module:attribute', imported at first use, or the callable itself."""
    if callable(target):
        return target
    module, _, attribute = target.partition(":")
    try:
        factory: Callable[[], T] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"{target} cannot be loaded: {error}") from error
    return factory


def _no_needs() -> str | None:
    return None


@attrs.frozen(kw_only=True)
class TransportSpec:
    """What a plugin declares of a transport; cheap to make, nothing heavy is imported before create()."""

    #: URI schemes, the first being the name and the others aliases (`rdma`, `x-rdma`).
    schemes: tuple[str, ...]
    #: 'package.module:Class' or a callable; makes the Transport.
    factory: str | Callable[[], Transport]
    #: The form of an address, for help texts: 'tcp:HOST:PORT'.
    syntax: str
    summary: str = ""
    #: 'What is missing on this machine: how to get it', or None when ready.
    needs: Callable[[], str | None] = _no_needs

    def create(self) -> Transport:
        return _load(self.factory)()


@attrs.frozen(kw_only=True)
class FilterSpec:
    """What a plugin declares of a filter."""

    name: str
    factory: str | Callable[[], Filter]
    summary: str = ""
    needs: Callable[[], str | None] = _no_needs

    def create(self) -> Filter:
        return _load(self.factory)()
