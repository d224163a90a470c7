"""What the monitor says of itself."""

from __future__ import annotations

from typing import Any

from whimbrel_monitor import Context, command
from whimbrel_monitor.schema import schema
from whimbrel_monitor.session import NEGOTIATE, NEGOTIATE_ARGUMENTS, NOT_FOUND, VERSION, QmpError


@command(NEGOTIATE, arguments=lambda kernel: NEGOTIATE_ARGUMENTS)
def qmp_capabilities(ctx: Context, enable: list[str] | None = None) -> None:
    """Comes first, and once: then commands are taken and events are sent. There is nothing to enable."""
    raise QmpError(NOT_FOUND, "Capabilities negotiation is already complete, command ignored")


@command("query-version")
def query_version(ctx: Context) -> dict[str, Any]:
    """The version in the greeting: the QEMU whose commands these are, and `package`, which tells whimbrel's."""
    return VERSION


@command("query-commands")
def query_commands(ctx: Context) -> list[dict[str, Any]]:
    """The names of all commands, those of other plugins included."""
    return [{"name": name} for name in ctx.commands]


@command("query-qmp-schema")
def query_qmp_schema(ctx: Context) -> list[dict[str, Any]]:
    """The types of arguments and return values, as far as they are declared, and the events."""
    return schema(ctx.commands.values(), ctx.kernel)


@command("x-whimbrel-plugins")
def plugins(ctx: Context) -> list[dict[str, Any]]:
    """Every plugin that was found, with what it provides, or why it is not used (`state`, `detail`)."""
    return [
        {
            "kind": info.kind,
            "name": info.name,
            "distribution": info.distribution,
            "version": info.version,
            "provides": list(info.provides),
            "settings": list(info.settings),
            "state": str(info.state),
            "detail": info.detail,
        }
        for info in ctx.kernel.plugins.infos()
    ]
