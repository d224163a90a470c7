"""Our end of a migration without a peer: the whole engine, our bare loop, and a raw copy, over the same warm memory.

ours   Kernel.migrate() to Kernel.incoming(): everything that a migration is
loop   the same batches by the same Encoder, Decoder and loops in C, in loops without kernel, stream, tracker or channel: what the
       engine costs is the difference to this
raw    sendall and recv_into of a MiB at a time, nothing looked at; with N sockets, a thread for each on both sides
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from remote import PATIENCE, Remote

from whimbrel import Kernel, Machine
from whimbrel.errors import MigrationError
from whimbrel.stream import ALIGNMENT, READ_BUFFER
from whimbrel_ram import RAMBlock, native
from whimbrel_ram.decoder import Decoder, Event
from whimbrel_ram.encoder import Encoder
from whimbrel_ram.records import EOS_RECORD
from whimbrel_ram.target import Target
from whimbrel_ram.transport import AT_ONCE
from whimbrel_ram.zero import as_words, zero_map, zero_map_at

CHUNK = 1 << 20
PAGE = 4096
#: The loops in C, by their names in whimbrel_ram.native; None where they are not here.
LOOPS = {name: getattr(native, name) for name in ("deltas", "packets", "records")}


def fill(memory: np.ndarray, content: str) -> None:
    """Write every page, so that the host has given memory for it."""
    words = memory.view(np.uint64)
    if content == "zero":
        words[:] = 1
        words[:] = 0
        return
    block = np.random.default_rng(7).integers(1, 1 << 63, CHUNK, dtype=np.uint64)
    for i in range(0, len(words), len(block)):
        words[i : i + len(block)] = block[: len(words) - i]


class RamSide:
    """One end: RAM in `blocks` blocks, and what can be done with it. Lives in a process of its own."""

    def __init__(self, size: int, blocks: int = 1) -> None:
        self.size = size
        each = size // blocks // PAGE * PAGE
        self.blocks = [RAMBlock(f"ram{i}", each) for i in range(blocks)]
        self.used = blocks
        self._sockets: list[socket.socket] = []
        self._writer: Writer | None = None
        self._written = 0.0  # bytes of pages per second

    def use(self, blocks: int) -> None:
        """Machines have so many of them from now on."""
        self.used = blocks

    def accel(self, on: bool) -> None:
        """With the loops of whimbrel-accel from now on, where they are here, or without."""
        for name, loops in LOOPS.items():
            setattr(native, name, loops if on else None)

    def fill(self, content: str) -> None:
        for block in self.blocks:
            fill(block.view, content)

    def same(self, content: str) -> bool:
        """Whether all pages hold what fill() would write."""
        wanted = np.empty(self.blocks[0].size, np.uint8)
        fill(wanted, content)
        return all(np.array_equal(b.view, wanted) for b in self.blocks)

    # ---- ours

    def _kernel(self, settings: dict[str, Any]) -> Kernel:
        machine = Machine("bench-1.0", stop=self._stop_writing)
        for block in self.blocks[: self.used]:
            machine.add(block)
        kernel = Kernel(machine)
        kernel.settings.update({"max-bandwidth": 0, **settings})
        return kernel

    def listen(self, uri: str, settings: dict[str, Any]) -> str:
        self.incoming = self._kernel(settings).incoming(uri, autostart=False)
        return str(self.incoming.addresses[0])

    def received(self) -> None:
        self.incoming.wait(PATIENCE)

    def send(
        self, uri: str, settings: dict[str, Any], patience: float = PATIENCE
    ) -> dict[str, Any]:
        """Migrate; what was measured, in seconds. Without `seconds` it did not end within `patience`."""
        kernel = self._kernel(settings)
        run = kernel.migrate(uri)
        try:
            run.wait(patience)
        except TimeoutError:
            run.cancel()
            with contextlib.suppress(MigrationError):
                run.wait(PATIENCE)
            return {"passes": run.result.figures.passes}
        finally:
            self._stop_writing()
        figures, said = run.result.figures, kernel.query()
        return {
            "seconds": figures.total_time,
            "downtime": figures.downtime,
            "passes": figures.passes,
            "megabytes": figures.transferred / 1e6,
            "xbzrle-cache": said.get("xbzrle-cache"),
            "rate": self._written,
        }

    # ---- a machine that writes

    def write(self, rate: float, hot: int, stride: int) -> None:
        """From now on, until the machine is stopped: `rate` bytes of pages a second are written a little in, in turn
        those of the first `hot` bytes; one byte in every `stride` bytes of each.
        """
        self._writer = Writer(self.blocks[0].rows[: hot // PAGE, ::stride], rate)

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._writer.stop()
            self._written = self._writer.kept
            self._writer = None

    # ---- loop and raw

    def bare_listen(self, uri: str) -> str:
        scheme, _, rest = uri.partition(":")
        if scheme == "unix":
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(rest)
            self._server.listen()
            return uri
        self._server = socket.create_server(("127.0.0.1", 0))
        return f"tcp:127.0.0.1:{self._server.getsockname()[1]}"

    def bare_received(self, way: str, sockets: int = 1) -> None:
        self._sockets = [self._server.accept()[0] for _ in range(sockets)]
        self._server.close()
        if way == "loop":
            self._loop_received(self._sockets[0])
        else:
            parts = self._parts(sockets)
            side_by_side(
                [partial(receive, s, p) for s, p in zip(self._sockets, parts, strict=True)]
            )
        for sock in self._sockets:
            sock.sendall(b"k")
            sock.close()

    def bare_send(self, way: str, uri: str, sockets: int = 1) -> dict[str, Any]:
        self._sockets = [connected(uri) for _ in range(sockets)]
        began = time.perf_counter()
        if way == "loop":
            self._loop_send(self._sockets[0])
        else:
            parts = self._parts(sockets)
            side_by_side([partial(send, s, p) for s, p in zip(self._sockets, parts, strict=True)])
        for sock in self._sockets:
            if sock.recv(1) != b"k":
                raise EOFError
            sock.close()
        return {"seconds": time.perf_counter() - began}

    def _parts(self, n: int) -> list[memoryview]:
        """The memory of the first block in n pieces."""
        buffer = self.blocks[0].buffer
        step = len(buffer) // n // PAGE * PAGE
        return [buffer[i * step : (i + 1) * step if i + 1 < n else None] for i in range(n)]

    def _loop_send(self, sock: socket.socket) -> None:
        """As StreamPages does it, in the order of the pages: of each batch the zero pages first, then the others."""
        block = self.blocks[0]
        words, encoder = as_words(block.rows), Encoder(PAGE)
        fast = native.records  # or None: as the engine does it
        look = most = encoder.batch * (AT_ONCE if fast else 1)
        first = 0
        while first < block.pages:
            some = np.arange(first, min(first + look, block.pages))
            first += len(some)
            zero = zero_map_at(words, some) if fast else zero_map(words[some[0] : some[-1] + 1])
            normal = some[~zero]
            look = most if len(normal) else 4 * encoder.batch
            if zero.any():
                for buffer in encoder.zeros(block.wire_idstr, some[zero]):
                    sock.sendall(buffer)
            if fast and len(normal) and encoder.continues(block.wire_idstr):
                fast.send(sock.fileno(), words, normal, PAGE)
                continue
            for i in range(0, len(normal), encoder.batch):
                for buffer in encoder.pages(block.wire_idstr, words, normal[i : i + encoder.batch]):
                    sock.sendall(buffer)
        sock.sendall(EOS_RECORD)

    def _loop_received(self, sock: socket.socket) -> None:
        block = self.blocks[0]
        target = Target(block.idstr, block.buffer, PAGE)
        decoder = Decoder(PAGE, lambda idstr: target)
        view = memoryview(mmap.mmap(-1, READ_BUFFER + ALIGNMENT))
        start = end = 0
        while True:
            taken, event = decoder.feed(view[start:end], 0)
            start += taken
            if event is Event.EOS:
                return
            rest = bytes(view[start:end])  # of one record: to the front, ending where it is aligned
            start = -len(rest) % ALIGNMENT
            end = start + len(rest)
            view[start:end] = rest
            n = sock.recv_into(view[end:])
            if not n:
                raise EOFError
            end += n


class Writer(threading.Thread):
    """Writes into rows (pages), so many bytes of pages a second, until it is told to stop."""

    TICK = 0.001

    def __init__(self, rows: np.ndarray, rate: float) -> None:
        super().__init__(daemon=True, name="writer")
        self._rows, self._rate = rows, rate
        self._halt = threading.Event()
        self.start()

    def run(self) -> None:
        began, done, at = time.monotonic(), 0, 0
        while not self._halt.wait(self.TICK):
            due = int((time.monotonic() - began) * self._rate / PAGE) - done
            done += due
            while due > 0:
                n = min(due, len(self._rows) - at)
                self._rows[at : at + n] += 1
                at, due = (at + n) % len(self._rows), due - n
        self.kept = done * PAGE / (time.monotonic() - began)

    def stop(self) -> None:
        self._halt.set()
        self.join()


def connected(uri: str) -> socket.socket:
    """With the options that our transports set."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)
        sock.connect(rest)
        return sock
    host, port = rest.rsplit(":", 1)
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(sock: socket.socket, view: memoryview) -> None:
    for i in range(0, len(view), CHUNK):
        sock.sendall(view[i : i + CHUNK])


