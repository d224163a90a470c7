"""With a real QEMU 7.2 as the other side: its RAM is then ours, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from whimbrel import Kernel, Machine
from whimbrel.savevm import SaveVMHandler, TailTaken
from whimbrel_ram import RAMBlock
from whimbrel_testing.peers import QemuFactory
from whimbrel_testing.qemu_guest import MIB, FilledGuest

pytestmark = pytest.mark.interop
MACHINE = "pc-i440fx-7.2"
#: Blocks of that machine beside its RAM, with -nodefaults.
OTHERS = {
    "/rom@etc/acpi/tables": 0x20000,
    "pc.bios": 0x40000,
    "pc.rom": 0x20000,
    "/rom@etc/table-loader": 0x1000,
    "/rom@etc/acpi/rsdp": 0x1000,
}
GUEST = FilledGuest(size=16 * MIB, filled=6 * MIB)
pinned = pytest.mark.parametrize(
    ("ours", "theirs"), [(False, False), (True, True), (True, False), (False, True)]
)


def prepared(ram: Path | None, pin_all: bool) -> Kernel:
    machine = Machine(MACHINE)
    memory = bytearray(ram.read_bytes() if ram is not None else GUEST.size)
    machine.add(RAMBlock("ram", memory=memory))
    for name, size in OTHERS.items():
        machine.add(RAMBlock(name, size))
    kernel = Kernel(machine)
    kernel.settings.update({"rdma-pin-all": pin_all, "max-bandwidth": 0})
    return kernel


@pinned
def test_a_qemu_takes_ours(
    qemu: QemuFactory, tmp_path: Path, uri: str, ours: bool, theirs: bool
) -> None:
    here, there = tmp_path / "ours", tmp_path / "theirs"
    GUEST.fill(here, seed=3)
    GUEST.fill(there, seed=4)
    target = qemu(
        *GUEST.args(there, MACHINE),
        version="7.2",
        incoming=uri,
        capabilities={"rdma_pin_all": theirs},
    )
    kernel = prepared(here, ours)
    kernel.migrate(uri).wait(60)
    target.wait_migration("completed")
    target.kill()
    assert there.read_bytes() == here.read_bytes()
    assert kernel.query()["x-rdma"]["pin-all"] is ours


class Rest(SaveVMHandler):
    """Device sections, which nobody here can read: all that follows RAM."""

    idstr = "rest"
    version_id = 1 << 31
    optional = True

    def save(self, out: object) -> None:
        raise NotImplementedError

    def load(self, inp: object, header: object) -> None:
        raise NotImplementedError
