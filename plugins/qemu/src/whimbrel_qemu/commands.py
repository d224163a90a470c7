"""`migctl receive` and `migctl send`: the click commands, and how they look. Loaded by migctl only."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whimbrel.errors import SettingError
from whimbrel.settings import SIZE_MAX, Parameter, Type, convert

if TYPE_CHECKING:
    from rich.console import RenderableType

    from whimbrel_qemu.progress import Progress

#: A job that is done before shows nothing.
_SHOW_AFTER = 1.0  # seconds
_PER_SECOND = 8


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
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
    click.echo(json.dumps({"event": event, **members}))


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
def shown(progress: Progress) -> Iterator[None]:
    """A line on standard error that tells how far it is, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
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
    ):
        yield


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
def _error_told_once() -> Iterator[None]:
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


_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")


@click.command(
    short_help="Take a migration (of a real QEMU, say) into a file.",
    epilog="""\b
Example: a running QEMU guest becomes a file, and later runs on elsewhere.
  $ migctl receive tcp:127.0.0.1:4444 guest.mig
  (qemu) migrate tcp:127.0.0.1:4444
  $ qemu-system-x86_64 ... -incoming unix:/run/dst.sock
  $ migctl send guest.mig unix:/run/dst.sock""",
)
@click.argument("uri")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-f", "--force", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--max-ram",
    callback=_size,
    metavar="SIZE",
    help="Refuse a machine with more RAM.  [default: 1T]",
)
@_JSON
def receive(uri: str, file: Path, force: bool, max_ram: int | None, as_json: bool) -> None:
    """Listen at URI, take one migration, and keep the machine in FILE.

    FILE holds each page of RAM once, and all else as the source sent it. It gets its name when everything is on disk;
    a source that asks for an answer (QEMU's capability return-path) gets it after that. If anything fails before, there
    is no FILE and the source runs on. `migctl send` puts FILE into a destination, as often as you like.
    """
    from whimbrel_qemu.guest import MAX_RAM
    from whimbrel_qemu.progress import Progress
    from whimbrel_qemu.receiving import receive as run

    def listening(addresses: tuple[str, ...]) -> None:
        if as_json:
            event("listening", addresses=addresses)
        else:
            click.echo(f"listening at {' '.join(addresses) or uri}", err=True)

    progress = Progress()
    with terminated_as_interrupted(), shown(progress):
        got = run(
            uri,
            file,
            force=force,
            max_ram=MAX_RAM if max_ram is None else max_ram,
            on_listening=listening,
            progress=progress,
        )
    if as_json:
        event(
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
        return
    told = (
        "the source was told" if got.acknowledged else "the source asked for no answer, or was gone"
    )
    devices = (
        "undescribed device sections" if got.sections is None else f"{got.sections} device sections"
    )
    click.echo(
        f"{got.path}: {got.machine_type or 'an old machine type'}, {got.run_state or 'running'},"
        f" {human(got.ram_bytes)} RAM, {devices}, {human(got.file_bytes)} on disk after {got.seconds:.1f} s; {told}"
    )
    if got.verbatim_from is not None:
        click.echo(
            f"from the live section '{got.verbatim_from}' on, the stream was kept as it came: nobody here can read it",
            err=True,
        )


@click.command(
    short_help="Put a machine kept in a file into a QEMU with -incoming.",
    epilog="""\b
Example:
  $ qemu-system-x86_64 ... -incoming unix:/run/dst.sock
  $ migctl send guest.mig unix:/run/dst.sock

The QEMU at the other end is started with the same machine and devices as the source was.""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("uri")
@click.option(
    "--return-path/--no-return-path",
    default=True,
    help="Ask the destination whether it has taken over, where the transport has a way back.  [default: ask]",
)
@click.option(
    "--bandwidth",
    callback=_size,
    default="0",
    metavar="SIZE",
    help="Bytes per second.  [default: unlimited]",
)
@_JSON
def send(file: Path, uri: str, return_path: bool, bandwidth: int, as_json: bool) -> None:
    """Put the machine in FILE into the destination that listens at URI.

    The destination starts it if it ran when it was received. FILE is only read, so that it can be sent again; do not
    run two copies of a machine that shares a disk or a network.
    """
    from whimbrel_qemu.progress import Progress
    from whimbrel_qemu.sending import send as run

    progress = Progress()
    with terminated_as_interrupted(), _error_told_once(), shown(progress):
        done = run(file, uri, return_path=return_path, max_bandwidth=bandwidth, progress=progress)
    if as_json:
        event(
            "sent",
            file=str(done.path),
            uri=done.uri,
            machine=done.machine_type,
            ram=done.ram_bytes,
            run_state=done.run_state,
            stream_bytes=done.stream_bytes,
            seconds=round(done.seconds, 3),
            acknowledged=done.acknowledged,
        )
        return
    told = (
        "the destination has taken over"
        if done.acknowledged
        else "all was sent, and nobody asked the destination whether it has taken over"
    )
    click.echo(
        f"{done.path} -> {done.uri}: {done.machine_type or 'an old machine type'}, {done.run_state or 'running'},"
        f" {human(done.stream_bytes)} in {done.seconds:.1f} s; {told}"
    )
