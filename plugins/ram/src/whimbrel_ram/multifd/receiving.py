"""The destination's channels: a thread each, which puts pages in place; the thread of the migration keeps the order."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import numpy as np

from whimbrel.errors import (
    Cancelled,
    ChannelError,
    DeadlineExceeded,
    EndOfStream,
    MigrationError,
    StreamError,
)
from whimbrel.wire.items import shown
from whimbrel_ram import native
from whimbrel_ram.multifd import packing, wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from whimbrel.channel import Channel
    from whimbrel_ram.target import Target

log = logging.getLogger("whimbrel.ram")

_LOOK = 0.1  # seconds between two looks for a cancel, or for the end
#: Seconds without a packet on a channel that is waited for.
PATIENCE = 60.0
_GRACE = 5.0  # seconds that a source whose channel was closed may take to end the main channel
_SOON = 0.5  # seconds in which a connection says what it is
_ALIKE = "Switch multifd on at both sides, with multifd-channels alike"


@attrs.define(eq=False)
class _Arrived:
    """What is known of one channel. Everything under the lock."""

    channel: Channel
    number: int | None = None  # until its init packet was read
    syncs: int = 0
    #: Pages since the last sync.
    loose: int = 0
    #: Bytes; counted by its thread alone.
    received: int = 0
    ended: bool = False


class Receivers:
    """The channels of one incoming migration."""

    def __init__(
        self,
        count: int,
        *,
        page_size: int,
        uuid: bytes | None,
        method: str,
        accept: Callable[[float], Channel],
        is_cancelled: Callable[[], bool],
        abandon: Callable[[], None],
    ) -> None:
        """accept(deadline): the next further connection of the source. They are accepted at once, and in any order.
        abandon: ends the main channel, on which a source may be silent for ever.
        """
        self._count = count
        self._page_size = page_size
        self._uuid = uuid
        self._method = method
        self._accept = accept
        self._is_cancelled = is_cancelled
        self._abandon = abandon
        self._failed_at: float | None = None
        self._patience = PATIENCE
        self._changed = threading.Condition()
        self._arrived: list[_Arrived] = []
        self._threads: list[threading.Thread] = []
        self._targets: dict[bytes, Target] = {}
        self._released = 0
        self._sealed = self._closing = False
        self._error: BaseException | None = None
        self.normal = self.zero = 0
        self._start(self._accept_all, "whimbrel-multifd-accept")

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        with self._changed:
            self._threads.append(thread)
        thread.start()

    # ---- the migration's thread

    def set_targets(self, targets: dict[bytes, Target]) -> None:
        """The blocks, by their names on the wire, before the first marker."""
        with self._changed:
            self._targets = dict(targets)

    def marker(self) -> None:
        """A marker of the main channel: wait until all channels have come to their sync, then let them go on.

        Raises what a channel failed with, StreamError for channels that do not come, Cancelled.
        """
        with self._changed:
            due = self._released + 1
            before, since = self._progress(), time.monotonic()
            while not self._all_at(due):
                self._check(due)
                if (now := self._progress()) != before:
                    before, since = now, time.monotonic()
                elif time.monotonic() - since > self._patience:
                    raise self._missing(due)
                self._changed.wait(_LOOK)
            self._released = due
            self._changed.notify_all()

    def seal(self) -> None:
        """The machine may start: no byte of its memory is written from here on. Raises StreamError for what would be
        missing: pages behind the last sync, or behind one that the main channel never told of.
        """
        with self._changed:
            self._check()
            self._sealed = True
        self._last_look()
        with self._changed:
            self._check()
            ahead = [c for c in self._arrived if c.syncs > self._released]
            late = [c for c in self._arrived if c.loose]
        if not self._arrived:
            raise self._missing(1)
        if ahead or not self._released:
            raise StreamError(
                "the main channel tells of fewer syncs than the multifd channels bring",
                section="ram",
                expected=f"{max((c.syncs for c in ahead), default=1)} markers",
                found=self._released,
                hint="The source's machine has the form of another version: start both with the same machine type",
            )
        if late:
            raise StreamError(
                f"pages came on multifd channel {late[0].number} behind the last sync",
                section="ram",
                expected="a sync after the last page",
                found=f"{sum(c.loose for c in late)} pages",
            )

    def _last_look(self) -> None:
        """Should the thread that accepts be late."""
        with contextlib.suppress(ChannelError):
            self._one_more(self._accept(time.monotonic()))
        self._check()

    def _one_more(self, channel: Channel) -> None:
        """Than there are to be. It says at once that it is a channel; who only looks whether somebody listens does not."""
        with channel, contextlib.suppress(ChannelError):
            if channel.peek(4, time.monotonic() + _SOON) == wire.MAGIC.to_bytes(4, "big"):
                self._fail(self._too_many())

    @property
    def failure(self) -> BaseException | None:
        """What a channel failed with."""
        return self._error

    def close(self) -> None:
        """Never raises."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            arrived = list(self._arrived)
        for one in arrived:
            one.channel.abort()
        for thread in self._threads:
            thread.join()
        for one in self._arrived:
            one.channel.close()

    def _progress(self) -> tuple[int, int]:
        return len(self._arrived), sum(c.received for c in self._arrived)

    def _all_at(self, due: int) -> bool:
        return len(self._arrived) == self._count and all(
            c.number is not None and c.syncs >= due for c in self._arrived
        )

    def _check(self, due: int | None = None) -> None:
        if self._error is not None:
            raise self._error
        if self._is_cancelled():
            raise Cancelled("the incoming migration was cancelled")
        lost = [c for c in self._arrived if c.ended and due is not None and c.syncs < due]
        if lost:
            raise EndOfStream(
                f"multifd channel {lost[0].number} ended before its sync",
                section="ram",
                hint="The source has failed, or has lost that connection",
            )

    def _too_many(self) -> MigrationError:
        return StreamError(
            f"more than {self._count} multifd channels came",
            section="ram",
            expected=f"{self._count} channels",
            hint=_ALIKE,
        )

    def _missing(self, due: int) -> MigrationError:
        came = [c for c in self._arrived if c.number is not None]
        if len(came) < self._count:
            return StreamError(
                f"{len(came)} of {self._count} multifd channels came",
                section="ram",
                expected=f"{self._count} channels",
                found=len(came),
                hint=_ALIKE,
            )
        late = ", ".join(str(c.number) for c in came if c.syncs < due)
        return StreamError(
            f"nothing has come on multifd channel {late} for {self._patience:.0f} s",
            section="ram",
            expected=f"sync {due}, which the main channel has told of",
        )

    # ---- threads of their own

    def _accept_all(self) -> None:
        """To the end: on a channel too many pages would come that nobody reads."""
        while not self._closing:
            if self._failed_at is not None and time.monotonic() > self._failed_at + _GRACE:
                self._abandon()
                return
            try:
                channel = self._accept(time.monotonic() + _LOOK)
            except DeadlineExceeded:
                continue
            except MigrationError as error:
                if len(self._arrived) < self._count:
                    self._fail(error)
                return
            if len(self._arrived) == self._count:
                self._one_more(channel)
                continue
            arrived = _Arrived(channel)
            with self._changed:
                self._arrived.append(arrived)
                number = len(self._arrived) - 1
                if self._closing:
                    channel.abort()
                self._changed.notify_all()
            self._start(lambda one=arrived: self._serve(one), f"whimbrel-multifd-{number}")  # type: ignore[misc]

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if not self._closing:
                self._error = self._error or error
                self._failed_at = self._failed_at or time.monotonic()
            self._changed.notify_all()

    def _serve(self, arrived: _Arrived) -> None:
        try:
            self._receive(arrived)
        except BaseException as error:
            if isinstance(error, MigrationError):
                error.message = f"multifd channel {arrived.number}: {error.message}"
            self._fail(error)
            arrived.channel.close()  # the source notices, and gives up
        finally:
            with self._changed:
                arrived.ended = True
                self._changed.notify_all()

    def _receive(self, arrived: _Arrived) -> None:
        receiver = _Receiver(arrived, self._page_size, self._method)
        init = receiver.read(wire.INIT_SIZE)
        if init is None:
            return
        number = wire.decode_init(init, self._uuid, self._count)
        with self._changed:
            if any(c.number == number for c in self._arrived):
                raise StreamError(f"two multifd channels are number {number}", section="ram")
            arrived.number = number
            self._changed.notify_all()
        while (packet := receiver.packet()) is not None:
            with self._changed:
                count = len(packet.normal) + len(packet.zero)
                if count and self._sealed:
                    log.error("pages that came on multifd channel %d too late are left out", number)
                    return
                arrived.loose += count  # before anything is written: who seals sees it, and refuses
            if count:
                self._put(packet, receiver)
            more = 0
            if len(packet.normal) and not packet.sync:
                more = receiver.further(packet.idstr, self._targets[packet.idstr])
            with self._changed:
                self.normal += len(packet.normal) + more
                self.zero += len(packet.zero)
                if packet.sync:
                    arrived.syncs += 1
                    arrived.loose = 0
                    self._changed.notify_all()
                while packet.sync and self._released < arrived.syncs and not self._closing:
                    self._changed.wait()

    def _put(self, packet: wire.Packet, receiver: _Receiver) -> None:
        target = self._targets.get(packet.idstr)
        if target is None:
            raise StreamError(
                f"a multifd packet for an unknown RAM block '{shown(packet.idstr)}'",
                section="ram",
                expected="a block of the setup record",
                found=repr(shown(packet.idstr)),
            )
        size, page_size = target.size, self._page_size
        if len(packet.normal):
            first = packet.run(page_size)
            if first is not None:  # one piece of memory
                count = len(packet.normal)
                piece = wire.memory_of(first, count, size, page_size, packet.idstr)
                page = first // page_size
                target.fresh_map[page : page + count] = False
                receiver.read_pages(packet, target.memory[piece])
            else:
                pages = wire.page_numbers(packet.normal, size, page_size, packet.idstr)
                target.rows[pages] = receiver.pages(packet)
                target.fresh_map[pages] = False
        if len(packet.zero):
            target.put_zeros(wire.page_numbers(packet.zero, size, page_size, packet.idstr), 0)


