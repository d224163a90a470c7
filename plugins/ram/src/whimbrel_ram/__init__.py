"""The ram section: an embedder's memory as RAM blocks, tracked, sent and received.

Names are imported at first use; numpy comes with the first that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "block": ("RAMBlock",),
    "check": ("RamChecker",),
    "converge": ("Throttle",),
    "decoder": ("Decoder",),
    "encoder": ("Encoder",),
    "handler": ("RamHandler",),
    "memory": ("untouched",),
    "records": ("PageFlag",),
    "setup": ("BlockEntry",),
    "trackers": ("DirtyTracker", "TrackerSpec"),
    "transport": ("PageTransport", "Phase", "SaveBlock", "Sent", "StreamPages", "zero_pages"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605

if TYPE_CHECKING:
    from whimbrel_ram.block import RAMBlock as RAMBlock
    from whimbrel_ram.check import RamChecker as RamChecker
    from whimbrel_ram.converge import Throttle as Throttle
    from whimbrel_ram.decoder import Decoder as Decoder
    from whimbrel_ram.encoder import Encoder as Encoder
    from whimbrel_ram.handler import RamHandler as RamHandler
    from whimbrel_ram.memory import untouched as untouched
    from whimbrel_ram.records import PageFlag as PageFlag
    from whimbrel_ram.setup import BlockEntry as BlockEntry
    from whimbrel_ram.trackers import DirtyTracker as DirtyTracker, TrackerSpec as TrackerSpec
    from whimbrel_ram.transport import (
        PageTransport as PageTransport,
        Phase as Phase,
        SaveBlock as SaveBlock,
        Sent as Sent,
        StreamPages as StreamPages,
        zero_pages as zero_pages,
    )


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"whimbrel_ram.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'whimbrel_ram' has no attribute {name!r}")
