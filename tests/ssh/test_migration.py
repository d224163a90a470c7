"""Whole migrations over ssh, between two processes: a machine that works meanwhile, and what goes wrong on the far host."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from whimbrel_qemu import load
from whimbrel_testing.harness import Pair
from whimbrel_testing.peers import wait_until
from whimbrel_testing.stress import StressConfig

MIB = 1 << 20
CONFIG = StressConfig(ram=16 * MIB, rate=3e6)
MIGCTL = f"{shlex.quote(str(Path(sys.executable).parent))}/migctl"
PATIENCE = 30


@pytest.fixture
def pair(host):
    values = {"downtime-limit": 100, "ssh-config": str(host.config)}
    with Pair(CONFIG, settings=values) as pair:
        pair.source.call("boot")
        yield pair


def wait(app):
    return app.call("wait", timeout=PATIENCE)


def moved(pair):
    """The destination runs it, whole, and said so; at no time did two copies run."""
    source = wait(pair.source)
    assert source["outcome"] == "completed", source
    assert source["acknowledged"]
    assert wait(pair.destination)["outcome"] == "completed"
    assert pair.running() == ["destination"]
    pair.destination.call("ticked")
    proof = pair.destination.call("verify")
    assert proof["holds"], proof["text"]
    assert pair.violations() == []


def runs_on(pair, *words):
    """The source still has it, and says why."""
    result = wait(pair.source)
    assert result["outcome"] == "failed", result
    for word in words:
        assert word in result["error"]["message"], result
    assert pair.running() == ["source"]
    assert pair.source.call("verify")["holds"]


def test_to_a_socket_of_the_far_host(pair, host):
    path = f"{pair.directory}/dst.sock"
    pair.destination.call("incoming", uri=f"unix:{path}")
    pair.source.call("migrate", uri=f"ssh://{host.name}/unix:{path}")
    moved(pair)


def test_both_dial_out_to_a_host_between_them(pair, host):
    """The destination listens on a port of that host, and the source connects to it there."""
    uri = f"ssh://{host.name}/tcp:localhost:0"
    (address,) = pair.destination.call("incoming", uri=uri)["addresses"]
    assert address.startswith(f"ssh://{host.name}/tcp:localhost:")
    pair.source.call("migrate", uri=address)
    moved(pair)


def test_compressed(pair, host):
    path = f"{pair.directory}/dst.sock"
    pair.destination.call("incoming", uri=f"zstd::unix:{path}")
    pair.source.call("migrate", uri=f"zstd::ssh://{host.name}/unix:{path}")
    moved(pair)


def test_a_cancel_on_the_way(pair, host, tmp_path):
    """Nothing is left on the far host."""
    file = tmp_path / "app.mig"
    pair.source.call("set", **{"max-bandwidth": 200_000})
    pair.source.call("migrate", uri=f"ssh://{host.name}/exec:{MIGCTL} receive - {file}")
    pair.source.wait_status("active")
    pair.source.call("cancel")
    assert wait(pair.source)["outcome"] == "cancelled"
    assert pair.running() == ["source"]
    wait_until(lambda: not list(tmp_path.glob("app.mig*")), "end of the command there")


def test_a_file_on_the_far_host(pair, host, tmp_path):
    """The source was told when the file was on disk."""
    file = tmp_path / "app.mig"
    pair.source.call("migrate", uri=f"ssh://{host.name}/exec:{MIGCTL} receive - {file}")
    result = wait(pair.source)
    assert (result["outcome"], result["acknowledged"]) == ("completed", True)
    assert load(file).ram_bytes > CONFIG.ram


def test_a_command_that_only_takes_the_stream(pair, host, tmp_path):
    file = tmp_path / "app.mig"
    pair.source.call("migrate", uri=f"ssh://{host.name}/exec,answers=off:cat > {file}")
    result = wait(pair.source)
    assert (result["outcome"], result["acknowledged"]) == ("completed", False)
    pair.destination.call("incoming", uri=f"ssh://{host.name}/exec:cat {file}")
    assert wait(pair.destination)["outcome"] == "completed"
    assert pair.destination.call("verify")["holds"]


def test_a_full_disk_on_the_far_host(pair, host, tmp_path):
    """A limit of the shell is a disk that is full soon."""
    file = tmp_path / "app.mig"
    command = f"ulimit -f 2000; {MIGCTL} receive - {file}"
    pair.source.call("migrate", uri=f"ssh://{host.name}/exec:{command}")
    runs_on(pair, "File too large")
    assert list(tmp_path.glob("app.mig*")) == []


def test_a_command_that_is_not_there(pair, host):
    pair.source.call("migrate", uri=f"ssh://{host.name}/exec:no-such-command")
    runs_on(pair, "exit status 127", "not found")


def test_a_host_that_dies_on_the_way(pair, sshd):
    server = sshd()
    path = f"{pair.directory}/dst.sock"
    pair.source.call("set", **{"ssh-config": str(server.config), "max-bandwidth": 200_000})
    pair.destination.call("incoming", uri=f"unix:{path}")
    pair.source.call("migrate", uri=f"ssh://{server.name}/unix:{path}")
    pair.source.wait_status("active")
    server.kill()
    runs_on(pair, "link lost")
    assert wait(pair.destination)["outcome"] == "failed"


def test_migctl_tells_what_is_missing(tmp_path):
    """A look-up that finds no paramiko stands for an environment without it."""
    code = (
        "import sys\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, p=None: None if n == 'paramiko' else real(n, p)\n"
        "from whimbrel_cli.main import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--plugins", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (ssh,) = [p for p in json.loads(done.stdout) if p["name"] == "ssh"]
    assert ssh["state"] == "needs"
    assert "pip install paramiko" in ssh["detail"]
    done = subprocess.run(
        [sys.executable, "-c", code, "receive", "ssh://h/tcp:localhost:0", tmp_path / "f"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "pip install paramiko" in done.stderr


def test_listing_the_plugins_does_not_load_paramiko():
    code = (
        "import sys; from whimbrel import Kernel, Plugins; k = Kernel(plugins=Plugins.load());"
        "assert 'ssh-host-key' in k.settings; assert 'paramiko' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
