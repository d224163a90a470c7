"""What only a real QEMU peer needs: keep its machine as a file, and put such a file into another QEMU.

Names are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "guest": ("Guest", "read_guest", "write_guest"),
    "progress": ("Progress",),
    "receive": ("Received", "receive"),
    "send": ("Sent", "load", "send"),
    "tail": ("ForeignTail", "Tail", "TailReader"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605

if TYPE_CHECKING:
    from whimbrel_qemu.guest import (
        Guest as Guest,
        read_guest as read_guest,
        write_guest as write_guest,
    )
    from whimbrel_qemu.progress import Progress as Progress
    from whimbrel_qemu.receive import Received as Received, receive as receive
    from whimbrel_qemu.send import Sent as Sent, load as load, send as send
    from whimbrel_qemu.tail import (
        ForeignTail as ForeignTail,
        Tail as Tail,
        TailReader as TailReader,
    )


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"whimbrel_qemu.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'whimbrel_qemu' has no attribute {name!r}")
