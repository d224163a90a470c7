"""A link between two processes, as a proxy: so many bytes per second and no more, cut or silent when the test says so.

    link = Link("tcp:127.0.0.1:4444", rate=250e6)      # the source connects to link.uri
    link.hang(); link.resume(); link.cut()

A proxy in between means that the end of the connection proves nothing about the process at the other end: on tcp link.uri
says so (direct=off), as a user must who migrates through a relay. A trigger acts at an exact place of the stream:

    link = Link(target, triggers=[Trigger(Direction.FORWARD, b"QEVM", do=Link.cut)])
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

import attrs

_CHUNK = 128 << 10
#: A paced sender that was held up makes good for at most so many seconds.
_CREDIT = 0.005
#: How long the beginning of a pattern at the end of what has come is kept back for the rest of it, in seconds.
_HOLD = 0.05
#: The proxy's own buffers are small: what a sender sees is the link, not a store behind it.
_BUFFER = 256 << 10


class Pacer:
    """Keeps a sender to `rate` bytes per second by absolute deadlines, so that errors of sleep() do not add up."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._next = time.monotonic()

    def wait(self, n: int) -> None:
        """Return when the next n bytes may go."""
        now = time.monotonic()
        if self._next > now:
            time.sleep(self._next - now)
        else:
            self._next = max(self._next, now - _CREDIT)
        self._next += n / self.rate


class Direction(enum.Enum):
    """Of the bytes on a link."""

    FORWARD = "source to destination"
    BACK = "destination to source"


@attrs.define(eq=False)
class Trigger:
    """Act before, or right after, the occurrence of a pattern: nothing behind it has passed when `do` is called, nor
    anything the other way that answers it.
    """

    direction: Direction
    pattern: bytes
    do: Callable[[Link], object]
    before: bool = True
    occurrence: int = 1
    fired: threading.Event = attrs.field(factory=threading.Event, init=False)

    def place(self, data: bytes) -> int | None:
        """Where in data to act, or None; counts what it sees."""
        start = 0
        while (found := data.find(self.pattern, start)) >= 0:
            self.occurrence -= 1
            if not self.occurrence:
                return found if self.before else found + len(self.pattern)
            start = found + len(self.pattern)
        return None

    def held(self, data: bytes) -> int:
        """How many bytes at the end of data may be the beginning of the pattern."""
        for n in range(min(len(self.pattern) - 1, len(data)), 0, -1):
            if data.endswith(self.pattern[:n]):
                return n
        return 0


@attrs.define(eq=False)
class _Pair:
    """The two connections of one that is passed on."""

    source: socket.socket
    destination: socket.socket
    ended: bool = False


class Link:
    """Accepts any number of connections, one after the other, and passes each on to the target.

    target: tcp:HOST:PORT or unix:PATH. The link listens with the same kind of socket, at `uri`. rate: bytes per second
    towards the target; None is no limit.
    """

    def __init__(
        self, target: str, *, rate: float | None = None, triggers: Sequence[Trigger] = ()
    ) -> None:
        self._target = target
        self._pacer = None if rate is None else Pacer(rate)
        self._triggers = list(triggers)
        self._open = threading.Event()
        self._open.set()
        self._passing = threading.RLock()
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._closed = False
        self._threads: list[threading.Thread] = []
        #: Bytes passed on, by direction.
        self.passed = dict.fromkeys(Direction, 0)
        self._listener, self.uri, self._path = self._listen()
        self._spawn(self._accept)

    def _listen(self) -> tuple[socket.socket, str, str | None]:
        path = None
        if self._target.startswith("unix:"):
            path = os.path.join(tempfile.mkdtemp(prefix="whimbrel-link-"), "link")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            uri = f"unix:{path}"
        else:
            listener = socket.socket(socket.AF_INET)
            listener.bind(("127.0.0.1", 0))
            uri = f"tcp:127.0.0.1:{listener.getsockname()[1]},direct=off"
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        listener.listen()
        return listener, uri, path

    def _connect(self) -> socket.socket:
        scheme, _, rest = self._target.partition(":")
        if scheme == "unix":
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(rest)
            except OSError:
                sock.close()
                raise
            return sock
        host, _, port = rest.rpartition(":")
        return socket.create_connection((host, int(port)))

    # ---- switches

    def hang(self) -> None:
        """From now on nothing passes, and nobody is told."""
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    def cut(self) -> None:
        """End all connections: both ends see the end of the stream."""
        self._end(reset=False)

    def reset(self) -> None:
        """End all connections the hard way: both ends see `connection reset` (tcp; as cut() on unix)."""
        self._end(reset=True)

    def _end(self, *, reset: bool) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.ended = True
            for sock in (pair.source, pair.destination):
                with contextlib.suppress(OSError):
                    if reset:
                        linger = struct.pack("ii", 1, 0)
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    # Wakes the pump; a socket that somebody waits on is not closed by close().
                    sock.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
                sock.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._open.set()
        self.cut()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._path is not None:
            os.unlink(self._path)
            os.rmdir(os.path.dirname(self._path))
            self._path = None

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the threads

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="link", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                source, _ = self._listener.accept()
            except OSError:
                return
            try:
                destination = self._connect()
            except OSError:
                source.close()
                continue
            for sock in (source, destination):
                if sock.family == socket.AF_INET:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(source, destination)
            with self._lock:
                self._pairs.append(pair)
            self._spawn(self._pump, Direction.FORWARD, pair)
            self._spawn(self._pump, Direction.BACK, pair)

    def _pump(self, direction: Direction, pair: _Pair) -> None:
        come, go = pair.source, pair.destination
        if direction is Direction.BACK:
            come, go = go, come
        held = b""
        with contextlib.suppress(OSError, ValueError):  # a switch closed it under us
            while True:
                if held and not select.select([come], [], [], _HOLD)[0]:
                    self._pass(direction, go, held)
                    held = b""
                try:
                    data = come.recv(_CHUNK)
                except ConnectionResetError:  # who sends is gone: no more comes
                    data = b""
                self._open.wait()
                if pair.ended:
                    return
                if not data:
                    self._pass(direction, go, held)
                    go.shutdown(socket.SHUT_WR)
                    return
                held = self._scan(direction, go, held + data)

    def _scan(self, direction: Direction, go: socket.socket, data: bytes) -> bytes:
        """Pass data on, acting where a trigger says so; returns what is held back."""
        mine = [t for t in self._triggers if t.direction is direction and not t.fired.is_set()]
        for trigger in mine:
            place = trigger.place(data)
            if place is not None:
                with self._passing:  # the other side's answer to it must not overtake the switch
                    self._pass(direction, go, data[:place])
                    data = data[place:]
                    trigger.do(self)
                trigger.fired.set()
        keep = max((t.held(data) for t in mine if not t.fired.is_set()), default=0)
        self._pass(direction, go, data[: len(data) - keep])
        return data[len(data) - keep :]

    def _pass(self, direction: Direction, go: socket.socket, data: bytes) -> None:
        if not data:
            return
        if self._pacer is not None and direction is Direction.FORWARD:
            self._pacer.wait(len(data))
        while True:
            self._open.wait()
            with self._passing:
                if self._open.is_set():
                    go.sendall(data)
                    self.passed[direction] += len(data)
                    return
