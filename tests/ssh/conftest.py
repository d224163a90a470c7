"""One sshd for all tests that do not change it, and what connects to it."""

import pytest

from whimbrel import Role, TransportContext
from whimbrel_ssh.transport import SshTransport
from whimbrel_testing.sshd import Sshd


@pytest.fixture(autouse=True)
def _no_world_of_the_user(monkeypatch, tmp_path):
    """Neither the keys nor the agent of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture(scope="session")
def host(sshd_binary, tmp_path_factory):
    """An sshd that lets in and forwards everything."""
    with Sshd(sshd_binary, tmp_path_factory.mktemp("sshd") / "host", "host") as server:
        yield server


def settings(server, policy="strict"):
    return {"ssh-config": str(server.config), "ssh-host-key": policy}


def context(server, role=Role.SOURCE, policy="strict", **kwargs):
    return TransportContext(role=role, settings=settings(server, policy), **kwargs)


@pytest.fixture
def connect(host):
    """Connect to an end (`unix:...`) on a server, the common one unless given."""

    def connect(end, server=host, name=None, **kwargs):
        transport = SshTransport()
        address = transport.parse(f"//{name or server.name}/{end}")
        return transport.connect(address, context(server, **kwargs))

    return connect
