"""What an operator gives a destination so that it has what the guest has: from names of sections and RAM blocks.

The names are QEMU's: `0000:00:05.0/e1000` is a device by its address, bare names belong to the board.
"""

from __future__ import annotations

import re

_PCI = re.compile(r"[0-9a-f]{4}:(?P<bus>[0-9a-f]{2}):(?P<slot>[0-9a-f]{2}\.[0-7])(?P<rest>\S*)")
_MIB = 1 << 20

#: Sections of the board that an option decides about, as seen with the machine types pc and q35.
_BOARD = {
    "hpet": "-machine hpet=on",
    "vmmouse": "-machine vmport=on",
    "ps2kbd": "-machine i8042=on",
    "ps2mouse": "-machine i8042=on",
    "pckbd": "-machine i8042=on",
    "i8254": "-machine pit=on",
    "pcspk": "-machine pit=on",
    "serial": "a -serial for each",
    "parallel_isa": "-parallel",
    "slirp": "-netdev user, one for each",
    "vmgenid": "-device vmgenid",
    "vmcoreinfo": "-device vmcoreinfo",
    "sb16": "-device sb16",
}
CPU = ("cpu", "cpu_common", "apic")
#: For a CPU that both sides have.
SAME_CPU = (
    "The destination's QEMU keeps the state of this CPU in another way: use the same -cpu as the source, or a QEMU nearer"
    " to the source's version; --against a file of that QEMU shows the fields"
)


def place(name: str) -> str | None:
    """Where a device is that a section or a RAM block is named after: `at PCI address 05.0`; None: on the board."""
    match = _PCI.match(name)
    if match is None:
        return None
    bus = "" if match["bus"] == "00" else f"{match['bus']}:"
    path, _, last = match["rest"].rpartition("/")
    behind = "".join(
        f", behind that at {step}" if ":" in step or "." in step else f", port {step}"
        for step in re.findall(r"[^:/]+", path)
    )
    name = last.partition(".")[0]  # e1000.rom is memory of e1000
    return f"at PCI address {bus}{match['slot']}{behind} ({name})"


def have(section: str, instance_id: int) -> str:
    """How a destination gets a section that it does not have."""
    if section in CPU:
        return f"Give the destination as many CPUs as the guest has: -smp {instance_id + 1} or more"
    if section in _BOARD:
        return f"Start the destination with {_BOARD[section]}, as the source was"
    where = place(section)
    if where is not None:
        return f"Give the destination the device that the guest has {where}; addr= pins it there"
    return "Start the destination with the devices and machine options of the source"


def have_block(block: str) -> str:
    """How a destination gets a RAM block that it does not have."""
    where = place(block)
    if where is not None:
        return f"Give the destination the device that the guest has {where}; addr= pins it there"
    if "/" in block or block.startswith("pc."):
        return "Start the destination with the machine type and devices of the source"
    return f"Give the destination the memory backend '{block}', and the device that uses it"


def resize_block(block: str, size: int) -> str:
    """How a RAM block of the destination gets that size, in bytes."""
    where = place(block)
    if where is not None:
        return f"Give the device {where} as much memory there as it has in the guest"
    if block.endswith(".ram") and size % _MIB == 0:
        return f"Start the destination with -m {size // _MIB}M, as the source was"
    return f"Make '{block}' as large there: {size} bytes"
