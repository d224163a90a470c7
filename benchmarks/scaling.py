"""The curves of `make bench-scaling`, by name: how total time or throughput goes with RAM, channels, blocks, dirty rate."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import loads
from lab import Lab, available
from measures import GIB, MIB, Entry, rate
from qemus import Pair
from results import Curve, Measure


def point(lab: Lab, x: float, ways: dict[str, Callable[[], float]], measure: Measure) -> None:
    """Rounds of all ways at one x of the curve."""
    assert measure.curve is not None
    one = Measure(name="", title=f"{measure.name} {x:g}", unit=measure.unit)
    lab.rounds(one, ways)
    for way, runs in one.ways.items():
        measure.curve.series.setdefault(way, []).append((x, runs))
    measure.notes += [f"at {x:g}: {note}" for note in one.notes]


def seconds(take: Callable[[], dict[str, Any]]) -> float:
    told = take()
    if "seconds" not in told:
        raise RuntimeError("it did not converge")
    return float(told["seconds"])


def ram(lab: Lab) -> Iterator[Measure]:
    """From a quarter of the lab's size to eight times it. Ours and QEMU's one after the other: not both fit in memory."""
    curve = Curve(x="guest RAM, GiB", y="total time, s")
    measure = Measure(name="ram", title="total time over RAM, random, tcp", unit="s", curve=curve)
    size = max(lab.size // 4, MIB)
    while size <= 8 * lab.size and 2.2 * size < available():
        with lab.sides(size, "random") as sides:
            ways = {"ours": lambda sides=sides: seconds(lambda: sides.ours(lab.uri("tcp")))}
            point(lab, size / GIB, ways, measure)
        if lab.qemus and 2.1 * size > shutil.disk_usage(lab.shm).free:
            measure.notes.append(f"at {size / GIB:g}: no room in {lab.shm.parent} for QEMU's RAM")
        elif lab.qemus:
            pairs = lab.files("random", size)
            point(lab, size / GIB, moves(lab, pairs), measure)
            lab.drop()
        size *= 2
    yield measure


def moves(lab: Lab, pairs: dict[str, Pair]) -> dict[str, Callable[[], float]]:
    """A migration of each pair."""

    def one(pair: Pair) -> float:
        return seconds(lambda: pair.moved(lab.uri("tcp")))

    return {name: partial(one, pair) for name, pair in pairs.items()}


def channels(lab: Lab) -> Iterator[Measure]:
    sides, pairs = lab.warm("random")
    curve = Curve(x="multifd channels", y="GB/s of guest RAM")
    measure = Measure(
        name="channels", title="throughput over channels, random, tcp", unit="GB/s", curve=curve
    )

    def ours(n: int) -> float:
        both = {"multifd": True, "multifd-channels": n}
        return rate(lab.size, sides.ours(lab.uri("tcp"), both=both))

    def raw(n: int) -> float:
        return rate(lab.size, sides.bare("raw", lab.uri("tcp"), n))

    def peer(pair: Pair, n: int) -> float:
        return rate(lab.size, pair.moved(lab.uri("tcp"), n))

    for n in (1, 2, 4, 8):
        ways: dict[str, Callable[[], float]] = {"ours": partial(ours, n), "raw": partial(raw, n)}
        ways |= {name: partial(peer, pair, n) for name, pair in pairs.items()}
        point(lab, n, ways, measure)
    yield measure


def blocks(lab: Lab) -> Iterator[Measure]:
    """The same RAM in more and more blocks."""
    curve = Curve(x="RAM blocks", y="total time, s", logarithmic=True)
    measure = Measure(
        name="blocks",
        title=f"total time over RAM blocks, {lab.size // MIB} MiB in all, random, tcp",
        unit="s",
        curve=curve,
    )
    for n in (1, 10, 100, 1000):
        with lab.sides(lab.size, "random", n) as sides:
            ways = {"ours": lambda sides=sides: seconds(lambda: sides.ours(lab.uri("tcp")))}
            point(lab, n, ways, measure)
    yield measure


def dirty(lab: Lab) -> Iterator[Measure]:
    """Half of RAM is written in; no limit but the channel's. A way that does not get done stays out from there on."""
    sides, pairs = lab.warm("random")
    patience = 30.0
    hot = lab.size // 2
    times = Measure(
        name="dirty-rate",
        title=f"total time over dirty rate, {lab.size // MIB} MiB, tcp",
        unit="s",
        curve=Curve(x="dirty rate, GB/s", y="total time, s"),
    )
    stops = Measure(
        name="dirty-rate-downtime",
        title="downtime over dirty rate, as the source measures it, limit 300 ms",
        unit="ms",
        curve=Curve(x="dirty rate, GB/s", y="downtime, ms"),
    )
    assert stops.curve is not None
    downtimes: dict[str, list[float]] = {}

    def noted(name: str, told: dict[str, Any]) -> dict[str, Any]:
        if "seconds" in told:
            downtimes.setdefault(name, []).append(told["downtime"] * 1000)
        return told

    def ours(load: loads.Load) -> float:
        return seconds(
            lambda: noted("ours", loads.ours(sides, lab.uri("tcp"), load, patience=patience))
        )

    def peer(name: str, pair: Pair, load: loads.Load) -> float:
        if not load.rate:
            return seconds(lambda: noted(name, pair.moved(lab.uri("tcp"))))
        return seconds(
            lambda: noted(name, loads.qemus(pair, lab.uri("tcp"), load, patience=patience))
        )

    out: set[str] = set()
    for gigabytes in (0.0, 0.1, 0.2, 0.5, 1.0):
        load = loads.Load(rate=gigabytes * 1e9, hot=hot)
        ways: dict[str, Callable[[], float]] = {"ours": partial(ours, load)}
        ways |= {name: partial(peer, name, pair, load) for name, pair in pairs.items()}
        point(lab, gigabytes, {w: f for w, f in ways.items() if w not in out}, times)
        assert times.curve is not None
        out |= {n for n, points in times.curve.series.items() if points and not points[-1][1]}
        for name, taken in downtimes.items():
            stops.curve.series.setdefault(name, []).append((gigabytes, taken[1:]))
        downtimes.clear()
    lab.drop()
    yield times
    yield stops


#: With five rounds, 1 GiB and two QEMUs, in seconds.
SCALING = {
    "ram": Entry(ram, 400),
    "channels": Entry(channels, 160),
    "blocks": Entry(blocks, 40),
    "dirty": Entry(dirty, 350),
}
