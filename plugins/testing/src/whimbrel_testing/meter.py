"""The `meter` filter: it counts the bytes each way and changes nothing. The smallest complete filter."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import attrs

from whimbrel import Channel, Filter, Role
from whimbrel.channel import Buffer, WrappedChannel

log = logging.getLogger("whimbrel.meter")


@attrs.define
class Count:
    """Bytes that passed. One thread writes each member."""

    sent: int = 0
    received: int = 0


class MeterFilter(Filter):
    """`count` is of all channels that this filter was put around."""

    def __init__(self) -> None:
        self.count = Count()

    def wrap(self, channel: Channel, role: Role) -> Channel:
        return MeterChannel(channel, self.count)


class MeterChannel(WrappedChannel):
    """What its filter counts: raw descriptors and extensions would pass it by, so there are none."""

    def __init__(self, inner: Channel, count: Count) -> None:
        super().__init__(inner)
        self.count = count

    def send(self, buffers: Sequence[Buffer]) -> None:
        self.inner.send(buffers)
        self.count.sent += sum(memoryview(buffer).nbytes for buffer in buffers)

    def recv_into(self, view: memoryview) -> int:
        n = self.inner.recv_into(view)
        self.count.received += n
        return n

    def close(self) -> None:
        self.inner.close()
        log.info("%s: %d bytes sent, %d received", self.name, self.count.sent, self.count.received)

    def rewrap(self, channel: Channel) -> Channel:
        return self if channel is self.inner else MeterChannel(channel, self.count)
