"""A shell command that cannot outlive us, with its exit status and the last that it said.

Two processes are started, in a process group of their own. The first is a guard: it reads from a pipe whose other end
only we hold, and kills the group when that ends, so also when we are killed by SIGKILL. (PR_SET_PDEATHSIG would not
do: it reaches one process instead of the group, and it fires when the *thread* ends that started the child.) The guard
leads the group, is there before the command is, and is reaped last: the group's number stays ours until then, and
killing it cannot hit anybody else's processes.

The group is in our session, so signals of a terminal do not reach it, and what reads from the terminal (a question for
a password) gets an error instead of being stopped for ever, as TTIN and TTOU are ignored.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import signal
import subprocess
import threading

from whimbrel import ChannelError
from whimbrel.waiting import Gate, wait_any, wait_fd

log = logging.getLogger("whimbrel.exec")

#: How much of the standard error output is kept, in bytes.
TAIL = 4096
_SHELL = "/bin/sh"
_GUARD = 'trap "" HUP INT QUIT TERM USR1 USR2 ALRM TSTP; read end; kill -KILL 0'
_COMMAND = 'trap "" TTIN TTOU; exec "$0" -c "$1"'
_PATIENCE = (
    5.0  # seconds for a killed process to be gone: it takes longer only while stuck in the kernel
)


class Child:
    """The command, running. `stdin` or `stdout` is the descriptor of the child's end; the caller keeps its own.

    kill() may come from any thread or process; close() kills what is left of the group, reaps, and never raises.
    """

    def __init__(
        self, command: str, *, stdin: int | None = None, stdout: int | None = None
    ) -> None:
        self.command = command
        self._tail = collections.deque[int](maxlen=TAIL)
        self._gate = Gate(
            f"exec:{command}"
        )  # turns out the thread that reads what the command says
        self._ending = threading.Lock()
        self._reaped = False
        with contextlib.ExitStack() as undo:
            undo.callback(self._gate.close)
            guard_end, self._lifeline = os.pipe()
            undo.callback(os.close, self._lifeline)
            try:
                self._guard = subprocess.Popen(
                    [_SHELL, "-c", _GUARD],
                    stdin=guard_end,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    process_group=0,
                )
            finally:
                os.close(guard_end)
            undo.callback(self._guard.wait)
            undo.callback(self._guard.kill)
            self._process = subprocess.Popen(
                [_SHELL, "-c", _COMMAND, _SHELL, command],
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                process_group=self._guard.pid,
            )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.callback(os.close, self._pidfd)
            self._drain = threading.Thread(
                target=self._read_stderr, name="exec stderr", daemon=True
            )
            self._drain.start()
            undo.pop_all()

    # ---- what it says

    def _read_stderr(self) -> None:
        """A command that nobody listens to would block once the pipe is full."""
        assert self._process.stderr is not None
        fd = self._process.stderr.fileno()
        line = b""
        while self._gate.fd not in wait_any((fd, self._gate.fd), select.POLLIN):
            data = os.read(fd, 65536)
            if not data:
                if line:
                    log.info("%s: %s", self.command, line.decode(errors="replace"))
                return
            self._tail.extend(data)
            *lines, line = (line + data)[-65536:].split(b"\n")
            for each in lines:
                log.info("%s: %s", self.command, each.decode(errors="replace"))

    def said(self) -> str:
        """The end of its standard error output."""
        text = bytes(self._tail).decode(errors="replace").strip()
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)

    # ---- how it ends

    def wait(self, deadline: float | None = None, cancel_fd: int | None = None) -> int:
        """The exit status, negative for a signal. Raises DeadlineExceeded, Cancelled by cancel_fd, and ChannelError
        when somebody else took the status.
        """
        if self._process.returncode is None:
            what = f"the command '{self.command}' to end"
            wait_fd(self._pidfd, select.POLLIN, deadline=deadline, cancel_fd=cancel_fd, what=what)
            try:
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:  # subprocess would say 0
                raise ChannelError(
                    f"the exit status of the command '{self.command}' was taken by somebody else in this process",
                    hint="Do not ignore SIGCHLD, and wait for no children but your own",
                ) from None
        return self._process.wait()

    def describe(self, status: int) -> str:
        """How it ended, and what it said last."""
        if status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else f"{-status}"
            how = f"was killed by signal {name}"
        else:
            how = f"ended with exit status {status}"
        # What it wrote before it ended is in the pipe; a process that it left behind may keep that open.
        self._drain.join(0.2)
        said = self.said()
        return f"the command '{self.command}' {how}" + (f": {said}" if said else "")

    def kill(self) -> None:
        """End the whole group at once."""
        with self._ending:
            if not self._reaped:
                with contextlib.suppress(OSError):
                    os.killpg(self._guard.pid, signal.SIGKILL)

    def close(self) -> None:
        """In a forked child of ours this closes its copies, and leaves the command alone."""
        if self._gate.forked:
            if self._gate.close():
                self._close_fds()
            return
        self.kill()
        with self._ending:
            if self._reaped:
                return
            self._reaped = True
            for process in (self._process, self._guard):
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    log.warning("%s: process %d does not end", self.command, process.pid)
        self._gate.signal()
        self._drain.join(_PATIENCE)
        self._gate.close()
        self._close_fds()

    def _close_fds(self) -> None:
        assert self._process.stderr is not None
        self._process.stderr.close()
        os.close(self._pidfd)
        os.close(self._lifeline)
