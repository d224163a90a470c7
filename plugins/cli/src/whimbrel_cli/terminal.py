"""The keyboard, key by key."""

from __future__ import annotations

import os
import select
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def keys(fd: int) -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key and returns it, or "". The terminal is left as it was.

    Ctrl-C interrupts as ever. Ctrl-Z does nothing: who stops would leave his screen to the shell.
    """
    before = termios.tcgetattr(fd)
    now = termios.tcgetattr(fd)
    now[3] &= ~(termios.ICANON | termios.ECHO)
    now[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(fd, termios.TCSADRAIN, now)

    def key(seconds: float) -> str:
        if not select.select([fd], [], [], seconds)[0]:
            return ""
        pressed = os.read(fd, 1)
        if not pressed:
            raise KeyboardInterrupt  # the terminal is gone
        return pressed.decode("ascii", "replace")

    try:
        yield key
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
