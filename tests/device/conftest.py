"""Streams of a real QEMU, taken once, with where its device sections lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from whimbrel.wire.format import ItemType
from whimbrel_device import vmdesc
from whimbrel_testing.peers import Qemu

MACHINES = {
    "pc": ["-M", "pc"],
    "q35": [
        *("-M", "q35", "-smp", "2", "-vga", "std"),
        *("-drive", "if=none,id=disk,driver=null-co,size=1M"),
        *("-device", "virtio-blk-pci,drive=disk", "-device", "virtio-net-pci"),
        *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
        *("-device", "qemu-xhci", "-device", "usb-tablet"),
        *("-device", "e1000e", "-device", "pcie-root-port,id=rp"),
        *("-audiodev", "none,id=audio", "-device", "intel-hda"),
        *("-device", "hda-duplex,audiodev=audio"),
    ],
    "isapc": ["-M", "isapc"],
    "microvm": ["-M", "microvm"],
    "none": ["-M", "none"],
}


@attrs.frozen(kw_only=True)
class Section:
    """A FULL section and what the vmdescription says of it."""

    device: vmdesc.Device
    members: dict[str, Any]
    version: int
    payload: bytes
    #: Offset of the payload in the stream.
    offset: int


@attrs.frozen(kw_only=True)
class Capture:
    machine: str
    data: bytes
    sections: tuple[Section, ...]

    def section(self, name: str, instance_id: int = 0) -> Section:
        wanted = (name, instance_id)
        return next(s for s in self.sections if (s.device.name, s.device.instance_id) == wanted)


def split(machine: str, data: bytes) -> Capture:
    """Take the stream apart from behind: FULL sections lie before the EOF byte without a gap."""
    found = vmdesc.find(data)
    assert found is not None
    end, text = found
    description = vmdesc.parse(text)
    members = json.loads(text)["devices"]
    framing = 1 + 4 + 1 + 8 + 5
    at = end - 1 - sum(size + len(name) + framing for name, _, size in description.section_lengths)
    sections = []
    for device, member in zip(description.devices, members, strict=True):
        name = device.name.encode()
        section_id = data[at + 1 : at + 5]
        head = bytes((ItemType.SECTION_FULL,)) + section_id + bytes((len(name),)) + name
        head += struct.pack(">I", device.instance_id)
        assert data[at : at + len(head)] == head
        offset = at + len(head) + 4
        size = device.payload_size(memoryview(data)[offset:])
        at = offset + size
        footer = bytes((ItemType.FOOTER,)) + section_id
        assert data[at : at + 5] == footer, f"{device.name} is not {size} bytes long"
        sections.append(
            Section(
                device=device,
                members=member,
                version=int.from_bytes(data[offset - 4 : offset], "big"),
                payload=data[offset:at],
                offset=offset,
            )
        )
        at += 5
    assert (at, data[at]) == (end - 1, ItemType.EOF)
    return Capture(machine=machine, data=data, sections=tuple(sections))


@pytest.fixture(scope="session")
def capture(qemu_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Capture]:
    """The stream of one of MACHINES."""
    folder: Path = tmp_path_factory.mktemp("capture")
    taken: dict[str, Capture] = {}

    def take(machine: str) -> Capture:
        if machine not in taken:
            path = folder / machine
            peer = Qemu(qemu_binary, ["-m", "16", "-S", *MACHINES[machine]])
            try:
                peer.migrate(f"exec:cat > {path}", max_bandwidth=1 << 40)
                peer.wait_migration("completed")
            finally:
                peer.close()
            taken[machine] = split(machine, path.read_bytes())
        return taken[machine]

    return take
