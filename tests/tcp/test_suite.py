"""tcp does what every transport has to do."""

from __future__ import annotations

import pytest

import whimbrel_tcp.plugin
from whimbrel_testing.transport_suite import Ends, Hang, TransportSuite, full_backlog


class TestTcp(TransportSuite):
    plugin = whimbrel_tcp.plugin
    scheme = "tcp"
    eof_means_peer_gone = True
    good_texts = (
        "host:4444",
        "127.0.0.1:0",
        ":4444",
        "[::1]:4444",
        "[fe80::1%eth0]:1",
        "host:http",
        "a.b-c:4444,ipv4",
        "host:4444,ipv4=off,to=4450",
        "host:1,ipv4=on,ipv6=on,direct=off",
    )
    bad_texts = (
        "",
        "host",
        "4444",
        "host:",
        "host:65536",
        "host:-1",
        "host:²",
        "host:80 ",
        "::1:4444",
        "[::1]",
        "[::1:4444",
        "[host]:4444",
        "[]:4444",
        "host:4444,",
        "host:4444,ipv4=maybe",
        "host:4444,ipv4=off,ipv6=off",
        "host:4444,ipv4,ipv4",
        "host:4444,to=4443",
        "host:4444,to=70000",
        "host:http,to=90",
        "host:4444,keep=on",
        "host:4444:5555",
    )

    @pytest.fixture
    def ends(self):
        return Ends("127.0.0.1:0")

    @pytest.fixture
    def hang(self):
        with full_backlog() as (host, port):
            yield Hang(f"{host}:{port}")
