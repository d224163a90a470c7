"""Logging for an operator: warnings in one line each; -v adds what happens, -vv everything, tracebacks included."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def printable(text: str) -> str:
    """One line that is safe on a terminal: names in it may come from a peer."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in " ".join(text.split())
    )


def folded(text: str, stream: TextIO, indent: int = 0) -> str:
    """Broken at words where the stream is a terminal, whose width cuts them anywhere; unchanged elsewhere. `indent`: so
    many columns before all lines but the first.
    """
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        width = 0
    if len(text) <= width or width < 20:
        return text
    import textwrap

    behind = " " * indent
    return textwrap.fill(
        text,
        width - 1,
        subsequent_indent=behind,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


class _OneLine(logging.Formatter):
    """For operators who did not ask for more: level and message; a traceback shrinks to its last line."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]}"
        return folded(f"migctl: {record.levelname.lower()}: {printable(text)}", sys.stderr)


def set_up(verbosity: int) -> None:
    """Log to standard error. 0 shows warnings, 1 (-v) also what happens, 2 (-vv) everything; more is 2."""
    handler = logging.StreamHandler(sys.stderr)
    if verbosity:
        handler.setFormatter(
            logging.Formatter(
                "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"
            )
        )
    else:
        handler.setFormatter(_OneLine())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("whimbrel").setLevel(LEVELS[min(verbosity, 2)])


def is_verbose() -> bool:
    """Whether -v was given."""
    return logging.getLogger("whimbrel").isEnabledFor(logging.INFO)
