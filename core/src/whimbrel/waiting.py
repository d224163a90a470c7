"""Waiting that can be ended: by a deadline, by a cancelled migration, by abort() or close() from another thread.

Nothing in whimbrel blocks in a system call that only its own completion can end: descriptors are used without blocking
and waited for here, but for sockets, where a shutdown ends what is blocked (see Gate). Deadlines are absolute, in seconds
of time.monotonic(); None means no deadline.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from whimbrel.errors import Cancelled, ChannelError, DeadlineExceeded

T = TypeVar("T")

_LONGEST_POLL = 3600.0  # seconds: poll(2) takes milliseconds in an int
_PATIENCE = 10.0  # seconds that close() waits for threads inside, should one be stuck in the kernel


def wait_any(
    fds: Iterable[int],
    events: int,
    *,
    deadline: float | None = None,
    cancel_fd: int | None = None,
    what: str = "the peer",
) -> set[int]:
    """Wait until some of the fds have one of the poll events (or an error), and say which.

    Raises DeadlineExceeded, or Cancelled once cancel_fd is readable, even if an fd is ready as well.
    """
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    if cancel_fd is not None:
        poll.register(cancel_fd, select.POLLIN)
    while True:
        left = _LONGEST_POLL if deadline is None else max(0.0, deadline - time.monotonic())
        ready = {fd for fd, _ in poll.poll(min(left, _LONGEST_POLL) * 1000)}
        if cancel_fd in ready:
            raise Cancelled(f"cancelled while waiting for {what}")
        if ready:
            return ready
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded(f"timed out waiting for {what}")


def wait_fd(
    fd: int,
    events: int,
    *,
    deadline: float | None = None,
    cancel_fd: int | None = None,
    what: str = "the peer",
) -> None:
    """Wait until fd has one of the poll events. Raises DeadlineExceeded, or Cancelled once cancel_fd is readable."""
    wait_any((fd,), events, deadline=deadline, cancel_fd=cancel_fd, what=what)


def pause(
    seconds: float, *, deadline: float | None = None, cancel_fd: int | None = None, what: str
) -> None:
    """Let some time pass, for what gives no event to wait for. Raises DeadlineExceeded and Cancelled."""
    until = time.monotonic() + seconds
    if deadline is not None and deadline <= until:
        wait_any((), 0, deadline=deadline, cancel_fd=cancel_fd, what=what)
    with contextlib.suppress(DeadlineExceeded):
        wait_any((), 0, deadline=until, cancel_fd=cancel_fd, what=what)


def call_in_thread(
    call: Callable[[], T],
    *,
    deadline: float | None = None,
    cancel_fd: int | None = None,
    what: str,
) -> T:
    """call() for what cannot be interrupted, a name lookup for one: what it returns or raises.

    It runs in a daemon thread. After DeadlineExceeded or Cancelled the thread is left alone, and its result dropped.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done, tell = os.pipe()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        # Closing `tell` would not do: a fork in between leaves a copy open in the child.
        with contextlib.suppress(OSError):
            os.write(tell, b".")
        os.close(tell)

    try:
        try:
            threading.Thread(target=run, name=f"whimbrel: {what}", daemon=True).start()
        except BaseException:
            os.close(tell)
            raise
        wait_fd(done, select.POLLIN, deadline=deadline, cancel_fd=cancel_fd, what=what)
    finally:
        os.close(done)
    for error in errors:
        raise error
    return results[0]


_forks = 0  # of this process, or of its parent since it began


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_parent=_forked, after_in_child=_forked)


class Gate:
    """What threads are inside of while they use a channel or a listener, so that abort() and close() are safe.

    `fd` becomes readable, and stays so, with signal() or close(): whoever waits must wait for it as well. close()
    returns when all have left, so that descriptors can be closed: a number that somebody still polls could by then be
    another file's.

    A forked child shares `fd`: its signal() reaches the parent as well, its close() does not.
    """

    def __init__(self, name: str, unblock: Callable[[], None] | None = None) -> None:
        """unblock: ends the system calls of those who enter(blocking=True), which do not wait for `fd`."""
        self.name = name
        self._unblock = unblock
        self._blocking = 0
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.closed = False
        self._aborted = False
        self._inside = 0
        self._changed = threading.Condition()
        self._pid = os.getpid()
        self._forks = _forks

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Around what waits for `fd` as well. Raises ChannelError when aborted or closed before."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self, *, blocking: bool = False) -> None:
        """inside() in two halves, for what is called often."""
        with self._changed:
            self.check()
            self._inside += 1
            self._blocking += blocking

    def leave(self, *, blocking: bool = False) -> None:
        with self._changed:
            self._inside -= 1
            self._blocking -= blocking
            if self.closed:
                self._changed.notify_all()

    def check(self) -> None:
        """Raises ChannelError when aborted or closed."""
        if self.closed:
            raise ChannelError(f"{self.name} is closed")
        if self._aborted or self._signalled_by_another_process():
            raise ChannelError(f"{self.name} was aborted")

    @property
    def forked(self) -> bool:
        """We are a child process that inherited the gate: what it closes goes on in its parent."""
        return os.getpid() != self._pid

    def signal(self) -> bool:
        """Turn out whoever is inside; nobody gets in any more. False when closed already."""
        with self._changed:
            if self.closed:
                return False
            self._aborted = True
            self._wake()
            return True

    def close(self) -> bool:
        """The same for good, and wait until all have left. False when somebody else closed it."""
        with self._changed:
            if self.closed:
                return False
            self.closed = True
            if not self.forked:
                self._wake()
                self._changed.wait_for(lambda: not self._inside, _PATIENCE)
            os.close(self.fd)
            return True

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # would block: it is at its maximum, so it is readable
            os.eventfd_write(self.fd, 1)
        if self._blocking and self._unblock is not None:
            self._unblock()

    def _signalled_by_another_process(self) -> bool:
        if self._forks == _forks:
            return False  # no other process has `fd`: most are asked this at every read and write, and poll() takes its time
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))
