"""An app with a monitor in this process, and a client that sees the bytes."""

import array
import contextlib
import json
import logging
import os
import socket
import threading

import pytest

from whimbrel import Kernel, Machine, Plugins
from whimbrel_ram import RAMBlock
from whimbrel_testing.peers import wait_until

MIB = 1 << 20
PATIENCE = 30.0


class Wire:
    """A connection, line by line."""

    def __init__(self, address):
        if address.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX)
            where = address.removeprefix("unix:")
        else:
            self.sock = socket.socket()
            host, _, port = address.removeprefix("tcp:").rpartition(":")
            where = (host, int(port))
        self.sock.settimeout(PATIENCE)
        try:
            self.sock.connect(where)
        except OSError:
            self.sock.close()
            raise
        self._data = b""
        self.events = []

    def raw_line(self):
        """With its end; b'' at the end of the connection."""
        while b"\n" not in self._data:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                return b""
            self._data += data
        line, end, self._data = self._data.partition(b"\n")
        return line + end

    def line(self):
        """The next message; events are put aside."""
        while True:
            raw = self.raw_line()
            if not raw:
                raise EOFError
            message = json.loads(raw)
            if "event" not in message:
                return message
            self.events.append(message)

    def event(self, name):
        """The data of the next event of that name."""
        while True:
            for number, message in enumerate(self.events):
                if message["event"] == name:
                    del self.events[: number + 1]
                    return message.get("data")
            message = json.loads(self.raw_line())
            assert "event" in message, message
            self.events.append(message)

    def send(self, text, fds=()):
        data = text if isinstance(text, bytes) else text.encode()
        if fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            self.sock.sendmsg([data], [rights])
        else:
            self.sock.sendall(data)

    def say(self, text, fds=()):
        """The answer to some text."""
        self.send(text, fds)
        return self.line()

    def negotiate(self):
        assert "QMP" in self.line()
        assert self.say('{"execute": "qmp_capabilities"}') == {"return": {}}
        return self

    def reply(self, command, /, fds=(), **arguments):
        request = {"execute": command}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        return self.say(json.dumps(request), fds)

    def ask(self, command, /, fds=(), **arguments):
        """What it returns."""
        reply = self.reply(command, fds, **arguments)
        assert "return" in reply, reply
        return reply["return"]

    def refused(self, command, /, fds=(), **arguments):
        """The text of the error, which is generic."""
        reply = self.reply(command, fds, **arguments)
        assert set(reply) == {"error"}, reply
        assert reply["error"]["class"] == "GenericError"
        return reply["error"]["desc"]

    def set_capabilities(self, **changes):
        listed = [{"capability": n.replace("_", "-"), "state": s} for n, s in changes.items()]
        self.ask("migrate-set-capabilities", capabilities=listed)

    def ends(self):
        """query-migrate, once the migration is over."""
        over = ("completed", "failed", "cancelled")
        wait_until(lambda: self.ask("query-migrate").get("status") in over, "end of the migration")
        return self.ask("query-migrate")

    def close(self):
        self.sock.close()


class App:
    """A machine with some memory in which nothing is zero, a kernel, a monitor."""

    def __init__(self, address, *, ram=MIB, plugins=None, waiting=False, **callbacks):
        self.machine = Machine("app-1.0", name="app", **callbacks)
        self.ram = self.machine.add(RAMBlock("ram", ram))
        self.kernel = Kernel(self.machine, plugins=plugins or Plugins.shared())
        if waiting:
            self.kernel.defer_incoming()
        else:
            self.ram.buffer[:] = os.urandom(4096) * (ram // 4096)
        self.monitor = self.kernel.monitor(address)
        self.address = self.monitor.addresses[0]
        self.clients = []

    def stranger(self):
        """A client that has not yet said anything."""
        self.clients.append(Wire(self.address))
        return self.clients[-1]

    def client(self):
        return self.stranger().negotiate()

    def close(self):
        with contextlib.suppress(Exception):
            self.kernel.cancel()
        self.monitor.close()
        for client in self.clients:
            client.close()


@pytest.fixture
def app(tmp_path):
    """Makes apps: see App; the address is one in tmp_path unless given."""
    apps = []

    def make(address=None, **kwargs):
        address = address or f"unix:{tmp_path}/app{len(apps)}.qmp"
        apps.append(App(address, **kwargs))
        return apps[-1]

    yield make
    for each in apps:
        each.close()


@pytest.fixture
def wire(app):
    """A client that has negotiated, of an app of its own."""
    return app().client()


@pytest.fixture(autouse=True)
def nothing_is_left(caplog):
    """No thread of a monitor outlives it, and nothing went wrong unseen."""
    before = set(threading.enumerate())
    with caplog.at_level(logging.WARNING, "whimbrel.monitor"):
        yield

    def left():
        return [
            t.name
            for t in threading.enumerate()
            if t not in before and t.name.startswith(("whimbrel-monitor", "whimbrel-accept"))
        ]

    wait_until(lambda: not left(), "end of the threads of the monitor")
    bugs = [r for r in caplog.records if r.name == "whimbrel.monitor" and r.exc_info]
    assert not bugs, bugs
