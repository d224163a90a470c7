"""Every hook there is. All collect: what each plugin returns is put together, nobody answers for all.

A plugin is a module (or any object) named by an entry point of the groups `whimbrel.transports`, `whimbrel.savevm` or
`whimbrel.plugins`. It says which API it was written for, and implements hooks:

    from whimbrel import TransportSpec, hookimpl

    whimbrel_api = (1, 0)

    @hookimpl
    def transports():
        return [TransportSpec(schemes=("tcp",), factory="whimbrel_tcp.transport:TcpTransport", syntax="tcp:HOST:PORT")]

A savevm plugin also names the sections that it claims: `whimbrel_sections = ("ram",)` ('*' for a kind of sections whose
names the machine chooses). A plugin may bring hooks of its own: `whimbrel_hookspecs = (module, ...)`. The declaration
module imports the standard library, attrs and whimbrel only; heavy imports wait until first use.

No hook is called per page or per record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from whimbrel.channel import FilterSpec, TransportSpec
    from whimbrel.handle import Monitor
    from whimbrel.health import Check
    from whimbrel.kernel import Kernel
    from whimbrel.machine import Machine
    from whimbrel.notifiers import Notification
    from whimbrel.savevm import SaveVMHandler
    from whimbrel.settings import Setting
    from whimbrel.stream import InStream
    from whimbrel.wire.items import SectionHeader

#: The version of this API: the first number changes when something breaks, the second when something is added.
API = (1, 0)

hookspec = pluggy.HookspecMarker("whimbrel")
hookimpl = pluggy.HookimplMarker("whimbrel")


@hookspec
def transports() -> list[TransportSpec]:  # type: ignore[empty-body]
    """Transports, by URI scheme. Called once, after loading."""


@hookspec
def filters() -> list[FilterSpec]:  # type: ignore[empty-body]
    """Filters, by name (`name::scheme:rest`). Called once, after loading."""


@hookspec
def settings() -> list[Setting]:  # type: ignore[empty-body]
    """Capabilities and parameters. Called once for each Kernel; a failure is the plugin's alone."""


@hookspec
def savevm_handlers(kernel: Kernel, machine: Machine) -> list[SaveVMHandler]:  # type: ignore[empty-body]
    """Handlers for those parts of the machine that the plugin knows. Called at the start of each migration, outgoing
    or incoming, on the caller's thread; an exception refuses the migration.
    """


@hookspec
def preflight(kernel: Kernel, uri: str) -> list[str]:  # type: ignore[empty-body]
    """Reasons why a migration to uri cannot work. All reasons of all plugins are put together before refusing."""


@hookspec
def state_changed(kernel: Kernel, notification: Notification) -> None:
    """What notifiers are told (setup, a new status, an error at the start, the end of clean-up), as a hook. On the
    thread where it happened; an exception is logged and harmless.
    """


@hookspec
def announce_self(kernel: Kernel, machine: Machine) -> None:
    """The destination is about to start the machine: tell the network. An exception is logged and harmless."""


@hookspec
def unknown_section(kernel: Kernel, header: SectionHeader, inp: InStream) -> SaveVMHandler | None:
    """A section that no handler of the machine claims: a handler for it, or None. Two answers are an error."""


@hookspec
def wrap_migration(kernel: Kernel, run: Callable[[], Any]) -> Any:
    """Around the whole of an outgoing or incoming run, on its thread: for tracing. Implement it with
    @hookimpl(wrapper=True): code before `yield`, the run, code behind; return what yield gives.
    """


@hookspec
def monitors(kernel: Kernel, address: str) -> Callable[[], Monitor] | None:
    """Who serves a monitor of the kernel at address: a function that opens it, or None for an address that is not the
    plugin's. Called by Kernel.monitor(); two answers are an error, and then nothing is opened.
    """


@hookspec
def cli_commands() -> list[Any]:  # type: ignore[empty-body]
    """Click commands to add to migctl. Called by migctl only."""


@hookspec
def monitor_commands() -> list[Any]:  # type: ignore[empty-body]
    """Commands (whimbrel_monitor.Command) to add to a monitor. Called when whimbrel-monitor opens one."""


@hookspec
def health() -> list[Check]:  # type: ignore[empty-body]
    """What the plugin finds of what it needs on this host: kernel features, limits, packages. Called by `migctl doctor`
    only; quick, and without a trace: whatever is opened for a look is closed again.
    """
