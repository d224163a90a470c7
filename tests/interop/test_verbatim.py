"""What nobody here can read is kept as it came, and a QEMU of the same kind takes it back."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel_testing.peers import QemuFactory, wait_until
from whimbrel_testing.qemu_guest import (
    MIB,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

pytestmark = pytest.mark.interop

Start = Callable[..., Any]


def test_live_section_of_a_disk_passes(qemu: QemuFactory, migctl: Start, tmp_path: Path) -> None:
    """A disk that QEMU copies within the stream, between pages of RAM."""
    guest = counting_guest(tmp_path)
    before, after, file = tmp_path / "before.log", tmp_path / "after.log", tmp_path / "guest.mig"
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.write_bytes(os.urandom(MIB))
    copy.write_bytes(bytes(MIB))

    def drive(path: Path) -> tuple[str, ...]:
        return "-drive", f"if=ide,format=raw,file={path}"

    source = qemu(*guest.args(before), *drive(disk))
    wait_counting(before)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.qmp("migrate", uri=receiver.address(), blk=True)
    received = receiver.succeeded("received")
    source.wait_migration("completed")
    assert received["verbatim_from"] == "block"
    assert received["file_bytes"] > MIB

    target = qemu(*guest.args(after), *drive(copy), incoming=f"unix:{tmp_path}/in")
    assert migctl("send", file, f"unix:{tmp_path}/in").succeeded("sent")["acknowledged"]
    target.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qmp("stop")
    check_count(before, after)
    assert copy.read_bytes() == disk.read_bytes()


def test_live_section_of_dirty_bitmaps_passes(
    qemu: QemuFactory, migctl: Start, tmp_path: Path
) -> None:
    file = tmp_path / "guest.mig"
    args = ("-S", "-m", "16M", "-blockdev", "driver=null-co,node-name=n0,size=1048576")
    source = qemu(*args, capabilities={"dirty_bitmaps": True, "return_path": True})
    source.qmp("block-dirty-bitmap-add", node="n0", name="b0", granularity=32768)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address())
    received = receiver.succeeded("received")
    source.wait_migration("completed")
    assert received["verbatim_from"] == "dirty-bitmap"
    assert received["acknowledged"]

    uri = f"unix:{tmp_path}/in"
    target = qemu(*args, incoming=uri, capabilities={"dirty_bitmaps": True})
    assert migctl("send", file, uri).succeeded("sent")["acknowledged"]
    target.wait_status("prelaunch", "paused")
    (node,) = target.qmp("query-named-block-nodes", flat=True)
    (bitmap,) = node["dirty-bitmaps"]
    assert (bitmap["name"], bitmap["granularity"]) == ("b0", 32768)


def test_a_source_that_breaks_off_behind_such_a_section_leaves_nothing(
    qemu: QemuFactory, migctl: Start, tmp_path: Path
) -> None:
    file = tmp_path / "guest.mig"
    source = qemu("-S", "-m", "16M", "-blockdev", "driver=null-co,node-name=n0,size=1048576")
    source.qmp("block-dirty-bitmap-add", node="n0", name="b0")
    source.capabilities(dirty_bitmaps=True)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address(), max_bandwidth=64 << 10)
    wait_until(
        lambda: source.migration().get("ram", {}).get("transferred", 0) > 1000, "a beginning"
    )
    source.kill()
    assert "vmdescription" in receiver.failed()
    assert not list(tmp_path.iterdir())
