"""What a destination that nobody touched costs, and what the parameter prefault gives back.

    python benchmarks/prefault.py [--size 1G] [--runs 3] [--channel tcp unix] [--content random zero]

RAM goes from a warm source to a fresh destination, in turns without prefault and with it; with it the source waits until
all memory is taken. Printed: guest RAM over the time of the whole migration, in 10^9 bytes a second, median and range.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from remote import PATIENCE, Remote
from sides import RamSide

from whimbrel.settings import parse_size


class ColdSide(RamSide):
    """A destination with memory that nobody touched, if it is not asked for twice."""

    def listen_ready(self, uri: str, prefault: bool) -> str:
        """Returns when prefault has taken all memory."""
        address = self.listen(uri, {"prefault": prefault})
        deadline = time.monotonic() + PATIENCE
        (block,) = self.blocks
        while prefault and os.fstat(block.fd).st_blocks * 512 < block.size:
            if time.monotonic() > deadline:
                raise TimeoutError("the memory is not taken")
            time.sleep(0.01)
        return address


def run(source: Remote, size: int, uri: str, prefault: bool) -> float:
    """Bytes per second."""
    with Remote(ColdSide, size) as destination:
        address = destination("listen_ready", uri, prefault)
        received = destination.start("received")
        seconds = source("send", address, {})["seconds"]
        received()
        return size / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=1 << 30, help="guest RAM (default 1G)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--channel", nargs="+", choices=("tcp", "unix"), default=["tcp", "unix"])
    parser.add_argument(
        "--content", nargs="+", choices=("random", "zero"), default=["random", "zero"]
    )
    options = parser.parse_args()
    with (
        Remote(RamSide, options.size) as source,
        tempfile.TemporaryDirectory(prefix="whimbrel-bench-") as folder,
    ):
        for content in options.content:
            source("fill", content)
            for channel in options.channel:
                rates: dict[bool, list[float]] = {False: [], True: []}
                for number in range(options.runs):
                    for prefault, of_way in rates.items():
                        path = Path(folder) / f"{number}{prefault}.sock"
                        uri = f"unix:{path}" if channel == "unix" else "tcp:127.0.0.1:0"
                        of_way.append(run(source, options.size, uri, prefault) / 1e9)
                        path.unlink(missing_ok=True)
                print(
                    f"{content:7} {channel:5}"
                    + "".join(
                        f"  {'prefault' if prefault else 'cold'}: {statistics.median(r):5.2f}"
                        f" ({min(r):.2f}-{max(r):.2f}) GB/s"
                        for prefault, r in rates.items()
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
