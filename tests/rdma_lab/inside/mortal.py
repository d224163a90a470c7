"""One side of a migration in a process of its own, which kills or stops itself at a point.

Starting Python takes long in the lab. So one process has imported everything and opened no device; for each line on stdin,
ROLE URI POINT SIGNAL, it forks one that does it. What that one says is its process number, once it listens or connects.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
from typing import Any

import numpy as np

from whimbrel import Kernel, Machine, MigrationError, RunState
from whimbrel_ram import RAMBlock

MIB = 1 << 20


def prepared(role: str) -> Kernel:
    """With a machine that runs, and has 4 MiB of 8 filled, or waits for one."""
    filled = role == "source"
    machine = Machine("test-1.0", run_state=RunState.RUNNING if filled else RunState.PRELAUNCH)
    block = machine.add(RAMBlock("ram", 8 * MIB))
    if filled:
        block.view[MIB : 5 * MIB] = np.random.default_rng(1).integers(
            256, size=4 * MIB, dtype=np.uint8
        )
    kernel = Kernel(machine)
    if filled:
        kernel.settings.update({"max-bandwidth": 0, "dirty-tracker": "explicit"})
    return kernel


def write_without_end(kernel: Kernel) -> None:
    """The machine writes faster than it may be sent: there is always another pass."""
    kernel.settings.update({"max-bandwidth": 4 * MIB, "downtime-limit": 1})
    (block,) = kernel.machine.parts(RAMBlock)
    tick = threading.Event()

    def write() -> None:
        for page in itertools.cycle(range(256, 512)):
            tick.wait(0.005)
            with kernel.machine.turn:
                if kernel.machine.is_running:
                    block.rows[page] += 1
                    block.mark_dirty(page * 4096, 4096)

    threading.Thread(target=write, daemon=True).start()


def points(role: str) -> dict[str, tuple[type, str, int]]:
    """Name of a point → the call, and which of them."""
    from whimbrel.incoming import Incoming
    from whimbrel.outgoing import Outgoing
    from whimbrel.way_back import WayBack
    from whimbrel_rdma.channel import RdmaChannel
    from whimbrel_rdma.receiving import ReceivingPages
    from whimbrel_rdma.sending import SendingPages
    from whimbrel_rdma.verbs import Connection

    if role == "source":
        return {
            "handshake": (RdmaChannel, "send", 1),
            "setup": (SendingPages, "begin", 1),
            "first pass": (Connection, "write", 1),
            "later pass": (Outgoing, "_pass", 3),
            "completion": (Outgoing, "_commit", 1),
            "handed over": (Outgoing, "_await_shut", 1),
        }
    return {
        "handshake": (Connection, "accept", 1),
        "setup": (ReceivingPages, "_describe", 1),
        "first pass": (ReceivingPages, "_register", 1),
        "completion": (WayBack, "pong", 2),
        "handed over": (Incoming, "_take_over", 1),
    }


def arm(role: str, point: str, number: int) -> None:
    owner, name, which = points(role)[point]
    call, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(call)
    def last(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == which:
            signal.pthread_kill(threading.get_ident(), number)  # this thread goes no further
        return call(*args, **kwargs)

    setattr(owner, name, last)


def migrate(role: str, uri: str, point: str, number: str) -> None:
    if point != "-":
        arm(role, point, signal.Signals[number])
    kernel = prepared(role)
    if point == "later pass":
        write_without_end(kernel)
    incoming = kernel.incoming(uri) if role == "destination" else None
    print(os.getpid(), flush=True)
    run = incoming or kernel.migrate(uri)
    with contextlib.suppress(MigrationError):
        run.wait(200)


def main() -> None:
    points("source")  # imports
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                migrate(*line.rstrip("\n").split("\t"))
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
