"""`migctl --plugins`: what is installed, what it gives, and why something cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from whimbrel_cli.logs import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from whimbrel import PluginInfo

_COLOURS = {"ready": "green", "disabled": "dim", "needs": "yellow"}


def as_json(infos: Iterable[PluginInfo]) -> str:
    """A JSON array, one object a plugin, keys as the columns of the table."""
    return json.dumps([_record(info) for info in infos], indent=2)


def _record(info: PluginInfo) -> dict[str, Any]:
    return {
        "kind": info.kind,
        "name": info.name,
        "provides": list(info.provides),
        "distribution": info.distribution,
        "version": info.version,
        "settings": list(info.settings),
        "state": info.state,
        "detail": info.detail,
    }


def print_table(infos: Sequence[PluginInfo]) -> None:
    """The table, 80 columns or as wide as the terminal, then the settings of each plugin that has some, and a line for each
    that is not ready. Colours only on a terminal, and not where NO_COLOR is set.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(_table(infos))
    console.print()
    console.print(_settings(infos))
    if any(info.detail for info in infos):
        console.print()
    for info in infos:
        if info.detail:
            about = f"{info.name} ({info.distribution} {info.version}): {info.detail}"
            console.print(
                f"[{_colour(info)}]{info.state}[/] {escape(printable(about))}",
                soft_wrap=not console.is_terminal,  # a pipe wants whole lines
            )


def _columns(*headings: str, gives_way: str) -> Table:
    """gives_way: the column that is folded where it is narrow."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading != gives_way)
    return table


def _settings(infos: Sequence[PluginInfo]) -> RenderableType:
    from rich.text import Text

    table = _columns("plugin", "settings", gives_way="settings")
    for info in infos:
        if info.settings:
            table.add_row(info.name, Text(" ".join(info.settings)))
    return table


def _table(infos: Sequence[PluginInfo]) -> RenderableType:
    from rich.text import Text

    table = _columns("kind", "name", "provides", "distribution", "state", gives_way="provides")
    for info in infos:
        table.add_row(
            info.kind,
            info.name,
            Text("\n".join(info.provides) or "-"),
            Text(f"{info.distribution} {info.version}"),
            Text(info.state, style=_colour(info)),
        )
    return table


def _colour(info: PluginInfo) -> str:
    return _COLOURS.get(info.state, "red")
