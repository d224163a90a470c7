"""The server: where it listens, whom it lets in, and that no client waits for another."""

import contextlib
import gc
import json
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from whimbrel import ChannelError, Kernel, LocalError, Machine, Plugins, UriError, hookimpl
from whimbrel_monitor import command
from whimbrel_monitor.client import MAX_UNREAD, SOME_UNREAD
from whimbrel_monitor.server import MAX_CLIENTS
from whimbrel_testing.peers import wait_until

# ---- where


def test_only_its_owner_can_connect_to_a_socket_in_the_file_system(app, tmp_path):
    one = app()
    path = one.address.removeprefix("unix:")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    one.monitor.close()
    assert not os.path.exists(path)


def test_the_socket_of_a_killed_app_is_in_nobodys_way(app, tmp_path):
    path = f"{tmp_path}/a.qmp"
    script = (
        "import os\nfrom whimbrel import Kernel, Machine\n"
        f"Kernel(Machine('a')).monitor('unix:{path}')\nos._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert os.path.exists(path)
    assert app(f"unix:{path}").client().ask("query-name") == {"name": "app"}
    with pytest.raises(ChannelError, match="another process does already"):
        Kernel(Machine("second")).monitor(f"unix:{path}")


def test_an_app_that_ends_takes_its_socket_away(tmp_path):
    script = (
        "from whimbrel import Kernel, Machine\n"
        f"k = Kernel(Machine('a')); k.monitor('unix:{tmp_path}/a.qmp')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_tcp_on_this_host(app, host):
    try:
        one = app(f"tcp:{host}:0")
    except ChannelError as error:
        if "::1" in host and not os.path.exists("/proc/net/if_inet6"):
            pytest.skip(f"no IPv6 here: {error}")
        raise
    port = int(one.address.rpartition(":")[2])
    with socket.create_connection((host.strip("[]"), port), timeout=20) as client:
        assert b"QMP" in client.recv(1000)


@pytest.mark.parametrize("address", ["tcp:0.0.0.0:0", "tcp::0", "tcp:[::]:0", "tcp:192.0.2.1:0"])
def test_other_hosts_only_when_told_so(app, address):
    with pytest.raises(UriError, match=r"other hosts.*remote=on"):
        app(address)


def test_other_hosts_when_told_so(app):
    one = app("tcp:0.0.0.0:0,remote=on")
    port = int(one.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        assert b"QMP" in client.recv(1000)


def test_what_is_no_address(app):
    with pytest.raises(LocalError):
        app("tcp:nonsense")
    with pytest.raises(LocalError):
        app("unix:")


def test_several_monitors_of_one_kernel(app, tmp_path):
    one = app()
    second = one.kernel.monitor("tcp:127.0.0.1:0")
    try:
        a = one.client()
        one.address = second.addresses[0]
        b = one.client()
        b.ask("stop")
        assert a.event("STOP") is None
        assert b.event("STOP") is None
    finally:
        second.close()
    assert a.ask("query-status")["status"] == "paused"


# ---- closing


def test_close_is_idempotent_and_disconnects(app):
    one = app()
    clients = [one.client(), one.stranger()]
    clients[1].line()
    threads = [threading.Thread(target=one.monitor.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    one.monitor.close()
    assert [c.raw_line() for c in clients] == [b"", b""]
    with pytest.raises(OSError, match=r"refused|No such file"):
        one.stranger()


def test_close_does_not_wait_for_a_command_that_hangs(app):
    go_on, begun = threading.Event(), threading.Event()

    def stop():
        begun.set()
        go_on.wait(30)

    one = app(stop=stop)
    wire = one.client()
    wire.send('{"execute":"stop"}')
    assert begun.wait(20)
    one.monitor.close()
    assert not go_on.is_set()
    assert wire.raw_line() == b""
    go_on.set()


def test_close_while_clients_come(app):
    """Each of them is either served or turned away; none is forgotten (an unclosed socket is a warning, and that an error)."""
    for _ in range(5):
        one = app()
        ended = threading.Event()

        def come(one=one, ended=ended):
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    one.stranger()

        thread = threading.Thread(target=come)
        thread.start()
        wait_until(lambda: len(one.clients) > 3, "clients")  # noqa: B023
        one.monitor.close()
        ended.set()
        thread.join(20)
        gc.collect()


# ---- one beside another


def test_a_command_that_blocks_keeps_only_its_client_waiting(app):
    go_on, begun = threading.Event(), threading.Event()

    def stop():
        begun.set()
        go_on.wait(30)

    one = app(stop=stop)
    waits, other = one.client(), one.client()
    waits.send('{"execute":"stop"}{"execute":"query-name"}')
    assert begun.wait(20)
    for _ in range(3):
        assert other.ask("query-status")["running"]
    go_on.set()
    assert waits.line() == {"return": {}}
    assert waits.line() == {"return": {"name": "app"}}


def test_a_client_that_does_not_read_is_dropped(app):
    one = app()
    deaf, other = one.client(), one.client()
    deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent = 0
    while len(one.monitor.clients) == 2:
        one.monitor.send_event("NOISE", {"text": "x" * 60_000})
        sent += 60_000
        assert other.event("NOISE")["text"]
        assert sent < 64 * MAX_UNREAD
    assert other.ask("query-name") == {"name": "app"}
    with contextlib.suppress(ConnectionError):
        while deaf.sock.recv(1 << 16):
            pass


def test_who_does_not_read_its_answers_is_not_asked_for_more(app):
    """It stops being served before it has cost much, and goes on when it reads."""
    one = app()
    wire, other = one.client(), one.client()
    question = b'{"execute":"query-qmp-schema"}'
    wire.sock.setblocking(False)
    asked = 0
    with contextlib.suppress(BlockingIOError):
        while wire.sock.send(question) == len(question):
            asked += 1
    (client,) = one.monitor.clients[:1]
    wait_until(lambda: len(client._unread) > SOME_UNREAD, "answers that nobody reads")
    for _ in range(20):
        other.ask("query-name")
        assert SOME_UNREAD < len(client._unread) < MAX_UNREAD
    wire.sock.settimeout(30)
    for _ in range(asked):
        assert "return" in wire.line()


def test_when_there_are_too_many_the_silent_ones_make_way(app):
    one = app()
    first = one.client()
    silent = [one.stranger() for _ in range(MAX_CLIENTS - 1)]
    for each in silent:
        each.raw_line()
    newest = one.client()
    assert silent[0].raw_line() == b""
    assert newest.ask("query-name") == first.ask("query-name")
    for each in silent[1:]:
        assert each.say('{"execute":"qmp_capabilities"}') == {"return": {}}
    assert one.stranger().raw_line() == b""  # all have negotiated: it is turned away
    silent[1].close()
    wait_until(lambda: len(one.monitor.clients) < MAX_CLIENTS, "place")
    assert one.client().ask("query-name") == {"name": "app"}


def test_a_web_page_cannot_command_a_port_of_this_host(app):
    one = app("tcp:127.0.0.1:0")
    page = one.stranger()
    page.line()
    body = '{"execute":"qmp_capabilities"}{"execute":"stop"}'
    page.send(f"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n{body}")
    assert "error" in page.line()
    assert page.raw_line() == b""
    assert one.machine.is_running
    assert "error" in one.client().say("@")  # who has negotiated may err


# ---- commands of other plugins


class Commands:
    def __init__(self, *names, fails=False):
        self.names, self.fails = names, fails

    @hookimpl
    def monitor_commands(self):
        if self.fails:
            raise RuntimeError("broken")
        return [command(name)(lambda ctx: self.names[0]) for name in self.names]


def with_plugins(*added):
    plugins = Plugins.load()
    for number, plugin in enumerate(added):
        plugins.register(plugin, f"p{number}")
    return plugins


def test_commands_of_plugins(app, caplog):
    plugins = with_plugins(
        Commands("x-a", "x-both", "query-name"), Commands("x-b", "x-both"), Commands(fails=True)
    )
    wire = app(plugins=plugins).client()
    assert wire.ask("x-a") == "x-a"
    assert wire.ask("x-b") == "x-b"
    assert wire.ask("query-name") == {"name": "app"}
    assert wire.reply("x-both")["error"]["class"] == "CommandNotFound"
    assert "command x-both is claimed by p0 " in caplog.text
    assert "p2" in caplog.text
    assert {"name": "x-a"} in wire.ask("query-commands")


def test_a_bug_in_a_command_is_told_and_logged(app, caplog):
    class Buggy:
        @hookimpl
        def monitor_commands(self):
            @command("x-bug")
            def bug(ctx, kind: str) -> object:
                if kind == "raise":
                    raise ZeroDivisionError("by zero")
                if kind == "exit":
                    raise SystemExit(3)
                return {"nan": float("nan"), "object": object()}[kind]

            return [bug]

    wire = app(plugins=with_plugins(Buggy())).client()
    assert wire.refused("x-bug", kind="raise") == "x-bug failed: ZeroDivisionError: by zero"
    assert wire.refused("x-bug", kind="exit") == "x-bug failed: SystemExit: 3"
    assert "x-bug failed" in wire.refused("x-bug", kind="nan")
    assert "x-bug failed" in wire.refused("x-bug", kind="object")
    assert wire.ask("query-name") == {"name": "app"}
    assert "the command x-bug failed" in caplog.text
    caplog.clear()  # as it should be


def test_annotations_that_qmp_has_no_type_for_are_found_at_once():
    with pytest.raises(TypeError, match="no type of QMP's"):

        @command("x-wrong")
        def wrong(ctx, a: bytes) -> None:
            pass


def test_whatever_is_returned_is_one_line(app):
    class Long:
        @hookimpl
        def monitor_commands(self):
            @command("x-long")
            def long(ctx) -> list[str]:
                return ["a\r\nb\u2028"] * 1000

            return [long]

    wire = app(plugins=with_plugins(Long())).client()
    wire.send('{"execute":"x-long"}')
    assert json.loads(wire.raw_line()) == {"return": ["a\r\nb\u2028"] * 1000}
