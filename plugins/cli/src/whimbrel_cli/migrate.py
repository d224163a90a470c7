"""`migctl migrate`: begin a migration, show it, and end with a status that tells how it went."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from whimbrel.errors import BlockedError
from whimbrel_cli import remote, units, uris
from whimbrel_cli.logs import printable

if TYPE_CHECKING:
    from whimbrel_cli.bridging.client import Bridge
    from whimbrel_cli.monitor import Monitor
    from whimbrel_cli.watching import Limits

#: Seconds after which it is said that something is waited for.
_SOON = 1.0


@click.command(
    short_help="Migrate a machine, and watch it go.",
    epilog="""\b
Examples:
  $ migctl -m unix:/run/src.qmp migrate tcp:host2:4444
  $ migctl -m unix:/run/src.qmp migrate --dry-run -d unix:/run/dst.qmp unix:/run/dst.sock
  $ migctl -m unix:/run/src.qmp migrate zstd::tcp:host2:4444
  $ migctl -m unix:/run/src.qmp migrate --timeout 30m --on-timeout pause tcp:host2:4444""",
)
@click.argument("uri")
@click.option(
    "-d",
    "--destination",
    metavar="unix:PATH|HOST:PORT",
    help="The monitor of the destination: compared with the source before anything is begun.",
)
@click.option(
    "--bridge",
    is_flag=True,
    help="Open the channel here, by a plugin, also where the machine speaks URI itself.",
)
@click.option(
    "--pump", is_flag=True, help="And pump, also where the machine could be given the descriptor."
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
@click.option("--blk", is_flag=True, help="Copy the disks as well (QEMU before 9.1, and apps).")
@click.option(
    "--inc", is_flag=True, help="Of the disks, copy what differs from a base that both sides have."
)
@remote.json_option
@click.pass_context
def migrate(
    ctx: click.Context,
    *,
    uri: str,
    destination: str | None,
    bridge: bool,
    pump: bool,
    dry_run: bool,
    detach: bool,
    timeout: float | None,
    on_timeout: str,
    stall: float | None,
    blk: bool,
    inc: bool,
    as_json: bool,
) -> None:
    """Migrate the machine to URI, where a destination listens.

    A URI that the machine does not speak itself is opened here, by a transport plugin (migctl --plugins lists them), and
    handed to the machine: the descriptor where the channel is one socket, else one end of a pump, a process that
    does not end with migctl. That needs the machine's monitor at a UNIX socket on this host.

    Everything that is known to stand against it is listed first, and then nothing is begun (exit status 3).

    Ctrl-C asks whether to cancel the migration or to leave it to itself; where there is no terminal, it cancels.
    """
    from whimbrel_cli.watching import Limits, OnTimeout

    limits = Limits(timeout=timeout, on_timeout=OnTimeout(on_timeout), stall=stall)
    force = bridge or pump
    disks = {name: True for name, wanted in (("blk", blk), ("inc", inc)) if wanted}
    with remote.connected(ctx) as source:
        _check(ctx, source, uri, destination, force_bridge=force, disks=bool(disks))
        if dry_run:
            remote.tell_done("nothing is known against it", as_json)
            return
        acknowledged = source.capabilities().get("return-path", False)
        with contextlib.ExitStack() as stack:
            way = None
            if force or not uris.spoken_by(source, uri):
                way = stack.enter_context(_bridged(ctx, source, uri, pump, acknowledged))
            if detach:
                _begin(source, uri, way, disks)
                more = {} if way is None else {"bridge": way.form}
                remote.tell_done("begun; migctl status tells how it goes on", as_json, **more)
                return
            _watch(
                *(source, uri, limits, way), disks=disks, acknowledged=acknowledged, as_json=as_json
            )


def _begin(source: Monitor, uri: str, way: Bridge | None, disks: dict[str, bool]) -> None:
    from whimbrel_cli.bridging import record

    if way is None:
        record.forget(source.address)
        source.execute("migrate", {"uri": uri, **disks})
    else:
        way.migrate(source, disks)


@contextlib.contextmanager
def _bridged(
    ctx: click.Context, source: Monitor, uri: str, pump: bool, wants_answers: bool
) -> Iterator[Bridge]:
    """A channel that a plugin has opened. Whatever is raised before the migration begins closes it."""
    from whimbrel.channel import Role
    from whimbrel_cli.app import Selection
    from whimbrel_cli.bridging.client import Bridge

    with Bridge(
        Role.SOURCE, uri, source.address, ctx.ensure_object(Selection), pump=pump
    ) as bridge:
        try:
            if not bridge.await_open(_SOON):
                click.echo(f"migctl: connecting to {printable(uri)} ...", err=True)
                bridge.await_open()
            if wants_answers and not bridge.has_way_back:
                raise BlockedError(
                    [f"the capability return-path is on, and {uri} has no way back: switch it off"]
                )
        except BaseException:
            bridge.give_up()
            raise
        yield bridge


def _check(
    ctx: click.Context,
    source: Monitor,
    uri: str,
    destination: str | None,
    *,
    force_bridge: bool,
    disks: bool,
) -> None:
    """Raises BlockedError with all reasons."""
    from whimbrel_cli import preflight
    from whimbrel_cli.app import Selection
    from whimbrel_cli.monitor import Monitor

    plugins = ctx.ensure_object(Selection).plugins
    if destination is None:
        found = preflight.reasons(
            source, uri, plugins=plugins, force_bridge=force_bridge, disks=disks
        )
    else:
        if uris.same(destination, source.address):
            raise BlockedError(["source and destination are the same machine"])
        with Monitor(destination) as other:
            found = preflight.reasons(
                *(source, uri),
                plugins=plugins,
                destination=other,
                force_bridge=force_bridge,
                disks=disks,
            )
    if found:
        raise BlockedError(found)


def _watch(
    source: Monitor,
    uri: str,
    limits: Limits,
    way: Bridge | None,
    *,
    disks: dict[str, bool],
    acknowledged: bool,
    as_json: bool,
) -> None:
    from whimbrel_cli import display as displays
    from whimbrel_cli.control import raise_unless_completed
    from whimbrel_cli.watching import Detached, follow

    by = "" if way is None else f" by {way.form}"
    with displays.choose(f"{source.address} -> {uri}{by}", as_json=as_json) as display:
        try:
            migration = follow(
                source,
                display,
                limits,
                lambda: _begin(source, uri, way, disks),
                lambda: None if way is None else way.watch(source),
            )
        except Detached:
            display.hide()
            remote.tell_done("detached; the migration goes on", as_json)
            return
    if way is not None:
        way.end(source)
        migration = way.explained(migration)
    raise_unless_completed(migration, source.address)
    acknowledged = migration.get("x-acknowledged", acknowledged)
    if as_json:
        more = {} if way is None else {"bridge": way.figures}
        remote.tell_json({"event": "completed", "acknowledged": acknowledged, **migration, **more})
        return
    told = (
        "the destination has taken over"
        if acknowledged
        else "the destination was not asked whether it has taken over (capability return-path)"
    )
    remote.say(f"{displays.summary(migration)}; {told}")
