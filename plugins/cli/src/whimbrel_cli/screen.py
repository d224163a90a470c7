"""What `migctl watch` draws: two lines a machine, or one where the terminal is wide."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from whimbrel_cli import display, units
from whimbrel_cli.logs import printable
from whimbrel_cli.looking import Look

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from whimbrel_cli.progress import Reading

#: From so many columns on, all of a machine is in one line.
_WIDE = 150
_STATE = 42  # columns, where it is wide
_HEADING = ("done", "left", "sent at", "dirty at", "downtime", "to go")
_WIDTHS = (5, 10, 12, 12, 8, 10)
_FIGURES = sum(_WIDTHS) + len(_WIDTHS) - 1
_GAP = 2  # columns
#: Lines that are no machine's: title, heading, foot.
_AROUND = 3


def line(look: Look) -> str:
    """One look in one line, for a log."""
    parts = [_state(look)]
    if look.reading is not None and look.reading.total:
        parts += [
            f"{text} {name}"
            for name, text in zip(_HEADING[:2], _figures(look.reading), strict=False)
            if text
        ]
        parts += _forecast(look.reading)
    if why := look.trouble or look.reason:
        parts.append(printable(why))
    return f"{printable(look.address)}: {', '.join(parts)}"


def _forecast(reading: Reading) -> list[str]:
    if reading.excess is not None:
        return [display.divergence(reading)]
    if reading.switchover is None or reading.downtime is None:
        return []
    return [display.switchover(reading.switchover, reading.downtime)]


def _state(look: Look) -> str:
    if look.trouble:
        return "no answer"
    if look.run_state is None:
        return "..."
    if look.reading is None:
        return f"{printable(look.run_state)}, no migration"
    return f"{printable(look.run_state)}, {display.state(look.reading)}"


def _figures(reading: Reading) -> tuple[str, ...]:
    def rate(value: float | None) -> str:
        return "" if value is None else f"{units.size(value)}/s"

    def seconds(value: float | None) -> str:
        return "" if value is None else units.time(value)

    ended = reading.status == "completed"
    return (
        f"{display.percent(reading)} %",
        units.size(reading.remaining),
        "" if ended else rate(reading.throughput),
        "" if ended else rate(reading.dirty_rate),
        seconds(
            reading.expected_downtime if ended or reading.downtime is None else reading.downtime
        ),
        "never" if reading.excess is not None else seconds(reading.eta) if not ended else "",
    )


class Screen:
    """The present state of all machines. One thread uses it."""

    def __init__(self, console: Console, machines: Sequence[str]) -> None:
        self._console = console
        self._looks = {address: Look(address=address) for address in machines}
        self._page = 0

    def show(self, look: Look) -> None:
        self._looks[look.address] = look

    def turn(self) -> None:
        """To the next page; behind the last comes the first."""
        self._page += 1

    def render(self) -> RenderableType:
        wide = self._console.width >= _WIDE
        blocks = [self._machine(look, wide) for look in self._looks.values()]
        pages = _paged(blocks, max(self._console.height - _AROUND, 2))
        self._page %= len(pages)
        heading = _figures_behind("", _HEADING)
        rows = [row for block in pages[self._page] for row in block]
        return Group(self._title(), heading, *rows, self._foot(len(pages)))

    def _title(self) -> RenderableType:
        looks = self._looks.values()
        text = f"migctl watch: {len(looks)} machine{'s' * (len(looks) != 1)}"
        if migrating := sum(look.migrates for look in looks):
            text += f", {migrating} migrating"
        if silent := sum(look.trouble is not None for look in looks):
            text += f", {silent} without an answer"
        grid = _grid()
        grid.add_row(Text(text, style="bold"), Text(time.strftime("%H:%M:%S")))
        return grid

    def _foot(self, pages: int) -> RenderableType:
        more = f"   space: next page ({self._page + 1} of {pages})" if pages > 1 else ""
        return Text(f"q: leave{more}", style="dim", no_wrap=True, overflow="ellipsis")

    def _machine(self, look: Look, wide: bool) -> list[RenderableType]:
        """Its lines."""
        state = Text(_state(look))
        reading = look.reading
        body: RenderableType | None = None
        if why := look.trouble or look.reason:
            state.stylize("bold red")
            room = (self._behind if wide else self._console.width) - 1
            body = Text(display.shortened(why, room), style="red")
        elif reading is not None:
            if reading.excess is not None:
                state.append(", not converging", style="bold red")
            elif reading.status == "cancelled":
                state.stylize("yellow")
            if reading.total:
                bar = ProgressBar(total=1.0, completed=reading.fraction)
                body = _figures_behind(bar, _figures(reading))
        if wide:
            return [self._one_line(look.address, state, body or "")]
        head = _grid()
        room = self._console.width - state.cell_len - _GAP
        head.add_row(Text(display.shortened(look.address, room), style="bold"), state)
        return [head] if body is None else [head, body]

    @property
    def _behind(self) -> int:
        """Columns of bar and figures, where it is wide."""
        return _FIGURES + (self._console.width - _FIGURES - _STATE) // 3

    def _one_line(self, address: str, state: Text, body: RenderableType) -> RenderableType:
        room = self._console.width - _STATE - self._behind - 2 * _GAP
        grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
        grid.add_column(ratio=1, no_wrap=True)
        grid.add_column(width=_STATE, no_wrap=True, overflow="ellipsis")
        grid.add_column(width=self._behind)
        grid.add_row(Text(display.shortened(address, room), style="bold"), state, body)
        return grid


def _grid() -> Table:
    """Something on the left that gives way, something on the right that does not."""
    grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    return grid


def _figures_behind(bar: RenderableType, cells: Sequence[str]) -> RenderableType:
    """At the right edge, one below the other on the whole screen."""
    grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
    grid.add_column(ratio=1)
    grid.add_column(width=_FIGURES, no_wrap=True)
    grid.add_row(
        bar, " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
    )
    return grid


def _paged(blocks: Sequence[list[RenderableType]], height: int) -> list[list[list[RenderableType]]]:
    """Machines to pages, none torn apart; at least one page."""
    pages: list[list[list[RenderableType]]] = [[]]
    room = height
    for block in blocks:
        if len(block) > room and pages[-1]:
            pages.append([])
            room = height
        pages[-1].append(block)
        room -= len(block)
    return pages
