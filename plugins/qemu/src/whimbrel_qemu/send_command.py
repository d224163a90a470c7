"""`migctl send`: the click command, and how it looks. Loaded by migctl only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from whimbrel_qemu import commands

if TYPE_CHECKING:
    from rich.console import RenderableType

    from whimbrel.wire.format import Dialect
    from whimbrel_qemu.comparing import Comparison
    from whimbrel_qemu.guest import Guest
    from whimbrel_qemu.refusal import Refused

_COLOURS = {"refused": "red", "silent": "yellow", "doubtful": "yellow"}


@click.command(
    short_help="Put a machine kept in a file into a QEMU with -incoming.",
    epilog="""\b
Examples:
  $ qemu-system-x86_64 ... -incoming unix:/run/dst.sock 2>dst.log
  $ migctl send guest.mig unix:/run/dst.sock --log dst.log

\b
To another host, with a configuration of its own for ssh:
  $ migctl send guest.mig ssh://dst/unix:/run/dst.sock --set ssh-config=lab.conf

\b
Into another version of QEMU: would it take the guest? A machine that never ran tells.
  $ printf 'migrate "exec:cat >other.mig"\\nquit\\n' | qemu-system-x86_64 ... -S -monitor stdio
  $ migctl send guest.mig --against other.mig --dry-run

\b
With a monitor, a QEMU of 9.1 or newer outlives what it refuses:
  $ qemu-system-x86_64 ... -incoming defer -qmp unix:/run/dst.qmp,server=on,wait=off
  $ migctl send guest.mig unix:/run/dst.sock --monitor /run/dst.qmp

