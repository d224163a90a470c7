"""The peers themselves, before anything of ours stands between them: what the other tests rely on."""

from pathlib import Path

import pytest

from whimbrel_testing.guest.counter import boot_sector
from whimbrel_testing.peers import QemuFactory, QmpError
from whimbrel_testing.qemu_guest import (
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

pytestmark = pytest.mark.interop


def test_guest_counts_across_a_migration_from_qemu_to_qemu(
    qemu: QemuFactory, tmp_path: Path
) -> None:
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    uri = f"unix:{tmp_path}/m.sock"
    target = qemu(*guest.args(after), incoming=uri)
    source = qemu(*guest.args(before))
    wait_counting(before)
    source.migrate(uri)
    source.wait_migration("completed")
    target.wait_status("running")
    reached = last_number(before)
    wait_counting(before, after, beyond=reached)
    target.qmp("stop")
    assert check_count(before, after) > reached
    assert source.status() == "postmigrate"


def test_guest_notices_a_page_that_was_lost(qemu: QemuFactory, tmp_path: Path) -> None:
    """The proof has teeth: one changed word of the ring, and the guest says so."""
    guest = counting_guest(tmp_path)
    ram, log = tmp_path / "ram", tmp_path / "log"
    backend = f"memory-backend-file,id=ram,size={guest.memory_mib}M,mem-path={ram},share=on"
    args = guest.args(log)
    args[args.index("-machine") + 1] += ",memory-backend=ram"
    peer = qemu("-object", backend, *args)
    wait_counting(log)
    peer.qmp("stop")
    with ram.open("r+b") as memory:
        memory.seek((1 << 20) + 4096 * 1000)
        memory.write(b"lost")
    reached = last_number(log)
    peer.qmp("cont")
    with pytest.raises(ValueError, match="BAD PAGE"):
        wait_counting(log, beyond=reached)
    with pytest.raises(AssertionError, match="not what it wrote"):
        check_count(log)


def test_filled_ram_arrives_whole_from_qemu_to_qemu(qemu: QemuFactory, tmp_path: Path) -> None:
    guest = FilledGuest()
    guest.fill(tmp_path / "source")
    uri = f"unix:{tmp_path}/m.sock"
    target = qemu(*guest.args(tmp_path / "target"), incoming=uri)
    source = qemu(*guest.args(tmp_path / "source"))
    source.migrate(uri, max_bandwidth=0)
    source.wait_migration("completed")
    target.wait_status("prelaunch", "paused")
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_qemu_that_does_not_start_says_why(qemu: QemuFactory) -> None:
    with pytest.raises(RuntimeError, match="unsupported machine type"):
        qemu("-machine", "no-such-machine")


def test_a_refused_command_is_an_error(qemu: QemuFactory) -> None:
    peer = qemu("-S")
    with pytest.raises(QmpError, match="valid migration protocol"):
        peer.migrate("nonsense:")


def test_boot_sector_refuses_what_its_timer_cannot() -> None:
    with pytest.raises(ValueError, match="19 Hz"):
        boot_sector(hz=10)
