"""A channel that breaks on purpose: cut, hung, delayed or corrupted at byte N of a direction, or when a condition holds.

In a test's own process:

    channel = FaultChannel(channel, [cut(SEND, at=4096), delay(RECV, at=10, seconds=0.5)])
    channel = FaultChannel(channel, [hang(SEND, when=lambda: kernel.state.status is Status.DEVICE)])

In another process, as a filter: `fault::tcp:host:port` with the faults in the environment,

    WHIMBREL_FAULTS="cut:send@4096 corrupt:recv@100:0x01"

A byte's number counts from 0 in its direction: the bytes before it pass, then the fault happens. A condition is asked
before each operation in its direction; what it asks about is the test's business (a state of the migration, a file).
"""

from __future__ import annotations

import enum
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import attrs

from whimbrel import Channel, ChannelError, DeadlineExceeded, Filter, Role
from whimbrel.channel import Buffer, WrappedChannel

#: Where FaultFilter finds its faults.
VARIABLE = "WHIMBREL_FAULTS"


class Kind(enum.Enum):
    """What happens."""

    CUT = "cut"  # both ends see the link end: the local one as an error, the peer as the end or a reset
    HANG = "hang"  # nothing passes in this direction any more, and nobody is told: a lost link, a stuck peer
    DELAY = "delay"  # once, for some seconds
    CORRUPT = "corrupt"  # one byte is changed


class Direction(enum.Enum):
    """As seen from the channel that is wrapped."""

    SEND = "send"
    RECV = "recv"


SEND, RECV = Direction.SEND, Direction.RECV


@attrs.frozen(kw_only=True)
class Fault:
    """One fault. Exactly one of `at` and `when`."""

    kind: Kind
    direction: Direction
    at: int | None = None
    when: Callable[[], bool] | None = attrs.field(default=None, eq=False)
    seconds: float = 0.0
    #: CORRUPT: what the byte is XORed with.
    mask: int = 0xFF

    def __attrs_post_init__(self) -> None:
        if (self.at is None) == (self.when is None):
            raise ValueError(
                "a fault happens at a byte or when a condition holds: give one of them"
            )
        if not 0 < self.mask < 256:
            raise ValueError(f"a mask of {self.mask} changes no byte")


def cut(
    direction: Direction, *, at: int | None = None, when: Callable[[], bool] | None = None
) -> Fault:
    return Fault(kind=Kind.CUT, direction=direction, at=at, when=when)


def hang(
    direction: Direction, *, at: int | None = None, when: Callable[[], bool] | None = None
) -> Fault:
    return Fault(kind=Kind.HANG, direction=direction, at=at, when=when)


def delay(
    direction: Direction,
    *,
    seconds: float,
    at: int | None = None,
    when: Callable[[], bool] | None = None,
) -> Fault:
    return Fault(kind=Kind.DELAY, direction=direction, at=at, when=when, seconds=seconds)


def corrupt(
    direction: Direction,
    *,
    at: int | None = None,
    when: Callable[[], bool] | None = None,
    mask: int = 0xFF,
) -> Fault:
    return Fault(kind=Kind.CORRUPT, direction=direction, at=at, when=when, mask=mask)


_TEXT = re.compile(
    r"(?P<kind>cut|hang|delay|corrupt):(?P<direction>send|recv)@(?P<at>\d+)(:(?P<value>[0-9a-fx.]+))?"
)


def parse_faults(text: str) -> list[Fault]:
    """Faults from 'KIND:DIRECTION@BYTE[:VALUE]' separated by blanks; the value is of delay (seconds) or corrupt (mask).

    Raises ValueError.
    """
    faults = []
    for word in text.split():
        form = _TEXT.fullmatch(word)
        if form is None:
            raise ValueError(f"'{word}' is not a fault: write for instance cut:send@4096")
        kind, value = Kind(form["kind"]), form["value"]
        if (value is not None) and kind not in (Kind.DELAY, Kind.CORRUPT):
            raise ValueError(f"'{word}': {kind.value} takes no value")
        faults.append(
            Fault(
                kind=kind,
                direction=Direction(form["direction"]),
                at=int(form["at"]),
                seconds=float(value or 1) if kind is Kind.DELAY else 0.0,
                mask=int(value or "0xff", 0) if kind is Kind.CORRUPT else 0xFF,
            )
        )
    return faults


