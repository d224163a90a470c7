"""Where the measures are taken: warm sides of ours and of QEMU over the same content, and rounds in which all take turns."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import qemus
from results import Measure
from sides import Sides, fill

#: More than this share of the processors' time taken by others: figures are not to be trusted.
BUSY = 0.1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@attrs.define(kw_only=True)
class Lab:
    """runs: rounds that count, after one to warm up. size: guest RAM. qemus: "7.2" → binary."""

    runs: int
    size: int
    qemus: dict[str, str]
    channels: Sequence[str] = ("tcp", "unix")
    folder: Path = attrs.field(init=False)
    shm: Path = attrs.field(init=False)
    _kept: tuple[int, str, Sides] | None = attrs.field(init=False, default=None)

    def __enter__(self) -> Lab:
        self.folder = Path(tempfile.mkdtemp(prefix="whimbrel-bench-"))
        self.shm = Path(tempfile.mkdtemp(prefix="whimbrel-bench-", dir="/dev/shm"))
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        shutil.rmtree(self.folder)
        shutil.rmtree(self.shm)

    def uri(self, channel: str) -> str:
        """One to listen at."""
        path = self.folder / "m.sock"
        path.unlink(missing_ok=True)
        return f"unix:{path}" if channel == "unix" else "tcp:127.0.0.1:0"

    def warm(self, content: str, size: int | None = None) -> tuple[Sides, dict[str, qemus.Pair]]:
        """Ours and the QEMUs ("QEMU 7.2" → pair), sources with that content; the same ones until it changes."""
        size = size or self.size
        if self._kept is None or self._kept[0] != size:
            self.drop()
            self._kept = (size, "", Sides(size))
        _, now, sides = self._kept
        if now != content:
            sides.fill(content)
            self.files(content, size)
            self._kept = (size, content, sides)
        return sides, self._pairs(size)

    def files(self, content: str, size: int) -> dict[str, qemus.Pair]:
        """The QEMUs alone."""
        if self.qemus:
            for file, what in zip(qemus.warm_files(self.shm, size), (content, "zero"), strict=True):
                fill(np.memmap(file, np.uint8, "r+"), what)
        return self._pairs(size)

    def _pairs(self, size: int) -> dict[str, qemus.Pair]:
        files = (self.shm / "src", self.shm / "dst")
        return {
            f"QEMU {version}": qemus.Pair(self.folder, files, size, binary)
            for version, binary in self.qemus.items()
        }

    def drop(self) -> None:
        """Give the memory back."""
        if self._kept is not None:
            self._kept[2].stop()
            self._kept = None
        for file in self.shm.iterdir():
            file.unlink()

    @contextmanager
    def sides(self, size: int, content: str, blocks: int = 1) -> Iterator[Sides]:
        """Ours of another size, alone."""
        self.drop()
        with Sides(size, blocks) as sides:
            sides.fill(content)
            yield sides

    def rounds(
        self,
        measure: Measure,
        ways: dict[str, Callable[[], float]],
        *,
        warm_up: int = 1,
        runs: int | None = None,
    ) -> None:
        """All ways in turn, each round beginning with another one; a way that fails is left out from there on, and said."""
        measure.ways.update({way: [] for way in ways})
        names = list(ways)
        for run in range((runs or self.runs) + warm_up):
            for way in names[run % len(names) :] + names[: run % len(names)]:
                if way not in ways:
                    continue
                try:
                    figure = ways[way]()
                except Exception as error:
                    del ways[way]
                    measure.notes.append(f"{way} failed in round {run}: {error!r}")
                    say(f"  {measure.notes[-1]}")
                    continue
                if run >= warm_up:
                    measure.ways[way].append(figure)
        said = [
            f"{way} {statistics.median(r):.3g} ({min(r):.3g}-{max(r):.3g})"
            for way, r in measure.ways.items()
            if r
        ]
        say(f"  {measure.title}, {measure.unit}: {', '.join(said)}")


def available() -> int:
    """Bytes of memory that can be had."""
    text = Path("/proc/meminfo").read_text()
    line = next(line for line in text.splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) << 10


def busy(before: list[int], after: list[int]) -> dict[str, float]:
    """Shares of the processors' time between two readings of processor_time()."""
    spent = [b - a for a, b in zip(before, after, strict=True)]
    whole = sum(spent) or 1
    return {"busy": 1 - (spent[3] + spent[4]) / whole, "stolen": spent[7] / whole}


def processor_time() -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal."""
    with open("/proc/stat", encoding="ascii") as file:
        return [int(x) for x in file.readline().split()[1:9]]


def machine(binaries: dict[str, str]) -> dict[str, Any]:
    """What this runs on, and what else ran in the second before."""
    before = processor_time()
    time.sleep(1)
    shares = busy(before, processor_time())
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if "model name" in line
    ]
    root = Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "qemu": {v: qemus.version(b)[1] for v, b in binaries.items()},
        "whimbrel": commit or "unknown",
        "load_before": round(os.getloadavg()[0], 2),
        "busy_before": round(shares["busy"], 3),
    }
