"""Published clients, used as they are: the qemu.qmp package and its qmp-shell."""

import asyncio
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from whimbrel_testing.peers import missing_peer, wait_until

MIB = 1 << 20


def where(app):
    """As qemu.qmp wants it."""
    if app.address.startswith("unix:"):
        return app.address.removeprefix("unix:")
    host, _, port = app.address.removeprefix("tcp:").rpartition(":")
    return host, int(port)


@pytest.mark.parametrize("address", [None, "tcp:127.0.0.1:0"])
def test_a_session_of_qemu_qmp(app, address):
    source, destination = app(address, ram=2 * MIB), app(ram=2 * MIB, waiting=True)
    uri = f"unix:{destination.address.removeprefix('unix:')}.m"

    async def session():
        here, there = QMPClient("source"), QMPClient("destination")
        await here.connect(where(source))
        await there.connect(where(destination))
        assert here.greeting.QMP.version["qemu"]["major"] == 10
        told = []
        with here.listener() as events:
            assert (await here.execute("query-status"))["running"]
            with pytest.raises(ExecuteError, match="has not been found") as refused:
                await here.execute("no-such-command")
            assert refused.value.error_class == "CommandNotFound"
            with pytest.raises(ExecuteError, match="Parameter 'value' is missing"):
                await here.execute("migrate_set_speed")
            on = {"capabilities": [{"capability": "events", "state": True}]}
            await here.execute("migrate-set-capabilities", on)
            await there.execute("migrate-incoming", {"uri": uri})
            # Many requests under way at once, each with its id.
            many = [here.execute("query-migrate-parameters") for _ in range(20)]
            assert len({str(answer) for answer in await asyncio.gather(*many)}) == 1
            await here.execute("migrate", {"uri": uri})
            await follow(events, told)
        await here.disconnect()
        await there.disconnect()
        return told

    async def follow(events: EventListener, told):
        async for event in events:
            data = event.get("data", {})
            told.append(data.get("status", event["event"]))
            if told[-1] == "completed":
                return

    told = asyncio.run(asyncio.wait_for(session(), 60))
    seen = [t for t in told if t != "MIGRATION_PASS"]
    assert seen == ["setup", "active", "STOP", "device", "completed"]
    assert told.count("MIGRATION_PASS") >= 2
    assert destination.machine.is_running


def test_a_descriptor_by_qemu_qmp(app):
    one = app()

    async def session():
        client = QMPClient("fd")
        await client.connect(where(one))
        a, b = socket.socketpair()
        with a, b:
            client.send_fd_scm(a.fileno())
            await client.execute("getfd", {"fdname": "x"})
        await client.execute("closefd", {"fdname": "x"})
        await client.disconnect()

    asyncio.run(asyncio.wait_for(session(), 60))


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command):
        self.fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb", "HOME": "/nonexistent"},
            start_new_session=True,
        )
        os.close(theirs)
        self.text, self._seen = "", 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while data := os.read(self.fd, 4096):
                self.text += data.decode()
        except OSError:
            pass  # its end, on Linux

    def type(self, line):
        os.write(self.fd, line.encode() + b"\n")

    def shows(self, pattern):
        """Wait for it, and forget all up to it."""
        expected = re.compile(pattern, re.DOTALL)
        self._seen = wait_until(lambda: expected.search(self.text, self._seen), pattern).end()

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def qmp_shell():
    path = Path(sysconfig.get_path("scripts"), "qmp-shell")
    if not path.exists() and shutil.which("qmp-shell") is None:
        missing_peer("qmp-shell is not installed: pip install qemu.qmp")
    opened = []

    def start(app):
        target = where(app)
        target = target if isinstance(target, str) else f"{target[0]}:{target[1]}"
        opened.append(Terminal(sys.executable, str(path), target))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.mark.parametrize("address", [None, "tcp:127.0.0.1:0"])
def test_a_session_of_qmp_shell(app, qmp_shell, tmp_path, address):
    one = app(address)
    shell = qmp_shell(one)
    shell.shows(r"Connected to QEMU 10\.0\.0")
    shell.shows(r"\(QEMU\)")
    shell.type("query-status")
    shell.shows(r'\{"return": \{"status": "running", "running": true\}\}')
    shell.type("query-n\t")  # it completes what query-commands has told
    shell.shows(r'\{"return": \{"name": "app"\}\}')
    shell.type("migrate-set-parameters max-bandwidth=1048576 downtime-limit=50")
    shell.shows(r'\{"return": \{\}\}')
    assert one.kernel.settings["downtime-limit"] == 50
    shell.type('migrate-set-capabilities capabilities=[{"capability":"events","state":true}]')
    shell.shows(r'\{"return": \{\}\}')
    shell.type("stop")
    shell.shows(r'\{"return": \{\}\}')
    shell.type(f"migrate uri=unix:{tmp_path}/nobody")
    shell.shows(r'\{"return": \{\}\}')
    wait_until(lambda: one.kernel.state.has_failed, "failure")
    shell.type("query-status")  # it reads what has come only while it waits for an answer
    shell.shows('"paused"')
    shell.type("")
    shell.shows(r"STOP.*MIGRATION.*setup.*MIGRATION.*failed")
    shell.type("migrate-set-parameters max-bandwidth=abc")
    shell.shows(r"Parameter 'max-bandwidth' expects uint64")
    shell.type("no-such")
    shell.shows("CommandNotFound")
    shell.shows(r"\(QEMU\) ")  # the terminal is the shell's again
    os.write(shell.fd, b"\x04")
    assert shell.process.wait(30) == 0
