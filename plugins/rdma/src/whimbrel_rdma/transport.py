"""The rdma transport: addresses and routes are found, connections made and accepted. pyverbs comes with the first use."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import select
import socket
import time
from typing import TYPE_CHECKING

from whimbrel.channel import Channel, Listener, Role, Transport, TransportContext
from whimbrel.errors import ChannelError, MigrationError, SettingError, StreamError
from whimbrel.waiting import Gate, call_in_thread, wait_any
from whimbrel_rdma.address import RdmaAddress, parse
from whimbrel_rdma.limits import pin_limit, refusals
from whimbrel_rdma.protocol import PIN_ALL, decode_private, encode_private

if TYPE_CHECKING:
    from whimbrel_rdma.channel import RdmaChannel
    from whimbrel_rdma.cm import Events
    from whimbrel_rdma.verbs import Connection

log = logging.getLogger("whimbrel.rdma")

_BACKLOG = 5
#: Seconds for each step of finding the way, of the system's resolver in the kernel.
_RESOLVE = 5.0
#: Seconds in which a destination takes the connection for its answers, or does not.
_WAY_BACK = 3.0

_HINTS = {
    "REJECTED": "Start the destination first, and check host and port",
    "UNREACHABLE": "Check the address, and that both hosts are on one RDMA network",
    "ADDR_ERROR": "Give the address of an interface with an RDMA device behind it (rdma link), here and there",
    "ROUTE_ERROR": "Check that both hosts are on one RDMA network",
}


class RdmaTransport(Transport):
    """Numbers for names come from the system's resolver; each address is tried in turn."""

    def parse(self, rest: str) -> RdmaAddress:
        return parse(rest)

    def connect(self, address: RdmaAddress, ctx: TransportContext) -> Channel:
        from whimbrel_rdma.channel import RdmaChannel

        _check(ctx)
        wanted = bool(ctx.settings is not None and ctx.settings.get("rdma-pin-all"))
        name = f"rdma:{address}"
        if not address.host:
            raise ChannelError(f"{name} names no host", hint="Write that of the destination")
        failure: MigrationError | None = None
        for host in _look_up(address, ctx, 0):
            try:
                connection, flags = _connect(name, host, address.port, wanted, ctx)
            except ChannelError as error:
                failure = error
                continue
            return RdmaChannel(
                connection,
                role=Role.SOURCE,
                pin_all=wanted and bool(flags & PIN_ALL),
                patience=_patience(ctx),
                way_back=lambda host=host: _way_back(
                    name, host, address.port, wanted, ctx.cancel_fd
                ),  # type: ignore[misc]
            )
        assert failure is not None
        raise failure

    def listen(self, address: RdmaAddress, ctx: TransportContext) -> Listener:
        _check(ctx)
        return RdmaListener(address, _look_up(address, ctx, socket.AI_PASSIVE)[0], ctx)


def _check(ctx: TransportContext) -> None:
    """Raises SettingError for what does not work over RDMA."""
    if ctx.settings is not None:
        found = refusals(ctx.settings, ctx.machine if ctx.role is Role.SOURCE else None)
        if found:
            raise SettingError(found[0])


def _patience(ctx: TransportContext) -> float | None:
    """Seconds for each answer of the destination at switchover."""
    timeout = ctx.settings.get("commit-timeout") if ctx.settings is not None else None
    return None if timeout is None else timeout / 1000


def _look_up(address: RdmaAddress, ctx: TransportContext, flags: int) -> list[str]:
    """The numeric addresses of the host. In a thread: the look-up cannot be interrupted."""
    if not address.host:
        return ["0.0.0.0"]  # noqa: S104 - what an address without a host means
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(address.host))]
    try:
        found = call_in_thread(
            lambda: socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=flags
            ),
            deadline=ctx.deadline,
            cancel_fd=ctx.cancel_fd,
            what=f"the addresses of {address.host}",
        )
    except (OSError, UnicodeError) as error:
        raise ChannelError(
            f"{address.host} is not known: {getattr(error, 'strerror', error)}",
            hint="Check the name, or write the numbers",
        ) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _earlier(deadline: float | None, seconds: float) -> float:
    limit = time.monotonic() + seconds
    return limit if deadline is None else min(deadline, limit)


def _connect(
    name: str, host: str, port: int, pin_all: bool, ctx: TransportContext
) -> tuple[Connection, int]:
    """A connection and the flags that the other side has agreed to."""
    from pyverbs.cmid import AddrInfo

    from whimbrel_rdma.cm import CmError, Events, ce, translated
    from whimbrel_rdma.verbs import Connection

    events = Events()
    connection: Connection | None = None
    cmid = None
    try:
        cmid = events.cmid()
        with translated(f"find an RDMA device on the way to {host}", _HINTS["ADDR_ERROR"]):
            cmid.resolve_addr(AddrInfo(dst=host, dst_service=str(port), port_space=ce.RDMA_PS_TCP))
        for kind in (ce.RDMA_CM_EVENT_ADDR_RESOLVED, ce.RDMA_CM_EVENT_ROUTE_RESOLVED):
            event = events.expect(
                kind,
                deadline=_earlier(ctx.deadline, _RESOLVE),
                cancel_fd=ctx.cancel_fd,
                what=f"the way to {host}",
            )
            event.close()
            if kind == ce.RDMA_CM_EVENT_ADDR_RESOLVED:
                with translated(f"find the way to {host}"):
                    cmid.resolve_route()
        connection = Connection(name, events, cmid)
        answer = connection.connect(
            encode_private(PIN_ALL if pin_all else 0), ctx.deadline, ctx.cancel_fd
        )
        return connection, decode_private(answer)
    except BaseException as error:
        if connection is not None:
            connection.close()
        else:
            if cmid is not None:
                cmid.close()
            events.close()
        if isinstance(error, CmError):
            raise ChannelError(
                f"cannot connect to {host} port {port} by RDMA: {error.message}",
                hint=_HINTS.get(error.event, "Check host and port"),
            ) from error
        raise


