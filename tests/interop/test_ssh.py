"""QEMU -> migctl relay -> sshd -> QEMU, and QEMU -> migctl receive at the far end of an ssh: the guest counts on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel_testing.peers import QemuFactory
from whimbrel_testing.qemu_guest import check_count, counting_guest, last_number, wait_counting
from whimbrel_testing.sshd import Sshd, SshdFactory

from .passage import Passage

pytestmark = pytest.mark.interop


@pytest.fixture
def host(sshd: SshdFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """A far host that the user of this test knows."""
    server = sshd()
    folder = tmp_path / ".ssh"
    folder.mkdir()
    (folder / "config").write_text(server.config.read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    return server


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
def test_guest_counts_on_behind_sshd(
    host: Sshd, passage: Passage, tmp_path: Path, qemu: QemuFactory, *, return_path: bool
) -> None:
    guest = counting_guest(tmp_path)
    before, after, there = (tmp_path / n for n in ("before.log", "after.log", "dst.sock"))
    source = qemu(*guest.args(before), capabilities={"return_path": return_path})
    target = qemu(
        *guest.args(after),
        incoming=f"unix:{there}",
        capabilities={"return_path": return_path},
    )
    wait_counting(before)
    relay = passage.leave(source, "relay", f"ssh://{host.name}/unix:{there}")
    passed = relay.succeeded("relayed")
    source.wait_migration("completed")
    target.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qmp("stop")
    check_count(before, after)
    assert passed["acknowledged"] is return_path
    assert "Accepted publickey" in host.said


def test_a_source_on_the_far_side_of_a_host_that_both_reach(
    host: Sshd, tmp_path: Path, qemu: QemuFactory, migctl: Callable[..., Any]
) -> None:
    """A migctl listens on a port of that host; the QEMU there needs nothing but the port."""
    guest = counting_guest(tmp_path)
    before, file = tmp_path / "before.log", tmp_path / "guest.mig"
    source = qemu(*guest.args(before), capabilities={"return_path": True})
    wait_counting(before)
    receiving = migctl("receive", f"ssh://{host.name}/tcp:localhost:0", file)
    address = receiving.address()
    source.migrate(f"tcp:127.0.0.1:{address.rpartition(':')[2]}")
    received = receiving.succeeded("received")
    source.wait_migration("completed")
    assert received["acknowledged"]
    assert received["sections"] > 10


def test_two_qemus_that_both_dial_out(
    host: Sshd,
    tmp_path: Path,
    qemu: QemuFactory,
    migctl: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bridged on both sides: the destination listens on a port of a host between them."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    src, dst = (f"unix:{tmp_path}/{name}.qmp" for name in ("src", "dst"))
    source, target = (
        qemu(*guest.args(log), *("-qmp", f"{monitor},server=on,wait=off"), *more, version=version)
        for log, monitor, more, version in (
            (before, src, (), "7.2"),
            (after, dst, ("-incoming", "defer"), "10.0"),
        )
    )
    for one in (source, target):
        one.capabilities(return_path=True)
    wait_counting(before)
    listening = migctl("-m", dst, "incoming", f"ssh://{host.name}/tcp:localhost:0")
    address = listening.address()
    assert address.startswith(f"ssh://{host.name}/tcp:localhost:")
    migrating = migctl("-m", src, "migrate", address)
    out, errors = migrating.process.communicate(timeout=60)
    assert migrating.process.returncode == 0, (out, errors)
    assert json.loads(out.splitlines()[-1])["acknowledged"] is True
    target.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qmp("stop")
    check_count(before, after)
