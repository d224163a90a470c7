"""The fuzz targets take all their seeds, and what they are there to notice they notice."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from whimbrel.errors import StreamError

FUZZ = Path(__file__).parents[2] / "fuzz"
NAMES = ("stream", "vmdescription", "vmstate", "qmp", "zstd", "block", "rdma")


@pytest.fixture
def fuzz(monkeypatch):
    """Imports a module of the folder, which is no package: its scripts are run from there."""
    monkeypatch.syspath_prepend(str(FUZZ))
    return importlib.import_module


@pytest.mark.parametrize("name", NAMES)
def test_all_seeds_and_regressions(fuzz, name):
    target = fuzz("targets").TARGETS[name]
    seeds = list(fuzz("seeds").seeds(name))
    assert len(seeds) > 3
    for data in seeds:
        target(data)


def test_each_regression_belongs_to_a_target(fuzz):
    folders = [path.name for path in fuzz("seeds").REGRESSIONS.iterdir()]
    assert set(folders) <= set(NAMES) == set(fuzz("targets").TARGETS)
    assert set(fuzz("run").TARGETS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_that_is_none_of_ours_is_noticed(fuzz, monkeypatch, name):
    targets = fuzz("targets")

    def broken(*_, **__):
        raise KeyError("bug")

    monkeypatch.setattr(targets, "load_app", broken)
    monkeypatch.setattr(targets.vmdesc, "parse", broken)
    monkeypatch.setattr(targets.wd, "decode", broken)
    monkeypatch.setattr(targets.Session, "receive", broken)
    monkeypatch.setattr(targets.PLUGINS, "filter", broken)
    monkeypatch.setattr(targets.codec, "read_record", broken)
    monkeypatch.setattr(targets.protocol, "decode_message", broken)
    with pytest.raises(KeyError):
        targets.TARGETS[name](b"\3{}")


def test_a_device_that_was_refused_and_changed_is_noticed(fuzz, monkeypatch):
    targets = fuzz("targets")

    def careless(obj, payload, version):
        obj.big = 1
        raise StreamError("refused")

    monkeypatch.setattr(targets.wd, "decode", careless)
    with pytest.raises(AssertionError, match="changed all the same"):
        targets.vmstate(b"\3")


def test_without_atheris_it_says_where_there_is_one(fuzz, monkeypatch):
    run = fuzz("run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match="needs atheris.*wheel for Python 3.11 to 3.13") as caught:
        run.main()
    assert caught.value.code not in (0, None)


def test_under_atheris(tmp_path):
    """The real thing, for a hundred inputs: what is imported is instrumented, and coverage guides it."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    done = subprocess.run(
        [sys.executable, FUZZ / "fuzz.py", "vmstate", "-runs=100", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Instrumenting whimbrel_device.layout" in done.stderr
    assert "Done 100 runs" in done.stderr
