"""`migctl incoming`: tell a machine that waits for a migration where to listen."""

from __future__ import annotations

from typing import Any

import click

from whimbrel.errors import StateError
from whimbrel_cli import remote


@click.command(
    short_help="Tell a waiting machine where to listen for its migration.",
    epilog="""\b
Example: a QEMU that was started with -incoming defer.
  $ migctl -m unix:/run/dst.qmp incoming tcp:0.0.0.0:4444""",
)
@click.argument("uri")
@click.option(
    "--survive",
    is_flag=True,
    help="Stay, and wait again, after a migration that failed (QEMU 9.1 and newer).",
)
@remote.json_option
@click.pass_context
def incoming(ctx: click.Context, uri: str, survive: bool, as_json: bool) -> None:
    """Let the machine listen at URI."""
    with remote.connected(ctx) as monitor:
        run_state = monitor.run_state()
        if run_state != "inmigrate":
            raise StateError(
                f"{monitor.address} waits for no migration: it is {run_state}",
                hint="Start a QEMU with -incoming defer",
            )
        arguments: dict[str, Any] = {"uri": uri}
        if survive:
            arguments["exit-on-error"] = False
        monitor.execute("migrate-incoming", arguments)
        listening = _addresses(monitor.migration()) or [uri]
    remote.tell_done(f"listening at {' '.join(listening)}", as_json, addresses=listening)


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
