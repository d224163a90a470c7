"""The table of dialects, checked against what QEMUs send for machine types of each version."""

import json
from pathlib import Path

import attrs
import pytest

from whimbrel import InStream
from whimbrel.channel import MemoryChannel
from whimbrel.wire import dialects
from whimbrel.wire.format import Command
from whimbrel_qemu.guest import read_guest
from whimbrel_testing.peers import QemuFactory

pytestmark = pytest.mark.interop

OLDEST = ("1.4", "1.7", "2.0", "2.2", "2.3", "2.4")
#: Version of QEMU, machine types that have one in their names.
X86 = [("7.2", f"pc-i440fx-{v}") for v in (*OLDEST, "2.12", "7.2")]
X86 += [("10.0", f"pc-i440fx-{v}") for v in ("2.4", "7.2", "8.0", "8.1")]
X86 += [("10.0", f"pc-q35-{v}") for v in ("8.2", "9.0", "9.2", "10.0")]


@pytest.mark.parametrize(("version", "machine"), X86)
def test_a_machine_type_speaks_what_the_table_says(
    qemu: QemuFactory, tmp_path: Path, version: str, machine: str
) -> None:
    file = tmp_path / "stream"
    source = qemu("-M", machine, "-m", "16", "-S", version=version)
    source.migrate(f"exec:cat > {file}", max_bandwidth=0)
    source.wait_migration("completed")
    commands: list[Command] = []
    inp = InStream(MemoryChannel(file.read_bytes()))
    guest = read_guest(inp, on_command=lambda command, data, inp: commands.append(command))
    tail = guest.tail
    assert tail is not None
    seen = attrs.evolve(
        guest.dialect,
        footers=tail.footers,
        vmdescription=tail.vmdescription is not None,
        switchover_start=Command.SWITCHOVER_START in commands,
    )
    table = dialects.for_machine(machine)
    if machine.startswith("pc-i440fx-1."):
        # QEMU of that time sent none; what a newer one sends for its machines is taken as well.
        table = attrs.evolve(table, vmdescription=True)
    for name in ("configuration", "footers", "vmdescription", "switchover_start"):
        assert getattr(seen, name) is getattr(table, name), name
    # The other members go by the version of QEMU itself, and are no matter to who reads: the table says what is sent to
    # the oldest QEMU that has the machine type.
    if tail.vmdescription is not None:
        assert ("configuration" in json.loads(tail.vmdescription)) is (version == "10.0")
        state = {device.name: bytes(payload) for device, payload in tail.payloads()}["globalstate"]
        assert state[4:].startswith(b"prelaunch\0")
        assert state[36] == (version == "10.0")


@pytest.mark.parametrize("machine", ["virt-2.7", "virt-2.8", "virt-7.2", "versatilepb"])
def test_pages_of_an_arm_board(qemu: QemuFactory, tmp_path: Path, machine: str) -> None:
    """The stream says their size where it is not the smallest of the architecture; the vmdescription says it always."""
    file = tmp_path / "stream"
    source = qemu("-M", machine, "-m", "64", "-S", arch="aarch64")
    source.migrate(f"exec:cat > {file}", max_bandwidth=0)
    source.wait_migration("completed")
    guest = read_guest(InStream(MemoryChannel(file.read_bytes())))
    assert guest.tail is not None
    assert guest.tail.description is not None
    assert 1 << guest.machine().target_page_bits == guest.tail.description.page_size
