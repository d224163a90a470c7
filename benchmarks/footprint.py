"""How much memory the engine takes beside guest RAM.

    python benchmarks/footprint.py [--size 1G] [--tracker auto] [--json]

Two processes migrate over tcp while the source's machine keeps writing. In each, the resident memory is sampled during the
whole run, shared memory left out (guest RAM is a memfd), and what the process had after `import whimbrel` is taken off:
what remains is the engine, its plugins and numpy. The highest sample counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 300  # seconds


def resident() -> int:
    """Bytes of this process without shared memory, which is where guest RAM is."""
    with open("/proc/self/status", encoding="utf-8") as file:
        fields = (line.split() for line in file)
        return sum(int(f[1]) << 10 for f in fields if f[0] in ("RssAnon:", "RssFile:"))


class Peak(threading.Thread):
    """The highest sample, until stop()."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, resident())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.highest


def side(role: str, size: int, tracker: str, pipe: Connection) -> None:
    import whimbrel

    whimbrel.Kernel, whimbrel.Machine  # noqa: B018 - what an app imports first
    base = resident()
    from whimbrel_ram import RAMBlock

    machine = whimbrel.Machine("bench-1.0")
    block = machine.add(RAMBlock("ram", size))
    pattern = b"".join(bytes((n,)) * 4096 for n in range(1, 256))
    for i in range(0, size, len(pattern)):  # without numpy: that is a part of what is measured
        piece = block.buffer[i : i + len(pattern)]
        piece[:] = pattern[: len(piece)]
    peak = Peak()
    peak.start()
    kernel = whimbrel.Kernel(machine)
    figures: dict[str, Any] = {}
    if role == "destination":
        incoming = kernel.incoming("tcp:127.0.0.1:0")
        pipe.send(incoming.addresses[0])
        incoming.wait(PATIENCE)
    else:
        kernel.settings["max-bandwidth"] = 0
        kernel.settings["dirty-tracker"] = tracker
        outgoing = kernel.migrate(pipe.recv())
        page, pause = 0, threading.Event()
        while not outgoing.done and machine.is_running:  # some 30,000 pages a second
            for _ in range(64):
                block.buffer[page * 4096] ^= 1
                page = (page + 4099) % block.pages
            pause.wait(0.002)
        outgoing.wait(PATIENCE)
        figures["passes"] = kernel.query()["ram"]["dirty-sync-count"]
    figures["peak_mib"] = round((peak.stop() - base) / 2**20, 1)
    figures["import_mib"] = round(base / 2**20, 1)
    pipe.send(figures)


def measure(size: int, tracker: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for role in ("destination", "source"):
        pipes[role], theirs = context.Pipe()
        process = context.Process(target=side, args=(role, size, tracker, theirs), daemon=True)
        process.start()
        processes.append(process)
    pipes["source"].send(pipes["destination"].recv())
    result = {}
    for role, pipe in pipes.items():
        if not pipe.poll(2 * PATIENCE):
            raise TimeoutError(f"the {role} does not answer")
        result[role] = pipe.recv()
    for process in processes:
        process.join(PATIENCE)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1G", help="guest RAM (default 1G)")
    parser.add_argument("--tracker", default="auto")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    from whimbrel.settings import parse_size

    result = measure(parse_size(arguments.size), arguments.tracker)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for role, figures in result.items():
        print(
            f"{role:11} {figures['peak_mib']:6.1f} MiB beside guest RAM ({arguments.size}) and beyond"
            f" `import whimbrel` ({figures['import_mib']:.1f} MiB)"
        )


if __name__ == "__main__":
    main()
