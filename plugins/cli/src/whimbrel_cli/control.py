"""The plain commands on a machine's monitor: status, cancel, stop, cont, blockers, incoming, resolve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from whimbrel.errors import BlockedError, Cancelled, LocalError, OutcomeUnknown
from whimbrel_cli import remote, units
from whimbrel_cli.logs import printable
from whimbrel_cli.progress import outlook

if TYPE_CHECKING:
    from whimbrel.forecast import Forecast
    from whimbrel_cli.monitor import Monitor

_ENDED = ("completed", "failed", "cancelled")


# ---- looking


@click.command(
    short_help="What a machine does, and how its migration stands.",
    epilog="Example: migctl -m unix:/run/src.qmp status",
)
@remote.json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show the run state of the machine and its migration, the present one or the last."""
    from whimbrel_cli.bridging import record

    with remote.connected(ctx) as monitor:
        run_state, migration = monitor.run_state(), monitor.migration()
        bridge = record.read(monitor.address)
        limit = monitor.parameters().get("downtime-limit", 300) / 1000
    found = outlook(migration, limit)
    if as_json:
        more: dict[str, Any] = {} if bridge is None else {"bridge": bridge}
        if found is not None:
            more["forecast"] = forecast_members(found)
        remote.tell_json({"run-state": run_state, "migration": migration, **more})
        return
    rows = describe(run_state, migration)
    if found is not None:
        rows.append(("forecast", told_forecast(found, limit)))
    if bridge is not None:
        rows.append(("bridge", printable(record.described(bridge))))
    for name, value in rows:
        remote.say(f"{name:<18} {value}", indent=19)


def forecast_members(found: Forecast) -> dict[str, Any]:
    """For JSON: seconds, and a factor that is above 1 where it does not converge. No switchover: then it does not."""
    return {
        "switchover": None if found.switchover is None else round(found.switchover, 4),
        "downtime": round(found.downtime, 4),
        "excess": round(found.excess, 4),
    }


def told_forecast(found: Forecast, limit: float) -> str:
    """For people. limit: the downtime limit in seconds."""
    from whimbrel_cli.display import diverging, switchover

    if found.switchover is not None:
        return switchover(found.switchover, found.downtime)
    return diverging(found.excess, found.downtime, found.downtime / limit if limit else None)


def describe(run_state: str, migration: dict[str, Any]) -> list[tuple[str, str]]:
    """The members of query-migrate that people look at, with units."""
    ram = migration.get("ram", {})
    rows = [("machine", run_state), ("migration", migration.get("status", "none"))]

    def add(name: str, value: str, present: Any) -> None:
        if present is not None:
            rows.append((name, value))

    add("reason", printable(str(migration.get("error-desc"))), migration.get("error-desc"))
    add("outcome", str(migration.get("x-outcome")), migration.get("x-outcome"))
    for member, name in (
        ("total-time", "time"),
        ("setup-time", "of it, setup"),
        ("downtime", "downtime"),
        ("expected-downtime", "expected downtime"),
    ):
        value = migration.get(member)
        add(name, units.time((value or 0) / 1000), value)
    if ram:
        left, total = ram.get("remaining", 0), ram.get("total", 0)
        rows.append(("memory left", f"{units.size(left)} of {units.size(total)}"))
        rows.append(("sent", units.size(ram.get("transferred", 0))))
        add("pass", str(ram.get("dirty-sync-count")), ram.get("dirty-sync-count"))
        if migration.get("status") not in _ENDED:
            rows.append(("throughput", f"{units.size(ram.get('mbps', 0) * 1e6 / 8)}/s"))
            rate = ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)
            rows.append(("dirty rate", f"{units.size(rate)}/s"))
    add(
        "throttling",
        f"{migration.get('cpu-throttle-percentage')} %",
        migration.get("cpu-throttle-percentage"),
    )
    rows += [("blocked by", printable(reason)) for reason in migration.get("blocked-reasons", ())]
    return rows


@click.command(
    short_help="Show what stands against a migration of a machine.",
    epilog="Example: migctl -m unix:/run/src.qmp blockers",
)
@remote.json_option
@click.pass_context
def blockers(ctx: click.Context, as_json: bool) -> None:
    """Show the reasons why the machine cannot be migrated now. The exit status is 3 where there are any."""
    with remote.connected(ctx) as monitor:
        reasons = monitor.migration().get("blocked-reasons", [])
    if as_json:
        remote.tell_json({"blocked-reasons": reasons})
    elif not reasons:
        click.echo("nothing blocks a migration")
    for reason in () if as_json else reasons:
        remote.say(printable(reason))
    if reasons:
        from whimbrel_cli.exits import Exit

        ctx.exit(Exit.BLOCKED)


# ---- doing


