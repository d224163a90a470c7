"""The results as a table for the terminal, and as one page of HTML that needs nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

import plots
from results import Check, Measure

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #5d6b7c; --line: #d8dee6;
  --good: #177245; --bad: #b3261e; --c0: #1667c1; --c1: #b35900; --c2: #2b8a3e; --c3: #8e44ad; --c4: #a61e4d; --c5: #0b7285; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --paper: #14181e; --soft: #9aa7b6; --line: #323b46;
  --good: #5fd08f; --bad: #ff8a80; --c0: #6cb1ff; --c1: #ffb066; --c2: #7fd98b; --c3: #d19bee; --c4: #ff8fb3; --c5: #66d9e8; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; }
.met { color: var(--good); font-weight: 600; } .missed { color: var(--bad); font-weight: 600; }
.soft { color: var(--soft); }
figure { margin: 2.2rem 0; } svg { width: 100%; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); } svg text.axis { fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.aim { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 4; }
.bar.ours { fill: var(--c0); opacity: .35; } .bar.other { fill: var(--soft); opacity: .3; }
.dot { fill: var(--paper); stroke-width: 2; } .dot.ours { stroke: var(--c0); } .dot.other { stroke: var(--soft); }
.curve { fill: none; stroke-width: 2; } .point { stroke: none; opacity: .7; }
""" + "".join(
    f".curve.s{n} {{ stroke: var(--c{n}); }} .point.s{n} {{ fill: var(--c{n}); }}\n"
    for n in range(6)
)


_SAID = (
    "Medians of rounds in which all took turns, both ends warm. A bar is the median, a dot is a run, a"
    " dashed line what is asked for."
    " GB/s are 10<sup>9</sup> bytes of guest RAM a second."
)


def aim(check: Check) -> str:
    if check.aim is None:
        return ""
    sign = ">=" if check.sense == "at least" else "<="
    return f"{sign} {check.aim:g}{'' if check.kind == 'must' else ' (aim)'}"


def value(check: Check) -> str:
    if check.value is None:
        return "-"
    digits = 2 if not check.unit else 0 if abs(check.value) >= 100 else 1
    return f"{check.value:.{digits}f}{' ' + check.unit if check.unit else ''}"


