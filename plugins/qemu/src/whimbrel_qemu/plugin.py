"""What this plugin adds: the commands `migctl receive`, `migctl send` and `migctl relay`."""

from __future__ import annotations

from typing import Any

from whimbrel import hookimpl

whimbrel_api = (1, 0)


@hookimpl
def cli_commands() -> list[Any]:
    from whimbrel_qemu.commands import receive
    from whimbrel_qemu.relay_command import relay
    from whimbrel_qemu.send_command import send

    return [receive, send, relay]
