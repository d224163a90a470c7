"""How fast RAM moves: ours beside QEMU's own migration and beside a raw copy through the same kind of socket.

    python benchmarks/ram.py [--size 1G] [--runs 5] [--json] [--channel tcp unix] [--content random zero] [--multifd N]

Each figure is guest RAM over the time of the whole migration as the source measures it, set-up and switchover included,
in 10^9 bytes a second. Two processes each, both ends warm: every page was touched before (first touches cost 2 to 20
microseconds a page and would be all that is measured). The three take turns, so that a noisy moment hits all; medians
and their ratios are printed. The bandwidth limit is lifted on both. With --multifd both send over N channels beside the main
one; the raw copy keeps to one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from whimbrel import Kernel, Machine
from whimbrel.settings import parse_size
from whimbrel_ram import RAMBlock

QEMU = "qemu-system-x86_64"
CHUNK = 1 << 20
PATIENCE = 120  # seconds for any one step


def fill(memory: np.ndarray, content: str) -> None:
    """Write every page, so that the host has given memory for it."""
    words = memory.view(np.uint64)
    if content == "zero":
        words[:] = 1
        words[:] = 0
        return
    block = np.random.default_rng(7).integers(1, 1 << 63, 1 << 20, dtype=np.uint64)
    for i in range(0, len(words), len(block)):
        words[i : i + len(block)] = block[: len(words) - i]


# ---- ours and the raw copy: two processes that keep their memory warm


class Side:
    """One end: a RAM block, and what can be done with it. Lives in a process of its own."""

    def __init__(self, role: str, size: int) -> None:
        self.role = role
        self.block = RAMBlock("ram", size)

    def fill(self, content: str) -> None:
        fill(self.block.view, content)

    def _kernel(self, multifd: int) -> Kernel:
        machine = Machine("bench-1.0")
        machine.add(self.block)
        kernel = Kernel(machine)
        kernel.settings["max-bandwidth"] = 0
        if multifd:
            kernel.settings.update({"multifd": True, "multifd-channels": multifd})
        return kernel

    def listen(self, uri: str, multifd: int) -> str:
        self.kernel = self._kernel(multifd)
        self.incoming = self.kernel.incoming(uri, autostart=False)
        return self.incoming.addresses[0]

    def received(self) -> None:
        self.incoming.wait(PATIENCE)

    def send(self, uri: str, multifd: int) -> float:
        kernel = self._kernel(multifd)
        kernel.migrate(uri).wait(PATIENCE)
        return float(kernel.query()["total-time"]) / 1000

    def raw_listen(self, uri: str) -> str:
        scheme, _, rest = uri.partition(":")
        if scheme == "unix":
            self.server = socket.socket(socket.AF_UNIX)
            self.server.bind(rest)
            self.server.listen()
            return uri
        self.server = socket.create_server(("127.0.0.1", 0))
        return f"tcp:127.0.0.1:{self.server.getsockname()[1]}"

    def raw_received(self) -> None:
        connection, _ = self.server.accept()
        view, got = self.block.buffer, 0
        while got < len(view):
            n = connection.recv_into(view[got : got + CHUNK])
            if not n:
                raise EOFError
            got += n
        connection.sendall(b"k")
        connection.close()
        self.server.close()

    def raw_send(self, uri: str) -> float:
        scheme, _, rest = uri.partition(":")
        if scheme == "unix":
            connection = socket.socket(socket.AF_UNIX)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)
            connection.connect(rest)
        else:
            host, port = rest.rsplit(":", 1)
            connection = socket.create_connection((host, int(port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.perf_counter()
        for i in range(0, self.block.size, CHUNK):
            connection.sendall(self.block.buffer[i : i + CHUNK])
        if connection.recv(1) != b"k":
            raise EOFError
        connection.close()
        return time.perf_counter() - began


def serve(role: str, size: int, pipe: Connection) -> None:
    side = Side(role, size)
    while True:
        command, *arguments = pipe.recv()
        if command == "stop":
            return
        try:
            pipe.send((True, getattr(side, command)(*arguments)))
        except Exception as error:
            pipe.send((False, repr(error)))


class Remote:
    """The other end of serve()."""

    def __init__(self, role: str, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(role, size, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, command: str, *arguments: Any) -> Callable[[], Any]:
        self.pipe.send((command, *arguments))
        return self.finish

    def finish(self) -> Any:
        if not self.pipe.poll(PATIENCE):
            raise TimeoutError("a side of the benchmark does not answer")
        fine, value = self.pipe.recv()
        if not fine:
            raise RuntimeError(value)
        return value

    def __call__(self, command: str, *arguments: Any) -> Any:
        return self.start(command, *arguments)()

    def stop(self) -> None:
        self.pipe.send(("stop",))
        self.process.join(PATIENCE)


def ours(source: Remote, destination: Remote, uri: str, multifd: int) -> float:
    address = destination("listen", uri, multifd)
    received = destination.start("received")
    seconds = source("send", address, multifd)
    received()
    return float(seconds)


def raw(source: Remote, destination: Remote, uri: str) -> float:
    address = destination("raw_listen", uri)
    received = destination.start("raw_received")
    seconds = source("raw_send", address)
    received()
    return float(seconds)


# ---- QEMU


class Qmp:
    """The little of QMP that this needs."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                self.socket.close()
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.file = self.socket.makefile("rwb")
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self.file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]


