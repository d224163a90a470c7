"""What the block plugin declares. Light: numpy is imported by the first migration of a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.hookspecs import hookimpl
from whimbrel.settings import Capability, Parameter, Type, When

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel
    from whimbrel.machine import Machine
    from whimbrel.savevm import SaveVMHandler
    from whimbrel.settings import Setting

whimbrel_api = (1, 0)
whimbrel_sections = ("block",)


@hookimpl
def settings() -> list[Setting]:
    return [
        Capability(
            name="block",
            help="Copy the disks with the machine, in each migration; blk and inc of migrate do it for one. On a"
            " destination: refuse a source that leaves them out",
        ),
        Capability(
            name="zero-blocks",
            default=True,
            help="Send a megabyte of zeros on a disk as a word. Every QEMU since 1.6 takes that",
        ),
        Parameter(
            name="block-incremental",
            type=Type.BOOL,
            default=False,
            when=When.IDLE,
            help="Copy only what differs from the base that a disk has on both sides",
        ),
    ]


@hookimpl
def preflight(kernel: Kernel, uri: str) -> list[str]:
    """Whether there is something to copy, where each migration is to copy the disks."""
    if not kernel.settings["block"]:
        return []
    from whimbrel_block.device import BlockDevice

    if not kernel.machine.parts(BlockDevice):
        return ["the capability block is on, and the machine has no disk that could be copied"]
    return []


@hookimpl(trylast=True)  # the kernel asks the last one first: disks go before RAM, as in QEMU
def savevm_handlers(kernel: Kernel, machine: Machine) -> list[SaveVMHandler]:
    from whimbrel_block.device import BlockDevice

    devices = machine.parts(BlockDevice)
    if not devices:
        return []
    from whimbrel_block.handler import BlockHandler

    return [
        BlockHandler(
            devices,
            active=lambda: bool(kernel.settings["block"]),
            incremental=lambda: bool(kernel.settings["block-incremental"]),
            zero_blocks=lambda: bool(kernel.settings["zero-blocks"]),
        )
    ]
