"""QEMU -> migctl receive -> a file -> migctl send -> QEMU, over each transport."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel_qemu import load
from whimbrel_testing.peers import QemuFactory, wait_until
from whimbrel_testing.qemu_guest import (
    MIB,
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

from .devices import differing_devices
from .passage import TRANSPORTS, Passage

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
def test_guest_counts_on(passage: Passage, tmp_path: Path, return_path: bool) -> None:
    answered = return_path and passage.two_way
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = passage.qemu(*guest.args(before))
    source.capabilities(return_path=answered)
    wait_counting(before)

    received = passage.receive(source)
    source.wait_migration("completed")
    reached = last_number(before)
    assert received["machine"] == "pc-i440fx-7.2"
    assert received["run_state"] == "running"
    assert received["acknowledged"] is answered
    assert received["file_bytes"] == passage.file.stat().st_size < received["stream_bytes"]
    kept = passage.file.read_bytes()

    target, sent = passage.send(*guest.args(after), return_path=return_path)
    target.wait_status("running")
    assert sent["acknowledged"] is passage.two_way
    assert wait_counting(before, after, beyond=reached) > reached
    target.qmp("stop")
    check_count(before, after)
    assert passage.file.read_bytes() == kept


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_filled_ram_arrives_whole(passage: Passage, tmp_path: Path) -> None:
    guest = FilledGuest()
    ram, copy = tmp_path / "ram", tmp_path / "copy"
    guest.fill(ram)
    source = passage.qemu(*guest.args(ram))
    received = passage.receive(source)
    source.wait_migration("completed")
    assert received["ram"] >= 64 * MIB
    assert received["run_state"] == "prelaunch"  # never started, and so it must arrive
    target, _ = passage.send(*guest.args(copy))
    target.wait_status("prelaunch", "paused")
    wait_until(lambda: target.migration().get("status") == "completed", "end of the load")
    assert copy.read_bytes() == ram.read_bytes()


def test_file_holds_each_page_once_and_qemu_reads_it_itself(
    qemu: QemuFactory, migctl: Callable[..., Any], tmp_path: Path
) -> None:
    """A source that has sent its ring many times over, at a rate that lets it converge only when told to."""
    guest = counting_guest(tmp_path, pages=2048)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = qemu(*guest.args(before))
    wait_counting(before)
    file = tmp_path / "guest.mig"
    receiver = migctl("receive", f"unix:{tmp_path}/m", file)
    source.migrate(receiver.address(), max_bandwidth=64 * MIB, downtime_limit=1)
    wait_until(
        lambda: source.migration().get("ram", {}).get("dirty-sync-count", 0) > 3, "three passes"
    )
    source.qmp("migrate-set-parameters", max_bandwidth=0, downtime_limit=500)
    received = receiver.succeeded("received")
    source.wait_migration("completed")
    assert received["file_bytes"] < 24 * MIB < received["stream_bytes"]
    target = qemu(*guest.args(after), incoming=f"exec:cat {file}")
    target.wait_status("running")
    wait_counting(before, after, beyond=last_number(before))
    target.qmp("stop")
    check_count(before, after)


def test_file_can_be_sent_again_and_again(
    qemu: QemuFactory, migctl: Callable[..., Any], tmp_path: Path
) -> None:
    guest = counting_guest(tmp_path)
    before = tmp_path / "before.log"
    source = qemu(*guest.args(before))
    wait_counting(before)
    file = tmp_path / "guest.mig"
    receiver = migctl("receive", f"unix:{tmp_path}/m", file)
    source.migrate(receiver.address())
    receiver.succeeded("received")
    for copy in range(2):
        after = tmp_path / f"after{copy}.log"
        uri = f"unix:{tmp_path}/in{copy}"
        target = qemu(*guest.args(after), incoming=uri)
        flag = ("--return-path", "--no-return-path")[copy]
        sent = migctl("send", file, uri, flag).succeeded("sent")
        assert sent["acknowledged"] is (copy == 0)
        target.wait_status("running")
        wait_counting(before, after, beyond=last_number(before))
        target.qmp("stop")
        check_count(before, after)


#: Devices of many kinds: on PCI and PCI express, USB, sound, an opaque one (the user network), two CPUs.
RICH = (
    *("-smp", "2", "-m", "64M", "-S"),
    *("-rtc", "base=2020-01-01,clock=vm"),  # it stands still with the machine
    *("-device", "VGA", "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci"),
    *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0", "-device", "e1000"),
    *("-device", "qemu-xhci", "-device", "usb-tablet", "-device", "usb-kbd"),
    *("-audiodev", "none,id=a", "-device", "AC97,audiodev=a"),
    *("-device", "intel-hda", "-device", "hda-duplex,audiodev=a"),
    *("-device", "virtio-serial-pci", "-device", "nec-usb-xhci", "-device", "lsi53c895a"),
)
UUID = "00112233-4455-6677-8899-aabbccddeeff"


@pytest.mark.parametrize(
    "machine",
    [
        ("-machine", "pc-i440fx-7.2"),
        (
            "-machine",
            "pc-q35-7.2",
            "-device",
            "pcie-root-port,id=p",
            "-device",
            "e1000e,bus=p",
        ),
    ],
    ids=["pc", "q35"],
)
def test_devices_of_all_kinds_pass(
    qemu: QemuFactory, migctl: Callable[..., Any], tmp_path: Path, machine: tuple[str, ...]
) -> None:
    """With a UUID that both sides check, kept in the file like the rest of the configuration."""
    args = (*machine, *RICH, "-uuid", UUID)
    file = tmp_path / "guest.mig"
    source = qemu(*args, capabilities={"return_path": True, "validate_uuid": True})
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address(), max_bandwidth=0)
    received = receiver.succeeded("received")
    source.wait_migration("completed")
    assert received["sections"] > 40
    uri = f"unix:{tmp_path}/in"
    target = qemu(*args, incoming=uri, capabilities={"validate_uuid": True})
    assert migctl("send", file, uri).succeeded("sent")["acknowledged"]
    target.wait_status("prelaunch", "paused")
    assert target.stderr == source.stderr
    # What QEMU made of it, it gives back: byte for byte, since the machine never ran.
    again = tmp_path / "again.mig"
    receiver = migctl("receive", "tcp:127.0.0.1:0", again)
    target.migrate(receiver.address(), max_bandwidth=0)
    receiver.succeeded("received")
    assert differing_devices(load(file), load(again)) == []
    assert [bytes(b.memory) for b in load(file).blocks] == [
        bytes(b.memory) for b in load(again).blocks
    ]
