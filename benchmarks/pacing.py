"""Is max-bandwidth kept, and how soon is a change of it felt?

    python benchmarks/pacing.py [--rate 10 30 100 300 1000] [--channel tcp unix] [--multifd 0 2] [--seconds 3] [--json]

A source with warm random RAM, all of which is written again and again, sends to a process that only counts what arrives,
on all connections together. Rates are in 10^6 bytes per second. Reported per rate: what was measured at the receiver from
a second after the start on, its deviation from what was asked, and the fastest and slowest 100 ms. Then the limit is
changed while it sends: reported is the time until the rate over the next 200 ms is within 10 % of the new limit. `raw` is
what the same connection carries without a limit: no limit above it can be kept. Exit status 1 if a rate that the
connection can carry was missed by more than 3 %, or a change took longer than 100 ms.
"""

import argparse
import json
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from whimbrel import Kernel, Machine
from whimbrel_ram import RAMBlock

RAM = 256 << 20
CHUNK = 1 << 20
MB = 1_000_000
PATIENCE = 60  # seconds for any one step
SETTLE = 1.0  # seconds before the steady part
NEAR = 0.2  # seconds over which a changed rate is judged
CHANGES = ((30, 100), (100, 30), (100, 10), (10, 100), (0, 30))


def sink(pipe: Connection, kind: str, where: str) -> None:
    """Count what arrives: a list of (time, bytes) from all connections, given on demand."""
    server = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    server.bind(where if kind == "unix" else ("127.0.0.1", 0))
    server.listen(16)
    counts: list[tuple[float, int]] = []
    threading.Thread(target=accept, args=(server, counts), daemon=True).start()
    pipe.send(f"unix:{where}" if kind == "unix" else f"tcp:127.0.0.1:{server.getsockname()[1]}")
    while pipe.recv() == "counts":
        taken, counts[:] = counts[:], []
        pipe.send(taken)


def accept(server: socket.socket, counts: list[tuple[float, int]]) -> None:
    while True:
        connection, _ = server.accept()
        threading.Thread(target=count, args=(connection, counts), daemon=True).start()


def count(connection: socket.socket, counts: list[tuple[float, int]]) -> None:
    buffer = bytearray(CHUNK)
    try:
        while n := connection.recv_into(buffer):
            counts.append((time.monotonic(), n))
    except ConnectionResetError:
        pass


