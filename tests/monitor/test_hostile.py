"""Ten clients that follow a migration, beside others that do all they can to disturb it."""

import contextlib
import os
import socket
import threading
import time

import pytest

from whimbrel_testing.peers import wait_until

MIB = 1 << 20
#: What the process may grow by while all of this goes on: the buffers of every client, and what Python keeps.
MOST_GROWTH = 64 * MIB


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flood(wire, chunk, size):
    """As much as it takes, up to `size` bytes; what comes back is thrown away by another thread."""

    def throw_away():
        with contextlib.suppress(OSError):
            while wire.sock.recv(1 << 16):
                pass

    threading.Thread(target=throw_away, daemon=True).start()
    with contextlib.suppress(OSError):
        for _ in range(size // len(chunk)):
            wire.sock.sendall(chunk)


NOISE = {
    "100 MB of one string": lambda w: (w.send('{"execute":"'), flood(w, b"x" * MIB, 100 * MIB)),
    "garbage": lambda w: flood(w, os.urandom(64 << 10), 100 * MIB),
    "brackets": lambda w: flood(w, b"[" * (64 << 10), 100 * MIB),
    "numbers": lambda w: flood(w, b"[" + b"1," * (32 << 10), 100 * MIB),
    "no requests": lambda w: flood(w, b"{}" * (32 << 10), 100 * MIB),
    "half a line": lambda w: w.send('{"execute":"stop", "id":'),
    "nothing": lambda w: None,
    "questions, never reading": lambda w: [
        w.sock.send(b'{"execute":"query-qmp-schema"}') for _ in range(300)
    ],
}


@pytest.mark.parametrize("negotiates", [True, False])
def test_the_others_are_served_and_the_migration_completes(app, negotiates):
    source, destination = app(ram=8 * MIB), app(ram=8 * MIB, waiting=True)
    uri = f"unix:{destination.address.removeprefix('unix:')}.m"
    destination.client().ask("migrate-incoming", uri=uri)
    good = [source.client() for _ in range(10)]
    good[0].set_capabilities(events=True)
    good[0].ask("migrate-set-parameters", max_bandwidth=4 * MIB)  # two seconds
    before = resident()
    noisy = [source.client() if negotiates else source.stranger() for _ in NOISE]
    for wire, act in zip(noisy, NOISE.values(), strict=True):
        wire.sock.settimeout(None)
        threading.Thread(target=act, args=(wire,), daemon=True).start()
    good[0].ask("migrate", uri=uri)
    slowest, growth, answers = 0.0, 0, 0
    while good[0].ask("query-migrate")["status"] not in ("completed", "failed"):
        for wire in good:
            began = time.monotonic()
            assert wire.ask("query-status")["status"] in (
                "running",
                "finish-migrate",
                "postmigrate",
            )
            slowest = max(slowest, time.monotonic() - began)
            answers += 1
        growth = max(growth, resident() - before)
    assert good[0].ask("query-migrate")["status"] == "completed"
    assert destination.machine.is_running
    for wire in good:
        while wire.event("MIGRATION")["status"] != "completed":
            pass
    print(f"{answers} answers, the slowest after {slowest:.3f} s, {growth / MIB:.1f} MiB more")
    assert answers >= 10
    assert growth < MOST_GROWTH
    for wire in noisy:
        with contextlib.suppress(OSError):
            wire.sock.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: len(source.monitor.clients) == len(good), "end of the noise")
