"""`migctl plan`: what a machine writes, measured, and what link it has: how a migration would go, before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from whimbrel.errors import BlockedError, LocalError
from whimbrel_cli import remote, units, uris
from whimbrel_cli.logs import printable
from whimbrel_cli.planning import Link, Plan, make, measure, needs
from whimbrel_cli.progress import ENDED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whimbrel_cli.monitor import Monitor

_MIB = 1 << 20
_LONGEST = 2000  # seconds that downtime-limit may be
_SLOWEST = 99  # percent of its time that a machine can be made to rest

# ---- the command


@click.command(
    short_help="Ask, before it begins, how a migration would go.",
    epilog="""\b
Examples:
  $ migctl -m unix:/run/src.qmp plan
  $ migctl -m unix:/run/src.qmp plan --bandwidth 10Gbit/s tcp:host2:4444
  $ migctl -m unix:/run/src.qmp plan --seconds 10 --downtime-limit 500ms --json""",
)
@click.argument("uri", required=False)
@click.option(
    "--bandwidth",
    callback=units.rate_option,
    metavar="RATE",
    help="What the link takes: 10Gbit/s, or 1.2GiB/s (10G is 10 GiB/s).  [default: max-bandwidth of the"
    " machine]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 60),
    default=3.0,
    show_default=True,
    help="How long to measure.",
)
@click.option(
    "--downtime-limit",
    "limit",
    callback=units.limit_option,
    metavar="TIME",
    help="How long the machine may stand still: 300ms.  [default: downtime-limit of the machine]",
)
@click.option(
    "--used",
    callback=units.size_option,
    metavar="SIZE",
    help="How much of the memory is in use; zero pages cost next to nothing.  [default: of an app measured, of a"
    " QEMU all of it]",
)
@remote.json_option
@click.pass_context
def plan(
    ctx: click.Context,
    *,
    uri: str | None,
    bandwidth: float | None,
    seconds: float,
    limit: float | None,
    used: int | None,
    as_json: bool,
) -> None:
    """Measure how fast the machine writes its memory, and tell how a migration would go: passes, time, downtime; or that it
    would not converge, by what factor, and what would let it. Nothing is begun, and the machine is not disturbed: its
    memory is sampled, not tracked.

    With URI, what is known to stand against a migration to it is looked for first (exit status 3).

    The exit status is 4 where it would not converge.
    """
    with remote.connected(ctx) as monitor:
        _check(ctx, monitor, uri)
        parameters = monitor.parameters()
        link = _link(ctx, parameters, bandwidth)
        if limit is None:
            limit = parameters.get("downtime-limit", 300) / 1000
        if not as_json:
            click.echo(
                f"migctl: measuring what the machine writes, for {units.time(seconds)} ...",
                err=True,
            )
        found = make(measure(monitor, seconds, limit), link, limit, used)
        allowed = parameters.get("max-bandwidth", 0)
        notes = list(_notes(monitor, found, allowed))
        advice = list(_advice(monitor, found, allowed))
    if as_json:
        remote.tell_json(members(found, notes, [command for command, _ in advice]))
    else:
        _tell(found, notes, advice)
    if found.converges is False:
        from whimbrel_cli.exits import Exit

        ctx.exit(Exit.NOT_CONVERGING)


def _check(ctx: click.Context, monitor: Monitor, uri: str | None) -> None:
    """Raises LocalError and BlockedError."""
    run_state, migration = monitor.run_state(), monitor.migration()
    status = migration.get("status", "none")
    if run_state in ("inmigrate", "postmigrate"):
        raise LocalError(
            f"there is nothing to plan: the machine is not here, it is {run_state}",
            hint="Ask the monitor of the side where it runs",
        )
    if status not in (*ENDED, "none"):
        raise LocalError(
            f"a migration is in progress ({status}), and tells its own forecast",
            hint="Look at it with migctl status, or migctl watch",
        )
    if uri is not None:
        from whimbrel_cli import preflight
        from whimbrel_cli.app import Selection

        if reasons := preflight.reasons(monitor, uri, plugins=ctx.ensure_object(Selection).plugins):
            raise BlockedError(reasons)
    if not monitor.has("calc-dirty-rate"):
        raise LocalError(
            f"{monitor.address} cannot measure what the machine writes",
            hint="QEMU can since 5.2, and an app with the plugin whimbrel-ram",
        )


def _link(ctx: click.Context, parameters: dict[str, Any], given: float | None) -> Link:
    """Raises click.UsageError where it is not known."""
    if given is not None:
        return Link(bandwidth=given, by="option", told="--bandwidth")
    if allowed := parameters.get("max-bandwidth"):
        return Link(bandwidth=allowed, by="max-bandwidth", told="max-bandwidth of the machine")
    raise click.UsageError(
        "how fast is the link? max-bandwidth is unlimited, so say it: --bandwidth 10Gbit/s",
        ctx,
    )


# ---- judging


def _notes(monitor: Monitor, found: Plan, allowed: int) -> Iterator[str]:
    """What one should know besides."""
    if allowed and allowed < found.link.bandwidth:
        yield f"max-bandwidth is {units.size(allowed)}/s: no more is sent until it is raised (migctl set bandwidth)"
    if (run_state := monitor.run_state()) != "running":
        yield f"the machine is {run_state}: it writes nothing now"
    for reason in monitor.migration().get("blocked-reasons", ()):
        yield f"stands against it now: {printable(reason)}"


def _advice(monitor: Monitor, found: Plan, allowed: int) -> Iterator[tuple[str, str]]:
    """Commands, any of which may let it end, and what they are good for. allowed: max-bandwidth, 0 where there is none."""
    if found.converges is True:
        return
    bandwidth, downtime = needs(found)
    migctl, capabilities = f"migctl -m {monitor.address}", monitor.capabilities()
    if allowed and allowed < bandwidth:
        yield f"{migctl} set bandwidth {-(-bandwidth // _MIB):.0f}MiB/s", "if the link takes that"
    else:
        yield f"a link that takes {units.size(bandwidth)}/s", "max-bandwidth allows it"
    if downtime <= _LONGEST:
        tens = -(-downtime * 100 // 1)
        yield f"{migctl} set downtime {tens * 10:.0f}ms", "if it may stand still for so long"
    rest = 100 - 100 * found.link.bandwidth / bandwidth
    if capabilities.get("auto-converge") is False and rest < _SLOWEST:
        can = "if the app can be slowed down: " if uris.is_app(monitor) else ""
        yield (
            f"{migctl} caps auto-converge=on",
            f"{can}it would rest about {rest:.0f} % of its time",
        )
    if capabilities.get("xbzrle") is False:
        yield f"{migctl} caps xbzrle=on", "if it writes a little in each page"


# ---- telling


def members(found: Plan, notes: list[str], advice: list[str]) -> dict[str, Any]:
    """For JSON: sizes in bytes, times in seconds, bandwidth in bytes/s. What comes to no end has no passes and times."""
    likely = found.likely
    ends = likely.switchover is not None
    bandwidth, downtime = needs(found)
    return {
        "converges": found.converges,
        "passes": likely.passes + 1 if ends else None,
        "total-time": _rounded(likely.total),
        "downtime": _rounded(likely.downtime) if ends else None,
        "excess": _rounded(likely.excess),
        "excess-at-worst": _rounded(found.worst.excess),
        "needs": None
        if found.converges
        else {"bandwidth": round(bandwidth), "downtime-limit": _rounded(downtime)},
        "memory": found.measured.memory,
        "used": found.used,
        "written": [
            {"seconds": _rounded(seconds), "bytes": round(size)}
            for seconds, size in found.measured.windows
        ],
        "bandwidth": round(found.link.bandwidth),
        "bandwidth-by": found.link.by,
        "downtime-limit": found.limit,
        "notes": notes,
        "advice": advice,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _tell(found: Plan, notes: list[str], advice: list[tuple[str, str]]) -> None:
    measured = found.measured
    memory = units.size(measured.memory)
    if found.used < measured.memory:
        memory += f", {units.size(found.used)} of it in use"
    elif measured.used is None:
        memory += ", taken to be all in use (--used)"
    rates = ", ".join(
        f"{units.size(size / seconds)}/s within {units.time(seconds)}"
        for seconds, size in measured.windows
    )
    for name, value in (
        ("memory", memory),
        ("dirty rate", rates),
        ("link", f"{units.size(found.link.bandwidth)}/s ({found.link.told})"),
        ("downtime limit", units.time(found.limit)),
        ("forecast", verdict(found)),
    ):
        remote.say(f"{name:<18} {value}", indent=19)
    for note in notes:
        remote.say(f"{'note':<18} {note}", indent=19)
    if advice:
        remote.say("What would let it end:")
    for command, when in advice:
        remote.say(f"  {command}  ({when})", indent=4)


def verdict(found: Plan) -> str:
    """In a sentence."""
    likely, worst = found.likely, found.worst
    if likely.total is None:
        times = f"{likely.excess:.1f} times" if likely.excess >= 1.05 else "just"
        return (
            f"will not converge: within the downtime limit {times} as much is written as the link takes;"
            f" it would have to stand still for {units.time(likely.downtime)}"
        )
    ends = (
        f"{likely.passes + 1} passes, about {units.time(likely.total)}, downtime about"
        f" {units.time(likely.downtime)}"
    )
    if worst.total is not None:
        return ends
    shortest, written = found.measured.windows[0]
    return (
        f"may not converge: {ends}, if it writes evenly. But this monitor measures over {units.time(shortest)} at"
        f" least: should the {units.size(written)} be written within the downtime limit, that is"
        f" {worst.excess:.1f} times what the link takes"
    )
