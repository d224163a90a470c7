"""What does zstd:: give on a thin link, and what does it cost on a fast one?

    python benchmarks/zstd.py --levels [--ram 64M] [--content half]
    python benchmarks/zstd.py [--ram 512M] [--link 100e6] [--runs 3] [--content half] [--level auto] [--json]

The same RAM migrates from one process to another with and without zstd::, in turns: through a link that carries so many
bytes per second (a proxy in the destination's process that paces by absolute deadlines), and over loopback without one. The content is `text` (shared
libraries of this system), `random`, or `half`: of each 64 KiB one half of either. A slice of it is written again and again
while it moves, so that there are several passes and a downtime. Rates are of memory, in bytes (10^6) per second. Beside the
total time stands what the measured ratio allows: the bytes that went over the link, at the link's rate.

--levels: no migration, but what each level makes of that content in portions as the source sends them, and what it costs
in processor time, with and without checksums in turns.
"""

import argparse
import glob
import json
import logging
import os
import statistics
import sys
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from whimbrel import Kernel, Machine, RunState
from whimbrel.settings import parse_size
from whimbrel_ram import RAMBlock
from whimbrel_testing.pacing import Direction, Link
from whimbrel_zstd.frames import Packer, Unpacker

LIBRARIES = ("/usr/lib/*/*.so*", "/lib/*/*.so*", "/usr/bin/*")
STRIPE = 64 << 10
#: Bytes that are written anew, and seconds until all of them were.
HOT, PERIOD = 8 << 20, 0.5


def texts(size: int) -> bytes:
    """Libraries and programs of this system, each once, again and again until there are enough."""
    names = sorted({os.path.realpath(n) for pattern in LIBRARIES for n in glob.glob(pattern)})
    found = bytearray()
    while len(found) < size:
        before = len(found)
        for name in names:
            if len(found) < size and os.path.isfile(name) and os.access(name, os.R_OK):
                found += Path(name).read_bytes()
        if len(found) == before:
            sys.exit("there are no libraries here to fill the memory with: use --content random")
    return bytes(found[:size])


