"""Does a busy machine get across a thin link, within the downtime that was asked for?

    python benchmarks/converge.py [--ram 1G] [--dirty-rate 100e6] [--link 250e6] [--downtime 300] [--limit 0] [--runs 3] [--json]

A stress machine in one process migrates to another through a link that carries so many bytes per second (a proxy that
paces by absolute deadlines). Reported: whether it converged, and the downtime as the guest felt it, which is the time
between the last tick of its clock at the source and the first at the destination. Rates are in bytes (10^6) per second.
--limit is max-bandwidth, which holds until the switchover; 0 is none.
Exit status 1 if a run did not converge, took longer than asked, or lost anything.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from whimbrel.settings import parse_size
from whimbrel_testing.harness import Pair
from whimbrel_testing.pacing import Direction, Link
from whimbrel_testing.stress import StressConfig

#: A run that takes longer than this many seconds does not converge.
PATIENCE = 180


def run(kind: str, options: argparse.Namespace) -> dict[str, object]:
    config = StressConfig(ram=options.ram, rate=options.dirty_rate)
    settings = {"max-bandwidth": int(options.limit), "downtime-limit": options.downtime}
    with tempfile.TemporaryDirectory() as directory, Pair(config, settings=settings) as pair:
        listen = "tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{Path(directory) / 'm.sock'}"
        pair.source.call("boot")
        target = pair.destination.call("incoming", uri=listen)["addresses"][0]
        before = pair.source.call("report")["writes"]
        began = time.monotonic()
        with Link(target, rate=options.link) as link:
            pair.source.call("migrate", uri=link.uri)
            result = pair.source.call("wait", timeout=PATIENCE, patience=PATIENCE + 10)
            took = time.monotonic() - began
            carried = link.passed[Direction.FORWARD]
        completed = result["outcome"] == "completed"
        here = pair.destination if completed else pair.source
        felt = here.call("ticked")
        written = felt["writes"] - before
        proof = here.call("verify", patience=PATIENCE)
        return {
            "transport": kind,
            "converged": completed,
            "error": result["error"],
            "passes": pair.source.call("query").get("ram", {}).get("dirty-sync-count"),
            "seconds": result["total_time"],
            "megabytes": carried / 1e6,
            "link_rate": carried / took / 1e6,
            "dirty_rate": written * 4096 / took / 1e6,
            "downtime_engine": (result["downtime"] or 0) * 1000,
            "downtime_felt": felt["felt_downtime"] * 1000,
            "longest_stall": felt["longest_stall"] * 1000,
            "whole": proof["holds"] and not pair.violations(),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ram", type=parse_size, default=1 << 30)
    parser.add_argument("--dirty-rate", type=float, default=100e6)
    parser.add_argument("--link", type=float, default=250e6)
    parser.add_argument("--limit", type=float, default=0)
    parser.add_argument("--downtime", type=int, default=300, help="ms")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--transport", choices=("tcp", "unix"), action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = []
    for _ in range(options.runs):
        for kind in options.transport or ("tcp", "unix"):
            runs.append(run(kind, options))
            if not options.json:
                show(runs[-1])
    for kind in dict.fromkeys(r["transport"] for r in runs):
        felt = [r["downtime_felt"] for r in runs if r["transport"] == kind]
        if not options.json:
            print(
                f"{kind}: guest-felt downtime median {statistics.median(felt):.0f} ms,"
                f" worst {max(felt):.0f} ms, asked {options.downtime} ms"
            )
    good = all(
        r["converged"] and r["whole"] and r["downtime_felt"] <= options.downtime for r in runs
    )
    if options.json:
        print(json.dumps({"options": vars(options), "runs": runs, "good": good}, indent=2))
    return 0 if good else 1


def show(r: dict[str, object]) -> None:
    print(
        f"{r['transport']:4}  {'converged' if r['converged'] else 'FAILED':9}  {r['passes']} passes"
        f"  {r['seconds']:5.1f} s  {r['megabytes']:5.0f} MB at {r['link_rate']:3.0f} MB/s"
        f"  dirtied {r['dirty_rate']:3.0f} MB/s  down {r['downtime_engine']:3.0f} ms engine,"
        f" {r['downtime_felt']:3.0f} ms felt  stall {r['longest_stall']:2.0f} ms"
        f"  {'whole' if r['whole'] else 'DAMAGED'}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