class Source:
    """A migration that goes on until it is cancelled, and the process that counts what it sends."""

    def __init__(self, block: RAMBlock, kind: str, multifd: int, limit: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        self.pipe, theirs = context.Pipe()
        where = str(Path(self.directory.name) / "m.sock")
        self.process = context.Process(target=sink, args=(theirs, kind, where), daemon=True)
        self.process.start()
        theirs.close()
        self.block = block
        machine = Machine("bench-1.0")
        machine.add(block)
        self.kernel = Kernel(machine)
        self.kernel.settings.update(
            {
                "max-bandwidth": limit,
                "downtime-limit": 0,
                "return-path": False,
                "dirty-tracker": "explicit",
                "multifd": bool(multifd),
                "multifd-channels": max(1, multifd),
            }
        )
        self.run = self.kernel.migrate(self._said())
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def _said(self):
        if not self.pipe.poll(PATIENCE):
            raise TimeoutError("the receiver does not answer")
        return self.pipe.recv()

    def _write(self) -> None:
        while not self._ended.wait(0.02):
            self.block.mark_dirty(0, self.block.size)

    def change(self, limit: int) -> float:
        began = time.monotonic()
        self.kernel.settings["max-bandwidth"] = limit
        return began

    def counts(self) -> np.ndarray:
        """What arrived since the last time: rows of time and bytes so far."""
        self.pipe.send("counts")
        got = np.array(sorted(self._said()), np.float64).reshape(-1, 2)
        got[:, 1] = np.cumsum(got[:, 1])
        return got

    def close(self) -> None:
        self._ended.set()
        self.run.cancel()
        self._writer.join()
        self.process.kill()
        self.process.join()
        self.directory.cleanup()


def between(counts: np.ndarray, start: float, end: float) -> float:
    """Bytes that arrived from start to end."""
    low, high = np.searchsorted(counts[:, 0], (start, end))
    before = counts[low - 1, 1] if low else 0
    return float((counts[high - 1, 1] if high else 0) - before)


def steady(block: RAMBlock, kind: str, multifd: int, asked: float, seconds: float) -> dict:
    source = Source(block, kind, multifd, int(asked * MB))
    try:
        source.kernel.state.wait_for(lambda status: str(status) == "active", PATIENCE)
        time.sleep(SETTLE + seconds)
        start = source.run.kernel.state.figures.started + SETTLE
        told = source.kernel.query().get("ram", {}).get("mbps", 0) / 8
        counts = source.counts()
    finally:
        source.close()
    start = max(start, counts[0, 0] + SETTLE)
    end = start + seconds - 0.2
    measured = between(counts, start, end) / (end - start) / MB
    edges = np.arange(start, end, 0.1)
    tenths = [between(counts, a, a + 0.1) / 0.1 / MB for a in edges[:-1]]
    return {
        "channel": kind,
        "multifd": multifd,
        "asked": asked,
        "measured": measured,
        "deviation": measured / asked - 1 if asked else 0.0,
        "slowest": min(tenths),
        "fastest": max(tenths),
        "told": told,
    }


def change(block: RAMBlock, kind: str, multifd: int, old: float, new: float) -> dict:
    """The time in seconds until the new limit is felt; None if it never was."""
    source = Source(block, kind, multifd, int(old * MB))
    try:
        time.sleep(SETTLE + 0.03 * (old + new) % 0.1)
        began = source.change(int(new * MB))
        time.sleep(1.5)
        counts = source.counts()
    finally:
        source.close()
    for after in np.arange(0, 1.2, 0.002):
        rate = between(counts, began + after, began + after + NEAR) / NEAR / MB
        if abs(rate / new - 1) <= 0.1:
            return {"channel": kind, "multifd": multifd, "old": old, "new": new, "felt": after}
    return {"channel": kind, "multifd": multifd, "old": old, "new": new, "felt": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--channel", nargs="+", choices=("tcp", "unix"), default=["tcp", "unix"])
    parser.add_argument("--multifd", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    block = RAMBlock("ram", RAM)
    words = block.view.view(np.uint64)
    words[:] = np.random.default_rng(7).integers(1, 1 << 63, len(words), dtype=np.uint64)
    rates, changes, good = [], [], True
    for kind in options.channel:
        for multifd in options.multifd:
            raw = steady(block, kind, multifd, 0, 2.0)
            rates.append(raw)
            say(options, f"{name(raw)}     raw: {raw['measured']:7.1f} MB/s")
            for asked in options.rate:
                r = steady(block, kind, multifd, asked, options.seconds)
                rates.append(r)
                possible = asked < raw["measured"] * 0.9
                good &= not possible or abs(r["deviation"]) <= 0.03
                say(
                    options,
                    f"{name(r)}  {asked:6.0f}: {r['measured']:7.1f} MB/s {r['deviation']:+7.2%}"
                    f"   100 ms: {r['slowest']:6.1f} to {r['fastest']:6.1f}   told {r['told']:6.1f}"
                    + ("" if possible else "   (more than the connection carries)"),
                )
            for old, new in CHANGES:
                c = change(block, kind, multifd, old, new)
                changes.append(c)
                good &= c["felt"] is not None and c["felt"] <= 0.1
                felt = "never" if c["felt"] is None else f"{c['felt'] * 1000:.0f} ms"
                say(options, f"{name(c)}  {old or 'none'} to {new}: felt after {felt}")
    if options.json:
        print(json.dumps({"rates": rates, "changes": changes, "good": good}, indent=2))
    return 0 if good else 1


def name(r: dict) -> str:
    return f"{r['channel']:4} {'multifd ' + str(r['multifd']) if r['multifd'] else 'single   '}"


def say(options: argparse.Namespace, line: str) -> None:
    if not options.json:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
