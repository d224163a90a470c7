"""How fast disks move: beside a plain copy of the same file, and a sparse image beside its data alone.

    python benchmarks/block.py [--size 1G] [--runs 5] [--dir /dev/shm] [--json]

Two processes, over tcp. `copy` reads the file a megabyte at a time and sends it; the other side writes it, and answers
when it is synced. `ours` is a whole migration of a machine with that disk, from migrate() to the end of wait(). Each is
run in turn, after one run of each to warm up; memory is watched in runs of their own. `sparse` is an image of 4 GiB that holds 200 MiB, in pieces of 2 MiB, and
`data` one of 200 MiB. Memory is the most that the process had resident beyond what it had before the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from footprint import Peak, resident
from remote import PATIENCE, Remote

MIB = 1 << 20


class Side:
    """What each process does, by name."""

    def __init__(self, folder: Path, role: str) -> None:
        self.folder = folder
        self.role = role
        self.incoming: Any = None
        self.server: socket.socket | None = None

    def path(self, what: str) -> Path:
        return self.folder / f"{what}-{self.role}.img"

    def _kernel(self, what: str, size: int) -> Any:
        from whimbrel import Kernel, Machine
        from whimbrel_block import BlockDevice

        machine = Machine("bench-1.0")
        machine.add(BlockDevice("disk", self.path(what), create=size))
        kernel = Kernel(machine)
        kernel.settings["max-bandwidth"] = 0
        return kernel

    def listen(self, what: str, size: int) -> str:
        self.path(what).unlink(missing_ok=True)
        self.incoming = self._kernel(what, size).incoming("tcp:127.0.0.1:0")
        return str(self.incoming.addresses[0])

    def received(self, watch: bool) -> float:
        return self._run(lambda: self.incoming.wait(PATIENCE), watch)[1]

    def send(self, what: str, size: int, uri: str, watch: bool) -> tuple[float, float]:
        kernel = self._kernel(what, size)
        return self._run(lambda: kernel.migrate(uri, blk=True).wait(PATIENCE), watch)

    @staticmethod
    def _run(work: Callable[[], object], watch: bool) -> tuple[float, float]:
        """Seconds, and if that is watched (which takes time of its own) the MiB of memory that it took at most."""
        began = time.perf_counter()
        if not watch:
            work()
            return time.perf_counter() - began, 0.0
        before = resident()
        peak = Peak()
        peak.start()
        try:
            work()
        finally:
            highest = peak.stop()
        return time.perf_counter() - began, (highest - before) / MIB

    def copy_listen(self, what: str, size: int) -> str:
        self.path(what).unlink(missing_ok=True)
        self.server = socket.create_server(("127.0.0.1", 0))
        return f"{self.server.getsockname()[1]}"

    def copy_received(self, what: str, size: int) -> None:
        assert self.server is not None
        connection, _ = self.server.accept()
        buffer = memoryview(bytearray(MIB))
        with connection, self.path(what).open("wb", buffering=0) as file:
            while n := connection.recv_into(buffer):
                file.write(buffer[:n])
                size -= n
                if not size:
                    break
            os.fsync(file.fileno())
            connection.sendall(b"k")
        self.server.close()

    def copy_send(self, what: str, port: str) -> float:
        began = time.perf_counter()
        buffer = memoryview(bytearray(MIB))
        with (
            socket.create_connection(("127.0.0.1", int(port))) as connection,
            self.path(what).open("rb", buffering=0) as file,
        ):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while n := file.readinto(buffer):
                connection.sendall(buffer[:n])
            if connection.recv(1) != b"k":
                raise EOFError
        return time.perf_counter() - began


def ours(
    source: Remote, destination: Remote, what: str, size: int, *, watch: bool = False
) -> tuple[float, float, float]:
    """Seconds, and MiB of memory on either side."""
    uri = destination("listen", what, size)
    received = destination.start("received", watch)
    seconds, memory = source("send", what, size, uri, watch)
    return seconds, memory, received()


def copy(source: Remote, destination: Remote, what: str, size: int) -> float:
    port = destination("copy_listen", what, size)
    received = destination.start("copy_received", what, size)
    seconds = source("copy_send", what, port)
    received()
    return float(seconds)


def fill(path: Path, size: int, data: int, piece: int) -> None:
    """A file of that size with `data` bytes of random data, evenly spread in pieces."""
    block = os.urandom(piece)
    with path.open("wb") as file:
        file.truncate(size)
        for n in range(data // piece):
            file.seek(n * (size * piece // data) // MIB * MIB)
            file.write(block)


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """The median over the runs, each pair of which stood side by side, and that of the best of each."""
    pairs = statistics.median(a / b for a, b in zip(one, other, strict=True))
    return {"median": round(pairs, 3), "best": round(min(one) / min(other), 3)}


def measure(folder: Path, size: int, runs: int) -> dict[str, Any]:
    images = {
        "dense": (size, size),
        "sparse": (4096 * MIB, 200 * MIB),
        "data": (200 * MIB, 200 * MIB),
    }
    source, destination = Remote(Side, folder, "source"), Remote(Side, folder, "destination")
    for what, (whole, data) in images.items():
        fill(folder / f"{what}-source.img", whole, data, 2 * MIB)
    times: dict[str, list[float]] = {n: [] for n in ("copy", "ours", "sparse", "data")}
    for run in range(runs + 1):
        seconds = {"copy": copy(source, destination, "dense", size)}
        for what, (whole, _) in images.items():
            name = "ours" if what == "dense" else what
            seconds[name] = ours(source, destination, what, whole)[0]
        for name, taken in seconds.items():
            if run:  # the first one warms up
                times[name].append(taken)
        same = [(folder / f"dense-{r}.img").read_bytes() for r in ("source", "destination")]
        assert same[0] == same[1], "the disk did not arrive"
        del same
    memory = {
        what: ours(source, destination, what, whole, watch=True)[1:]
        for what, (whole, _) in images.items()
    }
    for side in (source, destination):
        side.stop()
    middle = {n: statistics.median(t) for n, t in times.items()}
    return {
        "size": size,
        "seconds": times,
        "gb_per_s": {n: round(size / middle[n] / 1e9, 3) for n in ("copy", "ours")},
        "ours_to_copy": ratio(times["copy"], times["ours"]),
        "sparse_to_data": ratio(times["sparse"], times["data"]),
        "memory_mib": {w: [round(m, 1) for m in both] for w, both in memory.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1G", help="of the dense image (default 1G)")
    parser.add_argument("--runs", type=int, default=5, help="of each, after one to warm up")
    parser.add_argument("--dir", default="/dev/shm", help="where the images are made")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    from whimbrel.settings import parse_size

    size = parse_size(arguments.size) // (2 * MIB) * 2 * MIB
    folder = Path(tempfile.mkdtemp(prefix="whimbrel-bench-", dir=arguments.dir))
    try:
        result = measure(folder, size, arguments.runs)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    rates, seconds = result["gb_per_s"], result["seconds"]
    spread = ", ".join(f"{n} {min(t):.2f}-{max(t):.2f} s" for n, t in seconds.items())
    print(
        f"dense   ours {rates['ours']:.2f}  copy {rates['copy']:.2f} GB/s  ours/copy"
        f" {result['ours_to_copy']['median']:.2f} (of the best {result['ours_to_copy']['best']:.2f})"
    )
    sparse = result["sparse_to_data"]
    print(
        f"sparse  4 GiB with 200 MiB in {sparse['median']:.2f} of the time of 200 MiB (of the best"
        f" {sparse['best']:.2f})"
    )
    for what, (here, there) in result["memory_mib"].items():
        print(f"memory  {what:6}  source {here:.1f}  destination {there:.1f} MiB")
    print(f"({spread})")


if __name__ == "__main__":
    main()
