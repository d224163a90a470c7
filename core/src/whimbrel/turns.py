"""How long one thread keeps the interpreter while another waits for it.

CPython lets a thread that is busy in Python go on for 5 ms. The migration's thread gives the interpreter up for every copy
and system call, several times a MiB, so that beside a busy app it would mostly wait. While a migration moves, turns are
short; what the app had set comes back when the last one has ended.
"""

from __future__ import annotations

import sys
import threading

#: Seconds.
SHORT = 0.0002


class ShortTurns:
    """Holders are counted: migrations of several kernels overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before = self._ours = 0.0

    def hold(self) -> None:
        """Turns are short from now on, unless they are already."""
        with self._lock:
            if not self._holders:
                self._before = sys.getswitchinterval()
                if self._before > SHORT:
                    sys.setswitchinterval(SHORT)
                self._ours = sys.getswitchinterval()
            self._holders += 1

    def release(self) -> None:
        """One for each hold(). An app that has set turns of its own meanwhile keeps them."""
        with self._lock:
            self._holders -= 1
            if not self._holders and sys.getswitchinterval() == self._ours:
                sys.setswitchinterval(self._before)


#: The process has one interpreter.
TURNS = ShortTurns()
