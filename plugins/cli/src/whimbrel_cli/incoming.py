"""`migctl incoming`: tell a machine that waits for a migration where to listen, or listen in its place."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from whimbrel.errors import BlockedError, LocalError, StateError
from whimbrel_cli import remote, units, uris
from whimbrel_cli.logs import printable

if TYPE_CHECKING:
    from whimbrel_cli.bridging.client import Bridge
    from whimbrel_cli.monitor import Monitor

_POLL = 0.2  # seconds
_SETTLED = 3.0  # seconds, after which a monitor that does not answer is gone


@click.command(
    short_help="Tell a waiting machine where to listen for its migration.",
    epilog="""\b
Examples: a QEMU that was started with -incoming defer.
  $ migctl -m unix:/run/dst.qmp incoming tcp:0.0.0.0:4444
  $ migctl -m unix:/run/dst.qmp incoming zstd::tcp:0.0.0.0:4444""",
)
@click.argument("uri")
@click.option(
    "--survive",
    is_flag=True,
    help="Stay, and wait again, after a migration that failed (QEMU 9.1 and newer).",
)
@click.option(
    "--bridge",
    is_flag=True,
    help="Listen here, by a plugin, also where the machine speaks URI itself.",
)
@click.option(
    "--pump", is_flag=True, help="And pump, also where the machine could be given the descriptor."
)
@click.option("--detach", is_flag=True, help="When a plugin listens: do not wait for the end.")
@click.option(
    "--timeout",
    callback=units.option,
    metavar="TIME",
    help="When a plugin listens: so long it waits for a source, 10m.",
)
@remote.json_option
@click.pass_context
def incoming(
    ctx: click.Context,
    *,
    uri: str,
    survive: bool,
    bridge: bool,
    pump: bool,
    detach: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Let the machine listen at URI.

    At a URI that the machine does not speak itself, a transport plugin listens here (migctl --plugins lists them). The
    machine is given the connection over which a migration begins: the descriptor where it is one socket, else one end of
    a pump. migctl stays until the migration has ended; Ctrl-C, or a time-out, before somebody has connected leaves
    the machine as it was. From then on, Ctrl-C lets the migration go on by itself.
    """
    from whimbrel_cli.bridging import record

    with remote.connected(ctx) as monitor:
        if monitor.run_state() != "inmigrate":
            raise StateError(
                f"{monitor.address} waits for no migration: it is {monitor.run_state()}",
                hint="Start a QEMU with -incoming defer",
            )
        if bridge or pump or not uris.spoken_by(monitor, uri):
            _check(ctx, monitor, uri)
        else:
            arguments: dict[str, Any] = {"uri": uri}
            if survive:
                arguments["exit-on-error"] = False
            record.forget(monitor.address)
            monitor.execute("migrate-incoming", arguments)
            listening = _addresses(monitor.migration()) or [uri]
            remote.tell_done(f"listening at {' '.join(listening)}", as_json, addresses=listening)
            return
    from whimbrel.channel import Role
    from whimbrel_cli.app import Selection
    from whimbrel_cli.bridging.client import Bridge

    make = functools.partial(
        Bridge,
        Role.DESTINATION,
        uri,
        remote.address(ctx),
        ctx.ensure_object(Selection),
        pump=pump,
        survive=survive,
        timeout=timeout,
    )
    _bridge(make, detach=detach, survive=survive, as_json=as_json)


def _addresses(migration: dict[str, Any]) -> list[str]:
    """Where it listens, a port 0 being the one that was given."""
    found = list(migration.get("x-addresses", ()))
    for address in migration.get("socket-address", ()):
        if address.get("type") == "inet":
            host = address["host"]
            found.append(f"tcp:{f'[{host}]' if ':' in host else host}:{address['port']}")
        elif address.get("type") == "unix":
            found.append(f"unix:{address['path']}")
    return list(dict.fromkeys(found))  # an app gives both


# ---- a plugin listens


def _check(ctx: click.Context, monitor: Monitor, uri: str) -> None:
    """Raises BlockedError with all reasons against it."""
    from whimbrel_cli import preflight
    from whimbrel_cli.app import Selection

    found = list(preflight.against_bridge(monitor, uri, ctx.ensure_object(Selection).plugins))
    if uris.same(uri, monitor.address):
        found.append(f"{uri} is the monitor of {monitor.address}, no place to listen at")
    migration = monitor.migration()
    if "status" in migration or "socket-address" in migration:
        found.append(
            "it listens already, or has refused a migration: start it anew with -incoming defer"
        )
    if found:
        raise BlockedError([printable(reason) for reason in found])


def _bridge(make: Callable[[], Bridge], *, detach: bool, survive: bool, as_json: bool) -> None:
    with make() as bridge:
        try:
            listening = _await(bridge, "listening")["addresses"]
            text = f"listening at {' '.join(listening) or bridge.uri}"
            if detach:
                bridge.begun()
                remote.tell_done(text, as_json, addresses=listening)
                return
            _tell("listening", text, as_json, addresses=listening)
            _await(bridge, "open")
        except KeyboardInterrupt:
            if bridge.give_up():
                raise
            remote.tell_done("too late, a source has connected; the migration goes on", as_json)
            return
        except BaseException:
            bridge.give_up()
            raise
        _tell("connected", f"a source has connected: by {bridge.form}", as_json, form=bridge.form)
        try:
            run_state = _follow(bridge.monitor, survive)
        except KeyboardInterrupt:
            remote.tell_done("detached; the migration goes on", as_json)
            return
    remote.tell_done(f"the machine is {run_state}", as_json, **{"run-state": run_state})


def _await(bridge: Bridge, event: str) -> dict[str, Any]:
    while True:
        message = bridge.receive()
        if message is not None and message["event"] == event:
            return message


def _tell(event: str, text: str, as_json: bool, **members: Any) -> None:
    if as_json:
        remote.tell_json({"event": event, **members})
    else:
        click.echo(text, err=True)


def _again(address: str) -> Monitor:
    """The monitor that the bridge has just left: a QEMU that loads may need a moment until it takes the next program."""
    from whimbrel_cli.monitor import Gone, Monitor

    until = time.monotonic() + _SETTLED
    while True:
        try:
            return Monitor(address)
        except Gone:
            if time.monotonic() > until:
                raise
            time.sleep(_POLL)


def _follow(address: str, survive: bool) -> str:
    """Until the machine waits no more; its run state. Raises LocalError: the migration failed."""
    from whimbrel_cli.monitor import Gone

    try:
        with _again(address) as monitor:
            while True:
                if (run_state := monitor.run_state()) != "inmigrate":
                    return run_state
                migration = monitor.migration()
                if migration.get("status") == "failed":
                    why = printable(str(migration.get("error-desc", "its own log says why")))
                    again = "It waits again" if survive else "Start it anew"
                    raise LocalError(f"the migration failed: {why}", hint=again)
                time.sleep(_POLL)
    except Gone as error:
        raise LocalError(
            f"the migration failed: {error}", hint="Its own log says why; start it anew"
        ) from error
