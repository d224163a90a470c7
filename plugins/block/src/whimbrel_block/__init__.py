"""The block section: an embedder's disks, copied with the machine that writes to them.

Names are imported at first use; numpy comes with the first migration.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "codec": ("CHUNK", "SECTOR"),
    "device": ("BlockDevice",),
    "handler": ("BlockHandler",),
    "image": ("Image", "RawImage"),
    "qemu_image": ("QemuImage",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605

if TYPE_CHECKING:
    from whimbrel_block.codec import CHUNK as CHUNK, SECTOR as SECTOR
    from whimbrel_block.device import BlockDevice as BlockDevice
    from whimbrel_block.handler import BlockHandler as BlockHandler
    from whimbrel_block.image import Image as Image, RawImage as RawImage
    from whimbrel_block.qemu_image import QemuImage as QemuImage


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"whimbrel_block.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'whimbrel_block' has no attribute {name!r}")
