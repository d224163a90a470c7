"""The measures of `make bench`, by name: each takes a Lab and yields what it found."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import loads
from lab import Lab, available
from qemus import Pair
from results import Check, Curve, Measure

from whimbrel_ram import native

MIB = 1 << 20
GIB = 1 << 30
#: 1 Gbit/s, in bytes per second.
GIGABIT = 125_000_000


def rate(size: int, told: dict[str, Any]) -> float:
    """10^9 bytes of guest RAM a second."""
    return float(size / told["seconds"] / 1e9)


def throughput(lab: Lab, content: str, channel: str, multifd: int = 0) -> Measure:
    """Ours, QEMU's, the raw sockets', for one channel our bare loop's, and ours by numpy alone."""
    sides, pairs = lab.warm(content)
    both = {"multifd": True, "multifd-channels": multifd} if multifd else {}
    over = f", multifd {multifd}" if multifd else ""
    measure = Measure(
        name=f"{content}-{channel}{f'-multifd{multifd}' if multifd else ''}",
        title=f"{content} RAM over {channel}{over}",
        unit="GB/s",
    )

    def ours(accel: bool = True) -> float:
        return rate(lab.size, sides.ours(lab.uri(channel), both=both, accel=accel))

    def bare(way: str, sockets: int) -> float:
        return rate(lab.size, sides.bare(way, lab.uri(channel), sockets))

    def peer(pair: Pair) -> float:
        return rate(lab.size, pair.moved(lab.uri(channel), multifd))

    ways: dict[str, Callable[[], float]] = {"ours": ours}
    if not multifd:
        ways["loop"] = partial(bare, "loop", 1)
    ways["raw"] = partial(bare, "raw", multifd or 1)
    if native.records is not None:
        ways["numpy"] = partial(ours, False)
    ways |= {name: partial(peer, pair) for name, pair in pairs.items()}
    for way in {"ours", "loop", "numpy"} & set(ways):
        sides.destination("fill", "random" if content == "zero" else "zero")
        ways[way]()
        if not sides.destination("same", content):
            raise RuntimeError(f"{measure.title}, {way}: what arrived is not what was sent")
    lab.rounds(measure, ways)
    return measure


def random(lab: Lab) -> Iterator[Measure]:
    for channel in lab.channels:
        measure = throughput(lab, "random", channel)
        measure.compare("loop", 0.9, kind="must")
        for peer in measure.peers:
            measure.compare(peer, 1.1 if channel == "tcp" else 1.0, kind="aim")
        measure.compare("raw")
        measure.compare("numpy")
        yield measure


def zero(lab: Lab) -> Iterator[Measure]:
    for channel in lab.channels:
        measure = throughput(lab, "zero", channel)
        for peer in measure.peers:
            measure.compare(peer, 0.8, kind="aim")
        measure.compare("loop")
        measure.compare("numpy")
        yield measure


def multifd(lab: Lab) -> Iterator[Measure]:
    for channel in lab.channels:
        measure = throughput(lab, "random", channel, 2)
        measure.compare("raw", 0.85, kind="must")
        for peer in measure.peers:
            measure.compare(peer, 1.2, kind="aim")
        measure.compare("numpy")
        yield measure


def xbzrle(lab: Lab) -> Iterator[Measure]:
    """A quarter of RAM is hot; what is written is 1 % of the bytes of each page, the same in every round."""
    size = lab.size // 2
    hot = size // 4
    load = loads.Load(rate=200e6, hot=hot, stride=100)
    parameters = {"max-bandwidth": GIGABIT, "downtime-limit": 300, "xbzrle-cache-size": 2 * hot}
    measure = Measure(
        name="xbzrle",
        title=f"xbzrle: {size // MIB} MiB, 1 % of {hot // MIB} MiB rewritten at 200 MB/s, 1 Gbit/s",
        unit="s",
    )
    last: dict[str, Any] = {}
    sides, pairs = lab.warm("random", size)

    def ours() -> float:
        settings = {"xbzrle": True, **parameters}
        last["ours"] = told = loads.ours(sides, lab.uri("tcp"), load, settings=settings)
        return float(told["seconds"])

    def peer(name: str, pair: Pair) -> float:
        last[name] = told = loads.qemus(
            *(pair, lab.uri("tcp"), load), parameters=parameters, capabilities=("xbzrle",)
        )
        return float(told["seconds"])

    ways: dict[str, Callable[[], float]] = {"ours": ours}
    ways |= {name: partial(peer, name, pair) for name, pair in pairs.items()}
    lab.rounds(measure, ways, warm_up=0)
    for name in measure.peers:
        measure.compare(name, 1.0, kind="must", less=True)
    for name, told in last.items():
        cache = told["xbzrle-cache"]
        measure.notes.append(
            f"{name}, last round: {told['passes']} passes, {told['megabytes']:.0f} MB,"
            f" {cache['pages']} pages as deltas, {cache['cache-miss']} misses;"
            f" it wrote at {told['rate'] / 1e6:.0f} MB/s"
        )
    lab.drop()  # its guests have written into the memory
    yield measure


