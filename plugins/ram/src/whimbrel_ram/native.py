"""The loops in C of the package whimbrel-accel, where it is installed: None where it is not, or with WHIMBREL_ACCEL=0.

Without them numpy does the same, byte by byte.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

deltas: ModuleType | None = None
packets: ModuleType | None = None
records: ModuleType | None = None
if os.environ.get("WHIMBREL_ACCEL") != "0" and sys.maxsize > 1 << 32:  # page numbers are of 64 bits
    with contextlib.suppress(ImportError):
        import whimbrel_accel as _accel

        deltas, packets, records = _accel.deltas, _accel.packets, _accel.records
