"""What this plugin adds: the commands `migctl receive` and `migctl send`."""

from __future__ import annotations

from typing import Any

from whimbrel import hookimpl

whimbrel_api = (1, 0)


@hookimpl
def cli_commands() -> list[Any]:
    from whimbrel_qemu.commands import receive, send

    return [receive, send]
