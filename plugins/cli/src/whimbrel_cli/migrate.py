"""`migctl migrate`: begin a migration, show it, and end with a status that tells how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from whimbrel.errors import BlockedError
from whimbrel_cli import remote, units

if TYPE_CHECKING:
    from whimbrel_cli.monitor import Monitor
    from whimbrel_cli.watching import Limits


@click.command(
    short_help="Migrate a machine, and watch it go.",
    epilog="""\b
Examples:
  $ migctl -m unix:/run/src.qmp migrate tcp:host2:4444
  $ migctl -m unix:/run/src.qmp migrate --dry-run -d unix:/run/dst.qmp unix:/run/dst.sock
  $ migctl -m unix:/run/src.qmp migrate --timeout 30m --on-timeout pause tcp:host2:4444""",
)
@click.argument("uri")
@click.option(
    "-d",
    "--destination",
    metavar="unix:PATH|HOST:PORT",
    help="The monitor of the destination: compared with the source before anything is begun.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only list the reasons against it.")
@click.option("--detach", is_flag=True, help="Begin, and do not wait for the end.")
@click.option(
    "--timeout", callback=units.option, metavar="TIME", help="How long it may take: 30m, 90s."
)
@click.option(
    "--on-timeout",
    type=click.Choice(["cancel", "pause", "ignore"]),
    default="cancel",
    show_default=True,
    help="What happens then. pause: the machine is paused, so that it ends.",
)
@click.option(
    "--stall",
    callback=units.option,
    metavar="TIME",
    help="Cancel when for so long no less was left to send than before: 150s.",
)
@remote.json_option
@click.pass_context
def migrate(
    ctx: click.Context,
    *,
    uri: str,
    destination: str | None,
    dry_run: bool,
    detach: bool,
    timeout: float | None,
    on_timeout: str,
    stall: float | None,
    as_json: bool,
) -> None:
    """Migrate the machine to URI, where a destination listens.

    Everything that is known to stand against it is listed first, and then nothing is begun (exit status 3).

    Ctrl-C asks whether to cancel the migration or to leave it to itself; where there is no terminal, it cancels.
    """
    from whimbrel_cli.watching import Limits, OnTimeout

    limits = Limits(timeout=timeout, on_timeout=OnTimeout(on_timeout), stall=stall)
    with remote.connected(ctx) as source:
        _check(ctx, source, uri, destination)
        if dry_run:
            remote.tell_done("nothing is known against it", as_json)
            return
        acknowledged = source.capabilities().get("return-path", False)
        if detach:
            source.execute("migrate", {"uri": uri})
            remote.tell_done("begun; migctl status tells how it goes on", as_json)
            return
        _watch(source, uri, limits, acknowledged=acknowledged, as_json=as_json)


def _check(ctx: click.Context, source: Monitor, uri: str, destination: str | None) -> None:
    """Raises BlockedError with all reasons."""
    from whimbrel_cli import preflight
    from whimbrel_cli.app import Selection
    from whimbrel_cli.monitor import Monitor

    plugins = ctx.ensure_object(Selection).plugins
    if destination is None:
        found = preflight.reasons(source, uri, plugins=plugins)
    else:
        from whimbrel_cli import uris

        if uris.same(destination, source.address):
            raise BlockedError(["source and destination are the same machine"])
        with Monitor(destination) as other:
            found = preflight.reasons(source, uri, plugins=plugins, destination=other)
    if found:
        raise BlockedError(found)


def _watch(source: Monitor, uri: str, limits: Limits, *, acknowledged: bool, as_json: bool) -> None:
    from whimbrel_cli import display as displays
    from whimbrel_cli.control import raise_unless_completed
    from whimbrel_cli.watching import Detached, follow

    with displays.choose(f"{source.address} -> {uri}", as_json=as_json) as display:
        try:
            migration = follow(
                source, display, limits, lambda: source.execute("migrate", {"uri": uri})
            )
        except Detached:
            display.hide()
            remote.tell_done("detached; the migration goes on", as_json)
            return
    raise_unless_completed(migration, source.address)
    acknowledged = migration.get("x-acknowledged", acknowledged)
    if as_json:
        remote.tell_json({"event": "completed", "acknowledged": acknowledged, **migration})
        return
    told = (
        "the destination has taken over"
        if acknowledged
        else "the destination was not asked whether it has taken over (capability return-path)"
    )
    remote.say(f"{displays.summary(migration)}; {told}")