class _Receiver:
    """One channel: bytes into packets. A packet with a sync is the last that is touched before the channel goes on."""

    def __init__(self, arrived: _Arrived, page_size: int, method: str) -> None:
        self._arrived = arrived
        self._page_size = page_size
        self._method = wire.METHODS[method]
        self._unpacker = packing.unpacker(method)
        self._head = memoryview(bytearray(wire.header_size(page_size)))
        self._have_head = False
        rows = np.empty((wire.pages_of(page_size), page_size), np.uint8)
        self._rows, self._bytes = rows, rows.reshape(-1).data
        self._packed = memoryview(b"")

    def read(self, n: int) -> memoryview | None:
        """The next n bytes, valid until the next call; None at an end in order."""
        view = self._head[:n]
        got = self._fill(view)
        if 0 < got < n:
            raise self._cut(n - got)
        return view if got else None

    def packet(self) -> wire.Packet | None:
        """The next one; None at the end. Its data comes next, where it has normal pages."""
        if not self._have_head and self.read(len(self._head)) is None:
            return None
        self._have_head = False
        return wire.decode(self._head, self._page_size, self._method)

    def read_pages(self, packet: wire.Packet, into: memoryview) -> None:
        """The bytes of its normal pages."""
        if self._unpacker is None:
            self._read_data(packet, into)
            return
        if len(self._packed) < packet.size:
            self._packed = memoryview(bytearray(packet.size))
        packed = self._packed[: packet.size]
        self._read_data(packet, packed)
        self._unpacker.unpack(packed, into)

    def pages(self, packet: wire.Packet) -> NDArray[np.uint8]:
        """The same, a row a page, valid until the next call."""
        n = len(packet.normal)
        self.read_pages(packet, self._bytes[: n * self._page_size])
        return self._rows[:n]

    def further(self, idstr: bytes, target: Target) -> int:
        """Put the packets that follow in place, as far as the loop in C can; how many pages."""
        if native.packets is None or not self._have_head or self._unpacker is not None:
            return 0
        with self._arrived.channel.lend("read") as fd:
            if fd is None:
                return 0
            pages, got, missing = native.packets.receive(
                fd, self._head, idstr, target.memory, target.fresh, self._page_size
            )
        self._arrived.received += got
        self._have_head = not missing
        if missing > len(self._head):
            raise self._cut(missing - len(self._head))
        return int(pages)

    def _read_data(self, packet: wire.Packet, into: memoryview) -> None:
        """In one call with the next header, since one must come behind pages without a sync."""
        got = self._fill(into) if packet.sync else self._fill(into, self._head)
        self._have_head = got == len(into) + len(self._head)
        if got != len(into) and not self._have_head:
            raise self._cut(len(into) - got)

    def _fill(self, *views: memoryview) -> int:
        got = self._arrived.channel.recv_all(views)
        self._arrived.received += got
        return got

    def _cut(self, missing: int) -> MigrationError:
        return EndOfStream(
            "a multifd channel ended in the middle of a packet",
            section="ram",
            expected=f"{missing} more bytes",
        )
