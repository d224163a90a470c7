"""Machines that write while they move: ours, and a guest of QEMU's with the same load.

A load is so many bytes of pages a second, written a little in, of a ring of hot pages. Ours is a thread in the process that
embeds the machine; QEMU's is a boot sector (whimbrel_testing.guest.rewriter), whose serial port tells how it fares.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from pathlib import Path
from typing import Any

import attrs
import converge
from qemus import Pair, Qmp, place
from remote import PATIENCE, Remote
from sides import PAGE, Sides

from whimbrel_testing.guest import rewriter
from whimbrel_testing.pacing import Link

_FLOPPY = 1_474_560
#: Ticks a second of QEMU's guest.
_HZ = 1000


@attrs.frozen(kw_only=True)
class Load:
    """Bytes of pages written per second, in a ring of `hot` bytes, a byte in every `stride`.

    QEMU's guest writes whole pages a tick: at least 4.1 MB/s.
    """

    rate: float
    hot: int
    stride: int = PAGE


class SerialWatch:
    """Notes what two serial ports say, and when. In a process of its own, so that nothing delays it."""

    def __init__(self, paths: list[str]) -> None:
        self._ports = [Port(path) for path in paths]
        for port in self._ports:
            port.start()

    def seen(self) -> list[dict[str, Any]]:
        """Of each port so far: its text, and the times of the first and of the last of it."""
        return [{"text": bytes(p.text), "first": p.first, "last": p.last} for p in self._ports]


class Port(threading.Thread):
    """One serial port, which QEMU connects."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen()
        self.text = bytearray()
        self.first = self.last = 0.0

    def run(self) -> None:
        connection, _ = self._server.accept()
        while data := connection.recv(4096):
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.text += data


def count(text: bytes) -> int:
    """The last whole number. Raises RuntimeError where the lines are not 1, 2, 3, ..."""
    lines = text.split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        if int(line) != number:
            raise RuntimeError(f"the guest's count was broken: {line!r} instead of {number}")
    return len(lines)


def qemus(
    pair: Pair,
    uri: str,
    load: Load,
    *,
    link: float | None = None,
    parameters: dict[str, int] | None = None,
    capabilities: tuple[str, ...] = (),
    warm: float = 1.0,
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """A running guest moves. link: bytes per second of a proxy; warm: seconds that it works before.

    Seconds of the migration, `felt` downtime between the last number at the source and the first at the destination, the
    rate that the guest kept meanwhile (bytes per second), passes, and megabytes sent. Without `seconds` it did not end.
    """
    folder = pair.folder
    per_tick = round(load.rate / PAGE / _HZ)
    image = folder / "guest.img"
    sector = rewriter.boot_sector(
        pages=load.hot // PAGE, pages_per_tick=per_tick, stride=load.stride, hz=_HZ
    )
    image.write_bytes(sector.ljust(_FLOPPY, b"\0"))
    options = ["-drive", f"if=floppy,format=raw,readonly=on,file={image}"]
    ports = [str(folder / f"{side}.serial") for side in ("src", "dst")]
    for port in ports:
        Path(port).unlink(missing_ok=True)
    here, there = (
        [*options, "-chardev", f"socket,id=s,path={p}", "-serial", "chardev:s"] for p in ports
    )
    uri = place(uri)
    with Remote(SerialWatch, ports) as watch:
        watch("seen")  # it listens
        with pair.started(uri, source=here, destination=there, both=capabilities) as (source, to):
            source("migrate-set-parameters", **(parameters or {}))
            wait_counting(watch)
            time.sleep(warm)
            with Link(uri, rate=link) as way:
                before, began = count(watch("seen")[0]["text"]), time.monotonic()
                source("migrate", uri=way.uri.partition(",")[0] if link else uri)
                told = ended(source, to, watch, patience)
            port = watch("seen")[0]
            ticks = count(port["text"]) - before
            return {**told, "rate": ticks * per_tick * PAGE / (port["last"] - began)}


def wait_counting(watch: Remote) -> None:
    """The guest has begun."""
    deadline = time.monotonic() + 60
    while not count(watch("seen")[0]["text"]):
        if time.monotonic() > deadline:
            raise TimeoutError("the guest does not come up")
        time.sleep(0.01)


def ended(source: Qmp, to: Qmp, watch: Remote, patience: float) -> dict[str, Any]:
    """What the source and the serial ports say of the migration; nothing when it did not end."""
    info = source.completed(patience)
    if info is None:
        return {}
    to.event("RESUME")
    time.sleep(0.2)
    first, second = watch("seen")
    count(first["text"] + second["text"])  # joined: a line may have been cut in two
    return {
        "seconds": info["total-time"] / 1000,
        "downtime": info["downtime"] / 1000,
        "felt": second["first"] - first["last"],
        "passes": info["ram"]["dirty-sync-count"],
        "megabytes": info["ram"]["transferred"] / 1e6,
        "xbzrle-cache": info.get("xbzrle-cache"),
    }


def ours(
    sides: Sides,
    uri: str,
    load: Load,
    *,
    settings: dict[str, Any] | None = None,
    warm: float = 1.0,
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """The same, of ours, without a link and the guest's clock."""
    sides.source("write", load.rate, load.hot, load.stride)
    time.sleep(warm)
    return sides.ours(uri, source=settings, patience=patience)


def ours_felt(uri: str, load: Load, *, ram: int, link: float, downtime: int) -> dict[str, Any]:
    """A StressMachine, as in converge.py: whole pages, anywhere in RAM. Raises RuntimeError if anything was lost."""
    options = argparse.Namespace(
        ram=ram, dirty_rate=load.rate, link=link, limit=0, downtime=downtime
    )
    told = converge.run(uri.partition(":")[0], options)
    if not told["whole"]:
        raise RuntimeError(f"the machine did not arrive whole: {told}")
    return {
        **({"seconds": told["seconds"]} if told["converged"] else {}),
        "downtime": told["downtime_engine"] / 1000,
        "felt": told["downtime_felt"] / 1000,
        "rate": told["dirty_rate"] * 1e6,
        "passes": told["passes"],
        "megabytes": told["megabytes"],
    }
