"""Events: what the kernel's notifications are to a client."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from whimbrel import What
from whimbrel.state import Status
from whimbrel_monitor import kinds

if TYPE_CHECKING:
    from whimbrel import Kernel, Notification

#: Every event there is, and the members of its data.
EVENTS: dict[str, tuple[kinds.Member, ...]] = {
    "MIGRATION": (kinds.Member("status", kinds.Choice(tuple(map(str, Status)))),),
    "MIGRATION_PASS": (kinds.Member("pass", kinds.INT),),
    "STOP": (),
    "RESUME": (),
    "SHUTDOWN": (
        kinds.Member("guest", kinds.BOOL),
        kinds.Member("reason", kinds.Choice(("host-qmp-quit",))),
    ),
}


def make(name: str, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An event of now."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return {"timestamp": stamp, "event": name, **({"data": dict(data)} if data else {})}


def of(kernel: Kernel, notification: Notification) -> dict[str, Any] | None:
    """The event that a notification is, or None. Those of a migration come with the capability `events` only."""
    what = notification.what
    if what in (What.STOP, What.RESUME):
        return make(what.name)
    if what is What.STATE and kernel.settings.get("events"):
        return make("MIGRATION", {"status": str(notification.new)})
    if what is What.PASS and kernel.settings.get("events"):
        return make("MIGRATION_PASS", {"pass": notification.pass_number})
    return None
