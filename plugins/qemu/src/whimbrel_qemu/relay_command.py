"""`migctl relay`: the click command, and how it looks. Loaded by migctl only."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import click

from whimbrel_qemu import commands

if TYPE_CHECKING:
    from whimbrel.errors import OutcomeUnknown
    from whimbrel.wire.format import Dialect
    from whimbrel_qemu.relaying import Relayed


def _ask(as_json: bool) -> bool | None:
    """Does the destination run the machine? Without a terminal, wait for Ctrl-C; the source waits as long."""
    with contextlib.suppress(KeyboardInterrupt, click.Abort):
        if sys.stdin.isatty() and not as_json:
            return bool(
                click.confirm("Does the destination run the machine?", default=None, err=True)
            )
        signal.pause()
    return None


@click.command(
    short_help="Pass a migration on from one peer to another.",
    epilog="""\b
Example: a guest moves over a host that both sides reach.
  $ migctl relay tcp:0.0.0.0:4444 unix:/run/dst.sock --report
  (qemu) migrate tcp:relay:4444

\b
Over ssh, with a configuration of its own:
  $ migctl relay tcp:0.0.0.0:4444 ssh://dst/unix:/run/dst.sock --set ssh-config=lab.conf""",
)
@click.argument("source", metavar="IN")
@click.argument("destination", metavar="OUT")
@click.option("--report", is_flag=True, help="Show what passed, section by section.")
@commands.dialect_option
@commands.set_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def relay(
    *,
    source: str,
    destination: str,
    report: bool,
    dialect: Dialect | None,
    settings: dict[str, str],
    as_json: bool,
) -> None:
    """Listen at IN, take one migration, and pass it on to OUT, where a destination listens.

    Nothing is kept, and every section is checked before it goes on: a stream that is wrong ends here, and the source
    runs on. The destination's answers (QEMU's capability return-path) pass the other way.

    Ctrl-C leaves the machine with the source until the end of the stream has gone on; from there on the destination
    decides. If its answer is lost, the source is kept waiting until you say who has the machine (exit status 6).
    """
    from whimbrel_qemu.progress import Progress
    from whimbrel_qemu.relaying import relay as run

    progress = Progress()
    decided = False

    def listening(addresses: tuple[str, ...]) -> None:
        if as_json:
            commands.event("listening", addresses=addresses)
        else:
            click.echo(f"listening at {' '.join(addresses) or source}", err=True)

    def unknown(error: OutcomeUnknown) -> bool | None:
        nonlocal decided
        decided = True
        take_away()
        if as_json:
            commands.event("unknown", error=str(error))
        else:
            click.echo(f"migctl: {error}", err=True)
        return _ask(as_json)

    with commands.terminated_as_interrupted(), commands.shown(progress) as take_away:
        done = run(
            source,
            destination,
            dialect=dialect,
            settings=settings,
            on_listening=listening,
            on_unknown=unknown,
            progress=progress,
        )
    if as_json:
        _tell_json(done, report)
    else:
        _tell(done, report, decided)


def _tell_json(done: Relayed, report: bool) -> None:
    import attrs

    from whimbrel.wire import dialects

    more = {}
    if report:
        more = {
            "dialect": dialects.described(done.dialect),
            "blocks": [{"idstr": idstr, "bytes": size} for idstr, size in done.blocks],
            "sections": [attrs.asdict(section) for section in done.sections],
        }
    commands.event(
        "relayed",
        source=done.source,
        destination=done.destination,
        machine=done.machine_type,
        ram=sum(size for _, size in done.blocks),
        normal=done.normal,
        zero=done.zero,
        unverified_from=done.unverified_from,
        run_state=done.run_state,
        stream_bytes=done.stream_bytes,
        seconds=round(done.seconds, 3),
        downtime=None if done.downtime is None else round(done.downtime, 4),
        acknowledged=done.acknowledged,
        **more,
    )


def _tell(done: Relayed, report: bool, decided: bool) -> None:
    human = commands.human
    if report:
        _show(done)
    told = (
        "the destination has taken over"
        if done.acknowledged or decided
        else "the source did not ask the destination whether it has taken over"
    )
    click.echo(
        f"{done.source} -> {done.destination}: {done.machine_type or 'an old machine type'},"
        f" {done.run_state or 'running'}, {human(done.stream_bytes)} in {done.seconds:.1f} s; {told}"
    )
    if done.unverified_from is not None:
        click.echo(
            f"from section '{done.unverified_from}' on, the stream passed as it came: nobody here can read it",
            err=True,
        )


def _show(done: Relayed) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from whimbrel.wire import dialects

    human = commands.human
    table = Table(box=None, pad_edge=False)
    table.add_column("section", overflow="fold")
    for column in ("instance", "version"):
        table.add_column(column, justify="right")
    table.add_column("kind")
    table.add_column("size", justify="right")
    for section in done.sections:
        version = "?" if section.version_id is None else str(section.version_id)
        size = "?" if section.bytes is None else human(section.bytes)
        table.add_row(escape(section.idstr), str(section.instance_id), version, section.kind, size)
        if section.kind == "live":
            for idstr, block_size in done.blocks:
                table.add_row(f"  {escape(idstr)}", "", "", "RAMBlock", human(block_size))
    Console().print(table)
    form = [
        name.replace("_", " ") if value is True else f"{name} {value}"
        for name, value in dialects.described(done.dialect).items()
        if value
    ]
    click.echo(f"\nform of the stream: {', '.join(form)}")
    click.echo(f"pages: {done.normal}, and {done.zero} that are zero")
    if done.downtime is not None:
        click.echo(f"downtime as seen from here: {done.downtime * 1000:.0f} ms")
