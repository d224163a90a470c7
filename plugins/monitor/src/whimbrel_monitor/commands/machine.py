"""The machine: its state, its name, and running it."""

from __future__ import annotations

import contextlib
from typing import Any

from whimbrel import LocalError, RunState, StateError
from whimbrel_monitor import Context, command


@command("query-status")
def query_status(ctx: Context) -> dict[str, Any]:
    """The run state of the machine, in QEMU's words."""
    machine = ctx.kernel.machine
    return {"status": str(machine.run_state), "running": machine.is_running}


@command("query-name")
def query_name(ctx: Context) -> dict[str, Any]:
    """The name of the machine."""
    return {"name": ctx.kernel.machine.name}


@command("stop")
def stop(ctx: Context) -> None:
    """Let the machine stand still. A migration of it goes on; it arrives paused."""
    ctx.kernel.stop()


@command("cont")
def cont(ctx: Context) -> None:
    """Let the machine run. One that waits for a migration runs when that has come."""
    ctx.kernel.cont()


@command("announce-self")
def announce_self(  # noqa: PLR0917 - arguments come by name
    ctx: Context,
    initial: int,
    max: int,  # noqa: A002 - QMP's name
    rounds: int,
    step: int,
    interfaces: list[str] | None = None,
    id: str | None = None,  # noqa: A002
) -> None:
    """Let the machine and the plugins tell the network where it is: once, without the repetitions of a QEMU."""
    machine = ctx.kernel.machine
    if machine.run_state in (RunState.INMIGRATE, RunState.POSTMIGRATE):
        raise StateError(f"the machine is not here ({machine.run_state}): there is nothing to tell")
    if interfaces is not None:
        raise LocalError("the machine is announced as a whole, not by interfaces")
    ctx.kernel.plugins.notify("announce_self", kernel=ctx.kernel, machine=machine)
    machine.invoke("announce")


@command("quit")
def quit(ctx: Context) -> None:  # noqa: A001 - QMP's name
    """Let the app end, by the callback `quit` of its Machine; an app that gave none goes on."""
    machine = ctx.kernel.machine
    if not machine.has("quit"):
        raise LocalError(
            "this app cannot be ended by its monitor",
            hint="It can allow that with Machine(quit=...)",
        )
    ctx.send_event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

    def end() -> None:
        with contextlib.suppress(SystemExit):  # of this thread only
            machine.invoke("quit")

    ctx.after_reply(end)