The QEMU at the other end is started with the same machine type and devices as the source was; its version may be
another.""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("uri", required=False)
@click.option(
    "--return-path/--no-return-path",
    default=True,
    help="Ask the destination how far it got and whether it has taken over, where the transport has a way back."
    "  [default: ask]",
)
@click.option(
    "--bandwidth",
    callback=commands.size,
    default="0",
    metavar="SIZE",
    help="Bytes per second.  [default: unlimited]",
)
@click.option(
    "--against",
    metavar="FILE|URI",
    help="Compare the guest first with that of another QEMU: a file, or what a source sends to URI. Nothing is sent"
    " that would be refused.",
)
@click.option("--dry-run", is_flag=True, help="Send nothing: only read FILE, and compare.")
@click.option(
    "--monitor",
    metavar="PATH|HOST:PORT",
    help="QMP of the destination: asked before whether it fits, and afterwards why it refused.",
)
@click.option(
    "--log",
    "log_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the destination's standard error output goes: its own words, explained.",
)
@commands.dialect_option
@commands.set_option
@commands.json_option
def send(
    *,
    file: Path,
    uri: str | None,
    return_path: bool,
    bandwidth: int,
    against: str | None,
    dry_run: bool,
    monitor: str | None,
    log_file: Path | None,
    dialect: Dialect | None,
    settings: dict[str, str],
    as_json: bool,
) -> int:
    """Put the machine in FILE into the destination that listens at URI.

    The destination starts it if it ran when it was received. FILE is only read, so that it can be sent again; do not
    run two copies of a machine that shares a disk or a network.

    A destination that refuses the machine is explained: the section, the field, what to do. By itself it only answers
    up to which section it got; --log has its own words.
    """
    from whimbrel_qemu.progress import Progress
    from whimbrel_qemu.sending import load, send as run

    if uri is None and not dry_run:
        raise click.UsageError("URI is missing: where the destination listens (or --dry-run)")
    other = _other(against, settings) if against is not None else None
    if dry_run:
        return _try(file, load(file, dialect=dialect), other, as_json)
    assert uri is not None
    progress = Progress()
    with (
        commands.terminated_as_interrupted(),
        commands.error_told_once(),
        _refusals_shown(as_json),
        commands.shown(progress),
    ):
        done = run(
            file,
            uri,
            return_path=return_path,
            max_bandwidth=bandwidth,
            dialect=dialect,
            against=other,
            monitor=monitor,
            log_file=log_file,
            settings=settings,
            progress=progress,
        )
    if done.comparison is not None:
        show_comparison(done.comparison, as_json=as_json, err=True)
    if as_json:
        commands.event(
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
        return 0
    told = (
        "the destination has taken over"
        if done.acknowledged
        else "all was sent, and nobody asked the destination whether it has taken over"
    )
    click.echo(
        f"{done.path} -> {done.uri}: {done.machine_type or 'an old machine type'}, {done.run_state or 'running'},"
        f" {commands.human(done.stream_bytes)} in {done.seconds:.1f} s; {told}"
    )
    return 0


def _other(against: str, settings: dict[str, str]) -> Guest:
    """The guest to compare with. A file of that name comes before a URI."""
    from whimbrel_qemu.sending import load, sample

    if Path(against).exists() or ":" not in against:
        return load(against)
    return sample(against, settings=settings)


def _try(file: Path, guest: Guest, other: Guest | None, as_json: bool) -> int:
    """The dry run. Status 1 where something would be refused."""
    from whimbrel_qemu.comparing import Comparison, compare

    comparison = compare(guest, other) if other is not None else Comparison(())
    if other is not None:
        show_comparison(comparison, as_json=as_json, err=False)
    if not as_json:
        devices = "?" if guest.sections is None else guest.sections
        what = (
            f"{guest.machine_type or 'an old machine type'}, {guest.run_state or 'running'},"
            f" {commands.human(guest.ram_bytes)} RAM, {devices} device sections"
        )
        verdict = _verdict(comparison) if other is not None else "it can be sent"
        click.echo(f"{file}: {what}; {verdict}")
    return 1 if comparison.refused else 0


def _verdict(comparison: Comparison) -> str:
    n = len(comparison.refused)
    if n:
        return f"the destination would refuse it: {n} {'reason' if n == 1 else 'reasons'}"
    if comparison.differences:
        return "nothing that is sure to be refused"
    return "nothing differs"


# ---- how differences and refusals look


def show_comparison(comparison: Comparison, *, as_json: bool, err: bool) -> None:
    """A line of JSON, or a table and what to do about what would be refused; nothing where nothing differs."""
    if as_json:
        commands.event(
            "compared",
            refused=len(comparison.refused),
            differences=[
                attrs.asdict(d) | {"verdict": d.verdict.value} for d in comparison.differences
            ],
        )
        return
    if not comparison.differences:
        return
    from rich.console import Console

    console = Console(stderr=err, highlight=False)
    console.print(_table(comparison))
    hints = dict.fromkeys(d.hint for d in comparison.refused if d.hint)
    for hint in hints:
        click.echo(f"- {_plain(hint)}", err=err)


def _table(comparison: Comparison) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("verdict", "section", "field", "difference"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "verdict")
    for d in comparison.differences:
        section = f"{d.section} {d.instance_id}" if d.instance_id else d.section
        verdict = Text(d.verdict.value, style=_COLOURS.get(d.verdict.value, ""))
        table.add_row(verdict, *(Text(_plain(t)) for t in (section, d.field or "-", d.what)))
    return table


@contextlib.contextmanager
def _refusals_shown(as_json: bool) -> Iterator[None]:
    """What the one line of the error leaves out: the table of what differs, the destination's own words."""
    from whimbrel_qemu.refusal import Refused
    from whimbrel_qemu.sending import Incompatible

    try:
        yield
    except Incompatible as error:
        show_comparison(error.comparison, as_json=as_json, err=True)
        raise
    except Refused as error:
        _show_refusal(error, as_json)
        raise


def _show_refusal(error: Refused, as_json: bool) -> None:
    if as_json:
        commands.event(
            "refused",
            section=error.section,
            instance=error.instance_id,
            field=error.field,
            offset=error.offset,
            reason=error.what,
            hint=error.hint,
            words=list(error.words),
        )
    elif error.words:
        click.echo("the destination's own words:", err=True)
        for line in error.words:
            click.echo(f"  {_plain(line)}", err=True)


def _plain(text: str) -> str:
    """Names come from files, words from peers: no terminal is to obey them."""
    return "".join(c if c.isprintable() else "?" for c in text)
