"""Over a network that is far, slow, and then gone: sshd in a network namespace behind a shaped link."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from whimbrel_testing.harness import Pair
from whimbrel_testing.qemu_guest import check_count, counting_guest, last_number, wait_counting
from whimbrel_testing.sshd import Sshd
from whimbrel_testing.stress import StressConfig

MIB = 1 << 20
CONFIG = StressConfig(ram=16 * MIB, rate=1e6)
SPACE = f"whimbrel{os.getpid() % 100000}"
HERE, THERE = f"wh{os.getpid() % 100000}a", f"wh{os.getpid() % 100000}b"
#: 198.18.0.0/15 is there for tests of networks.
NEAR, FAR = "198.18.44.1", "198.18.44.2"


def ip(*args):
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


def shape(*words):
    """On both ends of the link."""
    for within, device in (((), HERE), (("ip", "netns", "exec", SPACE), THERE)):
        command = [*within, "tc", "qdisc", "replace", "dev", device, "root", *words]
        subprocess.run(command, check=True, capture_output=True)


#: Of each direction, seconds.
DELAY = 0.01


class Delay:
    """A relay that passes all on, both ways, DELAY later: where the kernel has no netem."""

    def __init__(self, target):
        self.target = target
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.sockets = [self.server]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(self.target)
                self.sockets += [near, far]
                for into, out in ((near, far), (far, near)):
                    waiting = queue.Queue(maxsize=256)  # of what is on its way: 16 MiB at most
                    for part in (self._read, self._write):
                        ends = (into if part == self._read else out, waiting)
                        threading.Thread(target=part, args=ends, daemon=True).start()

    @staticmethod
    def _read(sock, waiting):
        data = b"-"
        while data:
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            waiting.put((time.monotonic() + DELAY, data))

    @staticmethod
    def _write(sock, waiting):
        with contextlib.suppress(OSError):
            while True:
                due, data = waiting.get()
                time.sleep(max(0, due - time.monotonic()))
                if not data:
                    sock.shutdown(socket.SHUT_WR)
                    return
                sock.sendall(data)

    def close(self):
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture(scope="module")
def far(sshd_binary, tmp_path_factory):
    """An sshd in a namespace of its own, 20 ms away and back, at 200 Mbit/s."""
    try:
        ip("netns", "add", SPACE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root, iproute2 and a kernel that lets: {error}")
    try:
        ip("link", "add", HERE, "type", "veth", "peer", "name", THERE, "netns", SPACE)
        ip("addr", "add", f"{NEAR}/30", "dev", HERE)
        ip("link", "set", HERE, "up")
        ip("-n", SPACE, "addr", "add", f"{FAR}/30", "dev", THERE)
        ip("-n", SPACE, "link", "set", THERE, "up")
        ip("-n", SPACE, "link", "set", "lo", "up")
        netem = True
        try:
            shape("netem", "delay", "10ms", "rate", "200mbit", "limit", "10000")
        except subprocess.CalledProcessError:
            netem = False
            shape("tbf", "rate", "200mbit", "burst", "256k", "latency", "50ms")
        folder = tmp_path_factory.mktemp("far") / "h"
        within = ("ip", "netns", "exec", SPACE)
        with Sshd(sshd_binary, folder, "far", address=FAR, within=within) as server:
            known = server.config.read_text()
            with contextlib.ExitStack() as stack:
                if not netem:
                    delay = stack.enter_context(contextlib.closing(Delay((FAR, server.port))))
                    known = known.replace(f"HostName {FAR}", "HostName 127.0.0.1")
                    known = known.replace(f"Port {server.port}", f"Port {delay.port}")
                server.config.write_text("ServerAliveInterval 1\nServerAliveCountMax 2\n" + known)
                yield server
    finally:
        subprocess.run(["ip", "link", "del", HERE], check=False, capture_output=True)
        ip("netns", "del", SPACE)


@pytest.fixture
def pair(far):
    settings = {"downtime-limit": 500, "ssh-config": str(far.config)}
    with Pair(CONFIG, settings=settings) as pair:
        pair.source.call("boot")
        yield pair


def begin(pair, far):
    path = f"{pair.directory}/dst.sock"
    pair.destination.call("incoming", uri=f"unix:{path}")
    pair.source.call("migrate", uri=f"ssh://{far.name}/unix:{path}")


def test_a_machine_moves_over_a_slow_link(pair, far):
    begin(pair, far)
    result = pair.source.call("wait", timeout=40)
    assert (result["outcome"], result["acknowledged"]) == ("completed", True), result
    assert pair.destination.call("wait", timeout=20)["outcome"] == "completed"
    pair.destination.call("ticked")
    assert pair.destination.call("verify")["holds"]
    assert pair.running() == ["destination"]
    assert pair.violations() == []


def test_a_link_that_goes_down_leaves_the_machine_here(pair, far):
    pair.source.call("set", **{"max-bandwidth": 200_000})
    begin(pair, far)
    pair.source.wait_status("active")
    ip("link", "set", HERE, "down")
    try:
        result = pair.source.call("wait", timeout=40)
        assert result["outcome"] == "failed", result
        assert "link lost" in result["error"]["message"]
        assert pair.running() == ["source"]
        assert pair.source.call("verify")["holds"]
    finally:
        ip("link", "set", HERE, "up")


def test_the_link_is_as_far_as_it_says(far):
    """What stands between is really there: no answer comes sooner than both ways take."""
    began = time.monotonic()
    subprocess.run(["ssh", "-F", far.config, far.name, "true"], check=True, timeout=30)
    assert time.monotonic() - began > 5 * 2 * DELAY  # a session takes many more turns than that


def test_a_real_guest_counts_on_behind_it(far, qemu, tmp_path, monkeypatch):
    folder = tmp_path / ".ssh"
    folder.mkdir()
    (folder / "config").write_text(far.config.read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    guest = counting_guest(tmp_path)
    before, after, there = (tmp_path / n for n in ("before.log", "after.log", "dst.sock"))
    source = qemu(*guest.args(before), capabilities={"return_path": True})
    target = qemu(*guest.args(after), incoming=f"unix:{there}", capabilities={"return_path": True})
    wait_counting(before)
    migctl = shutil.which("migctl", path=str(Path(sys.executable).parent))
    relay = subprocess.Popen(
        [migctl, "relay", f"unix:{tmp_path}/in.sock", f"ssh://{far.name}/unix:{there}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with relay:
        assert relay.stderr.readline().startswith("listening at")
        source.migrate(f"unix:{tmp_path}/in.sock")
        out, errors = relay.communicate(timeout=60)
        assert relay.returncode == 0, errors
        assert "the destination has taken over" in out
    source.wait_migration("completed")
    target.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qmp("stop")
    check_count(before, after)
