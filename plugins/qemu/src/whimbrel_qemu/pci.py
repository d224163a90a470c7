"""Names for bytes of a PCI configuration space, from the PCI Local Bus Specification: what two devices differ in."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from whimbrel.channel import Buffer

_STATUS = 0x06
_HAS_CAPABILITIES = 0x10  # of the low byte of the status
_CAPABILITIES = 0x34
_MAX_CAPABILITIES = 48  # as many as fit

#: (first byte, bytes, name) of what is the same in every header.
_HEADER = (
    (0x00, 2, "vendor ID"),
    (0x02, 2, "device ID"),
    (0x04, 2, "command"),
    (0x06, 2, "status"),
    (0x08, 1, "revision"),
    (0x09, 3, "class"),
    (0x0C, 1, "cache line size"),
    (0x0D, 1, "latency timer"),
    (0x0E, 1, "header type"),
    (0x0F, 1, "self test"),
    (0x10, 24, "base addresses"),
    (0x28, 4, "card bus pointer"),
    (0x2C, 2, "subsystem vendor ID"),
    (0x2E, 2, "subsystem ID"),
    (0x30, 4, "ROM address"),
    (0x34, 1, "pointer to the capabilities"),
    (0x3C, 1, "interrupt line"),
    (0x3D, 1, "interrupt pin"),
)
_CAPABILITY = {
    0x01: "power management",
    0x05: "MSI",
    0x07: "PCI-X",
    0x09: "vendor-specific",
    0x0D: "subsystem of the bridge",
    0x10: "PCI Express",
    0x11: "MSI-X",
    0x12: "SATA",
}
_MSIX = 0x11


@attrs.frozen
class Capability:
    """One of the list: where it begins, and which it is."""

    offset: int
    number: int

    @property
    def name(self) -> str:
        return _CAPABILITY.get(self.number, f"0x{self.number:02x}")


def capabilities(config: Buffer) -> Iterator[Capability]:
    """The list of them, as far as it makes sense."""
    raw = bytes(config)
    if len(raw) < 256 or not raw[_STATUS] & _HAS_CAPABILITIES:
        return
    at, seen = raw[_CAPABILITIES] & ~3, set[int]()
    while 0x40 <= at < 0xFF and at not in seen and len(seen) < _MAX_CAPABILITIES:
        seen.add(at)
        yield Capability(at, raw[at])
        at = raw[at + 1] & ~3


def name_of(offset: int, config: Buffer = b"") -> str:
    """What that byte is part of. config: the space that it is a byte of, where known, to name capabilities."""
    for start, length, name in _HEADER:
        if start <= offset < start + length:
            return name
    before = [c for c in capabilities(config) if c.offset <= offset]
    if 0x40 <= offset < 0x100 and before:
        capability = max(before, key=lambda c: c.offset)
        if capability.number == _MSIX and offset - capability.offset in (2, 3):
            return "number of MSI-X vectors"
        return f"capability {capability.name}"
    return "PCI Express" if offset >= 0x100 else "capabilities"


@attrs.frozen
class Identity:
    """What of a configuration space QEMU compares: one that differs is another device."""

    name: str
    value: int


def identity(config: Buffer) -> list[Identity]:
    """Those members that hold no state of the guest, in the order of the space."""
    raw = bytes(config)
    found = [
        Identity(name_of(at), int.from_bytes(raw[at : at + n], "little"))
        for at, n in ((0x00, 2), (0x02, 2), (0x08, 1), (0x09, 3), (0x0E, 1))
    ]
    listed = sorted(capabilities(raw), key=lambda c: c.offset)
    for capability in listed:
        found.append(Identity(f"capability {capability.name}", capability.offset))
        if capability.number == _MSIX:
            control = int.from_bytes(raw[capability.offset + 2 : capability.offset + 4], "little")
            found.append(Identity("number of MSI-X vectors", (control & 0x7FF) + 1))
    return found
