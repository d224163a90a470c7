"""The connection manager without blocking: events of connections made, accepted and left.

pyverbs holds the GIL in calls that wait, so none ever does: descriptors are made non-blocking as soon as they are there,
and polled.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pyverbs.cmid import CMID, AddrInfo, CMEvent, CMEventChannel
from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError

from whimbrel.errors import ChannelError, EndOfStream, LocalError, MigrationError
from whimbrel.waiting import wait_fd

try:
    from pyverbs import cm_enums
except ImportError:  # renamed after rdma-core 44
    from pyverbs import librdmacm_enums as cm_enums
ce = cm_enums

_opening = threading.Lock()


def with_fd(make: Callable[[], Any], marker: str) -> tuple[Any, int]:
    """make() and the descriptor that it opened, now non-blocking: pyverbs does not tell it."""

    def fds() -> set[int]:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if marker in os.readlink(f"/proc/self/fd/{name}"):
                    found.add(int(name))
        return found

    with _opening:
        before = fds()
        made = make()
        new = fds() - before
    if len(new) != 1:
        raise LocalError(
            "the descriptor of an RDMA event channel cannot be told", expected=1, found=len(new)
        )
    (fd,) = new
    os.set_blocking(fd, False)
    return made, fd


@contextlib.contextmanager
def translated(doing: str, hint: str | None = None) -> Iterator[None]:
    """Errors of pyverbs as ChannelErrors that say what was being done."""
    try:
        yield
    except (PyverbsError, OSError) as error:
        code = getattr(error, "error_code", None) or getattr(error, "errno", None)
        why = os.strerror(code) if code else str(error)
        raise ChannelError(f"cannot {doing}: {why}", hint=hint) from error


class Events:
    """A CM event channel. The connections that a listener accepted share its channel with it."""

    def __init__(self) -> None:
        with translated("open an RDMA event channel"):
            self._channel, self.fd = with_fd(CMEventChannel, "rdma_cm")
        self._users = 1
        self._listening: CMID | None = None
        #: Connections that wait to be accepted.
        self.requests: collections.deque[CMEvent] = collections.deque()
        #: A peer has left.
        self.disconnected = False
        self._lock = threading.Lock()

    def cmid(self) -> CMID:
        with translated("make an RDMA connection"):
            return CMID(creator=self._channel, port_space=ce.RDMA_PS_TCP)

    def listen(self, host: str, port: int, backlog: int) -> None:
        self._listening = self.cmid()
        with translated(
            f"listen on {host} port {port} by RDMA",
            "Give an address of an interface with an RDMA device (rdma link), and a port that is free",
        ):
            where = AddrInfo(
                src=host,
                src_service=str(port),
                port_space=ce.RDMA_PS_TCP,
                flags=ce.RAI_PASSIVE,
            )
            self._listening.bind_addr(where)
            self._listening.listen(backlog)

    def next_request(self) -> tuple[CMID, bytes]:
        """The first of the requests as a connection to be, and its private data."""
        event = self.requests.popleft()
        private = bytes(event.private_data)
        with translated("accept an RDMA connection"):
            child = CMID(creator=event, listen_id=self._listening)
            event.close()
        return child, private

    def turn_away(self) -> None:
        """Refuse whoever waits to be accepted."""
        while self.requests:
            with contextlib.suppress(PyverbsError, MigrationError):
                self.next_request()[0].close()

    def share(self) -> Events:
        self._users += 1
        return self

    def take(self) -> CMEvent | None:
        """The next event, None where there is none yet. Requests and disconnects are noted here and not returned."""
        with self._lock:
            while True:
                poll = select.poll()
                poll.register(self.fd, select.POLLIN)
                if not poll.poll(0):
                    return None
                try:
                    event = CMEvent(self._channel)
                except PyverbsRDMAError as error:
                    if error.error_code in (errno.EAGAIN, None):
                        return None
                    raise
                if event.event_type == ce.RDMA_CM_EVENT_CONNECT_REQUEST:
                    self.requests.append(event)
                    return None
                if event.event_type == ce.RDMA_CM_EVENT_DISCONNECTED:
                    self.disconnected = True
                elif event.event_type != ce.RDMA_CM_EVENT_TIMEWAIT_EXIT:
                    return event
                event.close()

    def expect(
        self, kind: int, *, deadline: float | None, cancel_fd: int | None, what: str
    ) -> CMEvent:
        """Wait for that event. Raises ChannelError for another, DeadlineExceeded, Cancelled."""
        while True:
            event = self.take()
            if event is not None:
                if event.event_type == kind:
                    return event
                said = event.event_str().removeprefix("RDMA_CM_EVENT_")
                event.close()
                raise CmError(f"{what} failed: {said}", said)
            if self.disconnected:
                raise EndOfStream(f"{what} failed: the other side has left")
            wait_fd(self.fd, select.POLLIN, deadline=deadline, cancel_fd=cancel_fd, what=what)

    def close(self) -> None:
        self._users -= 1
        if self._users:
            return
        self.turn_away()
        # Not before: what was accepted uses its protection domain.
        with contextlib.suppress(PyverbsError):
            if self._listening is not None:
                self._listening.close()
            self._channel.close()


class CmError(ChannelError):
    """`event` is the CM's word for what happened: REJECTED, UNREACHABLE, ..."""

    def __init__(self, message: str, event: str) -> None:
        super().__init__(message)
        self.event = event
