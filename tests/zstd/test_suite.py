"""zstd:: in front of tcp and unix does what every transport has to do."""

import pytest

import whimbrel_tcp.plugin
import whimbrel_unix.plugin
import whimbrel_zstd.plugin
from whimbrel_testing.transport_suite import Ends, Hang, TransportSuite, full_backlog


class TestOverTcp(TransportSuite):
    plugin = whimbrel_tcp.plugin
    scheme = "tcp"
    good_texts = ("127.0.0.1:4444",)
    bad_texts = ("127.0.0.1",)
    filters = tuple(whimbrel_zstd.plugin.filters())
    eof_means_peer_gone = True

    @pytest.fixture
    def ends(self):
        return Ends("127.0.0.1:0")

    @pytest.fixture
    def hang(self):
        with full_backlog() as (host, port):
            yield Hang(f"{host}:{port}")


class TestOverUnix(TransportSuite):
    plugin = whimbrel_unix.plugin
    scheme = "unix"
    good_texts = ("/run/some.sock",)
    bad_texts = ("",)
    filters = tuple(whimbrel_zstd.plugin.filters())
    eof_means_peer_gone = True

    @pytest.fixture
    def ends(self, tmp_path):
        return Ends(str(tmp_path / "zstd.sock"))
