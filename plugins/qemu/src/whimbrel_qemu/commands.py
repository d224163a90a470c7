"""`migctl receive`: the click command, how it looks, and what the other commands share. Loaded by migctl only."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whimbrel.errors import SettingError
from whimbrel.settings import SIZE_MAX, Parameter, Type, convert

if TYPE_CHECKING:
    from rich.console import RenderableType

    from whimbrel.wire.format import Dialect
    from whimbrel_qemu.progress import Progress

#: A job that is done before shows nothing.
_SHOW_AFTER = 1.0  # seconds
_PER_SECOND = 8


def size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Bytes, with the units that every size of whimbrel has: 512M, 1GiB, 1.5g."""
    if value is None:
        return None
    setting = Parameter(
        name="size", help="", type=Type.SIZE, default=0, minimum=0, maximum=SIZE_MAX
    )
    try:
        return int(convert(setting, value))
    except SettingError as error:
        raise click.BadParameter(str(error)) from error


def _dialect(_: click.Context, __: click.Parameter, value: str | None) -> Dialect | None:
    from whimbrel.wire import dialects

    if value is None:
        return None
    try:
        return dialects.by_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


#: For streams that do not show their form.
dialect_option = click.option(
    "--dialect",
    callback=_dialect,
    metavar="VERSION",
    help="The form of the stream, by version of the machine type (2013, 2.3, 9.0, ...).  [default: it shows]",
)


def _settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value[1:]:
            raise click.BadParameter(f"'{value}' is not of the form NAME=VALUE")
    return dict(value.split("=", 1) for value in values)


set_option = click.option(
    "--set",
    "settings",
    callback=_settings,
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the transport, or another that the command has; a name that there is not lists them. May be"
    " given several times.",
)

# ---- output


def human(size: float) -> str:
    """Bytes for people: 4.6 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def event(event: str, **members: object) -> None:
    """One line of JSON on standard output."""
    click.echo(_line(event, **members))


def _line(event: str, **members: object) -> str:
    return json.dumps({"event": event, **members})


def _render(progress: Progress) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    seconds, done, total = progress.seconds, progress.done, progress.total
    line = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [Text(progress.phase)]
    if total:
        cells.append(ProgressBar(total=total, completed=min(done, total), width=30))
    if done:
        rate = f"{human(done / seconds)}/s" if seconds > 0 else ""
        cells += [Text(human(done)), Text(rate)]
    cells.append(Text(f"{seconds:.0f} s"))
    line.add_row(*cells)
    return line


@contextlib.contextmanager
def shown(progress: Progress) -> Iterator[Callable[[], None]]:
    """A line on standard error that tells how far it is, where that is a terminal. What it gives takes the line away, for
    a question to somebody.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    import time

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    began = time.monotonic()

    def line() -> RenderableType:
        if time.monotonic() - began < _SHOW_AFTER:
            return Text("")
        return _render(progress)

    with Live(
        get_renderable=line,
        console=Console(stderr=True),
        refresh_per_second=_PER_SECOND,
        transient=True,
    ) as live:
        yield live.stop


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does: the peer is told, no half file stays."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def error_told_once() -> Iterator[None]:
    """The engine logs what a migration ended with; the command line says it anyway."""
    engine = logging.getLogger("whimbrel.outgoing")
    quiet = not logging.getLogger("whimbrel").isEnabledFor(logging.INFO)
    before = engine.level
    if quiet:
        engine.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        engine.setLevel(before)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a line on stdout."
)


@click.command(
    short_help="Take a migration (of a real QEMU, say) into a file.",
    epilog="""\b
Example: a running QEMU guest becomes a file, and later runs on elsewhere.
  $ migctl receive tcp:127.0.0.1:4444 guest.mig
  (qemu) migrate tcp:127.0.0.1:4444
  $ qemu-system-x86_64 ... -incoming unix:/run/dst.sock
  $ migctl send guest.mig unix:/run/dst.sock

\b
From a source that has the capability multifd on:
  $ migctl receive tcp:127.0.0.1:4444 guest.mig --set multifd=on --set multifd-channels=4""",
)
@click.argument("uri")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-f", "--force", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--max-ram",
    callback=size,
    metavar="SIZE",
    help="Refuse a machine with more RAM.  [default: 1T]",
)
@dialect_option
@set_option
@json_option
def receive(
    *,
    uri: str,
    file: Path,
    force: bool,
    max_ram: int | None,
    dialect: Dialect | None,
    settings: dict[str, str],
    as_json: bool,
) -> None:
    """Listen at URI, take one migration, and keep the machine in FILE.

    FILE holds each page of RAM once, and all else as the source sent it. It gets its name when everything is on disk;
    a source that asks for an answer (QEMU's capability return-path) gets it after that. If anything fails before, there
    is no FILE and the source runs on. `migctl send` puts FILE into a destination, as often as you like.

    The URI - is standard input; the answers to the source go to standard output, and all else to standard error output.
    That is for the far end of a pipe or of ssh: ssh://host2/exec:migctl receive - /srv/guest.mig
    """
    from whimbrel_qemu.guest import MAX_RAM
    from whimbrel_qemu.progress import Progress
    from whimbrel_qemu.receiving import receive as run

    standard = uri == "-"

    def listening(addresses: tuple[str, ...]) -> None:
        if as_json:
            click.echo(_line("listening", addresses=addresses), err=standard)
        elif not standard:
            click.echo(f"listening at {' '.join(addresses) or uri}", err=True)

    progress = Progress()
    with terminated_as_interrupted(), shown(progress):
        got = run(
            uri,
            file,
            force=force,
            max_ram=MAX_RAM if max_ram is None else max_ram,
            dialect=dialect,
            settings=settings,
            on_listening=listening,
            progress=progress,
        )
    if as_json:
        line = _line(
            "received",
            file=str(got.path),
            machine=got.machine_type,
            ram=got.ram_bytes,
            sections=got.sections,
            verbatim_from=got.verbatim_from,
            run_state=got.run_state,
            stream_bytes=got.stream_bytes,
            file_bytes=got.file_bytes,
            seconds=round(got.seconds, 3),
            acknowledged=got.acknowledged,
        )
        click.echo(line, err=standard)
        return
    told = (
        "the source was told" if got.acknowledged else "the source asked for no answer, or was gone"
    )
    devices = (
        "undescribed device sections" if got.sections is None else f"{got.sections} device sections"
    )
    click.echo(
        f"{got.path}: {got.machine_type or 'an old machine type'}, {got.run_state or 'running'},"
        f" {human(got.ram_bytes)} RAM, {devices}, {human(got.file_bytes)} on disk after {got.seconds:.1f} s; {told}",
        err=standard,
    )
    if got.verbatim_from is not None:
        click.echo(
            f"from the live section '{got.verbatim_from}' on, the stream was kept as it came: nobody here can read it",
            err=True,
        )
