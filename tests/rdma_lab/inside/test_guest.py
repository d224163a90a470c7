"""A guest of a real QEMU that runs before, in between and afterwards: it counts on, and no page that it wrote is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from whimbrel import MigrationError
from whimbrel_qemu import load, receive, send
from whimbrel_testing.peers import PATIENCE, Qemu, QemuFactory, wait_until
from whimbrel_testing.qemu_guest import (
    MIB,
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)
from whimbrel_testing.transport_suite import Task

pytestmark = [pytest.mark.interop, pytest.mark.slow]
_places = count(1)


def listening(uri: str, file: Path) -> Task[Any]:
    """A receive that waits for its source."""
    ready = threading.Event()
    task = Task(lambda: receive(uri, file, on_listening=lambda _: ready.set()))
    wait_until(lambda: ready.is_set() or not task.thread.is_alive(), "listening")
    return task


def passes(source: Qemu, number: int) -> None:
    """Migration goes on until RAM has been gone through that often: the guest writes faster than it may be sent."""
    wait_until(
        lambda: source.migration().get("ram", {}).get("dirty-sync-count", 0) >= number,
        f"{number} passes",
    )
    source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=5000)


@pytest.mark.parametrize(
    ("version", "return_path", "pin_all"),
    [
        ("7.2", False, False),
        ("7.2", False, True),
        ("10.0", True, False),
        ("10.0", True, True),
    ],
)
def test_it_counts_on(
    qemu: QemuFactory, tmp_path: Path, uri: str, version: str, *, return_path: bool, pin_all: bool
) -> None:
    """Out of a QEMU into a file, and out of the file into a QEMU, both by RDMA."""
    guest = counting_guest(tmp_path, pages=512, pages_per_tick=64, hz=50)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    capabilities = {"return_path": return_path, "rdma_pin_all": pin_all}
    source = qemu(*guest.args(before), version=version, capabilities=capabilities)
    wait_counting(before)
    file = tmp_path / "guest.mig"
    receiving = listening(uri, file)
    source.migrate(uri, max_bandwidth=4 * MIB)
    passes(source, 3)
    source.wait_migration("completed")
    reached = last_number(before)
    received = receiving.result(PATIENCE)
    assert received.run_state == "running"
    assert received.acknowledged is return_path
    source.kill()

    there = f"{uri}{next(_places)}"
    target = qemu(*guest.args(after), version=version, incoming=there, capabilities=capabilities)
    sent = send(file, there)
    assert sent.acknowledged is return_path
    target.wait_status("running")
    wait_counting(before, after, beyond=reached)
    target.qmp("stop")
    check_count(before, after)


def test_a_qemu_7_2_opens_no_way_back(qemu: QemuFactory, tmp_path: Path, uri: str) -> None:
    """Its capability return-path breaks its migrations over RDMA to another QEMU as well."""
    guest = counting_guest(tmp_path, pages=64, pages_per_tick=1, hz=50)
    logs = tmp_path / "ours.log", tmp_path / "theirs.log"
    source = qemu(*guest.args(logs[0]), version="7.2", capabilities={"return_path": True})
    receiving = listening(uri, tmp_path / "guest.mig")
    source.migrate(uri)
    error = receiving.error(PATIENCE)
    assert isinstance(error, MigrationError)
    # It goes as soon as it has no way back; sometimes its first bytes have come by then.
    assert re.search("wants answers.*Switch the capability return-path off|ended early", str(error))
    source.wait_migration("failed")
    wait_counting(logs[0], beyond=last_number(logs[0]))

    there = f"{uri}1"
    other = qemu(
        *guest.args(logs[1]), version="7.2", incoming=there, capabilities={"return_path": True}
    )
    source.migrate(there)
    source.wait_migration("failed")
    assert other.wait_exit() != 0
    wait_counting(logs[0], beyond=last_number(logs[0]))


def test_migctl_receives(qemu: QemuFactory, tmp_path: Path, uri: str) -> None:
    guest = FilledGuest(size=16 * MIB, filled=4 * MIB)
    ram, file = tmp_path / "ram", tmp_path / "guest.mig"
    guest.fill(ram)
    with subprocess.Popen(
        [Path(sys.executable).parent / "migctl", "receive", uri, file, "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as migctl:
        assert migctl.stdout is not None
        assert json.loads(migctl.stdout.readline()) == {"event": "listening", "addresses": [uri]}
        source = qemu(*guest.args(ram, "pc-i440fx-7.2"), version="7.2")
        source.migrate(uri, max_bandwidth=1 << 40)
        source.wait_migration("completed")
        received = json.loads(migctl.stdout.readline())
    assert migctl.returncode == 0
    assert received["event"] == "received"
    blocks = {block.idstr: block for block in load(file).blocks}
    assert bytes(blocks["ram"].buffer) == ram.read_bytes()
