"""ssh does what every transport has to do, through a real sshd: to a port, a socket and a command of the far host."""

from __future__ import annotations

import os

import pytest

import whimbrel_ssh.plugin
from whimbrel import Role, TransportContext
from whimbrel_testing.transport_suite import Ends, Hang, TransportSuite, full_backlog
from whimbrel_unix.transport import UnixTransport


class SshSuite(TransportSuite):
    plugin = whimbrel_ssh.plugin
    scheme = "ssh"
    good_texts = (
        "//host/unix:/run/a b.sock",
        "//host/tcp:localhost:4444",
        "//me@host:2222/tcp::0",
        "//host/tcp:[::1]:1",
        "//[fe80::1%eth0]:22/exec:cat > 'x y' && echo a::b/c@d:e%20",
        "//a%40b@host/exec:cat",
        "//host/exec,answers=off:cat > /srv/x",
    )
    bad_texts = (
        "",
        "host",
        "host/unix:/x",
        "//",
        "//host",
        "//host/",
        "///unix:/x",
        "//host:/unix:/x",
        "//host:0/unix:/x",
        "//host:65536/unix:/x",
        "//::1/unix:/x",
        "//[host]/unix:/x",
        "//-oProxyCommand=x/unix:/x",
        "//a b/unix:/x",
        "//$(id)/unix:/x",
        "//-l@host/unix:/x",
        "//a'b@host/unix:/x",
        "//a%0ab@host/unix:/x",
        "//@host/unix:/x",
        "//me:secret@host/unix:/x",
        "//host/unix:",
        "//host/unix:relative",
        "//host/unix:/" + "x" * 108,
        "//host/unix:/a\0b",
        "//host/tcp:4444",
        "//host/tcp:host:",
        "//host/tcp:host:65536",
        "//host/exec:  ",
        "//host/exec,answers=maybe:cat",
        "//host/ssh://other/unix:/x",
        "//host/zstd::unix:/x",
        "//host/file:/x",
    )

    @pytest.fixture(autouse=True)
    def _host(self, host):
        self.host = host

    def context(self, role, **kwargs):
        settings = {"ssh-config": str(self.host.config), "ssh-host-key": "strict"}
        return TransportContext(role=role, settings=settings, **kwargs)


class TestPort(SshSuite):
    """The far host listens for the destination, and the source connects to that port through it."""

    @pytest.fixture
    def ends(self):
        return Ends(f"//{self.host.name}/tcp:localhost:0")

    @pytest.fixture
    def hang(self):
        with full_backlog() as (host, port):
            yield Hang(f"//{host}:{port}/unix:/x")


class TestUnix(SshSuite):
    """The destination listens on a UNIX socket of the far host, as one without whimbrel would."""

    @pytest.fixture
    def ends(self, tmp_path):
        path = tmp_path / "dst.sock"
        return Ends(str(path), f"//{self.host.name}/unix:{path}")

    @pytest.fixture
    def hang(self):
        """The host answers, but what is behind it does not."""
        with full_backlog() as (host, port):
            yield Hang(f"//{self.host.name}/tcp:{host}:{port}")

    def listen(self, ends, **kwargs):
        transport = UnixTransport()
        return transport.listen(
            transport.parse(ends.listen), self.context(Role.DESTINATION, **kwargs)
        )

    def test_claims(self, pair):
        assert pair.source.name == f"ssh://{self.host.name}/unix:{pair.ends.listen}"
        assert not pair.source.eof_means_peer_gone


class TestCommand(SshSuite):
    """Commands on both sides, which pass on what comes through two FIFOs."""

    many_channels = False
    accept_waits = False

    @pytest.fixture
    def ends(self, tmp_path):
        there, back = tmp_path / "there", tmp_path / "back"
        os.mkfifo(there)
        os.mkfifo(back)
        # The status is that of the job in front: the one that takes the stream. In the background standard input is
        # /dev/null, hence the number.
        place = f"//{self.host.name}/exec:exec 3<&0;"
        yield Ends(
            f"{place} cat <&3 > {back} 2>&- & cat < {there}; exec >&- 2>&-; wait",
            f"{place} cat < {back} & cat <&3 > {there}",
        )
        # A command that still waits for the other side of a FIFO gets one, and then the end.
        for fifo in (there, back):
            os.close(os.open(fifo, os.O_RDWR))
