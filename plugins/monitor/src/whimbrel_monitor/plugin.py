"""What this distribution declares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from whimbrel import Capability, hookimpl

if TYPE_CHECKING:
    from whimbrel import Kernel, Monitor
    from whimbrel.settings import Setting

whimbrel_api = (1, 0)


@hookimpl
def settings() -> list[Setting]:
    return [
        Capability(
            name="events",
            help="Tell the clients of the monitor of every change of the status (MIGRATION) and of every pass over the"
            " memory (MIGRATION_PASS)",
        )
    ]


@hookimpl
def monitors(kernel: Kernel, address: str) -> Callable[[], Monitor] | None:
    if not address.startswith(("unix:", "tcp:")):
        return None

    def serve() -> Monitor:
        from whimbrel_monitor.server import serve

        return serve(kernel, address)

    return serve


@hookimpl
def monitor_commands() -> list[Any]:
    from whimbrel_monitor import commands

    return commands.own()
