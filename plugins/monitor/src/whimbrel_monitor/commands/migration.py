"""Beginning a migration, following it, ending it."""

from __future__ import annotations

from typing import Any

from whimbrel import LocalError, MigrationError, RunState, StateError, Status
from whimbrel_monitor import Context, command
from whimbrel_monitor.channels import MigrationChannel, to_uri


def _uri(uri: str | None, channels: list[MigrationChannel] | None) -> str:
    if (uri is None) == (channels is None):
        raise LocalError("need either 'uri' or 'channels' argument")
    return to_uri(channels) if uri is None else uri  # type: ignore[arg-type]


@command("migrate")
def migrate(  # noqa: PLR0917 - arguments come by name
    ctx: Context,
    uri: str | None = None,
    channels: list[MigrationChannel] | None = None,
    blk: bool = False,
    inc: bool = False,
    detach: bool = True,
    resume: bool = False,
) -> None:
    """Begin to move the machine to `uri`, or to the main channel of `channels`. How it goes on is told by query-migrate and
    by events; what is known to stand against it is told at once. `detach` is ignored, as it always was.
    """
    where = _uri(uri, channels)
    if resume:
        raise StateError("Cannot resume if there is no paused migration")
    ctx.kernel.migrate(where, blk=blk, inc=inc)


@command("migrate_cancel")
def migrate_cancel(ctx: Context) -> None:
    """Cancel the migration, if there is one; the machine runs on here. Refused after the point of no return."""
    ctx.kernel.cancel()


@command("migrate-incoming")
def migrate_incoming(
    ctx: Context,
    uri: str | None = None,
    channels: list[MigrationChannel] | None = None,
    exit_on_error: bool = False,
) -> None:
    """Listen for a migration, in an app that waits for one (Kernel.defer_incoming()). After a failure another one may be
    waited for; with exit-on-error the app ends then, by the callback `quit` of its Machine.
    """
    kernel, machine = ctx.kernel, ctx.kernel.machine
    if machine.run_state is not RunState.INMIGRATE:
        raise StateError(
            f"'-incoming' was not specified: the machine waits for no migration, it is {machine.run_state}",
            hint="The app lets it wait with Kernel.defer_incoming()",
        )
    where = _uri(uri, channels)
    if kernel.state.is_running:
        raise StateError("The incoming migration has already been started")
    if exit_on_error and not machine.has("quit"):
        raise LocalError(
            "Parameter 'exit-on-error' needs an app that its monitor can end",
            hint="It can allow that with Machine(quit=...)",
        )
    run = kernel.incoming(where)
    if exit_on_error:

        def end() -> None:
            if run.result is not None and run.result.error is not None:
                machine.invoke("quit")

        run.add_done_callback(end)


@command("migrate-continue")
def migrate_continue(ctx: Context, state: Status) -> None:
    """Go on from `pre-switchover`, where the capability pause-before-switchover makes a migration wait."""
    ctx.kernel.migrate_continue(str(state))


@command("query-migrate")
def query_migrate(ctx: Context) -> dict[str, Any]:
    """How the migration stands, the present one or the last. Times in ms, sizes in bytes, mbps in 10^6 bit/s."""
    return ctx.kernel.query()


@command("x-whimbrel-blockers")
def blockers(ctx: Context, uri: str | None = None) -> list[str]:
    """All reasons against a migration now, to `uri` if one is given: blockers, sections that cannot be migrated, what plugins
    say to it.
    """
    kernel = ctx.kernel
    reasons = list(kernel.blockers.reasons)
    try:
        handlers = kernel.collect_handlers()
        reasons += [f"{h.idstr}: {h.unmigratable}" for h in handlers if h.unmigratable is not None]
        if uri is not None:
            kernel.route(uri)
            said = kernel.plugins.each("preflight", kernel=kernel, uri=uri)
            reasons += [reason for _, some in said for reason in some or ()]
    except MigrationError as error:
        reasons.append(str(error))
    return reasons


@command("x-whimbrel-resolve")
def resolve(ctx: Context, run_here: bool) -> None:
    """Settle an outcome that is unknown: the machine runs here (true), or the destination has it (false). Look there first:
    nobody else can tell, and two running machines are worse than none.
    """
    ctx.kernel.resolve(run_here=run_here)
