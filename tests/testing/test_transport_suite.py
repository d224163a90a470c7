"""The compliance suite finds what is wrong: transports broken in one way each fail the test that is about it.

That a sound transport passes the same tests is what tests/tcp shows.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

#: Test of the suite, and a flaw that it must find, as members of the class of a channel over a socket.
CHANNELS = {
    "test_bytes_arrive_in_order": """
        def send(self, buffers):
            super().send(buffers[::-1])
        """,
    "test_empty_buffers_are_nothing": """
        def send(self, buffers):
            super().send([b or b"?" for b in buffers])
        """,
    "test_many_small_buffers_in_one_send": """
        def send(self, buffers):
            super().send(buffers[:1024])
        """,
    "test_large_buffers": """
        def send(self, buffers):
            super().send([b[: 1 << 20] for b in buffers])
        """,
    "test_a_buffer_of_larger_items_is_sent_whole": """
        def send(self, buffers):
            super().send([memoryview(b).cast("B")[: len(b)] for b in buffers])
        """,
    "test_receive_gives_what_is_there": """
        def recv_into(self, view):
            n = 0
            while n < len(view):
                n += super().recv_into(view[n:])
            return n
        """,
    "test_the_end_is_zero_and_stays": """
        def recv_into(self, view):
            n = super().recv_into(view)
            if not n:
                raise ChannelError("the end")
            return n
        """,
    "test_peek_consumes_nothing": """
        def peek(self, n, deadline=None):
            super().peek(n, deadline)
            data = bytearray(n)
            return bytes(data[: self.recv_into(memoryview(data))])
        """,
    "test_peek_obeys_its_deadline": """
        def peek(self, n, deadline=None):
            return super().peek(n, None)
        """,
    "test_return_path": """
        def return_path(self):
            return None
        """,
    "test_finish_closes_one_direction": """
        def finish(self, deadline=None):
            pass
        """,
    "test_abort_ends_send": """
        def abort(self):
            pass
        """,
    "test_abort_ends_receive": """
        def recv_into(self, view):
            try:
                return super().recv_into(view)
            except ChannelError:
                return 0
        """,
    "test_abort_ends_peek": """
        def peek(self, n, deadline=None):
            try:
                return super().peek(n, deadline)
            except ChannelError:
                return b""
        """,
    "test_after_an_abort_even_what_had_arrived_is_refused": """
        def peek(self, n, deadline=None):
            self.kept = super().peek(n, deadline) if not hasattr(self, "kept") else self.kept
            return self.kept
        """,
    "test_close_is_idempotent_and_final": """
        def raw_fd(self, direction):
            return 0
        """,
    "test_claims": """
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.eof_means_peer_gone = True
        """,
    "test_the_raw_descriptor_writes_what_send_would": """
        def raw_fd(self, direction):
            self.other = self.other if hasattr(self, "other") else open(os.devnull, "r+b")
            return self.other.fileno()
        """,
    "test_several_channels": """
        def open_extra(self, purpose, index):
            raise ChannelError("not today")
        """,
    "test_flush": """
        def flush(self):
            raise ChannelError("not today")
        """,
}
#: The same for what is left behind: the test passes, and is failed when it is taken down.
LEFTOVERS = {
    "a descriptor": """
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.kept = os.eventfd(0)
        """,
    "a thread": """
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        """,
    "a child": """
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            STARTED.append(subprocess.Popen(["sleep", "60"]))
        """,
}
TRANSPORTS = {
    "test_what_cannot_be_parsed_is_said": """
        def parse(self, rest):
            try:
                return super().parse(rest)
            except UriError as error:
                raise UriError(str(error)) from None
        """,
    "test_parsing_is_pure": """
        def parse(self, rest):
            super().parse(rest)
            return object()
        """,
    "test_accept_can_be_cancelled": """
        def listen(self, address, ctx):
            return super().listen(address, attrs.evolve(ctx, cancel_fd=None))
        """,
    "test_connect_can_be_cancelled": """
        def connect(self, address, ctx):
            return super().connect(address, attrs.evolve(ctx, cancel_fd=None))
        """,
    "test_connect_obeys_its_deadline": """
        def connect(self, address, ctx):
            return super().connect(address, attrs.evolve(ctx, deadline=None))
        """,
    "test_accept_obeys_its_deadline": """
        def listen(self, address, ctx):
            listener = super().listen(address, ctx)
            accept = listener.accept
            listener.accept = lambda deadline=None: accept(None)
            return listener
        """,
}
MODULE = """
import atexit, os, subprocess, threading, types
import attrs, pytest
from whimbrel import Channel, ChannelError, TransportSpec, UriError
from whimbrel.descriptors import DescriptorChannel
from whimbrel_tcp.transport import TcpTransport
from whimbrel_testing.transport_suite import Ends, Hang, TransportSuite, full_backlog

STARTED = []
atexit.register(lambda: [process.kill() for process in STARTED])

class Base(TransportSuite):
    scheme = "tcp"
    good_texts = ("host:1",)
    bad_texts = ("host",)
    patience = 0.3
    transport_class = TcpTransport

    @property
    def plugin(self):
        spec = TransportSpec(schemes=("tcp",), factory=self.transport_class, syntax="tcp:")
        return types.SimpleNamespace(whimbrel_api=(1, 0), transports=lambda: [spec])

    @pytest.fixture
    def ends(self):
        return Ends("127.0.0.1:0")

    @pytest.fixture
    def hang(self):
        with full_backlog() as (host, port):
            yield Hang(f"{host}:{port}")

def using(channel_class):
    class T(TcpTransport):
        def _channel(self, address, sock, place=None, cancel_fd=None):
            return channel_class(
                sock=sock, name="tcp:x",
                open_extra=place and (lambda: self._extra(address, place, cancel_fd)),
            )
    return T
"""


def broken(name: str, base: str, members: str, use: str) -> str:
    body = textwrap.indent(textwrap.dedent(members), "    ")
    return f"\nclass {name}({base}):{body}\nclass Test{name}(Base):\n    transport_class = {use}\n"


@pytest.mark.slow
def test_every_flaw_is_found(tmp_path):
    module, nodes, expected = MODULE, [], set()
    flaws = [
        *((test, "DescriptorChannel", code, "using({})") for test, code in CHANNELS.items()),
        *((test, "TcpTransport", code, "{}") for test, code in TRANSPORTS.items()),
        *(
            ("test_bytes_arrive_in_order", "DescriptorChannel", code, "using({})")
            for code in LEFTOVERS.values()
        ),
    ]
    for i, (test, base, code, use) in enumerate(flaws):
        module += broken(f"Flaw{i}", base, code, use.format(f"Flaw{i}"))
        nodes.append(f"test_it.py::TestFlaw{i}::{test}")
        expected.add((f"TestFlaw{i}", test))
    (tmp_path / "test_it.py").write_text(module)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rfE",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            *nodes,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    found = set(re.findall(r"^(?:FAILED|ERROR) test_it.py::(\w+)::(\w+)", run.stdout, re.MULTILINE))
    assert found == expected, run.stdout[-5000:] + run.stderr
