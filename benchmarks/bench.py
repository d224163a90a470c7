"""How fast RAM moves: ours, the peer (QEMU) and the raw limit, beside each other; a table, JSON, and a page with plots.

    python benchmarks/bench.py [--only random zero ...] [--runs 5] [--size 1G] [--channel tcp unix]
    python benchmarks/bench.py --scaling [--only ram channels ...]
    python benchmarks/bench.py --report build/bench/FILE.json

Both ends of everything are warm: every page of their memory was touched before (first touches cost 2 to 20 microseconds a
page and would be all that is measured), and each way runs once uncounted. All ways of a measure take turns, in rounds, so
that a noisy moment hits all. Of ours and QEMU's a time is that of the whole migration as the source measures it, set-up
and switchover included; bandwidth limits are lifted where none is said. Results go to build/bench.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import qemus
import report
from lab import BUSY, Lab, busy, machine, processor_time, say
from measures import GIB, MEASURES
from results import Measure, decode
from scaling import SCALING

from whimbrel.settings import parse_size

OUT = Path(__file__).parents[1] / "build/bench"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {*MEASURES, *SCALING}
    parser.add_argument("--only", nargs="+", choices=sorted(names), metavar="NAME", help="of these")
    parser.add_argument("--scaling", action="store_true", help="the curves instead of the table")
    parser.add_argument("--runs", type=int, help="rounds (default 5; for --scaling 3)")
    parser.add_argument("--size", type=parse_size, default=GIB, help="guest RAM (default 1G)")
    parser.add_argument("--channel", nargs="+", choices=("tcp", "unix"), default=["tcp", "unix"])
    parser.add_argument("--qemu", nargs="*", metavar="VERSION", help="the peers (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="a folder for the results")
    parser.add_argument("--report", type=Path, metavar="JSON", help="only the table and the page")
    options = parser.parse_args()
    options.runs = options.runs or (3 if options.scaling else 5)
    chosen = SCALING if options.scaling else MEASURES
    options.only = options.only or list(chosen)
    if wrong := [n for n in options.only if n not in chosen]:
        parser.error(f"{', '.join(wrong)}: not among {', '.join(chosen)}")
    return options


def peers(wanted: list[str] | None) -> dict[str, str]:
    """The QEMUs to compare with. Says which are missing."""
    found = qemus.binaries()
    if wanted is None and not found:
        say(f"no {qemus.QEMU} here: ours beside the raw limit only")
    if missing := set(wanted or ()) - set(found):
        sys.exit(
            f"no QEMU {', '.join(sorted(missing))} here; there is {', '.join(found) or 'none'}"
        )
    return {v: b for v, b in found.items() if wanted is None or v in wanted}


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[Measure]]:
    """Take the measures; what was found, and on what."""
    binaries = peers(options.qemu)
    about = machine(binaries)
    warnings = []
    if about["busy_before"] > BUSY:
        warnings.append(
            f"the machine was {about['busy_before']:.0%} busy before this began: do not trust the figures"
        )
        say(f"WARNING: {warnings[-1]}")
    entries = {n: (SCALING if options.scaling else MEASURES)[n] for n in options.only}
    scale = (options.runs + 1) / 6 * (0.3 + 0.7 * options.size / GIB)
    say(f"about {sum(e.seconds for e in entries.values()) * scale / 60:.0f} minutes")
    began, clock, spent = time.monotonic(), dt.datetime.now().astimezone(), processor_time()
    measures: list[Measure] = []
    with Lab(runs=options.runs, size=options.size, qemus=binaries, channels=options.channel) as lab:
        for name, entry in entries.items():
            say(f"{name}  (after {time.monotonic() - began:.0f} s)")
            try:
                measures += entry.take(lab)
            except KeyboardInterrupt:
                warnings.append(f"interrupted in {name}")
                break
            except Exception as error:  # the others are worth having
                say(f"  {name} failed: {error!r}")
                warnings.append(f"{name} failed: {error!r}")
    about["stolen"] = round(busy(spent, processor_time())["stolen"], 4)
    document = {
        "began": clock.isoformat(" ", "seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "machine": about,
        "warnings": warnings,
        "options": {"runs": options.runs, "size": options.size, "only": options.only},
    }
    return document, measures


def main() -> None:
    options = parsed()
    if options.report is None:
        document, measures = run(options)
        options.out.mkdir(parents=True, exist_ok=True)
        kind = "scaling" if options.scaling else "bench"
        stamp = document["began"][:19].replace(" ", "-").replace(":", "")
        path = options.out / f"{kind}-{stamp}.json"
        kept = {**document, "measures": [attrs.asdict(m) for m in measures]}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    else:
        path = options.report
        document = json.loads(path.read_text())
        measures = [decode(m) for m in document["measures"]]
    page = path.with_suffix(".html")
    page.write_text(report.html(document, measures))
    print(report.table(document, measures))
    print(f"{path}\n{page}")


if __name__ == "__main__":
    main()
