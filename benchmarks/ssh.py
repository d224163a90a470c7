"""ssh:// beside the OpenSSH client, to one sshd of its own on this host, in turns of one run.

    .venv/bin/python benchmarks/ssh.py [--size 512] [--rounds 3] [--profile]

Each line is the median of the rounds, in MB/s (10^6 bytes), of a stream that goes into `cat > /dev/null` there, from the
first byte to the exit status. All run on this host, so that they share its processors: over a network both ends have
their own. The second table is the profile of our side: which functions the time goes to.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from whimbrel import Channel, Role, TransportContext
from whimbrel_ssh.transport import SshTransport
from whimbrel_testing.sshd import Sshd

MB = 1_000_000
PIECE = 1 << 20  # as the engine sends
SINK = "cat > /dev/null"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="MiB of a stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where our time goes")
    options = parser.parse_args()
    binary = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if binary is None:
        sys.exit("no sshd; Debian: apt-get install openssh-server")
    Path("/run/sshd").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Sshd(binary, Path(folder) / "h", "host") as host:
        measure(host, options.size << 20, options.rounds)
        if options.profile:
            profile(host, options.size << 20)


def measure(host: Sshd, size: int, rounds: int) -> None:
    rows: dict[str, Callable[[], float]] = {
        "ssh": lambda: by_openssh(host, size),
        "ssh -c aes128-gcm": lambda: by_openssh(host, size, "-c", "aes128-gcm@openssh.com"),
        "ssh://": lambda: by_channels(host, size, 1),
        "ssh://, 2 channels": lambda: by_channels(host, size, 2),
        "ssh://, 4 channels": lambda: by_channels(host, size, 4),
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            found[name].append(size / run() / MB)
    default = statistics.median(found["ssh"])
    print(f"{'way':<20} {'MB/s':>6} {'of ssh':>7}   all rounds")
    for name, speeds in found.items():
        middle = statistics.median(speeds)
        every = " ".join(f"{s:.0f}" for s in speeds)
        print(f"{name:<20} {middle:>6.0f} {middle / default:>7.2f}   {every}")


def by_openssh(host: Sshd, size: int, *options: str) -> float:
    """Seconds that the client takes, its start and the handshake not counted: those of an empty stream."""
    command = ["ssh", "-F", str(host.config), *options, host.name, SINK]
    began = time.monotonic()
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    start = time.monotonic() - began
    began = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0) as client:
        assert client.stdin is not None
        piece = bytes(PIECE)
        for _ in range(size // PIECE):
            view = memoryview(piece)
            while view:
                view = view[client.stdin.write(view) or 0 :]
        client.stdin.close()
    return time.monotonic() - began - start


def by_channels(host: Sshd, size: int, number: int) -> float:
    """Seconds that our channels take for their shares, each on a thread and a connection of its own."""
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(connect(host)) for _ in range(number)]
        threads = [threading.Thread(target=send, args=(c, size // number)) for c in channels]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - began


def connect(host: Sshd) -> Channel:
    transport = SshTransport()
    settings = {"ssh-config": str(host.config), "ssh-host-key": "strict"}
    context = TransportContext(role=Role.SOURCE, settings=settings)  # type: ignore[arg-type]
    return transport.connect(transport.parse(f"//{host.name}/exec:{SINK}"), context)


def send(channel: Channel, size: int) -> None:
    piece = bytes(PIECE)
    for _ in range(size // PIECE):
        channel.send([piece])
    channel.finish(time.monotonic() + 60)


def profile(host: Sshd, size: int) -> None:
    profiler = cProfile.Profile()
    with connect(host) as channel:
        profiler.enable()
        send(channel, size)
        profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(12)
    print(text.getvalue())


if __name__ == "__main__":
    main()
