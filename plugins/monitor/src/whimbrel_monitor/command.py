"""A command of the monitor: a typed function under a name.

    from whimbrel_monitor import Context, command

    @command("query-temperature")
    def temperature(ctx: Context, sensor: str, fahrenheit: bool = False) -> int:
        "The temperature of a sensor, in degrees."

Arguments are checked against the annotations before the function is called (whimbrel_monitor.kinds); `_` in their names is
`-` for the client. It runs on a thread of its own: it may block, and then only the client that asked waits. A MigrationError
that it raises is told to the client; anything else is a bug, and is logged as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from whimbrel_monitor import kinds

if TYPE_CHECKING:
    from whimbrel import Kernel


class Context(Protocol):
    """What a command is given: the kernel, and the client that asks."""

    @property
    def kernel(self) -> Kernel: ...

    @property
    def commands(self) -> Mapping[str, Command]:
        """All there are, by name."""

    def take_fd(self) -> int:
        """The descriptor that the client has sent, which then is the command's. Raises LocalError when there is none."""

    def after_reply(self, function: Callable[[], object]) -> None:
        """To be called when the reply is on its way; it may block."""

    def send_event(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell all clients, before the reply."""


@attrs.frozen(kw_only=True)
class Command:
    """A command. Made by command()."""

    name: str
    function: Callable[..., Any]
    #: Its arguments.
    members: Callable[[Kernel], tuple[kinds.Member, ...]]

    @property
    def help(self) -> str:
        return self.function.__doc__ or ""

    def __call__(self, ctx: Context, arguments: Mapping[str, Any]) -> Any:
        """Raises ArgumentError, and what the function raises."""
        return self.function(ctx, **kinds.check_members(self.members(ctx.kernel), arguments))


def command(
    name: str, arguments: Callable[[Kernel], tuple[kinds.Member, ...]] | None = None
) -> Callable[[Callable[..., Any]], Command]:
    """Make a Command of a function. `arguments`: where they depend on the kernel (its settings); else the function's own.

    Raises TypeError for an annotation that QMP has no type for.
    """

    def make(function: Callable[..., Any]) -> Command:
        if arguments is not None:
            return Command(name=name, function=function, members=arguments)
        declared = kinds.of_function(function)
        return Command(name=name, function=function, members=lambda _: declared)

    return make