def receive(sock: socket.socket, view: memoryview) -> None:
    got = 0
    while got < len(view):
        n = sock.recv_into(view[got : got + CHUNK])
        if not n:
            raise EOFError
        got += n


def side_by_side(works: Sequence[Callable[[], None]]) -> None:
    """All of them, the further ones in threads."""
    threads = [threading.Thread(target=work) for work in works[1:]]
    for thread in threads:
        thread.start()
    works[0]()
    for thread in threads:
        thread.join()


class Sides:
    """Source and destination of ours, warm."""

    def __init__(
        self, size: int, blocks: int = 1, *, make: Callable[[int, int], RamSide] = RamSide
    ) -> None:
        self.source = Remote(make, size, blocks)
        self.destination = Remote(make, size, blocks)

    def fill(self, content: str, *, destination: str = "zero") -> None:
        """Of the source; of the destination something else."""
        filled = self.source.start("fill", content)
        self.destination("fill", destination)
        filled()

    def ours(
        self,
        uri: str,
        *,
        both: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        patience: float = PATIENCE,
        accel: bool = True,
    ) -> dict[str, Any]:
        """A migration. both, source: settings by name. accel: with the loops in C, where they are here."""
        if not accel:
            for side in (self.source, self.destination):
                side("accel", False)
            try:
                return self.ours(uri, both=both, source=source, patience=patience)
            finally:
                for side in (self.source, self.destination):
                    side("accel", True)
        address = self.destination("listen", uri, both or {})
        received = self.destination.start("received")
        settings = {**(both or {}), **(source or {})}
        told: dict[str, Any] = self.source("send", address, settings, patience)
        try:
            received()
        except RuntimeError:
            if "seconds" in told:
                raise
        return told

    def bare(self, way: str, uri: str, sockets: int = 1) -> dict[str, Any]:
        """way: loop or raw."""
        address = self.destination("bare_listen", uri)
        received = self.destination.start("bare_received", way, sockets)
        told: dict[str, Any] = self.source("bare_send", way, address, sockets)
        received()
        return told

    def stop(self) -> None:
        self.source.stop()
        self.destination.stop()

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
