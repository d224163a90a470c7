"""Signs of life: paramiko sends some, but does not look for answers."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

from whimbrel import DeadlineExceeded
from whimbrel.waiting import wait_any
from whimbrel_ssh.config import Host
from whimbrel_ssh.protocol import FAILURES, Protocol

#: Seconds for a thread to see that its connection is closed.
JOIN = 5.0


class Keeper:
    """Asks the far host for signs of life, regularly and on request, on a thread of its own."""

    def __init__(self, transport: Protocol, host: Host) -> None:
        self._transport = transport
        self._every = host.keepalive
        self._patience = host.keepalive * host.keepalives
        self._asked: float | None = None
        self._lock = threading.Lock()
        self._waiting: list[threading.Event] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ssh keepalive", daemon=True)
        self._thread.start()

    @property
    def silent(self) -> float | None:
        """For how many seconds the host has owed an answer, if that is too long."""
        asked = self._asked
        since = 0.0 if asked is None else time.monotonic() - asked
        return since if self._every and since > self._patience else None

    def ask(self) -> threading.Event:
        """Set once the host has answered what was sent up to now, or the connection is broken."""
        done = threading.Event()
        with self._lock:
            self._waiting.append(done)
        os.eventfd_write(self._wake, 1)
        return done

    def _run(self) -> None:
        while not self._stopped and self._transport.is_active():
            with contextlib.suppress(DeadlineExceeded):
                until = time.monotonic() + self._every if self._every else None
                wait_any((self._wake,), select.POLLIN, deadline=until, what="work")
                os.eventfd_read(self._wake)
            if self._stopped:
                break
            with self._lock:
                waiting, self._waiting = self._waiting, []
            self._asked = time.monotonic()
            with contextlib.suppress(*FAILURES):
                self._transport.global_request("keepalive@openssh.com", wait=True)
            self._asked = None
            for each in waiting:
                each.set()
        for each in self._waiting:
            each.set()

    def stop(self) -> None:
        """The connection may be open still: what is asked then ends with it."""
        self._stopped = True
        os.eventfd_write(self._wake, 1)
        with contextlib.suppress(*FAILURES):  # of a connection inside another that is gone
            self._transport.close()
        self._thread.join(JOIN)
        os.close(self._wake)
