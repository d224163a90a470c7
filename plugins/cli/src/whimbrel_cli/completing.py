"""What the shell completes that only the machine knows: names of parameters and capabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import click
from click.shell_completion import CompletionItem

from whimbrel.errors import MigrationError

if TYPE_CHECKING:
    from whimbrel_cli.monitor import Monitor

Value = TypeVar("Value")

_PATIENCE = 0.5  # seconds: nobody waits longer for a Tab


def ask(
    ctx: click.Context, question: Callable[[Monitor], Mapping[str, Value]]
) -> Mapping[str, Value]:
    """The answer of the machine that -m named; nothing where it does not answer at once."""
    from whimbrel_cli.app import Selection
    from whimbrel_cli.monitor import Monitor

    selection = ctx.find_object(Selection)
    if selection is None or len(selection.monitors) != 1:
        return {}
    try:
        with Monitor(selection.monitors[0], patience=_PATIENCE) as monitor:
            return question(monitor)
    except (MigrationError, OSError):
        return {}


def starting(incomplete: str, words: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(word) for word in sorted(words) if word.startswith(incomplete)]


def a_path(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For -m: the shell completes the path of a socket."""
    return [CompletionItem(incomplete, type="file")]


def join_colons(words: list[str], current: int) -> tuple[list[str], int]:
    """Bash takes a word apart at its colons: `unix:/run/vm.qmp` is three to it. Put them together; `current` is the
    index of the word that is completed.
    """
    joined: list[str] = []
    at = current
    for index, word in enumerate(words):
        colons = word.strip(":") == ""
        if joined and index <= current and (colons or joined[-1].endswith(":")):
            joined[-1] += word
            at -= 1
        else:
            joined.append(word)
    return joined, at