class FaultFilter(Filter):
    """The faults given, or those of $WHIMBREL_FAULTS, in each channel."""

    def __init__(self, faults: Iterable[Fault] | None = None) -> None:
        self.faults = tuple(
            parse_faults(os.environ.get(VARIABLE, "")) if faults is None else faults
        )

    def wrap(self, channel: Channel, role: Role) -> Channel:
        return FaultChannel(channel, self.faults)


class FaultChannel(WrappedChannel):
    """The channel of the module's docstring. Faults may be added to `faults` at any time.

    Its end proves nothing: after a cut the peer's process is as alive as before.
    """

    def __init__(self, inner: Channel, faults: Iterable[Fault] = ()) -> None:
        super().__init__(inner)
        self.eof_means_peer_gone = False
        self.faults = list(faults)
        #: Those that have happened, in order.
        self.happened: list[Fault] = []
        #: Bytes that passed in each direction.
        self.passed = {SEND: 0, RECV: 0}
        self._aborted = threading.Event()
        self._hung: set[Direction] = set()
        self._cut = False

    # ---- faults

    def _before(self, direction: Direction, deadline: float | None = None) -> int | None:
        """Let happen what is due. Returns how many bytes may pass until the next fault; None is any number."""
        if self._cut:
            raise ChannelError(f"{self.name}: the link was cut")
        while (fault := self._due(direction)) is not None:
            if fault.kind is Kind.CORRUPT:
                return 1
            self._happen(fault)
            if fault.kind is Kind.CUT:
                self._cut = True
                self.inner.abort()
                raise ChannelError(
                    f"{self.name}: the link was cut at byte {self.passed[direction]}"
                )
            if fault.kind is Kind.HANG:
                self._hung.add(direction)
            else:
                self._stand(time.monotonic() + fault.seconds)
        if direction in self._hung:
            self._stand(deadline)
            raise DeadlineExceeded(f"timed out waiting for {self.name}")
        passed = self.passed[direction]
        ahead = [
            f.at - passed
            for f in self.faults
            if f.direction is direction and f.at is not None and f.at > passed
        ]
        return min(ahead, default=None)

    def _due(self, direction: Direction) -> Fault | None:
        for fault in self.faults:
            if fault.direction is direction and (
                fault.when() if fault.when is not None else fault.at == self.passed[direction]
            ):
                return fault
        return None

    def _happen(self, fault: Fault) -> None:
        self.faults.remove(fault)
        self.happened.append(fault)

    def _stand(self, deadline: float | None) -> None:
        """Nothing goes on until the deadline, or abort()."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self._aborted.wait(left):
            raise ChannelError(f"{self.name} was aborted")

    def _changed(self, direction: Direction, data: bytes) -> bytes:
        """The next byte that passes, with the corruption that is due."""
        fault = self._due(direction)
        if fault is None or fault.kind is not Kind.CORRUPT or not data:
            return data
        return bytes((data[0] ^ fault.mask,)) + data[1:]

    # ---- the channel

    def send(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            todo = memoryview(buffer).cast("B")
            while len(todo):
                n = self._before(SEND)
                piece = todo if n is None else todo[:n]
                fault = self._due(SEND)
                if fault is not None and fault.kind is Kind.CORRUPT:
                    self.inner.send([self._changed(SEND, bytes(piece))])
                    self._happen(fault)
                else:
                    self.inner.send([piece])
                self.passed[SEND] += len(piece)
                todo = todo[len(piece) :]

    def recv_into(self, view: memoryview) -> int:
        n = self._before(RECV)
        view = view if n is None else view[:n]
        got = self.inner.recv_into(view)
        fault = self._due(RECV)
        if got and fault is not None and fault.kind is Kind.CORRUPT:
            view[:1] = self._changed(RECV, bytes(view[:1]))
            self._happen(fault)
        self.passed[RECV] += got
        return got

    def peek(self, n: int, deadline: float | None = None) -> bytes:
        most = self._before(RECV, deadline)
        return self._changed(RECV, self.inner.peek(n if most is None else min(n, most), deadline))

    def abort(self) -> None:
        self._aborted.set()
        self.inner.abort()

    def close(self) -> None:
        self._aborted.set()
        self.inner.close()

    def rewrap(self, channel: Channel) -> Channel:
        """Another channel of the same transport has no faults of its own: add them to its `faults`."""
        return self if channel is self.inner else FaultChannel(channel)
