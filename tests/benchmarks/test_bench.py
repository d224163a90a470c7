"""The benchmarks run, in their smallest form, and say what they found. How fast it was is not looked at."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from whimbrel_ram import native
from whimbrel_testing.peers import PATIENCE, QemuBinaries

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bench(folder, *arguments):
    """What was printed, what was kept, and the page."""
    said = run("bench.py", "--runs", 1, "--out", folder, *arguments)
    (kept,) = folder.glob("*.json")
    document = json.loads(kept.read_text())
    failures = [n for m in document["measures"] for n in m["notes"] if "failed" in n]
    assert not failures
    return said, {m["name"]: m for m in document["measures"]}, kept


def ways(measure):
    """Those that ran, each once."""
    return {way for way, runs in measure["ways"].items() if len(runs) == 1}


ALONE = ("--size", "8M", "--qemu", "--channel", "tcp", "--only")


def test_ours_alone(tmp_path):
    said, measures, kept = bench(tmp_path, *ALONE, "random", "multifd")
    numpy = {"numpy"} if native.records else set()
    assert ways(measures["random-tcp"]) == {"ours", "loop", "raw"} | numpy
    assert ways(measures["random-tcp-multifd2"]) == {"ours", "raw"} | numpy
    assert re.search(r"\d of 2 requirements met", said)

    page = kept.with_suffix(".html")
    text = page.read_text()
    assert text.count("<svg") == 2
    assert not re.search(r"https?://|<script|<link|src=", text)
    page.unlink()
    again = run("bench.py", "--report", kept)
    assert (again, page.read_text()) == (said, text)


def test_sizes(tmp_path):
    """Where it grows: the engine's memory, and the time."""
    _, measures, _ = bench(tmp_path, *ALONE, "memory", "slope")
    sides = {f"{role}, {size} MiB" for role in ("source", "destination") for size in (8, 64)}
    assert ways(measures["memory"]) == sides
    assert [x * 1024 for x, _ in measures["slope"]["curve"]["series"]["ours"]] == [8, 16, 32, 64]
    required = [c for m in measures.values() for c in m["checks"] if c["kind"] == "must"]
    assert len(required) == 3
    assert all(c["value"] is not None for c in required)


def test_curves(tmp_path):
    _, measures, _ = bench(tmp_path, "--scaling", "--size", "4M", "--qemu", "--only", "channels")
    for points in measures["channels"]["curve"]["series"].values():
        assert [x for x, _ in points] == [1, 2, 4, 8]


def test_profile():
    said = run("profiling.py", "--size", "8M", "--runs", 1, "--multifd", 1)
    for thread in ("whimbrel-migration", "whimbrel-incoming", "whimbrel-multifd-0"):
        assert f"thread {thread}:" in said


@pytest.mark.interop
def test_beside_a_qemu(tmp_path, qemu_binaries: QemuBinaries):
    qemu_binaries.find("7.2")
    names = ("random", "multifd", "xbzrle", "downtime")
    said, measures, _ = bench(
        tmp_path, "--size", "32M", "--qemu", "7.2", "--channel", "unix", "--only", *names
    )
    assert len(measures) == 4
    for measure in measures.values():
        assert {"ours", "QEMU 7.2"} <= ways(measure)
    assert "ours / QEMU 7.2" in said
