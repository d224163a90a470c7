"""`migctl watch`: several machines on one screen; where there is no terminal, a line for each change."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
from typing import TYPE_CHECKING

import click

from whimbrel_cli import display, remote, units

if TYPE_CHECKING:
    from whimbrel_cli.looking import Look

_TICK = 0.1  # seconds between two looks at the keyboard
_BETWEEN = 1.0  # seconds between two drawings where nothing happens: for the clock, and a new size


@click.command(
    short_help="Watch several machines and their migrations.",
    epilog="""\b
Examples:
  $ migctl -m unix:/run/a.qmp -m unix:/run/b.qmp watch
  $ migctl -m unix:/run/a.qmp -m unix:/run/b.qmp watch --json | jq .""",
)
@click.option(
    "--interval",
    callback=units.option,
    default="1s",
    metavar="TIME",
    help="Between two looks at a machine.  [default: 1s]",
)
@remote.json_option
@click.pass_context
def watch(ctx: click.Context, interval: float, as_json: bool) -> None:
    """Show every machine that -m names: run state, migration, what is left, rates, expected downtime, time to go.

    q or Ctrl-C leaves; the space bar shows the next page. A machine that goes away is shown again when it is back.

    Each look connects, asks and leaves, because a QEMU's monitor serves one program at a time: other programs get in
    between, and one that stays (migctl migrate, libvirt) is told as such. Give such a QEMU a second -qmp for watch.

    Without a terminal, or with --json, each change is a line on standard output.
    """
    from whimbrel_cli.looking import Looker
    from whimbrel_cli.uris import parse_address

    if interval < _TICK:
        raise click.BadParameter(f"at least {units.time(_TICK)}", ctx, param_hint="--interval")
    machines = list(dict.fromkeys(remote.addresses(ctx)))
    for address in machines:
        parse_address(address)  # what names no monitor never will
    looks: queue.SimpleQueue[Look] = queue.SimpleQueue()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Looker(machines, interval, looks.put), contextlib.suppress(KeyboardInterrupt):
            if as_json or not (sys.stdout.isatty() and sys.stdin.isatty()):
                _lines(looks, as_json)
            else:
                _full_screen(machines, looks)
    finally:
        signal.signal(signal.SIGTERM, before)


def _lines(looks: queue.SimpleQueue[Look], as_json: bool) -> None:
    """A line for each change; as JSON also for each look at one that migrates."""
    import time

    from whimbrel_cli import screen

    seen: dict[str, object] = {}
    while True:
        look = looks.get()
        if look.state == seen.get(look.address) and not (as_json and look.migrates):
            continue
        seen[look.address] = look.state
        if as_json:
            remote.tell_json(
                {
                    "machine": look.address,
                    "run-state": look.run_state,
                    "trouble": look.trouble,
                    "reason": look.reason,
                    "migration": look.reading and display.members(look.reading),
                }
            )
        else:
            click.echo(f"{time.strftime('%H:%M:%S')} {screen.line(look)}")


def _full_screen(machines: list[str], looks: queue.SimpleQueue[Look]) -> None:
    import time

    from rich.console import Console
    from rich.live import Live

    from whimbrel_cli.screen import Screen
    from whimbrel_cli.terminal import keys

    console = Console(highlight=False)
    view = Screen(console, machines)
    with (
        keys(sys.stdin.fileno()) as key,
        Live(get_renderable=view.render, console=console, screen=True, auto_refresh=False) as live,
    ):
        drawn = 0.0
        while (pressed := key(_TICK)) not in ("q", "Q"):
            changed = False
            if pressed == " ":
                view.turn()
                changed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    view.show(looks.get_nowait())
                    changed = True
            if changed or time.monotonic() - drawn >= _BETWEEN:
                drawn = time.monotonic()
                live.refresh()