def _way_back(
    name: str, host: str, port: int, pin_all: bool, cancel_fd: int | None
) -> RdmaChannel | None:
    """A second connection, for the destination's answers; None where it takes no other. Raises Cancelled."""
    from whimbrel_rdma.channel import RdmaChannel

    ctx = TransportContext(
        role=Role.SOURCE, deadline=time.monotonic() + _WAY_BACK, cancel_fd=cancel_fd
    )
    try:
        connection, _ = _connect(f"{name} (answers)", host, port, pin_all, ctx)
    except (ChannelError, StreamError) as error:
        log.info("%s gives no answers: %s", name, error)
        return None
    channel = RdmaChannel(connection, role=Role.SOURCE, eager=True)
    channel.ready()
    return channel


class RdmaListener(Listener):
    """Of a destination. The connection for the answers is accepted while the first one is read."""

    def __init__(self, address: RdmaAddress, host: str, ctx: TransportContext) -> None:
        from whimbrel_rdma.cm import Events

        self.addresses = (f"rdma:{address}",)
        self._name = f"rdma:{address}"
        self._ctx = ctx
        self._gate = Gate(self._name)
        self._answers: RdmaChannel | None = None
        self._answered = False
        self._events: Events = Events()
        try:
            self._events.listen(host, address.port, _BACKLOG)
        except BaseException:
            self.close()
            raise

    def accept(self, deadline: float | None = None) -> Channel:
        from whimbrel_rdma.channel import RdmaChannel

        with self._gate.inside():
            while True:
                self._wait_for_request(deadline)
                try:
                    connection, flags = self._take()
                except (ChannelError, StreamError) as error:
                    log.warning("%s turned a connection away: %s", self._name, error)
                    continue
                connection.requested = self._take_answers
                return RdmaChannel(
                    connection,
                    role=Role.DESTINATION,
                    pin_all=bool(flags & PIN_ALL),
                    way_back=self._take_way_back,
                )

    def _wait_for_request(self, deadline: float | None) -> None:
        while not self._events.requests:
            event = self._events.take()
            if event is not None:
                event.close()
            elif not self._events.requests:
                wait_any(
                    (self._events.fd, self._gate.fd),
                    select.POLLIN,
                    deadline=deadline if deadline is not None else self._ctx.deadline,
                    cancel_fd=self._ctx.cancel_fd,
                    what="a connection",
                )
                self._gate.check()

    def _take(self) -> tuple[Connection, int]:
        """Accept the next request: the connection, and the flags that were agreed on."""
        from whimbrel_rdma.verbs import Connection

        child, private = self._events.next_request()
        self._events.disconnected = False  # of a connection before this one
        try:
            flags = decode_private(private)
        except StreamError:
            child.close()
            raise
        if flags & PIN_ALL and not self._can_pin_all():
            flags &= ~PIN_ALL
        events = self._events.share()
        try:
            connection = Connection(self._name, events, child)
        except BaseException:
            child.close()
            events.close()
            raise
        try:
            connection.accept(encode_private(flags))
        except BaseException:
            connection.close()
            raise
        return connection, flags

    def _can_pin_all(self) -> bool:
        from whimbrel_ram import RAMBlock

        limit, machine = pin_limit(), self._ctx.machine
        if limit is None or machine is None:
            return True
        need = sum(block.size for block in machine.parts(RAMBlock))
        if need > limit:
            log.warning(
                "%s: pin-all is off: %d MiB of RAM, and this process may pin %d MiB (RLIMIT_MEMLOCK)",
                self._name,
                need >> 20,
                limit >> 20,
            )
        return need <= limit

    def _take_answers(self) -> None:
        """A second connection is for the answers, also when nothing else is listened for any more; there is no third."""
        from whimbrel_rdma.channel import RdmaChannel

        if not self._answered:
            self._answered = True
            try:
                connection, _ = self._take()
                self._answers = RdmaChannel(connection, role=Role.DESTINATION)
            except (ChannelError, StreamError) as error:
                log.warning("%s turned a connection away: %s", self._name, error)
        self._events.turn_away()

    def _take_way_back(self) -> Channel | None:
        answers, self._answers = self._answers, None
        return answers

    def close(self) -> None:
        if self._gate.close():
            self._events.close()