def described(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine in words."""
    said = [
        ("processor", f"{machine['cores']} x {machine['processor']}"),
        ("memory", f"{machine['memory_gib']} GiB"),
        ("system", machine["system"]),
        ("Python", f"{machine['python']}, numpy {machine['numpy']}"),
        ("peers", "; ".join(machine["qemu"].values()) or "none"),
        ("whimbrel", machine["whimbrel"]),
        (
            "before the start",
            f"load {machine['load_before']}, processors {machine['busy_before']:.0%} busy",
        ),
    ]
    if "stolen" in machine:
        said.append(("stolen by the host", f"{machine['stolen']:.1%} of the processors' time"))
    return said


def verdict(measures: Sequence[Measure]) -> str:
    checks = [c for m in measures for c in m.checks if c.kind == "must"]
    met = sum(c.verdict == "met" for c in checks)
    return (
        f"{met} of {len(checks)} requirements met"
        if checks
        else "nothing that is required was measured"
    )


def curve_rows(measure: Measure) -> list[tuple[str, str]]:
    """Each series: its medians, and the line through them."""
    curve = measure.curve
    if curve is None:
        return []
    rows = []
    for name in curve.series:
        x, y = curve.medians(name)
        said = "  ".join(f"{a:g}: {b:.3g}" for a, b in zip(x, y, strict=True))
        fit = curve.fit(name)
        if fit is not None and not curve.logarithmic:
            said += f"   [{fit[0]:.3g} + {fit[1]:.3g} x]"
        rows.append((name, said))
    return rows


def table(document: dict[str, Any], measures: Sequence[Measure]) -> str:
    """For a terminal."""
    out = [f"{name:18} {said}" for name, said in described(document["machine"])]
    out += [f"WARNING: {w}" for w in document["warnings"]]
    out += ["", f"medians; rounds in which all took turns: {document['options']['runs']}", ""]
    rows = [("measure", "figure", "", "should be", "")]
    for measure in measures:
        rows.append((measure.title, "", "", "", ""))
        rows += [(f"  {c.what}", value(c), c.detail, aim(c), c.verdict) for c in measure.checks]
        rows += [(f"  {name}", "", said, "", "") for name, said in curve_rows(measure)]
    narrow = [r for r in rows if any(r[1:])]
    width = [max(len(r[i]) for r in narrow) for i in range(5)]
    out += [
        "  ".join(
            (cell.rjust if i == 1 else cell.ljust)(width[i]) for i, cell in enumerate(row)
        ).rstrip()
        if any(row[1:])
        else row[0]
        for row in rows
    ]
    notes = [f"{m.name}: {note}" for m in measures for note in m.notes]
    out += ["", *notes] if notes else []
    return "\n".join([*out, "", verdict(measures)])


def html(document: dict[str, Any], measures: Sequence[Measure]) -> str:
    """The page."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>whimbrel: how fast it moves, {escape(document['began'])}</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>How fast whimbrel moves</h1>",
        f"<p>{escape(document['began'])}, {document['seconds'] / 60:.1f} minutes. {_SAID}</p>",
    ]
    parts += [f'<p class="missed">{escape(w)}</p>' for w in document["warnings"]]
    parts.append(f"<table><tr><th>rounds</th><td>{document['options']['runs']}</td></tr>")
    parts += [
        f"<tr><th>{escape(name)}</th><td>{escape(said)}</td></tr>"
        for name, said in described(document["machine"])
    ]
    parts.append("</table>")
    parts.append(f"<h2>{escape(verdict(measures))}</h2>")
    parts.append(
        '<table><tr><th>measure</th><th></th><th class="n">figure</th><th></th><th>should be</th><th></th></tr>'
    )
    for measure in measures:
        for i, c in enumerate(measure.checks):
            css = {"met": "met", "": "soft"}.get(c.verdict, "missed")
            link = f'<a href="#{measure.name}">{escape(measure.title)}</a>' if not i else ""
            parts.append(
                f'<tr><td>{link}</td><td>{escape(c.what)}</td><td class="n">{escape(value(c))}</td>'
                f'<td class="soft">{escape(c.detail)}</td><td>{escape(aim(c))}</td>'
                f'<td class="{css}">{escape(c.verdict.lower())}</td></tr>'
            )
    parts.append("</table>")
    for measure in measures:
        parts.append(f'<figure id="{measure.name}"><figcaption><h3>{escape(measure.title)}</h3>')
        parts.append("</figcaption>")
        if measure.curve is not None:
            parts.append(plots.curve(measure.curve, measure.title))
            rows = "".join(
                f"<tr><th>{escape(n)}</th><td>{escape(s)}</td></tr>" for n, s in curve_rows(measure)
            )
            parts.append(f"<table>{rows}</table>")
        if measure.ways:
            parts.append(plots.runs(measure))
            parts.append(_figures(measure))
        parts += [f'<p class="soft">{escape(note)}</p>' for note in measure.notes]
        parts.append("</figure>")
    return "\n".join([*parts, "</body></html>", ""])


def _figures(measure: Measure) -> str:
    """The same in numbers."""
    rows = [
        f'<tr><td>{escape(way)}</td><td class="n">{statistics.median(runs):.3g}</td>'
        f'<td class="n">{min(runs):.3g}</td><td class="n">{max(runs):.3g}</td></tr>'
        for way, runs in measure.ways.items()
        if runs
    ]
    head = f'<tr><th></th><th class="n">median, {escape(measure.unit)}</th><th class="n">least</th><th class="n">most</th></tr>'
    return f"<details><summary>figures</summary><table>{head}{''.join(rows)}</table></details>"
