"""What only a real QEMU peer needs: keep its machine as a file, put such a file into another QEMU, pass a
migration on from one to another.

Names are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "comparing": ("Comparison", "Difference", "Verdict", "compare"),
    "guest": ("Guest", "read_guest", "write_guest"),
    "progress": ("Progress",),
    "receiving": ("Received", "receive"),
    "relaying": ("Passage", "PassedSection", "Relayed", "relay"),
    "refusal": ("Refused",),
    "sending": ("Incompatible", "Sent", "load", "sample", "send"),
    "tail": ("ForeignTail", "Tail", "TailReader"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605

if TYPE_CHECKING:
    from whimbrel_qemu import (
        comparing,
        guest,
        progress,
        receiving,
        refusal,
        relaying,
        sending,
        tail,
    )

    Comparison = comparing.Comparison
    Difference = comparing.Difference
    Verdict = comparing.Verdict
    compare = comparing.compare
    Guest = guest.Guest
    read_guest = guest.read_guest
    write_guest = guest.write_guest
    Progress = progress.Progress
    Received = receiving.Received
    receive = receiving.receive
    Passage = relaying.Passage
    PassedSection = relaying.PassedSection
    Relayed = relaying.Relayed
    relay = relaying.relay
    Refused = refusal.Refused
    Incompatible = sending.Incompatible
    Sent = sending.Sent
    load = sending.load
    sample = sending.sample
    send = sending.send
    ForeignTail = tail.ForeignTail
    Tail = tail.Tail
    TailReader = tail.TailReader


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"whimbrel_qemu.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'whimbrel_qemu' has no attribute {name!r}")
