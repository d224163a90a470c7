"""Over a network that is far, slow, and then gone: sshd in a network namespace behind a shaped link."""

from __future__ import annotations

import os
import subprocess

import pytest

from whimbrel_testing.harness import Pair
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


@pytest.fixture(scope="module")
def far(sshd_binary, tmp_path_factory):
    """An sshd in a namespace of its own, 20 ms away at 200 Mbit/s; without netem, at that rate only."""
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
        try:
            shape("netem", "delay", "10ms", "rate", "200mbit", "limit", "10000")
        except subprocess.CalledProcessError:
            shape("tbf", "rate", "200mbit", "burst", "256k", "latency", "50ms")
        folder = tmp_path_factory.mktemp("far") / "h"
        within = ("ip", "netns", "exec", SPACE)
        with Sshd(sshd_binary, folder, "far", address=FAR, within=within) as server:
            server.config.write_text(
                "ServerAliveInterval 1\nServerAliveCountMax 2\n" + server.config.read_text()
            )
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
