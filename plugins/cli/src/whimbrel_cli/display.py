"""A migration as it goes on, for eyes and for programs: a live display on a terminal, lines elsewhere, or JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, Self

import attrs

from whimbrel_cli import remote, units
from whimbrel_cli.logs import printable
from whimbrel_cli.progress import ENDED

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from whimbrel_cli.progress import Reading

_BETWEEN = 1.0  # seconds between two lines of JSON in one state


class Display(Protocol):
    """Used by one thread."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, reading: Reading) -> None: ...

    def note(self, text: str) -> None:
        """Something that stays."""

    def hide(self) -> None:
        """Make room for a question; show() brings it back."""


def choose(title: str, *, as_json: bool) -> Display:
    if as_json:
        return _Json()
    return _Live(title) if sys.stderr.isatty() else _Lines()


def members(reading: Reading) -> dict[str, Any]:
    """A reading for JSON."""
    found = attrs.asdict(reading)
    found["pass"] = found.pop("number")
    return {name.replace("_", "-"): _rounded(value) for name, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


class _Json:
    """One object a line on standard output."""

    def __init__(self) -> None:
        self._last: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, reading: Reading) -> None:
        if self._last is not None:
            status, elapsed = self._last
            if status == reading.status and reading.elapsed - elapsed < _BETWEEN:
                return
        self._last = reading.status, reading.elapsed
        remote.tell_json({"event": "progress", **members(reading)})

    def note(self, text: str) -> None:
        remote.tell_json({"event": "note", "text": text})

    def hide(self) -> None:
        pass


class _Lines:
    """A line for each new state, on standard error: for logs."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, reading: Reading) -> None:
        if reading.status != self._last:
            self._last = reading.status
            print(f"migctl: {reading.status}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"migctl: {printable(text)}", file=sys.stderr, flush=True)

    def hide(self) -> None:
        pass


class _Live:
    """Redrawn in place on standard error."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self._title = title
        self._console: Console = Console(stderr=True, highlight=False)
        self._reading: Reading | None = None
        self._live: Live = Live(
            get_renderable=self._render, console=self._console, auto_refresh=False, transient=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def _render(self) -> RenderableType:
        return (
            "" if self._reading is None else render(self._title, self._reading, self._console.width)
        )

    def show(self, reading: Reading) -> None:
        self._reading = reading
        self._live.start()
        self._live.refresh()

    def note(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    def hide(self) -> None:
        self._live.stop()


def state(reading: Reading) -> str:
    status = printable(reading.status)
    return f"{status}, pass {reading.number}" if reading.number else status


def percent(reading: Reading) -> int:
    """Of the work, rounded down: 100 is done."""
    return int(reading.fraction * 100)


def shortened(text: str, columns: int) -> str:
    """Its beginning and its end, which tell it from others, in so many columns of a terminal."""
    from rich.cells import cell_len

    text = printable(text)
    if cell_len(text) <= columns:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while (head or tail) and cell_len(head) + 1 + cell_len(tail) > columns:
        if len(head) > len(tail):
            head = head[:-1]
        else:
            tail = tail[1:]
    return f"{head}…{tail}"


def render(title: str, reading: Reading, width: int) -> RenderableType:
    """Four lines of `width` columns or more: where to, the bar, what flows, what to expect."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(expand=True, padding=(0, 1, 0, 0))
    head.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    head.add_column(justify="right", no_wrap=True)
    right = f"{state(reading)}, {units.time(reading.elapsed)}"
    head.add_row(Text(shortened(title, width - len(right) - 2), style="bold"), Text(right))
    lines: list[RenderableType] = [head]
    if reading.total:
        lines.append(_bar("", reading.fraction, reading.remaining, reading.total))
        if (disk := reading.disk) is not None and disk.total:
            sent = 1 - disk.remaining / disk.total
            lines.append(_bar("of it, disks", sent, disk.remaining, disk.total))
        lines += [Text(_flow(reading)), Text(expectation(reading))]
    if reading.excess is not None:
        lines.append(Text(divergence(reading), style="bold red"))
    return Group(*lines)


def _bar(name: str, fraction: float, left: int, total: int) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(expand=True, padding=(0, 1, 0, 0))
    if name:
        line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    cells: list[RenderableType] = [
        ProgressBar(total=1.0, completed=fraction),
        Text(f"{int(fraction * 100):3} %  {units.size(left)} left of {units.size(total)}"),
    ]
    line.add_row(*([Text(name)] if name else []), *cells)
    return line


def _flow(reading: Reading) -> str:
    rate = "..." if reading.throughput is None else f"{units.size(reading.throughput)}/s"
    text = f"sent {units.size(reading.sent)} at {rate}"
    if reading.dirty_rate is not None:
        text += f", memory gets dirty at {units.size(reading.dirty_rate)}/s"
    return text if reading.throttle is None else f"{text}, CPUs throttled by {reading.throttle} %"


def expectation(reading: Reading) -> str:
    """When the machine will stand still, and for how long."""
    if reading.switchover is not None and reading.downtime is not None and reading.eta_range:
        return switchover(reading.switchover, reading.downtime, reading.eta_range)
    down = reading.expected_downtime
    if reading.status in ENDED:
        return "" if down is None else f"downtime {units.time(down)}"
    if reading.number <= 1:
        if reading.eta is None:
            return "end not known yet"
        return f"about {units.time(reading.eta)} to go, if little is written meanwhile"
    return f"no end in sight, expected downtime {'...' if down is None else units.time(down)}"


def switchover(left: float, downtime: float, around: tuple[float, float] | None = None) -> str:
    """A forecast of one that converges, in seconds. around: from when to when, if that is known."""
    span = f" ({units.time(around[0])} to {units.time(around[1])})" if around is not None else ""
    return f"switchover in about {units.time(left)}{span}, downtime about {units.time(downtime)}"


def divergence(reading: Reading) -> str:
    """Why it does not end, and by what factor."""
    return diverging(reading.excess or 1.0, reading.expected_downtime, reading.overdue)


def diverging(excess: float, down: float | None, overdue: float | None) -> str:
    """The same from figures. down: seconds that the rest would take; overdue: so many times the downtime limit."""
    text = "not converging: memory gets dirty"
    text += (
        " as fast as it is sent" if excess < 1.05 else f" {excess:.1f} times as fast as it is sent"
    )
    if overdue is None or overdue < 1 or down is None:
        return text
    return f"{text}; the rest would take {units.time(down)}, {overdue:.1f} times the downtime limit"


def summary(migration: dict[str, Any]) -> str:
    """What a completed migration cost."""
    ram = migration.get("ram", {})
    parts = [f"completed in {units.time(migration.get('total-time', 0) / 1000)}"]
    if (downtime := migration.get("downtime")) is not None:
        parts.append(f"downtime {units.time(downtime / 1000)}")
    if ram:
        parts.append(
            f"{units.size(ram.get('transferred', 0))} sent in {ram.get('dirty-sync-count', 0)} passes"
        )
    return ", ".join(parts)
