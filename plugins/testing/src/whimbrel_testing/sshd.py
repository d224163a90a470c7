"""A real sshd of OpenSSH as a peer: an ordinary process on a port of its own, with its own keys, known_hosts and ~/.ssh/config.

def test_it(sshd):
    server = sshd()
    kernel.settings["ssh-config"] = str(server.config)
    kernel.migrate(f"ssh://{server.name}/unix:{socket}")
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from whimbrel_testing.peers import PATIENCE, missing_peer, wait_until

_PRIVILEGE_SEPARATION = Path("/run/sshd")  # the package makes it when its service starts

_SERVER = """\
ListenAddress {address}
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PidFile none
SetEnv HOME={folder}
LogLevel VERBOSE
"""
_CLIENT = """\
Host {name}
  HostName {address}
  Port {port}
  HostKeyAlias {name}
  IdentityFile {folder}/user_key
  IdentityAgent none
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
"""


class Sshd:
    """One server, and a user whom it lets in: `config` is for ssh -F, and knows it under `name`."""

    def __init__(
        self,
        binary: str,
        folder: Path,
        name: str,
        options: str = "",
        *,
        address: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        """options: lines in front of its sshd_config. within: a command that runs it, as `ip netns exec NAME`."""
        self.folder, self.name = folder, name
        self._command = [*within, binary]
        self.config = folder / "config"
        self.known_hosts = folder / "known_hosts"
        self.log = folder / "log"
        folder.mkdir(parents=True)
        for key in ("host_key", "user_key"):
            make_key(folder / key)
        (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
        self.port = _free_port()
        (folder / "sshd_config").write_text(
            options + _SERVER.format(address=address, port=self.port, folder=folder)
        )
        self.config.write_text(
            _CLIENT.format(name=name, address=address, port=self.port, folder=folder)
        )
        self.know(folder / "host_key.pub")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def know(self, public_key: Path) -> None:
        """Let known_hosts name this key, and no other."""
        self.known_hosts.write_text(f"{self.name} {public_key.read_text()}")

    def start(self) -> None:
        """Again, after kill()."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._command, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._listens, f"sshd at port {self.port}: {self.said}")

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"sshd does not start: {self.said}")
        return "Server listening" in self.said

    @property
    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def sessions(self) -> list[int]:
        """Processes that serve connections, and those below them."""
        assert self.process is not None
        found: list[int] = []
        waiting = [self.process.pid]
        while waiting:
            with contextlib.suppress(OSError):
                pid = waiting.pop()
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                found += map(int, children)
                waiting += map(int, children)
        return found

    def signal_sessions(self, number: signal.Signals) -> None:
        """To all that sessions() lists: SIGKILL cuts every connection, SIGSTOP freezes it."""
        for pid in self.sessions():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL to the server and to all its sessions. Idempotent."""
        if self.process is not None:
            self.signal_sessions(signal.SIGKILL)
            self.process.kill()
            self.process.wait(PATIENCE)

    def __enter__(self) -> Sshd:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def make_key(path: Path, passphrase: str = "") -> None:
    """An Ed25519 key, and beside it PATH.pub."""
    path.unlink(missing_ok=True)
    command = [
        "ssh-keygen",
        "-q",
        "-t",
        "ed25519",
        "-N",
        passphrase,
        "-C",
        path.name,
        "-f",
        str(path),
    ]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class SshdFactory(Protocol):
    """The `sshd` fixture."""

    def __call__(self, options: str = "") -> Sshd:
        """Start one; it is killed at the end of the test. options: lines in front of its sshd_config."""


@pytest.fixture(scope="session")
def sshd_binary() -> str:
    """Path of sshd, or a skip."""
    found = shutil.which(
        "sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
    )
    if found is None or shutil.which("ssh-keygen") is None:
        missing_peer("no sshd; Debian: apt-get install openssh-server (its service need not run)")
    if os.geteuid() == 0:
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    return found


@pytest.fixture
def sshd(sshd_binary: str, tmp_path: Path) -> Iterator[SshdFactory]:
    """Starts sshds; see Sshd. Their names are host1, host2, ..."""
    numbers = itertools.count(1)
    with contextlib.ExitStack() as running:

        def start(options: str = "") -> Sshd:
            name = f"host{next(numbers)}"
            server = Sshd(sshd_binary, tmp_path / name, name, options)
            running.callback(server.kill)
            return server

        yield start


@pytest.fixture
def ssh_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A running ssh-agent, empty: the path of its socket, which is SSH_AUTH_SOCK as well."""
    if shutil.which("ssh-agent") is None:
        missing_peer("no ssh-agent; Debian: apt-get install openssh-client")
    path = tmp_path / "agent.sock"
    agent = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        wait_until(path.exists, "socket of ssh-agent")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        yield path
    finally:
        agent.kill()
        agent.wait(PATIENCE)
