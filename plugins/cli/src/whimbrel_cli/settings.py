"""`migctl set`, `caps` and `params`: settings of a machine by its monitor, with units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from whimbrel_cli import remote, units

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: What people say → what the monitor says.
SHORT = {
    "bandwidth": "max-bandwidth",
    "downtime": "downtime-limit",
    "cache-size": "xbzrle-cache-size",
    "postcopy-bandwidth": "max-postcopy-bandwidth",
}
_RATES = (
    "max-bandwidth",
    "avail-switchover-bandwidth",
    "max-postcopy-bandwidth",
)
_SIZES = ("xbzrle-cache-size", "x-rdma-chunk-size")
_MILLISECONDS = (
    "downtime-limit",
    "announce-initial",
    "announce-max",
    "announce-step",
    "x-checkpoint-delay",
    "x-vcpu-dirty-limit-period",
    "commit-timeout",
)
_PERCENT = (
    "throttle-trigger-threshold",
    "cpu-throttle-initial",
    "cpu-throttle-increment",
    "max-cpu-throttle",
)
_UNLIMITED = ("max-bandwidth", "max-postcopy-bandwidth")
_DIGITS = 20  # of 2**64
_SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def to_wire(name: str, text: str, present: Any) -> Any:
    """The text as the monitor wants it; `present`, the value now, shows its type. Raises click.BadParameter."""
    from whimbrel.settings import parse_duration, parse_size

    try:
        if name in _RATES and text in ("unlimited", "none"):
            return 0
        if name in _RATES or name in _SIZES:
            return parse_size(text)
        if name in _MILLISECONDS:
            return parse_duration(text)
        if isinstance(present, bool):
            return _switch(text)
        if isinstance(present, int):
            return _whole(text)
    except ValueError as error:
        raise click.BadParameter(f"{name}: {error}") from error
    return text


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise ValueError(f"'{text}' is not a whole number")
    return int(text)


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(f"'{text}' is neither on nor off")
    return _SWITCH[text.lower()]


def to_people(name: str, value: Any) -> str:
    """A value with its unit."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if name in _UNLIMITED and value == 0:
        return "unlimited"
    if name == "avail-switchover-bandwidth" and value == 0:
        return "as measured"
    if name in _RATES:
        return f"{units.size(value)}/s"
    if name in _SIZES:
        return units.size(value)
    if name in _MILLISECONDS:
        return f"{value} ms"
    if name in _PERCENT:
        return f"{value} %"
    return str(value) if value != "" else "-"


def _complete_name(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from whimbrel_cli import completing

    known = completing.ask(ctx, lambda monitor: monitor.parameters())
    return completing.starting(incomplete, {*SHORT, *known})


def _complete_value(
    ctx: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from whimbrel_cli import completing

    name = SHORT.get(ctx.params["name"], ctx.params["name"])
    if name in _UNLIMITED:
        return completing.starting(incomplete, ("unlimited",))
    present = completing.ask(ctx, lambda monitor: monitor.parameters()).get(name)
    return completing.starting(incomplete, ("on", "off") if isinstance(present, bool) else ())


def _complete_change(
    ctx: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from whimbrel_cli import completing

    known = completing.ask(ctx, lambda monitor: monitor.capabilities())
    return completing.starting(
        incomplete, [f"{name}={'off' if is_on else 'on'}" for name, is_on in known.items()]
    )


def _print_pairs(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


@click.command(
    name="set",
    short_help="Set a parameter of a machine's migrations.",
    epilog="""\b
Examples:
  $ migctl -m unix:/run/src.qmp set downtime 200ms
  $ migctl -m unix:/run/src.qmp set bandwidth 500MiB/s
  $ migctl -m unix:/run/src.qmp set bandwidth unlimited
  $ migctl -m unix:/run/src.qmp set multifd-channels 4""",
)
@click.argument("name", shell_complete=_complete_name)
@click.argument("value", shell_complete=_complete_value)
@remote.json_option
@click.pass_context
def set_(ctx: click.Context, name: str, value: str, as_json: bool) -> None:
    """Set parameter NAME to VALUE: at once where one may be changed while a migration runs.

    bandwidth, downtime, cache-size and postcopy-bandwidth stand for the monitor's long names; `migctl params` lists all.
    Units of sizes are powers of 1024: 500MiB/s, 2G. Times: 300ms, 0.5s.
    """
    with remote.connected(ctx) as monitor:
        full = SHORT.get(name, name)
        before = monitor.parameters()
        if full not in before:
            from whimbrel.errors import SettingError
            from whimbrel_cli.app import similar

            raise SettingError(
                f"{monitor.address} has no parameter '{full}'",
                hint=f"{similar(name, [*SHORT, *before])} migctl params lists all".lstrip(),
            )
        monitor.execute("migrate-set-parameters", {full: to_wire(full, value, before[full])})
        now = monitor.parameters()[full]
    remote.tell_done(f"{full} is {to_people(full, now)}", as_json, parameter=full, value=now)


@click.command(
    short_help="Show the parameters of a machine's migrations.",
    epilog="Example: migctl -m unix:/run/src.qmp params",
)
@remote.json_option
@click.pass_context
def params(ctx: click.Context, as_json: bool) -> None:
    """Show every parameter with its unit; `migctl set` changes one."""
    with remote.connected(ctx) as monitor:
        values = monitor.parameters()
    if as_json:
        remote.tell_json(values)
    else:
        _print_pairs([(name, to_people(name, value)) for name, value in sorted(values.items())])


def _check(address: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raises SettingError."""
    from whimbrel.errors import SettingError
    from whimbrel_cli.app import similar

    for name in wanted:
        if name not in known:
            raise SettingError(
                f"{address} has no capability '{name}'",
                hint=f"{similar(name, known)} migctl caps lists all".lstrip(),
            )


@click.command(
    short_help="Show or switch the capabilities of a machine's migrations.",
    epilog="""\b
Examples:
  $ migctl -m unix:/run/src.qmp caps
  $ migctl -m unix:/run/src.qmp caps xbzrle=on auto-converge=on""",
)
@click.argument("changes", nargs=-1, metavar="[NAME=on|off]...", shell_complete=_complete_change)
@remote.json_option
@click.pass_context
def caps(ctx: click.Context, changes: tuple[str, ...], as_json: bool) -> None:
    """Show the capabilities; with NAME=on or NAME=off, switch them first: all of them, or none."""
    wanted = {}
    for change in changes:
        name, equals, text = change.partition("=")
        try:
            if not (name and equals):
                raise ValueError(f"'{change}' is not NAME=on or NAME=off")
            wanted[name] = _switch(text)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx) from error
    with remote.connected(ctx) as monitor:
        now = monitor.capabilities()
        if wanted:
            _check(monitor.address, wanted, now)
            monitor.set_capabilities(wanted)
            now = monitor.capabilities()
    if as_json:
        remote.tell_json(now)
    else:
        shown = {n: s for n, s in now.items() if n in wanted} if wanted else now
        _print_pairs([(name, to_people(name, state)) for name, state in sorted(shown.items())])