def fill(view: memoryview, content: str) -> None:
    if content == "text":
        view[:] = texts(len(view))
        return
    for at in range(0, len(view), 16 << 20):
        part = view[at : at + (16 << 20)]
        part[:] = os.urandom(len(part))
    if content == "half":
        text = memoryview(texts(len(view) // 2))
        for n, at in enumerate(range(0, len(view), STRIPE)):
            half = STRIPE // 2
            view[at : at + half] = text[n * half : (n + 1) * half]


def machine(ram: int) -> tuple[Machine, RAMBlock]:
    made = Machine("bench-zstd", stop=lambda: None, start=lambda: None)
    return made, made.add(RAMBlock("ram", ram))


def destination(pipe: Connection, ram: int, prefix: str, rate: float | None) -> None:
    """Answers with the URI to connect to, and in the end with the bytes that the link carried."""
    logging.disable()
    sys.setswitchinterval(0.0005)
    made, block = machine(ram)
    block.buffer[:] = bytes(ram)  # the host's memory is there before the clock runs
    kernel = Kernel(made)
    run = kernel.incoming(f"{prefix}tcp:127.0.0.1:0")
    address = run.addresses[0]
    if rate is None:
        pipe.send(address)
        run.wait()
        pipe.send(None)
    else:
        with Link(address.removeprefix(prefix), rate=rate) as link:
            pipe.send(prefix + link.uri)
            run.wait()
            pipe.send(link.passed[Direction.FORWARD])
            pipe.recv()


def migrate(
    options: argparse.Namespace, kernel: Kernel, ram: memoryview, prefix: str, rate: float | None
) -> dict[str, object]:
    """One migration of the machine of `kernel`, which then runs on."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=destination, args=(theirs, options.ram, prefix, rate))
    child.start()
    address = pipe.recv()
    kernel.machine.vm_start()
    over = threading.Event()
    writer = threading.Thread(target=write, args=(kernel.machine, ram, over))
    writer.start()
    try:
        result = kernel.migrate(address).wait(600)
    finally:
        over.set()
        writer.join()
    passed = pipe.recv()
    pipe.send("done")
    child.join()
    said = kernel.query()
    figures = result.figures
    compressed = said.get("x-zstd", {}).get("compressed", figures.transferred)
    carried = compressed if passed is None else passed
    return {
        "link": rate,
        "with": prefix or "plain",
        "seconds": figures.total_time,
        "passes": figures.passes,
        "plain": figures.transferred,
        "carried": carried,
        "ratio": figures.transferred / carried,
        "level": said.get("x-zstd", {}).get("level"),
        "memory_rate": figures.transferred / figures.total_time,
        "link_alone": None if rate is None else carried / rate,
        "downtime": figures.downtime * 1000,
    }


def write(machine: Machine, ram: memoryview, over: threading.Event) -> None:
    """Writes one byte of each page of a slice, at a steady rate."""
    at, steps = 0, 100
    while not over.wait(PERIOD / steps):
        if machine.run_state is RunState.RUNNING:
            for page in range(at, at + HOT // steps, 4096):
                ram[page] = (ram[page] + 1) & 255
            at = (at + HOT // steps) % HOT


#: What the source sends at once: 128 records of pages.
PORTION = 128 * 4104


def levels(ram: memoryview) -> None:
    portions = [ram[at : at + PORTION] for at in range(0, len(ram), PORTION)]
    for level in (-7, -3, -1, 1, 2, 3, 6, 9, 12):
        rates: dict[bool, list[float]] = {True: [], False: []}
        for checksum in (False, True) * 2:
            packer = Packer(checksum=checksum)
            began = time.process_time()
            packed = [part for some in portions for part in packer.pack([some], level)]
            packed.append(packer.finish())
            rates[checksum].append(len(ram) / (time.process_time() - began) / 1e6)
        unpacker, rest = Unpacker(), memoryview(b"".join(packed))
        began = time.process_time()
        while rest and (taken := unpacker.take(rest)) is not None:
            rest = rest[taken[0] :]
        unpacking = len(ram) / (time.process_time() - began) / 1e6
        print(
            f"level {level:3}  ratio {len(ram) / sum(map(len, packed)):4.2f}  packs {max(rates[True]):4.0f} MB/s"
            f" ({max(rates[False]):4.0f} without checksums), unpacks {unpacking:5.0f} MB/s",
            flush=True,
        )


def show(r: dict[str, object]) -> None:
    allowed = "" if r["link_alone"] is None else f"  link alone {r['link_alone']:5.2f} s"
    link = "loopback" if r["link"] is None else f"{r['link'] / 1e6:.0f} MB/s"
    level = "" if r["level"] is None else f"  level {r['level']}"
    print(
        f"{link:9} {r['with']:7}"
        f" {r['seconds']:6.2f} s  {r['memory_rate'] / 1e6:5.0f} MB/s of memory{allowed}"
        f"  ratio {r['ratio']:4.2f}  {r['passes']} passes  down {r['downtime']:4.0f} ms{level}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ram", type=parse_size, default=512 << 20)
    parser.add_argument("--link", type=float, default=100e6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--content", choices=("half", "text", "random"), default="half")
    parser.add_argument("--level", default="auto")
    parser.add_argument("--levels", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable()
    sys.setswitchinterval(0.0005)
    made, block = machine(options.ram)
    ram = memoryview(block.buffer).cast("B")
    fill(ram, options.content)
    if options.levels:
        levels(ram)
        return 0
    kernel = Kernel(made)
    kernel.settings.update({"max-bandwidth": 0, "zstd-level": options.level})
    runs = []
    for _ in range(options.runs):
        for rate in (options.link, None):
            for prefix in ("", "zstd::"):
                runs.append(migrate(options, kernel, ram, prefix, rate))
                if not options.json:
                    show(runs[-1])
    medians = {
        (r["link"], r["with"], what): statistics.median(
            x[what] for x in runs if (x["link"], x["with"]) == (r["link"], r["with"])
        )
        for r in runs
        for what in ("seconds", "downtime")
    }
    faster = {
        "link" if rate else "loopback": medians[rate, "plain", "seconds"]
        / medians[rate, "zstd::", "seconds"]
        for rate in (options.link, None)
    }
    if options.json:
        print(json.dumps({"options": vars(options), "runs": runs, "times_as_fast": faster}))
    else:
        print(
            f"with zstd:: {faster['link']:.2f} times as fast on the link,"
            f" {faster['loopback']:.2f} times on loopback (medians)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
