"""What cannot go together with rdma, and how much memory may be pinned. Without pyverbs."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING

from whimbrel_ram import RAMBlock

if TYPE_CHECKING:
    from whimbrel.machine import Machine
    from whimbrel.settings import Settings

_REASONS = {
    "multifd": "its pages go over channels of their own, those of rdma by RDMA",
    "xbzrle": "deltas need a destination that works them out, and RDMA writes past it",
    "postcopy-ram": "pages that come by RDMA raise no page faults",
}
_CAP_IPC_LOCK = 14
#: Message buffers and queues, of two connections.
OWN_USE = 8 << 20


def refusals(settings: Settings, machine: Machine | None) -> list[str]:
    """Reasons why a migration over rdma cannot work with these settings."""
    found = [
        f"{name} does not work over rdma: {why}. Switch it off"
        for name, why in _REASONS.items()
        if settings.get(name)
    ]
    if settings["rdma-pin-all"] and machine is not None:
        limit, need = pin_limit(), sum(b.size for b in machine.parts(RAMBlock))
        if limit is not None and need > limit:
            found.append(cannot_pin(need, limit))
    return found


def pin_limit() -> int | None:
    """Bytes of RAM that this process may pin, None without limit (RLIMIT_MEMLOCK, CAP_IPC_LOCK)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or _may_lock_all():
        return None
    return max(0, soft - OWN_USE)


def _may_lock_all() -> bool:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    effective = next((s.split()[1] for s in status.splitlines() if s.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)


def cannot_pin(need: int, limit: int) -> str:
    return (
        f"rdma-pin-all must pin {need >> 20} MiB of RAM, and this process may pin {limit >> 20} MiB (RLIMIT_MEMLOCK)."
        " Raise the limit (ulimit -l unlimited; LimitMEMLOCK=infinity for a systemd unit) or switch rdma-pin-all off"
    )
