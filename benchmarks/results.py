"""What a benchmark finds: measures with the runs of each way, checks against what is aimed at, and curves. Kept as JSON."""

from __future__ import annotations

import statistics
from typing import Any

import attrs
import numpy as np


@attrs.define(kw_only=True)
class Check:
    """A figure, and what it should be. kind: must, aim (we try), or reported."""

    what: str
    value: float | None
    aim: float | None = None
    sense: str = "at least"  #: or "at most"
    kind: str = "reported"
    unit: str = ""
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        if self.value is None:
            return "not measured"
        value, aim = round(self.value, 2), self.aim
        return "met" if (value >= aim if self.sense == "at least" else value <= aim) else "MISSED"


@attrs.define(kw_only=True)
class Curve:
    """Figures over something that grows. series: name → [(x, the runs there)]."""

    x: str
    y: str
    series: dict[str, list[tuple[float, list[float]]]] = attrs.field(factory=dict)
    logarithmic: bool = False

    def medians(self, name: str) -> tuple[list[float], list[float]]:
        points = [(x, statistics.median(runs)) for x, runs in self.series[name] if runs]
        return [x for x, _ in points], [y for _, y in points]

    def fit(self, name: str) -> tuple[float, float] | None:
        """Intercept and slope of the straight line through the medians."""
        x, y = self.medians(name)
        if len(x) < 2:
            return None
        slope, intercept = np.polyfit(x, y, 1)
        return float(intercept), float(slope)


@attrs.define(kw_only=True)
class Measure:
    """One thing that was measured. ways: what ran, and the figure of each run, warm-up left out."""

    name: str
    title: str
    unit: str
    ways: dict[str, list[float]] = attrs.field(factory=dict)
    checks: list[Check] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    curve: Curve | None = None

    def median(self, way: str) -> float | None:
        runs = self.ways.get(way)
        return statistics.median(runs) if runs else None

    def compare(
        self, way: str, aim: float | None = None, *, kind: str = "reported", less: bool = False
    ) -> None:
        """Check ours against that way; less: of what is better when it is less."""
        ours, theirs = self.median("ours"), self.median(way)
        if theirs is None and kind != "must":
            return
        value = None if ours is None or not theirs else ours / theirs
        detail = "" if value is None else f"{ours:.3g} / {theirs:.3g} {self.unit}"
        self.checks.append(
            Check(
                what=f"ours / {way}",
                value=value,
                aim=aim,
                sense="at most" if less else "at least",
                kind=kind,
                detail=detail,
            )
        )

    @property
    def peers(self) -> list[str]:
        return [way for way in self.ways if way.startswith("QEMU")]


def decode(members: dict[str, Any]) -> Measure:
    """From attrs.asdict(), by way of JSON."""
    curve = members["curve"]
    if curve is not None:
        series = {n: [(x, ys) for x, ys in points] for n, points in curve["series"].items()}
        curve = Curve(**{**curve, "series": series})
    checks = [Check(**c) for c in members["checks"]]
    return Measure(**{**members, "checks": checks, "curve": curve})