def downtime(lab: Lab) -> Iterator[Measure]:
    """As the guest felt it: by the machine's own clock, and by the counts on the serial ports of QEMU's guest."""
    link, limit = 400e6, 300
    size = lab.size
    _, pairs = lab.warm("random")
    load = loads.Load(rate=200e6, hot=size - 32 * MIB if size > 64 * MIB else size // 4)
    measure = Measure(
        name="downtime",
        title=f"guest-felt downtime: {size // MIB} MiB written at 200 MB/s, link of 400 MB/s, limit {limit} ms",
        unit="ms",
    )
    rates: dict[str, list[float]] = {}

    def noted(name: str, told: dict[str, Any]) -> float:
        if "seconds" not in told:
            raise RuntimeError("it did not converge")
        rates.setdefault(name, []).append(told["rate"] / 1e6)
        return float(told["felt"] * 1000)

    def ours() -> float:
        told = loads.ours_felt(lab.uri("tcp"), load, ram=size, link=link, downtime=limit)
        return noted("ours", told)

    def peer(name: str, pair: Pair) -> float:
        parameters = {"downtime-limit": limit}
        told = loads.qemus(pair, lab.uri("tcp"), load, link=link, parameters=parameters)
        return noted(name, told)

    ways: dict[str, Callable[[], float]] = {"ours": ours}
    ways |= {name: partial(peer, name, pair) for name, pair in pairs.items()}
    lab.rounds(measure, ways, warm_up=0)
    felt = measure.ways["ours"]
    measure.checks.append(
        Check(
            what="ours, median",
            value=measure.median("ours"),
            aim=limit,
            sense="at most",
            kind="must",
            unit="ms",
            detail=f"worst {max(felt):.0f} ms" if felt else "",
        )
    )
    for name in measure.peers:
        measure.compare(name, 1.0, kind="must", less=True)
    for name, kept in rates.items():
        measure.notes.append(f"{name} wrote at {statistics.median(kept):.0f} MB/s while it moved")
    lab.drop()
    yield measure


def large(lab: Lab) -> int:
    """Eight times the size of the lab, or as much as memory allows for two of."""
    size = 8 * lab.size
    while 2.2 * size > available():
        size //= 2
    return size


def footprint(size: int) -> dict[str, Any]:
    """What footprint.py says. A program of its own: our processes have numpy from the start, which is to be measured."""
    script = Path(__file__).with_name("footprint.py")
    command = [sys.executable, script, "--size", str(size), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def memory(lab: Lab) -> Iterator[Measure]:
    lab.drop()
    measure = Measure(name="memory", title="engine's memory beside guest RAM", unit="MiB")
    sizes = sorted({min(lab.size, large(lab)), large(lab)})
    for size in sizes:
        for role, figures in footprint(size).items():
            measure.ways[f"{role}, {size // MIB} MiB"] = [figures["peak_mib"]]
    for role in ("source", "destination"):
        small, big = (measure.median(f"{role}, {s // MIB} MiB") for s in (sizes[0], sizes[-1]))
        assert small is not None
        assert big is not None
        measure.checks.append(
            Check(
                what=f"{role}, guest of {sizes[-1] // MIB} MiB",
                value=big,
                aim=64,
                sense="at most",
                kind="must",
                unit="MiB",
                detail=f"{small:.3g} MiB for one of {sizes[0] // MIB} MiB",
            )
        )
        more = (sizes[-1] - sizes[0]) / GIB
        if more:
            measure.checks.append(
                Check(
                    what=f"{role}, more for each GiB of guest RAM (flat: 0.2 %)",
                    value=(big - small) / more,
                    aim=2,
                    sense="at most",
                    kind="aim",
                    unit="MiB",
                )
            )
    yield measure


def slope(lab: Lab) -> Iterator[Measure]:
    """Total time over RAM: each piece of the curve must be as steep as the line through all of it. All sizes take turns in
    the same warm memory.
    """
    curve = Curve(x="guest RAM, GiB", y="total time, s")
    measure = Measure(
        name="slope", title="total time over guest RAM, random, tcp", unit="s", curve=curve
    )
    points = curve.series.setdefault("ours", [])
    whole = large(lab)
    with lab.sides(whole, "random", blocks=8) as sides:

        def ours(blocks: int) -> float:
            for side in (sides.source, sides.destination):
                side("use", blocks)
            return float(sides.ours(lab.uri("tcp"))["seconds"])

        sizes = {f"{whole * n // 8 // MIB} MiB": n for n in (1, 2, 4, 8)}
        all_of_them = Measure(name="", title=measure.title, unit="s")
        lab.rounds(all_of_them, {name: partial(ours, n) for name, n in sizes.items()})
        measure.notes += all_of_them.notes
        for name, n in sizes.items():
            if runs := all_of_them.ways[name]:
                points.append((whole * n / 8 / GIB, runs))
    x, y = curve.medians("ours")
    fitted = curve.fit("ours")
    if fitted is not None:
        pieces = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
        said = ", ".join(f"{p:.3f}" for p in pieces)
        measure.checks.append(
            Check(
                what="steepest or flattest piece, off the line's slope",
                value=max(abs(p / fitted[1] - 1) for p in pieces) * 100,
                aim=15,
                sense="at most",
                kind="must",
                unit="%",
                detail=f"{fitted[0]:.3f} s + {fitted[1]:.3f} s/GiB; pieces {said}",
            )
        )
    yield measure


@attrs.frozen
class Entry:
    take: Callable[[Lab], Iterator[Measure]]
    #: With five rounds, 1 GiB and two QEMUs, in seconds.
    seconds: float


MEASURES = {
    "random": Entry(random, 90),
    "zero": Entry(zero, 70),
    "multifd": Entry(multifd, 80),
    "xbzrle": Entry(xbzrle, 150),
    "downtime": Entry(downtime, 200),
    "memory": Entry(memory, 60),
    "slope": Entry(slope, 120),
}
