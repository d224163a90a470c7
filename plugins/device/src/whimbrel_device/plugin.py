"""What this distribution declares: handlers for the devices of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel import hookimpl

if TYPE_CHECKING:
    from whimbrel import Kernel, Machine, SaveVMHandler

whimbrel_api = (1, 0)
#: The machine's devices choose their names.
whimbrel_sections = ("*",)


@hookimpl
def savevm_handlers(kernel: Kernel, machine: Machine) -> list[SaveVMHandler]:
    from whimbrel_device.handler import handlers_for

    return handlers_for(machine)
