"""Machines that go from one QEMU into another: a newer one, an older one, one of another architecture than ours."""

from pathlib import Path

import attrs
import pytest

from whimbrel_qemu import load
from whimbrel_testing.peers import wait_until
from whimbrel_testing.qemu_guest import (
    MACHINE,
    MIB,
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

from .devices import differing_devices
from .passage import Passage

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("machine", [MACHINE, "pc-q35-7.2", "microvm", "pc-i440fx-2.4"])
@pytest.mark.parametrize(("old", "new"), [("7.2", "10.0"), ("10.0", "7.2")], ids=["up", "down"])
def test_guest_counts_on_in_another_version(
    machine: str, old: str, new: str, passage: Passage, tmp_path: Path
) -> None:
    """Where it does, it can also come back: both ways are tested."""
    guest = counting_guest(tmp_path, memory_mib=8)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = passage.qemu(*guest.args(before, machine), version=old)
    source.capabilities(return_path=True)
    wait_counting(before)
    assert passage.receive(source)["acknowledged"]
    source.wait_migration("completed")
    reached = last_number(before)
    target, sent = passage.send(*guest.args(after, machine), version=new, return_path=True)
    assert sent["acknowledged"]
    target.wait_status("running")
    wait_counting(before, after, beyond=reached)
    target.qmp("stop")
    assert check_count(before, after) > reached


@attrs.frozen(kw_only=True)
class Foreign:
    """A machine of another architecture."""

    arch: str
    machine: str
    mib: int
    named: str
    page_bits: int | None = None
    verbatim_from: str | None = None
    #: Devices whose state is not what was loaded, also when nothing stands between two QEMUs: clocks, an interrupt.
    moving: tuple[str, ...] = ()


FOREIGN = [
    Foreign(arch="aarch64", machine="virt", mib=32, named="virt-7.2", page_bits=12),
    Foreign(
        arch="ppc64",
        machine="pseries",
        mib=256,
        named="pseries-7.2",
        verbatim_from="spapr/htab",
        moving=("cpu_common", "spapr"),
    ),
]
#: A clock that stands still with the machine.
CLOCK = ("-rtc", "base=2020-01-01,clock=vm")


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: f.machine)
def test_machine_of_another_architecture_passes(
    foreign: Foreign, passage: Passage, tmp_path: Path
) -> None:
    guest = FilledGuest(foreign.mib * MIB, filled=32 * MIB)
    ram, copy = tmp_path / "ram", tmp_path / "copy"
    guest.fill(ram)
    source = passage.qemu(*guest.args(ram, foreign.machine), *CLOCK, arch=foreign.arch)
    source.capabilities(return_path=True)
    received = passage.receive(source)
    source.wait_migration("completed")
    assert received["machine"] == foreign.named
    assert received["verbatim_from"] == foreign.verbatim_from
    assert received["acknowledged"]
    kept = load(passage.file)
    assert kept.configuration is not None
    assert kept.configuration.target_page_bits == foreign.page_bits

    target, sent = passage.send(
        *guest.args(copy, foreign.machine), *CLOCK, arch=foreign.arch, return_path=True
    )
    assert sent["acknowledged"]
    target.wait_status("prelaunch", "paused")
    wait_until(lambda: target.migration().get("status") == "completed", "end of the load")
    assert copy.read_bytes() == ram.read_bytes()

    # What QEMU made of the devices, it gives back: byte for byte, since the machine never ran.
    again = tmp_path / "again.mig"
    target.capabilities(return_path=False)
    target.migrate(f"exec:cat > {again}", max_bandwidth=0)
    target.wait_migration("completed")
    assert {*differing_devices(kept, load(again))} == {*foreign.moving}
