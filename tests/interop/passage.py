"""The ways between a QEMU and a migctl, over each transport."""

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from whimbrel_testing.peers import Qemu, QemuFactory

Migctl = Any
TRANSPORTS = ("tcp", "unix", "exec", "fd")


@attrs.frozen
class Target:
    """A QEMU that waits for a migration, and how to reach it."""

    qemu: Qemu
    uri: str
    #: What the process that connects must inherit.
    sockets: Sequence[socket.socket] = ()


class Passage:
    """The steps of a passage over one transport: out of a QEMU into a migctl, out of a migctl into a QEMU."""

    def __init__(
        self, transport: str, folder: Path, qemu: QemuFactory, migctl: Callable[..., Migctl]
    ) -> None:
        self.transport, self.folder = transport, folder
        self.qemu = qemu
        self.file = folder / "guest.mig"
        self._migctl = migctl
        self._open = contextlib.ExitStack()

    @property
    def two_way(self) -> bool:
        """Can a destination answer?"""
        return self.transport != "exec"  # a pipe has no way back

    def receive(self, source: Qemu) -> dict[str, Any]:
        """From the running source into the file."""
        received: dict[str, Any] = self.leave(source, "receive", self.file).succeeded("received")
        return received

    def send(self, *args: str, return_path: bool = False, **peer: str) -> tuple[Qemu, Any]:
        """From the file into a QEMU with these arguments, and that capability."""
        target = self.target(*args, return_path=return_path, **peer)
        sent = self.run("send", self.file, target.uri, inherited=target.sockets)
        return target.qemu, sent.succeeded("sent")

    def run(self, *args: object, inherited: Sequence[socket.socket] = ()) -> Migctl:
        """A migctl; the sockets go over to it."""
        process = self._migctl(*args, pass_fds=[s.fileno() for s in inherited])
        for s in inherited:
            s.close()
        return process

    def leave(
        self, source: Qemu, command: str, *args: object, inherited: Sequence[socket.socket] = ()
    ) -> Migctl:
        """Start `migctl COMMAND URI ARGS` that listens, and let the source migrate to it."""
        if self.transport == "exec":
            pipe = self._fifo("out")
            process = self.run(command, f"exec:cat {pipe}", *args, inherited=inherited)
            process.event("listening")
            uri = f"exec:cat > {pipe}"
        elif self.transport == "fd":
            ours, theirs = self._pair()
            process = self.run(command, f"fd:{ours.fileno()}", *args, inherited=[ours, *inherited])
            process.event("listening")
            source.send_fd("way-out", theirs.fileno())
            theirs.close()
            uri = "fd:way-out"
        else:
            at = "tcp:127.0.0.1:0" if self.transport == "tcp" else f"unix:{self.folder}/out"
            process = self.run(command, at, *args, inherited=inherited)
            uri = process.address()
        source.migrate(uri, max_bandwidth=0)
        return process

    def target(self, *args: str, return_path: bool = False, **peer: str) -> Target:
        """A QEMU that waits; peer: its version and arch."""

        def start(incoming: str, *fds: int) -> Qemu:
            capabilities = {"return_path": return_path}
            return self.qemu(
                *args, incoming=incoming, capabilities=capabilities, pass_fds=fds, **peer
            )

        if self.transport == "exec":
            pipe = self._fifo("in")
            return Target(start(f"exec:cat {pipe}"), f"exec:cat > {pipe}")
        if self.transport == "fd":
            ours, theirs = self._pair()
            with theirs:
                qemu = start(f"fd:{theirs.fileno()}", theirs.fileno())
            return Target(qemu, f"fd:{ours.fileno()}", [ours])
        if self.transport == "tcp":
            qemu = start("tcp:127.0.0.1:0")
            address = qemu.qmp("query-migrate")["socket-address"][0]
            return Target(qemu, f"tcp:{address['host']}:{address['port']}")
        uri = f"unix:{self.folder}/in"
        return Target(start(uri), uri)

    def _fifo(self, name: str) -> Path:
        path = self.folder / f"{name}.fifo"
        os.mkfifo(path)
        return path

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        return self._open.enter_context(ours), self._open.enter_context(theirs)

    def close(self) -> None:
        self._open.close()
