"""A real guest over a compressed link: QEMU -> migctl relay -> zstd:: -> migctl relay -> QEMU, and by a file."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel_testing.peers import QemuFactory
from whimbrel_testing.qemu_guest import check_count, counting_guest, last_number, wait_counting

from .passage import Passage

pytestmark = pytest.mark.interop


@pytest.fixture
def way(tmp_path: Path, qemu: QemuFactory, migctl: Callable[..., Any]) -> Any:
    with contextlib.closing(Passage("unix", tmp_path, qemu, migctl)) as steps:
        yield steps


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
def test_guest_counts_on_behind_two_relays(
    way: Passage, tmp_path: Path, migctl: Callable[..., Any], *, return_path: bool
) -> None:
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = way.qemu(*guest.args(before), capabilities={"return_path": return_path})
    target = way.target(*guest.args(after), return_path=return_path)
    wait_counting(before)
    far = migctl("relay", "zstd::tcp:127.0.0.1:0", target.uri)
    address = far.address()
    assert address.startswith("zstd::tcp:")
    near = way.leave(source, "relay", address)
    for relay in (near, far):
        passed = relay.succeeded("relayed")
        assert passed["acknowledged"] is return_path
        assert passed["unverified_from"] is None
    source.wait_migration("completed")
    target.qemu.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qemu.qmp("stop")
    check_count(before, after)


def test_guest_is_received_and_sent_compressed(
    way: Passage, tmp_path: Path, migctl: Callable[..., Any]
) -> None:
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = way.qemu(*guest.args(before), capabilities={"return_path": True})
    wait_counting(before)
    receive = migctl("receive", "zstd::tcp:127.0.0.1:0", way.file)
    near = way.leave(source, "relay", receive.address())
    assert near.succeeded("relayed")["acknowledged"]
    assert receive.succeeded("received")["run_state"] == "running"
    source.wait_migration("completed")
    assert way.file.read_bytes().startswith(b"QEVM"), "a file is kept as QEMU writes it"

    target = way.target(*guest.args(after), return_path=True)
    far = migctl("relay", "zstd::tcp:127.0.0.1:0", target.uri)
    assert migctl("send", way.file, far.address()).succeeded("sent")["acknowledged"]
    assert far.succeeded("relayed")["acknowledged"]
    target.qemu.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qemu.qmp("stop")
    check_count(before, after)
