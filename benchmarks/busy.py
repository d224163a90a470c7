"""An app that is busy in Python while it migrates: what short turns on the interpreter are worth.

    python benchmarks/busy.py [--size 256M] [--runs 5] [--channel unix] [--json]

The source has a thread that counts in Python without a pause. Reported for each length of a turn (5 ms is what CPython
begins with, 0.2 ms what the kernel sets while a migration moves): guest RAM over the time of the whole migration, in 10^9
bytes a second, and the share of its speed without a migration that the app's thread keeps meanwhile. The lengths take
turns; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from sides import RamSide, Sides

from whimbrel import turns
from whimbrel.settings import parse_size

LENGTHS = (0.005, 0.001, 0.0005, 0.0002)


class BusySide(RamSide):
    """One end, with an app around it."""

    def begin(self) -> float:
        """The app counts from now on; returns how far it comes in a second."""
        self._count = 0
        threading.Thread(target=self._work, daemon=True).start()
        self.speed()
        time.sleep(1)
        return self.speed()

    def _work(self) -> None:
        x = 0
        while True:
            for i in range(1000):
                x += i * i
            self._count += 1

    def speed(self) -> float:
        """Counts a second since the last call."""
        now, count = time.monotonic(), self._count
        before, self._since = getattr(self, "_since", (now - 1, count)), (now, count)
        return (count - before[1]) / (now - before[0])

    def turns(self, seconds: float) -> None:
        turns.SHORT = seconds


def measure(size: int, channel: str, multifd: int, runs: int) -> list[dict[str, Any]]:
    found: dict[float, list[tuple[float, float]]] = {length: [] for length in LENGTHS}
    both = {"multifd": True, "multifd-channels": multifd} if multifd else {}
    with tempfile.TemporaryDirectory() as folder, Sides(size, make=BusySide) as sides:
        sides.fill("random")
        alone = sides.source("begin")
        for run in range(runs + 1):
            for length in LENGTHS:
                where = Path(folder) / f"{run}-{length}"
                uri = f"unix:{where}" if channel == "unix" else "tcp:127.0.0.1:0"
                sides.source("turns", length)
                sides.source("speed")
                seconds = sides.ours(uri, both=both)["seconds"]
                if run:
                    found[length].append((size / seconds / 1e9, sides.source("speed") / alone))
    return [
        {
            "turn_ms": length * 1000,
            "multifd": multifd,
            "gb_per_s": statistics.median(rate for rate, _ in all_of_it),
            "app_keeps": statistics.median(kept for _, kept in all_of_it),
        }
        for length, all_of_it in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=256 << 20, help="guest RAM")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--channel", choices=("tcp", "unix"), default="unix")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    rows = []
    for multifd in (0, 2):
        for row in measure(arguments.size, arguments.channel, multifd, arguments.runs):
            rows.append(row)
            over = f"multifd {multifd}" if multifd else "one channel"
            print(
                f"{over:11} turns of {row['turn_ms']:.1f} ms: {row['gb_per_s']:.2f} GB/s,"
                f" the app keeps {row['app_keeps']:.0%}",
                file=sys.stderr,
            )
    if arguments.json:
        json.dump(rows, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
