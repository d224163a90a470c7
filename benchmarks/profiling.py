"""Where the time of a migration goes, on both sides and in all of their threads.

    python benchmarks/profiling.py [--size 1G] [--runs 5] [--channel tcp] [--content random] [--multifd N]

Every millisecond a thread of each process notes where its other threads are. A place is the innermost function of ours
with the line in it: a line that copies, sends or waits in C is the line that calls it. Shares are of what was noted of a
thread; beside it stands for how much of the migrations' time a processor worked for it, and the rest it waited. Noting
takes time of its own: the time without it is told as well.
"""

from __future__ import annotations

import argparse
import collections
import linecache
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import RamSide, Sides

from whimbrel.settings import parse_size

_PERIOD = 0.001
#: Where Python's own modules are, and the packages that are not ours: a call of theirs counts for who calls.
_LIBRARY = (str(Path(threading.__file__).parent), str(Path(np.__file__).parent))


class Sampler(threading.Thread):
    """Notes places of all threads but itself and the one that made it, until stop()."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._halt = threading.Event()
        self._mine = threading.get_ident()
        self.places: dict[str, collections.Counter[tuple[str, int, str]]] = {}
        self.worked: dict[str, float] = {}  # seconds of a processor, by thread
        self._first: dict[int, float] = {}

    def run(self) -> None:
        self.began = time.monotonic()
        while not self._halt.wait(_PERIOD):
            self._note()
        self.seconds = time.monotonic() - self.began

    def _note(self) -> None:
        frames = sys._current_frames()
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is None or thread is self or thread.ident == self._mine:
                continue
            while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY):
                frame = frame.f_back
            self._processor(thread)
            place = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
            self.places.setdefault(thread.name, collections.Counter())[place] += 1

    def _processor(self, thread: threading.Thread) -> None:
        try:
            with open(f"/proc/self/task/{thread.native_id}/schedstat", encoding="ascii") as file:
                spent = int(file.read().split()[0]) / 1e9
        except (OSError, ValueError):  # it has just ended
            return
        first = self._first.setdefault(thread.native_id or 0, spent)
        self.worked[thread.name] = spent - first

    def stop(self) -> None:
        self._halt.set()
        self.join()


class ProfiledSide(RamSide):
    """With a sampler that runs from watch() to watched()."""

    def watch(self) -> None:
        sys.setswitchinterval(0.0005)
        self._sampler = Sampler()
        self._sampler.start()

    def watched(self) -> dict[str, Any]:
        sampler = self._sampler
        sampler.stop()
        sys.setswitchinterval(0.005)
        return {
            "seconds": sampler.seconds,
            "worked": sampler.worked,
            "places": {name: dict(count) for name, count in sampler.places.items()},
        }


def short(path: str) -> str:
    """The last folder and the name."""
    return "/".join(Path(path).parts[-2:])


def shown(role: str, runs: list[dict[str, Any]], most: int) -> list[str]:
    """Lines of text: each thread that worked, and where it was."""
    whole = sum(run["seconds"] for run in runs)
    threads: dict[str, collections.Counter[tuple[str, int, str]]] = {}
    worked: collections.Counter[str] = collections.Counter()
    for run in runs:
        worked.update(run["worked"])
        for name, places in run["places"].items():
            threads.setdefault(name, collections.Counter()).update(places)
    out = [f"{role}: {whole:.2f} s"]
    for name, _ in worked.most_common():
        samples = sum(threads[name].values())
        out.append(f"  thread {name}: {worked[name] / whole:.0%} of a processor, {samples} samples")
        functions: dict[tuple[str, str], collections.Counter[int]] = {}
        for (path, number, function), n in threads[name].items():
            functions.setdefault((path, function), collections.Counter())[number] += n
        ranked = sorted(functions.items(), key=lambda f: -f[1].total())
        for (path, function), numbers in ranked[:most]:
            out.append(f"    {numbers.total() / samples:6.1%}  {function}  ({short(path)})")
            for number, n in numbers.most_common(3):
                if n > 0.02 * samples:
                    code = linecache.getline(path, number).strip()
                    out.append(f"        {n / samples:6.1%}  {number}: {code[:90]}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=1 << 30, help="guest RAM (default 1G)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--channel", choices=("tcp", "unix"), default="tcp")
    parser.add_argument("--content", choices=("random", "zero"), default="random")
    parser.add_argument("--multifd", type=int, default=0, metavar="N", help="over N channels")
    parser.add_argument("--most", type=int, default=8, help="functions for each thread")
    options = parser.parse_args()
    both = {"multifd": True, "multifd-channels": options.multifd} if options.multifd else {}
    with tempfile.TemporaryDirectory() as folder, Sides(options.size, make=ProfiledSide) as sides:
        sides.fill(options.content)
        path = Path(folder) / "m.sock"

        def uri() -> str:
            path.unlink(missing_ok=True)
            return f"unix:{path}" if options.channel == "unix" else "tcp:127.0.0.1:0"

        sides.ours(uri(), both=both)
        bare: list[float] = []
        noted: list[float] = []
        found: dict[str, list[dict[str, Any]]] = {"source": [], "destination": []}
        for _ in range(options.runs):
            bare.append(sides.ours(uri(), both=both)["seconds"])
            for side in (sides.source, sides.destination):
                side("watch")
            noted.append(sides.ours(uri(), both=both)["seconds"])
            found["source"].append(sides.source("watched"))
            found["destination"].append(sides.destination("watched"))
    for role, runs in found.items():
        print("\n".join(shown(role, runs, options.most)))
    print(f"best time {min(bare):.3f} s, while places were noted {min(noted):.3f} s")


if __name__ == "__main__":
    main()
