"""Plots as SVG in text: runs of each way on one axis, and curves. Colours come from the page's style sheet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from results import Curve, Measure

_WIDTH, _LEFT, _RIGHT = 760, 150, 24
_ROW = 30


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def text(x: float, y: float, said: str, anchor: str = "middle", css: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(said)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def framed(height: float, label: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"\n{body}\n</svg>"
    )


def runs(measure: Measure) -> str:
    """A row for each way: its median as a bar, each run as a dot; what is asked for as a dashed line."""
    ways = {way: figures for way, figures in measure.ways.items() if figures}
    if not ways:
        return ""
    aims = [c.aim for c in measure.checks if c.aim is not None and c.unit == measure.unit]
    high = max(*aims, *(max(figures) for figures in ways.values()), 0.0) * 1.05 or 1.0
    bottom = 8 + _ROW * len(ways)

    def at(value: float) -> float:
        return _LEFT + value / high * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for tick in ticks(0, high):
        parts.append(line(at(tick), 4, at(tick), bottom, "grid"))
        parts.append(text(at(tick), bottom + 16, f"{tick:g}"))
    parts += [line(at(a), 4, at(a), bottom, "aim") for a in sorted(set(aims))]
    for row, (way, figures) in enumerate(ways.items()):
        y = 8 + _ROW * row
        middle = statistics.median(figures)
        css = "ours" if way == "ours" else "other"
        parts.append(text(_LEFT - 10, y + 19, way, "end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 5}" width="{at(middle) - _LEFT:.1f}" height="{_ROW - 12}"'
            f' class="bar {css}"><title>{escape(way)}: median {middle:.4g} {measure.unit}</title></rect>'
        )
        parts += [
            f'<circle cx="{at(f):.1f}" cy="{y + 14}" r="3.5" class="dot {css}">'
            f"<title>{f:.4g} {measure.unit}</title></circle>"
            for f in figures
        ]
    parts.append(text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 34, measure.unit, css="axis"))
    return framed(bottom + 42, measure.title, parts)


def curve(shown: Curve, label: str) -> str:
    """Medians as lines, each run as a dot, both axes from zero (a logarithmic x from its first point)."""
    points = [(x, y) for series in shown.series.values() for x, ys in series for y in ys]
    if not points:
        return ""
    top, bottom, left = 12, 300, 70
    xs = sorted({x for x, _ in points})
    high = max(y for _, y in points) * 1.08 or 1.0
    low_x, high_x = (math.log(xs[0]), math.log(xs[-1])) if shown.logarithmic else (0.0, xs[-1])
    wide = (high_x - low_x) or 1.0

    def at(x: float) -> float:
        place = math.log(x) if shown.logarithmic else x
        return left + (place - low_x) / wide * (_WIDTH - left - _RIGHT)

    def up(y: float) -> float:
        return bottom - y / high * (bottom - top)

    parts = []
    for tick in ticks(0, high):
        parts.append(line(left, up(tick), _WIDTH - _RIGHT, up(tick), "grid"))
        parts.append(text(left - 8, up(tick) + 4, f"{tick:g}", "end"))
    for tick in xs if shown.logarithmic else ticks(0, xs[-1]):
        parts.append(line(at(tick), top, at(tick), bottom, "grid"))
        parts.append(text(at(tick), bottom + 16, f"{tick:g}"))
    for number, (name, series) in enumerate(shown.series.items()):
        x, y = shown.medians(name)
        path = " ".join(f"{at(a):.1f},{up(b):.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{path}" class="curve s{number % 6}"/>')
        parts += [
            f'<circle cx="{at(a):.1f}" cy="{up(b):.1f}" r="3" class="point s{number % 6}">'
            f"<title>{escape(name)}: {b:.4g} at {a:g}</title></circle>"
            for a, ys in series
            for b in ys
        ]
        key = left + 12 + 150 * (number % 4), bottom + 62 + 20 * (number // 4)
        parts.append(line(key[0], key[1] - 4, key[0] + 22, key[1] - 4, f"curve s{number % 6}"))
        parts.append(text(key[0] + 28, key[1], name, "start"))
    parts.append(text((left + _WIDTH - _RIGHT) / 2, bottom + 36, shown.x, css="axis"))
    middle = (top + bottom) / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" class="axis"'
        f' transform="rotate(-90 16 {middle})">{escape(shown.y)}</text>'
    )
    return framed(bottom + 74 + 20 * ((len(shown.series) - 1) // 4), label, parts)