@click.command(
    short_help="Cancel the migration of a machine.",
    epilog="Example: migctl -m unix:/run/src.qmp cancel",
)
@click.option(
    "--timeout",
    callback=units.option,
    default="30s",
    metavar="TIME",
    help="How long to wait for that.  [default: 30s]",
)
@remote.json_option
@click.pass_context
def cancel(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Cancel the migration that runs, and wait until it has ended. The machine runs on where it is. A plugin that
    listens for the machine (migctl incoming) stops listening.

    The exit status is 1 where there is none to cancel, or where it has ended before.
    """
    from whimbrel_cli.bridging import record

    with remote.connected(ctx) as monitor:
        if record.stop_listening(monitor.address):
            ended = "cancelled"
        else:
            ended = cancel_and_wait(monitor, timeout)
        run_state = monitor.run_state()
    if ended not in ("cancelled", "failed"):  # a QEMU that cannot write fails when it is cancelled
        what = "no migration has" if ended == "not begun" else "the last migration is"
        raise LocalError(
            f"there is nothing to cancel: {what} {ended.removeprefix('not ')}", hint=""
        )
    remote.tell_done(f"cancelled; the machine is {run_state}", as_json, **{"run-state": run_state})


def cancel_and_wait(monitor: Monitor, timeout: float = 30.0) -> str:
    """Cancel; the status that it ended in. Raises LocalError when it has not ended after `timeout` seconds."""
    import time

    deadline = time.monotonic() + timeout
    running = monitor.migration().get("status", "none")
    if running in (*_ENDED, "none"):
        return f"{running} already" if running != "none" else "not begun"
    monitor.execute("migrate_cancel")
    while (now := monitor.migration().get("status", "none")) not in _ENDED:
        if time.monotonic() > deadline:
            raise LocalError(
                f"still '{now}' {units.time(timeout)} after it was cancelled",
                hint="migctl status shows how it goes on",
            )
        time.sleep(0.05)
    return str(now)


@click.command(
    short_help="Pause a machine.",
    epilog="Example: migctl -m unix:/run/src.qmp stop",
)
@remote.json_option
@click.pass_context
def stop(ctx: click.Context, as_json: bool) -> None:
    """Pause the machine; a migration of it goes on, and ends soon."""
    _execute(ctx, "stop", as_json)


@click.command(
    short_help="Let a machine run.",
    epilog="Example: migctl -m unix:/run/src.qmp cont",
)
@remote.json_option
@click.pass_context
def cont(ctx: click.Context, as_json: bool) -> None:
    """Let the machine run on. One that waits for a migration runs when that has come.

    A machine that has been migrated away (postmigrate) is left alone: `migctl resolve` is for that.
    """
    _execute(ctx, "cont", as_json)


def _execute(ctx: click.Context, command: str, as_json: bool) -> None:
    with remote.connected(ctx) as monitor:
        if command == "cont" and monitor.run_state() == "postmigrate":
            raise LocalError(
                "the machine has been migrated: letting it run here as well would make two of it",
                hint="If you are sure that its copy does not run: migctl resolve --run-here",
            )
        monitor.execute(command)
        run_state = monitor.run_state()
    remote.tell_done(f"the machine is {run_state}", as_json, **{"run-state": run_state})


@click.command(
    short_help="Settle which side has the machine, after a lost link.",
    epilog="""\b
Example: the link was lost at the very end, and the destination is dead.
  $ migctl -m unix:/run/src.qmp resolve --run-here""",
)
@click.option("--run-here", "here", flag_value="here", help="The machine runs here.")
@click.option("--gone", "here", flag_value="gone", help="The destination has it; here it is over.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@remote.json_option
@click.pass_context
def resolve(ctx: click.Context, here: str | None, yes: bool, as_json: bool) -> None:
    """Settle an outcome that is unknown. Look first: with --run-here while the destination runs, there are two of it.

    An app of whimbrel is told by its own command. A QEMU in postmigrate is let run (cont), and of one that waits for a
    destination's last word the migration is cancelled.
    """
    if here is None:
        raise click.UsageError("say who has the machine: --run-here or --gone", ctx)
    with remote.connected(ctx) as monitor:
        if here == "here" and not yes:
            click.confirm(
                "Are you sure that the destination does not run the machine?", abort=True, err=True
            )
        if monitor.has("x-whimbrel-resolve"):
            monitor.execute("x-whimbrel-resolve", {"run-here": here == "here"})
        elif (run_state := monitor.run_state()) == "finish-migrate":
            _settle_waiting(monitor, here)
        elif run_state != "postmigrate":
            raise LocalError(f"there is nothing to settle: the machine is {run_state}", hint="")
        elif here == "here":
            monitor.execute("cont")
        run_state = monitor.run_state()
    remote.tell_done(f"the machine is {run_state}", as_json, **{"run-state": run_state})


def _settle_waiting(monitor: Monitor, here: str) -> None:
    """A QEMU that stands still at the end of its migration, and waits for a word that nobody can give any more."""
    if here != "here":
        raise LocalError(
            "the machine waits for a word of its destination",
            hint="If the destination has the machine, end this QEMU: it never runs again by itself",
        )
    cancel_and_wait(monitor)
    if monitor.run_state() == "postmigrate":  # QEMU 7.2, of a machine that was paused
        monitor.execute("cont")


def raise_unless_completed(migration: dict[str, Any], where: str) -> None:
    """Raise what a finished migration's status means. Raises OutcomeUnknown, Cancelled, BlockedError, LocalError."""
    ended = migration.get("status")
    reason = printable(str(migration.get("error-desc", "no reason was given")))
    if migration.get("x-outcome") == "unknown":
        raise OutcomeUnknown(
            f"it is unknown whether the destination runs the machine: {reason}",
            hint=f"Look there, then settle it: migctl -m {where} resolve --run-here, or --gone",
        )
    if ended == "cancelled":
        raise Cancelled("the migration was cancelled; the machine is where it was")
    if ended != "completed":
        raise LocalError(
            f"the migration failed: {reason}",
            hint="Look at the destination: does it listen there, and what does its log say?"
            " migctl status shows how the machine is here",
        )


def check_blockers(migration: dict[str, Any]) -> None:
    """Raises BlockedError with all of them."""
    if reasons := migration.get("blocked-reasons"):
        raise BlockedError([printable(reason) for reason in reasons])
