"""Two kernels over a socket pair, and a scripted destination for what a real one cannot be made to do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import attrs
import pytest

from whimbrel import (
    InStream,
    Kernel,
    Listener,
    LiveSaveVMHandler,
    Machine,
    Pending,
    Plugins,
    SaveVMHandler,
    Transport,
    TransportSpec,
    hookimpl,
)
from whimbrel.descriptors import DescriptorChannel
from whimbrel.wire.return_path import encode_pong, encode_shut


class PairTransport(Transport):
    """`pair:` one end of a socket pair for whoever connects, the other for whoever listens."""

    def __init__(self, *, way_back=True, eof_means_peer_gone=True):
        self.ends = socket.socketpair()
        self.way_back = way_back
        self.eof_means_peer_gone = eof_means_peer_gone
        self.hang_connect = False

    def _end(self, number):
        transport = self

        class Channel(DescriptorChannel):
            def return_path(self):
                return super().return_path() if transport.way_back else None

        return Channel(
            sock=self.ends[number], name="pair", eof_means_peer_gone=self.eof_means_peer_gone
        )

    def parse(self, rest):
        return rest

    def connect(self, address, ctx):
        if self.hang_connect:
            from whimbrel.descriptors import wait_fd

            a, b = socket.socketpair()
            with a, b:
                wait_fd(a.fileno(), 1, deadline=ctx.deadline, cancel_fd=ctx.cancel_fd)
        return self._end(0)

    def listen(self, address, ctx):
        transport = self

        class Waiting(Listener):
            addresses = ("pair:",)

            def accept(self, deadline=None):
                return transport._end(1)

            def close(self):
                pass

        return Waiting()

    def peer(self):
        """The destination's end as a plain socket."""
        return self.ends[1]

    def renew(self):
        """A new pair, for the next migration."""
        self.close()
        self.ends = socket.socketpair()

    def close(self):
        for end in self.ends:
            end.close()


class Number(SaveVMHandler):
    """A device that is one number."""

    def __init__(self, idstr, value=0, instance_id=0):
        self.idstr = idstr
        self.instance_id = instance_id
        self.value = value
        self.outcomes = []

    def save(self, out):
        out.u64(self.value)

    def load(self, inp, header):
        self.value = inp.u64()

    def cleanup(self, outcome):
        self.outcomes.append(outcome)

    def load_cleanup(self, outcome):
        self.outcomes.append(outcome)


class Live(LiveSaveVMHandler):
    """A live section of `total` bytes that the machine dirties again as scripted: bytes found at each exact look."""

    idstr = "live"

    def __init__(self, total=1 << 20, dirtied=(), rate=None):
        self.left = total
        self.dirtied = list(dirtied)
        self.rate = rate
        self.looks = 0
        self.received = 0
        self.outcomes = []

    def setup(self, out, params):
        out.u32(0)

    def pending(self, exact):
        if exact:
            self.looks += 1
            if self.dirtied:
                self.left += self.dirtied.pop(0)
        return Pending(self.left, 0, self.rate)

    def _send(self, out, most):
        n = min(self.left, most)
        out.u32(n)
        out.write(bytes(n))
        self.left -= n

    def iterate(self, out, budget):
        self._send(out, 65536 if budget.bytes is None else min(65536, budget.bytes))
        return not self.left

    def complete(self, out, mode):
        self.pending(exact=True)
        self._send(out, self.left)

    def load(self, inp, header):
        n = inp.u32()
        self.received += n
        inp.read(n)

    def cleanup(self, outcome):
        self.outcomes.append(outcome)


class Side:
    """One machine with its kernel; remembers which callbacks were called."""

    def __init__(self, plugins, handlers=(), *, profile="today", **callbacks):
        self.calls = []
        told = {
            name: self._recorder(name, callbacks.pop(name, None))
            for name in ("stop", "start", "wakeup", "activate", "invalidate", "announce")
        }
        self.machine = Machine("test-1.0", **told, **callbacks)
        for handler in handlers:
            self.machine.register(handler)
        self.kernel = Kernel(self.machine, plugins=plugins, profile=profile)

    def _recorder(self, name, also):
        def call():
            self.calls.append(name)
            if also is not None:
                also()

        return call


@attrs.define
class World:
    """What the tests of the kernel play with."""

    transport: PairTransport
    plugins: Plugins

    def side(self, *handlers, **options):
        return Side(self.plugins, handlers, **options)


@pytest.fixture
def world():
    transport = PairTransport()

    class Plugin:
        whimbrel_api = (1, 0)

        @hookimpl
        def transports(self):
            return [
                TransportSpec(schemes=("pair",), factory=lambda: transport, syntax="pair:"),
            ]

    plugins = Plugins.load(entry_points=[])
    plugins.register(Plugin(), "pair")
    yield World(transport, plugins)
    transport.close()


class ScriptedDestination(threading.Thread):
    """Reads a stream of Number devices and answers as scripted; for faults that no real destination shows at will."""

    def __init__(self, sock, *, pong=True, on_ping=None, on_eof=None):
        super().__init__(daemon=True)
        self.sock = sock
        self.pong = pong
        self.on_ping = on_ping
        self.on_eof = on_eof
        self.got = bytearray()
        self.got_commit = threading.Event()
        self.got_eof = threading.Event()
        self.start()

    def run(self):
        """Answers PING 1 at once; the commit PING as told. What follows it is the EOF byte and the vmdescription."""
        with contextlib.suppress(OSError):
            while True:
                data = self.sock.recv(65536)
                if not data:
                    return
                self.got += data
                self._look()

    def _look(self):
        opening = bytes.fromhex("08 0002 0004 00000001".replace(" ", ""))
        if opening in self.got and self.pong:
            self.pong = False
            self.sock.sendall(encode_pong(1))
        at = self.got.find(bytes.fromhex("080002000480"))
        if at >= 0 and not self.got_commit.is_set():
            value = struct.unpack(">I", self.got[at + 5 : at + 9])[0]
            self.got_commit.set()
            if self.on_ping is not None:
                self.on_ping(self.sock, value)
        if at >= 0 and len(self.got) > at + 9 and not self.got_eof.is_set():
            assert self.got[at + 9] == 0
            self.got_eof.set()
            if self.on_eof is not None:
                self.on_eof(self.sock)


def answer_pong(sock, value):
    sock.sendall(encode_pong(value))


def answer_shut(status):
    return lambda sock: sock.sendall(encode_shut(status))


def hang_up(sock, *_):
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def stream_of(data):
    from whimbrel.channel import MemoryChannel

    return InStream(MemoryChannel(data))
