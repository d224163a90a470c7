"""What a relay costs: QEMU to QEMU directly, through `migctl relay`, and through a bare copy loop, in turn.

    python benchmarks/relay.py [--size 1G] [--runs 5] [--json] [--channel tcp unix] [--limit 128M 0]

The guest runs (firmware that finds nothing to boot), with RAM full of random bytes, and the return path is open.
Throughput is guest RAM over the source's total-time, downtime the time from the source's event STOP to the destination's
event RESUME. Memory is the most that the relay's process had resident (ru_maxrss), the interpreter included. The first run
of each way is not counted. The bare loop, recv and sendall in a process of its own, looks at nothing: it shows what a third process
between the two costs on this machine, whatever it does. --limit is QEMU's max-bandwidth in bytes per second, 0 being none; 128M is its default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from qemus import QEMU, UNLIMITED, place, qemu, warm_files
from remote import PATIENCE
from sides import fill

from whimbrel.settings import parse_size

MIB = 1 << 20


@attrs.frozen(kw_only=True)
class Run:
    seconds: float
    downtime: float
    #: Bytes; None without a relay.
    resident: int | None


@contextmanager
def relayed(uri: str, target: str) -> Iterator[tuple[str, list[int]]]:
    """Where the relay listens, and a list that gets its peak memory in bytes when it has ended."""
    program = Path(sys.executable).parent / "migctl"
    process = subprocess.Popen(
        [program, "relay", uri, target, "--json"], stdout=subprocess.PIPE, text=True
    )
    resident: list[int] = []
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["addresses"][0], resident
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"migctl relay ended with {process.returncode}")
        resident.append(usage.ru_maxrss << 10)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def copy(server: socket.socket, target: str) -> None:
    """Pass everything on, both ways, a MiB at a time."""
    source, _ = server.accept()
    if target.startswith("unix:"):
        onward = socket.socket(socket.AF_UNIX)
        onward.connect(target.removeprefix("unix:"))
    else:
        onward = socket.create_connection(("127.0.0.1", int(target.rpartition(":")[2])))

    def one_way(into: socket.socket, out: socket.socket) -> None:
        view = memoryview(bytearray(MIB))
        with contextlib.suppress(OSError):
            while n := into.recv_into(view):
                out.sendall(view[:n])
            out.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=one_way, args=(onward, source), daemon=True)
    back.start()
    one_way(source, onward)
    back.join()


@contextmanager
def copied(uri: str, target: str) -> Iterator[tuple[str, list[int]]]:
    """As relayed(), by the bare loop."""
    if uri.startswith("unix:"):
        server = socket.socket(socket.AF_UNIX)
        server.bind(uri.removeprefix("unix:"))
        server.listen()
    else:
        server = socket.create_server(("127.0.0.1", 0))
        uri = f"tcp:127.0.0.1:{server.getsockname()[1]}"
    process = multiprocessing.get_context("fork").Process(target=copy, args=(server, target))
    process.start()
    server.close()
    try:
        yield uri, []
        process.join(PATIENCE)
    finally:
        process.kill()


def once(
    folder: Path, files: tuple[Path, Path], size: int, *, channel: str, limit: int, way: str
) -> Run:
    for path in folder.glob("*.sock"):
        path.unlink()
    to = place(f"unix:{folder}/to.sock" if channel == "unix" else "tcp:")
    with (
        qemu(folder, "dst", files[1], size, "-incoming", "defer") as dst,
        qemu(folder, "src", files[0], size) as src,
    ):
        for side in (src, dst):
            side.capabilities("return-path", "events")
        dst("migrate-incoming", uri=to)
        src("migrate-set-parameters", **{"max-bandwidth": limit or UNLIMITED})
        resident: list[int] = []
        if way != "direct":
            listen = f"unix:{folder}/in.sock" if channel == "unix" else "tcp:127.0.0.1:0"
            with (relayed if way == "relay" else copied)(listen, to) as (address, resident):
                src("migrate", uri=address)
                info = src.completed()
        else:
            src("migrate", uri=to)
            info = src.completed()
        assert info is not None
        downtime = dst.event("RESUME") - src.event("STOP")
        return Run(
            seconds=info["total-time"] / 1000,
            downtime=downtime,
            resident=resident[0] if resident else None,
        )


def fill_file(path: Path) -> None:
    fill(np.memmap(path, np.uint8, "r+"), "random")


def compare(
    size: int, runs: int, channels: list[str], limits: list[int]
) -> Iterator[dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory(prefix="whimbrel-bench-") as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shm,
    ):
        files = warm_files(Path(shm), size)
        for file in files:
            # In another process: what was resident in this one would count for the relay that it starts.
            filler = multiprocessing.get_context("spawn").Process(target=fill_file, args=(file,))
            filler.start()
            filler.join()
        for channel in channels:
            for limit in limits:
                got: dict[str, list[Run]] = {"direct": [], "relay": [], "copy": []}
                for run in range(runs + 1):
                    for way, runs_of_it in got.items():
                        done = once(
                            Path(folder), files, size, channel=channel, limit=limit, way=way
                        )
                        if run:
                            runs_of_it.append(done)
                row = summary(channel, limit, size, got)
                show(row)
                yield row


def summary(channel: str, limit: int, size: int, got: dict[str, list[Run]]) -> dict[str, Any]:
    rate = {way: statistics.median(size / r.seconds / 1e9 for r in rs) for way, rs in got.items()}
    down = {way: statistics.median(r.downtime * 1e3 for r in rs) for way, rs in got.items()}
    return {
        "channel": channel,
        "limit": limit,
        "gb_per_s": {way: round(value, 3) for way, value in rate.items()},
        "downtime_ms": {way: round(value, 1) for way, value in down.items()},
        "throughput_ratio": round(rate["relay"] / rate["direct"], 3),
        "throughput_ratio_to_copy": round(rate["relay"] / rate["copy"], 3),
        "downtime_added_ms": round(down["relay"] - down["direct"], 1),
        "resident_mib": round(max(r.resident or 0 for r in got["relay"]) / MIB, 1),
        "downtime_runs_ms": {
            way: [round(r.downtime * 1e3, 1) for r in runs] for way, runs in got.items()
        },
    }


def show(row: dict[str, Any]) -> None:
    rate, down = row["gb_per_s"], row["downtime_ms"]
    limit = f"{row['limit'] >> 20} MiB/s" if row["limit"] else "no limit"
    rates = "  ".join(f"{way} {value:.2f}" for way, value in rate.items())
    downs = "  ".join(f"{way} {value:.0f}" for way, value in down.items())
    print(
        f"{row['channel']:5} {limit:10} GB/s {rates}  relay/direct {row['throughput_ratio']:.2f}"
        f"  relay/copy {row['throughput_ratio_to_copy']:.2f}   downtime ms {downs}"
        f"  added {row['downtime_added_ms']:+.0f}   resident {row['resident_mib']:.1f} MiB",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=1 << 30, help="guest RAM (default 1G)")
    parser.add_argument("--runs", type=int, default=5, help="of each way, after one to warm up")
    parser.add_argument("--channel", nargs="+", choices=("tcp", "unix"), default=["tcp", "unix"])
    parser.add_argument(
        "--limit", nargs="+", type=parse_size, default=[128 * MIB, 0], help="max-bandwidth"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    if shutil.which(QEMU) is None:
        sys.exit(f"{QEMU} is not installed: apt-get install qemu-system-x86")
    rows = list(compare(arguments.size, arguments.runs, arguments.channel, arguments.limit))
    if arguments.json:
        json.dump(
            {"size": arguments.size, "cpus": os.cpu_count(), "rows": rows}, sys.stdout, indent=2
        )
        print()


if __name__ == "__main__":
    main()
