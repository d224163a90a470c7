"""Machines that go from one QEMU into another: a newer one, an older one, one of another architecture than ours."""

import functools
import itertools
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
from .matrix import Record
from .passage import Passage

pytestmark = pytest.mark.interop

BETWEEN = "QEMU -> migctl receive, migctl send -> QEMU of another version"
OTHERS = "the same, machines of other architectures"
ACROSS = [("7.2", "10.0"), ("10.0", "7.2")]
versions = functools.partial(pytest.mark.parametrize, "versions", ids=" to ".join)


@pytest.mark.parametrize("machine", [MACHINE, "pc-q35-7.2", "microvm", "pc-i440fx-2.4"])
@versions(ACROSS)
def test_guest_counts_on_in_another_version(
    machine: str, versions: tuple[str, str], passage: Passage, tmp_path: Path, record: Record
) -> None:
    (old, new), cell = versions, (BETWEEN, machine, " to ".join(versions))
    record(*cell)
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
    record(*cell, "counts")


@attrs.frozen(kw_only=True)
class Foreign:
    """A machine of another architecture."""

    arch: str
    machine: str
    mib: int
    page_bits: int | None = None
    verbatim_from: str | None = None
    #: Devices whose state is not what was loaded, also when nothing stands between two QEMUs: a clock, flags.
    moving: tuple[str, ...] = ()
    #: Those that another version of QEMU writes in its own way.
    translated: tuple[str, ...] = ()

    def named(self, version: str) -> str:
        """For -machine. A board with sound wants it connected since 8.2."""
        sound = self.machine == "integratorcp" and version == "10.0"
        return f"{self.machine},audiodev=silent" if sound else self.machine


VIRT = Foreign(arch="aarch64", machine="virt-7.2", mib=32, page_bits=12)
#: Its processors have pages of 1 KiB, and its stream does not say so.
INTEGRATOR = Foreign(
    arch="aarch64",
    machine="integratorcp",
    mib=32,
    moving=("pl110",),
    translated=("cpu", "globalstate"),
)
PSERIES = Foreign(
    arch="ppc64",
    machine="pseries-7.2",
    mib=256,
    verbatim_from="spapr/htab",
    moving=("cpu", "cpu_common", "spapr"),
)
#: A clock that stands still with the machine, and no sound.
ALIKE = ("-rtc", "base=2020-01-01,clock=vm", "-audiodev", "none,id=silent")


@pytest.mark.parametrize(
    ("versions", "foreign"),
    [
        *itertools.product([("7.2", "7.2"), ("10.0", "10.0")], [VIRT, INTEGRATOR, PSERIES]),
        *itertools.product(ACROSS, [INTEGRATOR]),
    ],
    ids=lambda v: v.machine if isinstance(v, Foreign) else " to ".join(v),
)
def test_machine_of_another_architecture_passes(
    foreign: Foreign, versions: tuple[str, str], passage: Passage, tmp_path: Path, record: Record
) -> None:
    (old, new), cell = versions, (OTHERS, foreign.machine, " to ".join(versions))
    record(*cell)
    guest = FilledGuest(foreign.mib * MIB, filled=32 * MIB)
    ram, copy = tmp_path / "ram", tmp_path / "copy"
    guest.fill(ram)
    source = passage.qemu(
        *guest.args(ram, foreign.named(old)), *ALIKE, arch=foreign.arch, version=old
    )
    source.capabilities(return_path=True)
    received = passage.receive(source)
    source.wait_migration("completed")
    assert received["machine"] == foreign.machine
    assert received["verbatim_from"] == foreign.verbatim_from
    assert received["acknowledged"]
    kept = load(passage.file)
    assert kept.configuration is not None
    assert kept.configuration.target_page_bits == foreign.page_bits

    target, sent = passage.send(
        *guest.args(copy, foreign.named(new)),
        *ALIKE,
        arch=foreign.arch,
        version=new,
        return_path=True,
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
    differing = {*differing_devices(kept, load(again))} - {*foreign.moving}
    if old != new:
        differing -= {*foreign.translated}
    assert differing == set()
    record(*cell, "RAM and devices whole")


@pytest.mark.parametrize("foreign", [VIRT, PSERIES], ids=lambda f: f.machine)
@versions(ACROSS)
def test_machine_that_no_other_version_takes(
    foreign: Foreign, versions: tuple[str, str], passage: Passage, record: Record
) -> None:
    """Under TCG the processors of these versions differ; from QEMU to QEMU it is the same."""
    (old, new), cell = versions, (OTHERS, foreign.machine, " to ".join(versions))
    record(*cell)
    args = ("-machine", foreign.machine, "-m", f"{foreign.mib}M", "-S")
    passage.receive(passage.qemu(*args, arch=foreign.arch, version=old))
    target = passage.target(*args, arch=foreign.arch, version=new)
    sender = passage.run("send", passage.file, target.uri)
    assert sender.event("refused")["section"] == "cpu"
    assert "destination" in sender.failed()
    assert target.qemu.wait_exit() == 1
    record(*cell, "none: the destination refuses the state of the device cpu")
