"""What the commands on monitors share: which machines -m named, and how an answer is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from whimbrel_cli.logs import folded

if TYPE_CHECKING:
    from whimbrel_cli.monitor import Monitor

json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")


def addresses(ctx: click.Context) -> tuple[str, ...]:
    """What -m named, at least one. Raises click.UsageError."""
    from whimbrel_cli.app import Selection

    selection = ctx.find_object(Selection)
    named = tuple(selection.monitors) if selection is not None else ()
    if not named:
        raise click.UsageError(
            f"which machine? Name its monitor: migctl -m unix:/run/vm.qmp {ctx.info_name} ...", ctx
        )
    return named


def address(ctx: click.Context) -> str:
    """The one that -m named. Raises click.UsageError."""
    named = addresses(ctx)
    if len(named) > 1:
        raise click.UsageError(f"{ctx.info_name} drives one machine: give -m once", ctx)
    return named[0]


@contextmanager
def connected(ctx: click.Context) -> Iterator[Monitor]:
    """The monitor that -m named. Raises click.UsageError, Gone."""
    from whimbrel_cli.monitor import Monitor

    with Monitor(address(ctx)) as monitor:
        yield monitor


def tell_json(value: Any) -> None:
    """One line, so that a program reads line by line."""
    click.echo(json.dumps(value))


def tell_done(what: str, as_json: bool, **members: Any) -> None:
    if as_json:
        tell_json({"done": what, **members})
    else:
        say(what)


def say(text: str, indent: int = 0) -> None:
    """A sentence for people; see logs.folded."""
    click.echo(folded(text, sys.stdout, indent))
