"""How fast xbzrle deltas are made and applied: by numpy, and by whimbrel-accel.

    python benchmarks/deltas.py [--pages 4096] [--runs 5] [--json]

Page data a second, 10^6 bytes, of one thread; pages of 4 KiB in which single bytes, or stretches of 64, were changed. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from whimbrel_ram import native, xbzrle

PAGE = 4096
#: Pages of one call, as the engine makes them: while encoding, and while decoding.
BATCHES = (256, 1024)


def changed(old: np.ndarray, percent: int, stretch: int) -> np.ndarray:
    """So many of its bytes are others, in stretches that are spread evenly."""
    new = old.copy()
    every = stretch * 100 // percent
    for i in range(stretch):
        new[:, i::every] ^= 0x5A
    return new


def rate(what: Callable[[], object], size: int, runs: int) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        what()
        times.append(time.perf_counter() - began)
    return size / statistics.median(times) / 1e6


def measure(pages: int, percent: int, stretch: int, runs: int) -> dict[str, float]:
    rng = np.random.default_rng(1)
    old = rng.integers(0, 256, (pages, PAGE), np.uint8)
    new = changed(old, percent, stretch)
    before, now = old.view(np.uint64), new.view(np.uint64)

    def encode() -> None:
        for i in range(0, pages, BATCHES[0]):
            xbzrle.encode(before[i : i + BATCHES[0]], now[i : i + BATCHES[0]])

    data, length = xbzrle.encode(before, now)
    start = np.cumsum(length) - length
    where = np.arange(pages, dtype=np.int64) * PAGE
    memory = old.reshape(-1).copy()

    def decode() -> None:
        for i in range(0, pages, BATCHES[1]):
            some = slice(i, i + BATCHES[1])
            xbzrle.patch(data, start[some], length[some], where[some], PAGE, memory)

    figures = {"encode": rate(encode, old.nbytes, runs), "decode": rate(decode, old.nbytes, runs)}
    if memory.tobytes() != new.tobytes():
        raise RuntimeError("what was decoded is not what was encoded")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=4096, help="of 4 KiB (default 4096)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    codecs: dict[str, Any] = {"numpy": None}
    if native.deltas is None:
        print("whimbrel-accel is not here: numpy alone", file=sys.stderr)
    else:
        codecs["accel"] = native.deltas
    rows = []
    for stretch in (1, 64):
        for percent in (1, 10, 20):
            row: dict[str, Any] = {"changed_percent": percent, "stretch": stretch}
            for name, codec in codecs.items():
                native.deltas = codec
                row[name] = measure(arguments.pages, percent, stretch, arguments.runs)
            rows.append(row)
            told = ", ".join(
                f"{name} {f['encode']:.0f}/{f['decode']:.0f}"
                for name, f in row.items()
                if isinstance(f, dict)
            )
            print(f"{percent:3} % changed, stretches of {stretch:2}: {told} MB/s", file=sys.stderr)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
