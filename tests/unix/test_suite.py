"""unix does what every transport has to do."""

from __future__ import annotations

import contextlib
import socket

import pytest

import whimbrel_unix.plugin
from whimbrel_testing.transport_suite import Ends, Hang, TransportSuite


class TestUnix(TransportSuite):
    plugin = whimbrel_unix.plugin
    scheme = "unix"
    eof_means_peer_gone = True
    good_texts = ("/run/a.sock", "relative", "/with:colon,and=comma", "/ü", "/" + "a" * 106)
    bad_texts = ("", "a\0b", "/" + "a" * 107, "/" + "ü" * 60)

    @pytest.fixture
    def ends(self, tmp_path):
        return Ends(str(tmp_path / "m.sock"))

    @pytest.fixture
    def hang(self, tmp_path):
        path = str(tmp_path / "full.sock")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(path)
            server.listen(0)
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            while client.connect_ex(path) == 0:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
            yield Hang(path)