@contextmanager
def qemu(folder: Path, name: str, memory: Path, size: int, *more: str) -> Iterator[Qmp]:
    path = folder / f"{name}.qmp"
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            *(QEMU, "-M", "pc", "-accel", "tcg", "-nodefaults", "-display", "none", "-S"),
            *("-m", f"{size >> 20}M", "-machine", "memory-backend=m"),
            "-object",
            f"memory-backend-file,id=m,mem-path={memory},size={size},share=on,prealloc=on",
            *("-qmp", f"unix:{path},server=on,wait=off"),
            *more,
        ]
    )
    try:
        qmp = Qmp(path, process)
        yield qmp
        qmp("quit")
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()


def qemus(folder: Path, files: tuple[Path, Path], size: int, uri: str, multifd: int) -> float:
    with (
        qemu(folder, "dst", files[1], size, "-incoming", "defer") as dst,
        qemu(folder, "src", files[0], size) as src,
    ):
        if uri.startswith("tcp"):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                uri = f"tcp:127.0.0.1:{probe.getsockname()[1]}"
        if multifd:
            for side in (src, dst):
                on = [{"capability": "multifd", "state": True}]
                side("migrate-set-capabilities", capabilities=on)
                side("migrate-set-parameters", **{"multifd-channels": multifd})
        dst("migrate-incoming", uri=uri)
        src("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        src("migrate", uri=uri)
        info: dict[str, Any] = {}
        while not info.get("total-time") or info["status"] != "completed":  # the time comes last
            time.sleep(0.02)
            info = src("query-migrate")
            if info["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"QEMU: {info}")
        return float(info["total-time"]) / 1000


# ---- the comparison


def compare(
    size: int, runs: int, channels: list[str], contents: list[str], *, multifd: int, with_qemu: bool
) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whimbrel-bench-")))
        shm = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        source, destination = Remote("source", size), Remote("destination", size)
        stack.callback(source.stop)
        stack.callback(destination.stop)
        files = (shm / "src", shm / "dst")
        if with_qemu:
            for file in files:
                with file.open("wb") as handle:
                    handle.truncate(size)
        for content in contents:
            source("fill", content)
            destination("fill", "zero")
            if with_qemu:
                for file, what in zip(files, (content, "zero"), strict=True):
                    fill(np.memmap(file, np.uint8, "r+"), what)
            for channel in channels:
                ways: dict[str, Callable[[str], float]] = {
                    "ours": lambda uri: ours(source, destination, uri, multifd),
                    "raw": lambda uri: raw(source, destination, uri),
                }
                if with_qemu:
                    ways["qemu"] = lambda uri: qemus(folder, files, size, uri, multifd)
                times: dict[str, list[float]] = {way: [] for way in ways}
                for run in range(runs + 1):
                    for way, measure in ways.items():
                        path = folder / f"{way}{run}.sock"
                        uri = f"unix:{path}" if channel == "unix" else "tcp:127.0.0.1:0"
                        seconds = measure(uri)
                        path.unlink(missing_ok=True)
                        if run:  # the first of each warms up what pre-touching did not
                            times[way].append(seconds)
                rates = {w: [size / t / 1e9 for t in ts] for w, ts in times.items()}
                rows.append(summary(channel, content, rates))
                show(rows[-1])
    return rows


def summary(channel: str, content: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    middle = {way: statistics.median(r) for way, r in rates.items()}
    return {
        "channel": channel,
        "content": content,
        "gb_per_s": {w: round(m, 3) for w, m in middle.items()},
        "runs": {w: [round(x, 3) for x in r] for w, r in rates.items()},
        "ours_to_qemu": round(middle["ours"] / middle["qemu"], 3) if "qemu" in middle else None,
        "ours_to_raw": round(middle["ours"] / middle["raw"], 3),
    }


def show(row: dict[str, Any]) -> None:
    rates = row["gb_per_s"]
    spread = ", ".join(f"{w} {min(r):.2f}-{max(r):.2f}" for w, r in row["runs"].items())
    peer = f"  qemu {rates['qemu']:5.2f}" if "qemu" in rates else ""
    ratio = f"  ours/qemu {row['ours_to_qemu']:.2f}" if row["ours_to_qemu"] else ""
    print(
        f"{row['content']:7} {row['channel']:5} ours {rates['ours']:5.2f}{peer}  raw {rates['raw']:5.2f} GB/s"
        f"{ratio}  ours/raw {row['ours_to_raw']:.2f}   ({spread})",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=1 << 30, help="guest RAM (default 1G)")
    parser.add_argument("--runs", type=int, default=5, help="of each way, after one to warm up")
    parser.add_argument("--channel", nargs="+", choices=("tcp", "unix"), default=["tcp", "unix"])
    parser.add_argument(
        "--content", nargs="+", choices=("random", "zero"), default=["random", "zero"]
    )
    parser.add_argument("--multifd", type=int, default=0, metavar="N", help="over N channels")
    parser.add_argument("--without-qemu", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    with_qemu = not arguments.without_qemu and shutil.which(QEMU) is not None
    if not with_qemu and not arguments.without_qemu:
        print(f"no {QEMU} here: ours beside the raw copy only", file=sys.stderr)
    rows = compare(
        *(arguments.size, arguments.runs, arguments.channel, arguments.content),
        multifd=arguments.multifd,
        with_qemu=with_qemu,
    )
    if arguments.json:
        json.dump(
            {"size": arguments.size, "cpus": os.cpu_count(), "rows": rows}, sys.stdout, indent=2
        )
        print()


if __name__ == "__main__":
    main()
