"""fd does what every transport has to do, over sockets and over pipes."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

import whimbrel_fd.plugin
from whimbrel_testing.transport_suite import Ends, TransportSuite


def close_all(*fds):
    """What was handed over is closed already, and what a test left unused is not."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


class FdSuite(TransportSuite):
    plugin = whimbrel_fd.plugin
    scheme = "fd"
    many_channels = False
    accept_waits = False
    good_texts = ("5", "migrate", "5,direct=on", "a-b.c", "007")
    bad_texts = ("", ",direct=on", "5,", "5,direct=maybe", "5,other=on", "a\nb", "99999999999")


class TestSockets(FdSuite):
    @pytest.fixture
    def ends(self):
        a, b = socket.socketpair()
        here, there = a.detach(), b.detach()
        yield Ends(str(here), str(there))
        close_all(here, there)


class TestPipe(FdSuite):
    has_return_path = False

    @pytest.fixture
    def ends(self):
        r, w = os.pipe()
        yield Ends(str(r), str(w))
        close_all(r, w)


class TestListeningSocket(FdSuite):
    """A listening socket on the destination, and on the source one that is connected to it."""

    many_channels = True
    accept_waits = True

    @pytest.fixture
    def ends(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            listening = server.detach()
        yield Ends(str(listening))
        close_all(listening)

    def connect(self, ends, listener, **kwargs):
        host, _, port = listener.addresses[0].removeprefix("tcp:").rpartition(":")
        connected = socket.create_connection((host, int(port))).detach()
        return super().connect(Ends(ends.listen, str(connected)), listener, **kwargs)

    def test_several_channels(self, pair):
        """The source has its one descriptor; the destination takes more."""
        address = pair.listener.addresses[0].removeprefix("tcp:").rpartition(":")
        with (
            socket.create_connection((address[0], int(address[2]))) as client,
            pair.listener.accept(self.soon()) as accepted,
        ):
            accepted.send([b"hello"])
            assert client.recv(5) == b"hello"

    def test_claims(self, pair):
        assert pair.listener.addresses[0].startswith("tcp:127.0.0.1:")
        assert pair.destination.name.startswith("fd:")
        assert not pair.destination.eof_means_peer_gone
